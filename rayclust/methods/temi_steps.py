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
from rayclust.kernels.heads import BLOCK, LANES, transpose
from rayclust.kernels.information import Logits, information, teacher_softmax
from rayclust.kernels.products import Shared
from rayclust.methods.base import Batch
from rayclust.methods.fused_head import Net, Room
from rayclust.methods.heads import Heads, matmul_dtype

if TYPE_CHECKING:
    from rayclust.methods.temi import Temi

SLACK = 1.01
"""Logits in bf16 exceed |g|/τ by less than this factor."""
LEAST_WORK = 1e7
"""Operations of a head's forward pass below which one batched step of all heads is faster."""


def fits(method: Temi) -> bool:
    """Whether this method's steps can be taken here: on the CPU, two plain layers, TEMI's own loss, and AdamW."""
    config, weight = method.config, method.student.direction
    plain = config.layers == 2 and not (config.batch_norm or config.dropout or config.final_gelu)
    aligned = config.hidden % LANES == 0 and config.bottleneck % LANES == 0
    loss = config.loss == "temi" and not config.positive_pmi and config.repeats == 1
    descent = config.optimizer == "adamw" and config.clip_norm is None
    return plain and loss and descent and weight.device.type == "cpu" and (aligned or _narrow(method) == weight.dtype)


def pays(method: Temi) -> bool:
    """Whether a head of this method is enough work for a thread of its own."""
    config = method.config
    widths = method.dimension + config.bottleneck
    return 4 * min(config.batch_size, method.count) * widths * config.hidden >= LEAST_WORK


def _narrow(method: Temi) -> torch.dtype:
    return matmul_dtype(method.config.precision, method.student.direction)


@dataclass
class _Parameter:
    """A stacked parameter of the student, its teacher, and what AdamW keeps for it."""

    name: str
    value: nn.Parameter
    follower: nn.Parameter
    decays: bool
    mean: Tensor
    square: Tensor
    copies: tuple[Tensor, Tensor] | None = None
    steps: int = 0

    def slots(self) -> list[Slot]:
        """Each head's part."""
        value, follower = self.value.data, self.follower.data
        slots = []
        for head in range(len(value)):
            copies = None if self.copies is None else (self.copies[0][head], self.copies[1][head])
            slots.append(Slot(value[head], self.mean[head], self.square[head], follower[head], copies))
        return slots

    def refresh(self) -> None:
        """Brings the copies up to date with parameters that others have set."""
        if self.copies is not None:
            self.copies[0].copy_(self.value.data)
            self.copies[1].copy_(self.follower.data)


@dataclass(frozen=True)
class _Step:
    """What the heads need to know of a step."""

    x: Shared
    """The batch, R×D: view 0, padding, view 1, padding."""
    xt: Shared
    """The same transposed."""
    rows: int
    """B."""
    factors: tuple[float, float]
    """1/τ of student and teacher."""
    bounds: tuple[list[float], list[float]]
    """What no logit of student and teacher exceeds, by head."""
    learns: dict[str, AdamW]
    """The optimiser's numbers for each parameter that this step trains."""
    scale: float
    """Of a column's part in the sum over workers that the gradient is of."""


