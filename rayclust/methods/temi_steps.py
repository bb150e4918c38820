"""TEMI's training step written out for the CPU: head by head, each head's data used while it is in the cache.

One step does what autograd, AdamW and the moving average do in training/steps.py, in this order: all teachers (their
agreement weighs every head's pairs), p̂, and then for each head its student forward and back and at once its update.
Heads are shared out over threads.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from rayclust import collectives
from rayclust.kernels.adamw import AdamW, Slot, adamw
from rayclust.kernels.crew import Crew
from rayclust.methods.base import Batch
from rayclust.methods.engines import Engine, PlainEngine, Step, TileEngine
from rayclust.methods.heads import Heads, matmul_dtype

if TYPE_CHECKING:
    from rayclust.methods.temi import Temi

SLACK = 1.01
"""Logits in bf16 exceed |g|/τ by less than this factor."""
LEAST_WORK = 1e7
"""Operations of a head's forward pass below which one batched step of all heads is faster."""


def fits(method: Temi) -> bool:
    """Whether steps can be taken here: on the CPU, two plain layers, TEMI's own loss, AdamW, and all clusters."""
    config = method.config
    plain = config.layers == 2 and not (config.batch_norm or config.dropout or config.final_gelu)
    loss = config.loss == "temi" and not config.positive_pmi and config.repeats == 1
    descent = config.optimizer == "adamw" and config.clip_norm is None
    whole = method.grid.stack.size == 1
    return plain and loss and descent and whole and method.student.direction.device.type == "cpu"


def pays(method: Temi) -> bool:
    """Whether a head of this method is enough work for a thread of its own."""
    config = method.config
    widths = method.dimension + config.bottleneck
    return 4 * min(config.batch_size, method.count) * widths * config.hidden >= LEAST_WORK


def engine_for(method: Temi, crew: Crew) -> Engine:
    """Matrix tiles for bf16 where there are some, else torch alone."""
    student, teacher = method.student, method.teacher
    narrow = matmul_dtype(method.config.precision, student.direction)
    if narrow == torch.bfloat16 and TileEngine.fits(student):
        return TileEngine(student, teacher, crew)
    return PlainEngine(student, teacher, crew, narrow)


@dataclass
class _Parameter:
    """A stacked parameter of the student, and what AdamW keeps for it."""

    name: str
    value: nn.Parameter
    decays: bool
    mean: Tensor
    square: Tensor
    slots: list[Slot]
    """Each head's part, with its teacher's."""
    steps: int = 0