class FusedSteps:
    """See the module; the state has the names that `training.steps.GradientSteps` gives it.

    Args:
        method: for which `fits`.
    """

    def __init__(self, method: Temi) -> None:
        self.method, self.shape = method, method.student.shape
        self._narrow, self._wide = _narrow(method), method.student.direction.dtype
        self._ordered = _parameters(method, self._narrow)
        self._parameters = {parameter.name: parameter for parameter in self._ordered}
        self._slots = {parameter.name: parameter.slots() for parameter in self._ordered}
        self._nets = [[self._net(head, teacher) for head in range(self.shape.heads)] for teacher in (False, True)]
        self._crew = Crew(min(torch.get_num_threads(), self.shape.heads))
        self._columns, self._stale = 0, True

    def take(self, batch: Batch, learning_rate: float, weight_decay: float) -> dict[str, Tensor]:
        """One whole step; see `Steps`."""
        self._make_room(batch.views.shape[1])
        if self._stale:
            for parameter in self._ordered:
                parameter.refresh()
            self._stale = False
        step = self._plan(batch, learning_rate, weight_decay)
        self._crew.each(lambda head, member: self._teach(step, head, member), self.shape.heads)
        self._settle(step.rows)
        self._crew.each(lambda head, member: self._learn(step, head, member), self.shape.heads)
        if collectives.world_size() > 1:
            self._gather(step.learns)
            self._crew.each(lambda head, member: self._update(step.learns, head), self.shape.heads)
        losses = self._losses / (2 * step.rows * step.scale)
        return {"loss": losses.mean(), "head_loss": losses}

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

    def _make_room(self, rows: int) -> None:
        """Memory for batches of `rows` rows; kept while that number stays."""
        columns = 2 * BLOCK * -(-rows // BLOCK)
        if columns == self._columns:
            return
        heads, clusters = self.shape.heads, self.shape.clusters

        def sums(*sizes: int) -> Tensor:
            return torch.empty(*sizes, dtype=self._wide)

        self._columns = columns
        self._x = torch.zeros(columns, self.shape.dimension, dtype=self._narrow)
        self._xt = torch.empty(self.shape.dimension, columns, dtype=self._narrow)
        self._packed: dict[int, Shared] = {}
        self._rooms = [Room(self.shape, columns, self._narrow, self._wide) for _ in range(self._crew.size)]
        self._students = torch.empty(self._crew.size, clusters, columns, dtype=self._narrow)
        self._teachers = torch.empty(heads, clusters, columns, dtype=self._narrow)
        self._normalizers, self._agreement = sums(heads, columns), sums(heads, columns // 2)
        self._sums, self._losses = sums(heads, clusters), sums(heads)
        self._gradients = {}
        if collectives.world_size() > 1:
            self._gradients = {name: torch.zeros_like(p.value.data) for name, p in self._parameters.items()}

    def _plan(self, batch: Batch, learning_rate: float, weight_decay: float) -> _Step:
        config, rows = self.method.config, batch.views.shape[1]
        self._x.view(2, -1, self.shape.dimension)[:, :rows].copy_(batch.views)
        self._crew.each(self._pack, 2)
        factors = 1.0 / config.student_temperature, 1.0 / self.method.teacher_temperature(batch.epoch)
        bounds = _bounds(self.method.student, factors[0]), _bounds(self.method.teacher, factors[1])
        frozen = {id(parameter) for parameter in self.method.frozen(batch)}
        follow = 1.0 - self.method.teacher_momentum(batch.step)
        learns = {}
        for parameter in self._ordered:
            # A frozen parameter's teacher is its equal: there is nothing to follow.
            if id(parameter.value) not in frozen:
                parameter.steps += 1
                decay = weight_decay if parameter.decays else 0.0
                learns[parameter.name] = AdamW(learning_rate, decay, parameter.steps, follow)
        scale = batch.share / (collectives.world_size() * self.shape.heads * 2 * rows)
        return _Step(self._packed[0], self._packed[1], rows, factors, bounds, learns, scale)

    def _pack(self, side: int, member: int) -> None:
        """Side 0: the batch; side 1: transposed."""
        if side:
            transpose(self._x, self._xt)
        self._packed[side] = Shared(self._xt if side else self._x, self.shape.hidden)

    def _net(self, head: int, teacher: bool) -> Net:
        heads = self.method.teacher if teacher else self.method.student
        matrices = []
        for i, weight in enumerate(heads.weights):
            copies = self._parameters[f"weights.{i}"].copies
            matrices.append(weight.data[head] if copies is None else copies[teacher][head])
        first, second = (bias.data[head] for bias in heads.biases)
        return Net(matrices[0], matrices[1], (first, second), (heads.direction.data[head], heads.scale.data[head]))

    def _teach(self, step: _Step, head: int, member: int) -> None:
        """One teacher's logits, and what the others need to know of them."""
        room, logits = self._rooms[member], Logits(self._teachers[head], step.bounds[1][head])
        room.forward(self._nets[1][head], step.x, step.factors[1], logits.values, learns=False)
        out = self._normalizers[head], self._sums[head], self._agreement[head]
        teacher_softmax(logits, room.terms, step.rows, out)

    def _settle(self, rows: int) -> None:
        """p̂ and the pairs' weights, once all teachers have answered."""
        self._log_marginal = self.method.marginal.take_in(self._sums, 2 * rows)
        self._weights = self._agreement.mean(0).clamp(max=1.0)
        self._weights[rows:] = 0.0

    def _learn(self, step: _Step, head: int, member: int) -> None:
        """One student forward and back, and its update unless other workers have a say in it."""
        room, net, factor = self._rooms[member], self._nets[0][head], step.factors[0]
        student = Logits(self._students[member], step.bounds[0][head])
        teacher = Logits(self._teachers[head], step.bounds[1][head])
        room.forward(net, step.x, factor, student.values, learns=True)
        known = self._normalizers[head], self._log_marginal[head], self._weights
        losses = self._losses[head : head + 1]
        information(student, teacher, room.terms, known, self.method.config.beta, step.scale, losses)
        gradients = room.backward(net, step.xt, factor, student.values, "direction" in step.learns)
        for name, options in step.learns.items():
            if self._gradients:
                self._gradients[name][head].copy_(gradients[name])
            else:
                adamw(self._slots[name][head], gradients[name], options)

    def _gather(self, learns: dict[str, AdamW]) -> None:
        """The sum over workers of the gradients, in one exchange."""
        wanted = [self._gradients[name] for name in learns]
        total = collectives.all_sum(torch.cat([gradient.flatten() for gradient in wanted]))
        for gradient, part in zip(wanted, torch.split(total, [gradient.numel() for gradient in wanted]), strict=True):
            gradient.copy_(part.view_as(gradient))

    def _update(self, learns: dict[str, AdamW], head: int) -> None:
        for name, options in learns.items():
            adamw(self._slots[name][head], self._gradients[name][head], options)


def _parameters(method: Temi, narrow: torch.dtype) -> list[_Parameter]:
    """The student's trainable parameters in the optimiser's order: those that decay, then the others."""
    followers = dict(method.teacher.named_parameters())
    parameters = []
    for name, value in method.student.named_parameters():
        if value.requires_grad:
            copies = None
            if name.startswith("weights.") and narrow != value.dtype:
                copies = torch.empty_like(value.data, dtype=narrow), torch.empty_like(value.data, dtype=narrow)
            zeros = torch.zeros_like(value.data), torch.zeros_like(value.data)
            decays = method.student.is_decayed(name)
            parameters.append(_Parameter(name, value, followers[name], decays, *zeros, copies))
    return sorted(parameters, key=lambda parameter: not parameter.decays)


def _bounds(heads: Heads, factor: float) -> list[float]:
    """What no logit of a head exceeds in size, over its temperature."""
    bounds: list[float] = (heads.scale.detach().abs().amax(1) * (factor * SLACK)).tolist()
    return bounds