class FusedSteps:
    """See the module; the state has the names that `training.steps.GradientSteps` gives it.

    Args:
        method: for which `fits`.
    """

    def __init__(self, method: Temi) -> None:
        self.method, self.heads = method, method.student.shape.heads
        self._crew = Crew(min(torch.get_num_threads(), self.heads))
        self._engine = engine_for(method, self._crew)
        self._ordered = _parameters(method, self._engine)
        self._slots = {parameter.name: parameter.slots for parameter in self._ordered}
        self._gradients: dict[str, Tensor] = {}
        if collectives.world_size() > 1:
            self._gradients = {p.name: torch.zeros_like(p.value.data) for p in self._ordered}
        self._stale = True

    def take(self, batch: Batch, learning_rate: float, weight_decay: float) -> dict[str, Tensor]:
        """One whole step; see `Steps`."""
        if self._stale:
            self._engine.refresh()
            self._stale = False
        self._engine.take_in(batch.views)
        learns = self._learning(batch, learning_rate, weight_decay)
        step = self._step(batch, "direction" in learns)
        self._crew.each(lambda head, member: self._engine.teach(step, head, member), self.heads)
        self._settle(step.rows)
        self._crew.each(lambda head, member: self._learn(step, learns, head, member), self.heads)
        if self._gradients:
            self._gather(learns)
            self._crew.each(lambda head, member: self._update(learns, head), self.heads)
        exchange = self._engine.exchange
        losses, trust = exchange.losses / (2 * step.rows * step.scale), exchange.agreement[:, : step.rows]
        return self.method.told(losses, trust)

    def state(self) -> dict[str, Tensor]:
        """What AdamW keeps of each parameter that it has moved, as "position.key"."""
        state: dict[str, Tensor] = {}
        for position, parameter in enumerate(self._ordered):
            if parameter.steps:
                state[f"{position}.step"] = torch.tensor(float(parameter.steps))
                state[f"{position}.exp_avg"] = parameter.mean
                state[f"{position}.exp_avg_sq"] = parameter.square
        return state

    def load(self, state: dict[str, Tensor]) -> None:
        """Takes back what `state` gave."""
        for position, parameter in enumerate(self._ordered):
            known = f"{position}.step" in state
            parameter.steps = int(state[f"{position}.step"]) if known else 0
            for own, key in ((parameter.mean, "exp_avg"), (parameter.square, "exp_avg_sq")):
                own.copy_(state[f"{position}.{key}"]) if known else own.zero_()
        self._stale = True

    def _learning(self, batch: Batch, learning_rate: float, weight_decay: float) -> dict[str, AdamW]:
        """The optimiser's numbers for each parameter that this step trains."""
        frozen = {id(parameter) for parameter in self.method.frozen(batch)}
        follow = 1.0 - self.method.teacher_momentum(batch.step)
        learns = {}
        for parameter in self._ordered:
            # A frozen parameter's teacher is its equal: there is nothing to follow.
            if id(parameter.value) not in frozen:
                parameter.steps += 1
                decay = weight_decay if parameter.decays else 0.0
                learns[parameter.name] = AdamW(learning_rate, decay, parameter.steps, follow)
        return learns

    def _step(self, batch: Batch, last_learns: bool) -> Step:
        method, rows = self.method, batch.views.shape[1]
        factors = 1.0 / method.config.student_temperature, 1.0 / method.teacher_temperature(batch.epoch)
        bounds = _bounds(method.student, factors[0]), _bounds(method.teacher, factors[1])
        scale = batch.share / (collectives.world_size() * method.config.heads * 2 * rows)
        return Step(rows, method.config.beta, scale, factors, bounds, last_learns)

    def _settle(self, rows: int) -> None:
        """p̂ and the pairs' weights, once all teachers have answered."""
        exchange = self._engine.exchange
        exchange.log_marginal.copy_(self.method.marginal.take_in(exchange.sums, 2 * rows))
        exchange.weights[:rows] = self.method.pool(exchange.agreement[:, :rows])[0].clamp(max=1.0)

    def _learn(self, step: Step, learns: dict[str, AdamW], head: int, member: int) -> None:
        """One student forward and back, and its update unless other workers have a say in it."""
        gradients = self._engine.learn(step, head, member)
        for name, options in learns.items():
            if self._gradients:
                self._gradients[name][head].copy_(gradients[name])
            else:
                adamw(self._slots[name][head], gradients[name], options)

    def _gather(self, learns: dict[str, AdamW]) -> None:
        """The sum over workers of the gradients, in one exchange."""
        wanted = [self._gradients[name] for name in learns]
        total = collectives.all_sum(torch.cat([gradient.flatten() for gradient in wanted]))
        parts = torch.split(total, [gradient.numel() for gradient in wanted])
        for gradient, part in zip(wanted, parts, strict=True):
            gradient.copy_(part.view_as(gradient))

    def _update(self, learns: dict[str, AdamW], head: int) -> None:
        for name, options in learns.items():
            adamw(self._slots[name][head], self._gradients[name][head], options)


def _parameters(method: Temi, engine: Engine) -> list[_Parameter]:
    """The student's trainable parameters in the optimiser's order: those that decay, then the others."""
    followers = dict(method.teacher.named_parameters())
    parameters = []
    for name, value in method.student.named_parameters():
        if value.requires_grad:
            mean, square = torch.zeros_like(value.data), torch.zeros_like(value.data)
            stacked = zip(value.data, mean, square, followers[name].data, strict=True)
            slots = [Slot(a, b, c, d, engine.tiles(name, head)) for head, (a, b, c, d) in enumerate(stacked)]
            parameters.append(_Parameter(name, value, method.student.is_decayed(name), mean, square, slots))
    return sorted(parameters, key=lambda parameter: not parameter.decays)


def _bounds(heads: Heads, factor: float) -> list[float]:
    """What no logit of a head exceeds in size, over its temperature."""
    bounds: list[float] = (heads.scale.detach().abs().amax(1) * (factor * SLACK)).tolist()
    return bounds
