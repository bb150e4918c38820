"""Training loop over any method, on one worker or many, that can be killed and resumed.

Optimisers and schedules come first, then the single step, then the trainer with its epochs and checkpoints.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from rayclust import distributed
from rayclust.errors import ArtefactError, ConfigError, RayclustError
from rayclust.methods import build_for
from rayclust.methods.base import BaseTrainer, Batch, HeadParallel, Method, Rows
from rayclust.methods.settings import BaseMethodConfig, TrainedConfig, cosine_schedule
from rayclust.training.sampling import STEP_STREAM, ArrayRows, RowSource, derive_seed

logger = logging.getLogger(__name__)

CLOCK_STEPS = 20
"""Steps between two looks at the clock for a checkpoint."""
LOSS_SCALE, LOSS_SCALE_STEPS = 2.0**12, 2_000
"""Initial factor on the loss of fp16 gradients; doubles after so many finite steps, halves after another one."""
SCALE_KEYS = ("scale", "_growth_tracker")
"""What changes in the state of a `GradScaler`, which is empty where the loss is not scaled."""
METHOD, OPTIMIZER, SUMS = "method.", "optimizer.", "sums."
"""Prefixes of tensors in a checkpoint."""


class Lars(torch.optim.Optimizer):
    """Layer-wise adaptive rates with momentum.

    Groups with `adapts` scale each step by η·‖w‖/‖g‖; in groups with `stacked` each index of axis 0 is a layer with
    norms of its own.

    Args:
        groups: of parameters.
        momentum: of the velocity.
        trust: η.

    Source: arXiv 1708.03888, algorithm 1.
    """

    def __init__(self, groups: Iterable[dict[str, Any]], momentum: float = 0.9, trust: float = 0.001) -> None:
        defaults = {"lr": 0.0, "weight_decay": 0.0, "momentum": momentum, "trust": trust}
        super().__init__(groups, {**defaults, "adapts": True, "stacked": False})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Take one step for every parameter that has a gradient."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state, gradient = self.state[parameter], parameter.grad
                if group["adapts"]:
                    # Local rate η·‖w‖/‖g‖ of each layer, 1 where either is zero.
                    gradient = gradient + group["weight_decay"] * parameter
                    axes = tuple(range(int(group["stacked"]), parameter.dim()))
                    length = torch.linalg.vector_norm(parameter, dim=axes, keepdim=True)
                    slope = torch.linalg.vector_norm(gradient, dim=axes, keepdim=True)
                    ratio = group["trust"] * length / slope
                    gradient = gradient * torch.where((length > 0) & (slope > 0), ratio, torch.ones_like(ratio))
                if "momentum_buffer" not in state:
                    state["momentum_buffer"] = torch.zeros_like(parameter)
                velocity: Tensor = state["momentum_buffer"]
                velocity.mul_(group["momentum"]).add_(gradient)
                parameter.add_(velocity, alpha=-group["lr"])


def build_optimizer(groups: Iterable[Mapping[str, Any]], config: TrainedConfig) -> torch.optim.Optimizer:
    """Build the config's optimiser over a method's parameter groups.

    Args:
        groups: as `Method.parameter_groups` returns them.
        config: the optimiser's name, and the weight decay of groups that don't give their own.

    Returns:
        An optimiser whose groups hold all keys of `Method.parameter_groups`, the decay at the start as `initial_decay`;
        learning rate and weight decay are set before every step.
    """
    filled = []
    for group in groups:
        decay = group.get("weight_decay", config.weight_decay)
        final = config.final_weight_decay if "weight_decay" not in group else decay
        filled.append(
            {
                "params": group["params"],
                "lr_scale": group.get("lr_scale", 1.0),
                "constant_lr": group.get("constant_lr", False),
                "initial_decay": decay,
                "final_decay": group.get("final_weight_decay", final),
                "stacked": group.get("stacked", False),
                "frozen_epochs": group.get("frozen_epochs", 0),
                "betas": group.get("betas", (0.9, 0.999)),
                "adapts": group.get("weight_decay") != 0,
            }
        )
    if config.optimizer == "sgd":
        return torch.optim.SGD(filled, lr=0.0, momentum=0.9, fused=True)
    if config.optimizer == "lars":
        return Lars(filled)
    return torch.optim.AdamW(filled, lr=0.0, weight_decay=0.0, fused=True)  # one pass over memory


class Stepper:
    """Optimiser steps on a method, with gradients averaged over the workers.

    Args:
        method: on its device; has a plan.

    Raises:
        ConfigError: the method is not trained by gradient, or a batch has too few rows for the workers.
    """

    def __init__(self, method: Method) -> None:
        if not isinstance(method.config, TrainedConfig):
            raise ConfigError(f"method = {type(method).__name__}: is not trained by gradient")
        self.method, self.config, self.plan = method, method.config, method.plan
        workers, size = distributed.data_group().size, self.plan.batch_size
        if size < workers:
            raise ConfigError(f"workers = {workers}: a batch has only {size} rows, use no more workers")
        if size // workers < method.parts:
            raise ConfigError(
                f"method.accumulation = {method.parts}: a batch of {size} has only {size // workers} rows for each of "
                f"{workers} workers"
            )
        self.optimizer = build_optimizer(method.parameter_groups(), self.config)
        names = {id(parameter): name for name, parameter in method.named_parameters()}
        self._parameters = {names[id(p)]: p for group in self.optimizer.param_groups for p in group["params"]}
        device = next(iter(self._parameters.values())).device.type
        self._scaler = torch.amp.GradScaler(
            device, LOSS_SCALE, growth_interval=LOSS_SCALE_STEPS, enabled=method.scales_loss
        )

    def step(self, batch: Batch) -> dict[str, Tensor]:
        """Take one step: loss, gradients over all workers, optimiser, and the method's `on_step_end`.

        Returns:
            What `Method.training_step` gives, detached.
        """
        rate = self.config.rate_at(batch.step, self.plan)
        peak, _ = self.config.rates_for(self.plan.batch_size)
        for group in self.optimizer.param_groups:
            decays = group["initial_decay"], group["final_decay"]
            group["lr"] = (peak if group["constant_lr"] else rate) * group["lr_scale"]
            group["weight_decay"] = cosine_schedule(*decays, batch.step, self.plan.steps)
        self.optimizer.zero_grad(set_to_none=True)
        means: dict[str, Tensor] = {}
        for part in batch.split(self.method.parts) if self.method.parts > 1 else (batch,):
            metrics = self.method.training_step(part)
            self._scaler.scale(metrics["loss"] * part.weight).backward()  # type: ignore[no-untyped-call]
            share = part.weight / batch.weight
            for name, value in metrics.items():
                means[name] = means[name] + share * value.detach() if name in means else share * value.detach()
        distributed.average_gradients(self._parameters.values())
        self._scaler.unscale_(self.optimizer)
        if self.config.clip_norm is not None:
            nn.utils.clip_grad_norm_(self._parameters.values(), self.config.clip_norm)
        for group in self.optimizer.param_groups:
            if batch.epoch < group["frozen_epochs"]:
                for parameter in group["params"]:
                    parameter.grad = None
        self._scaler.step(self.optimizer)
        self._scaler.update()
        self.method.on_step_end(batch.step)
        return means

    def state(self) -> dict[str, Tensor]:
        """Return each parameter's state as "parameter.key" and the loss scale, if any; numbers become float64."""
        scale = self._scaler.state_dict()
        state = {f"loss_scale.{key}": torch.tensor(scale[key], dtype=torch.float64) for key in SCALE_KEYS if scale}
        for name, parameter in self._parameters.items():
            for key, value in self.optimizer.state.get(parameter, {}).items():
                if value is not None:
                    as_tensor = value if isinstance(value, Tensor) else torch.tensor(value, dtype=torch.float64)
                    state[f"{name}.{key}"] = as_tensor
        return state

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Take back what `state` gave.

        Raises:
            ArtefactError: it is of other parameters.
        """
        scale, positions = self._scaler.state_dict(), {name: n for n, name in enumerate(self._parameters)}
        nested: dict[int, dict[str, Tensor]] = {}
        for full, value in state.items():
            name, _, key = full.rpartition(".")
            parameter = self._parameters.get(name)
            if name == "loss_scale" and key in scale:
                scale[key] = type(scale[key])(value.item())
            elif parameter is None or (value.dim() and value.shape != parameter.shape):
                raise ArtefactError(f"checkpoint does not fit the optimizer at {full}: remove it or restore the config")
            else:
                nested.setdefault(positions[name], {})[key] = value
        self.optimizer.load_state_dict({"state": nested, "param_groups": self.optimizer.state_dict()["param_groups"]})
        self._scaler.load_state_dict(scale)


class Trainer(BaseTrainer):
    """Fits methods by gradient."""

    def fit(self, method: Method, data: Rows | Mapping[str, Rows], start: Callable[[], None] | None = None) -> None:
        """Run the steps of the method's plan, from the latest checkpoint if there is one.

        Args:
            method: moved to the trainer's device.
            data: the rows, or those of each space by its name.
            start: called before the first step of a training that is not resumed.

        Raises:
            ArtefactError: the checkpoint is of another method.
            ConfigError: the method has no plan, or there are more workers than rows in a batch.
            RayclustError: the loss is no longer a finite number.
        """
        devices = [self.device] if self.device.type == "cuda" else []
        rank = distributed.data_group().rank
        with torch.random.fork_rng(devices=devices):
            stepper = Stepper(method.to(self.device))
            plan, dtype = stepper.plan, next(method.parameters()).dtype
            each = method.spaces is None
            source = RowSource(data, method.pairing, self.seed, self.device, dtype, each=each)
            sums: dict[str, Tensor] = {}
            step = self._resume(stepper, sums)
            batches = source.batches(plan, rank, step or 0)
            if step is None and start is not None:
                start()
                self._started = self._saved = time.monotonic()
            logger.info("training: %d steps of %d rows from step %d", plan.steps, plan.batch_size, step or 0)
            method.train()
            for batch in () if method.stop else batches:
                torch.manual_seed(derive_seed(self.seed, STEP_STREAM, batch.step, rank))
                for name, value in stepper.step(batch).items():
                    if name not in sums:
                        sums[name] = torch.zeros_like(value, dtype=torch.float64)
                    sums[name].add_(value, alpha=batch.weight)
                step = batch.step + 1
                if step == plan.steps or step % plan.steps_per_epoch == 0:
                    self._end_epoch(stepper, batch.epoch, step, sums)
                    sums.clear()
                by_epochs = self.every.epochs is not None and step % plan.steps_per_epoch == 0
                by_clock = step % CLOCK_STEPS == 0 and self.is_due(None)
                if step == plan.steps or method.stop or by_clock or (by_epochs and self.is_due(batch.epoch + 1)):
                    self._save(stepper, step, sums)
                if method.stop:
                    break
            method.eval()

    def _end_epoch(self, stepper: Stepper, epoch: int, step: int, sums: dict[str, Tensor]) -> None:
        """Average the epoch's metrics over steps and workers, and report them."""
        method, plan = stepper.method, stepper.plan
        steps = step - epoch * plan.steps_per_epoch
        divisor = steps * distributed.data_group().size
        means = {name: distributed.all_reduce(sums[name]) / divisor for name in sorted(sums)}
        if isinstance(method, HeadParallel):
            means = method.gather_state(means)
        seconds, before = self.seconds(), float(self.history[-1]["seconds"]) if self.history else 0.0
        row = {"epoch": epoch, "step": step, "loss": float(means["loss"])}
        row["learning_rate"] = stepper.config.rate_at(step - 1, plan)
        row.update(method.on_epoch_end(means))
        row["rows_per_second"] = steps * plan.batch_size / max(seconds - before, 1e-9)
        row["seconds"] = seconds
        self.report(row)
        if not all(bool(mean.isfinite().all()) for mean in means.values()):
            raise RayclustError(
                f"training loss = {row['loss']} in epoch {epoch}: lower learning_rate or use precision: fp32"
            )

    def _save(self, stepper: Stepper, step: int, sums: dict[str, Tensor]) -> None:
        """Keep a training of all heads: the same content however workers divide it."""
        if self.store is None:
            return
        method = stepper.method
        tensors = {METHOD + name: value for name, value in method.state_dict().items()}
        tensors |= {OPTIMIZER + name: value for name, value in stepper.state().items()}
        tensors |= {SUMS + name: distributed.all_reduce(sums[name]) for name in sorted(sums)}
        if isinstance(method, HeadParallel):
            for name in sorted(tensors):  # one after another: all heads of all tensors may not fit on a worker
                prefix, _, own = name.partition(".")
                whole = method.gather_state({own: tensors[name].detach()})[own]
                tensors[f"{prefix}.{own}"] = whole.to("cpu")
        self.save(step, tensors, workers=distributed.data_group().size, stop=method.stop)

    def _resume(self, stepper: Stepper, sums: dict[str, Tensor]) -> int | None:
        """Put the newest checkpoint back, if any: method, optimiser and an unfinished epoch's sums; return its step."""
        checkpoint = self.restore()
        if checkpoint is None:
            return None
        tensors, state = checkpoint
        method = stepper.method

        def part(prefix: str) -> dict[str, Tensor]:
            """Return this worker's tensors with a prefix."""
            found = {name.removeprefix(prefix): x for name, x in tensors.items() if name.startswith(prefix)}
            return method.shard_state(found) if isinstance(method, HeadParallel) else found

        try:
            method.load_state_dict(part(METHOD))
        except RuntimeError as error:
            reason = " ".join(str(error).split())
            raise ArtefactError(
                f"checkpoint does not fit the method: {reason}; remove it or restore the config"
            ) from error
        stepper.load(part(OPTIMIZER))
        method.stop = bool(state["stop"])
        if distributed.data_group().rank == 0:
            # Weights of W workers add up to W means: sums of more or fewer workers are scaled to this number.
            scale = distributed.data_group().size / state["workers"]
            sums.update({name: total.to(self.device) * scale for name, total in part(SUMS).items()})
        return int(state["step"])


def fit_arrays(
    x: Tensor | np.ndarray | Mapping[str, Tensor | np.ndarray],
    neighbors: Tensor | np.ndarray | None,
    config: BaseMethodConfig,
    seed: int = 0,
    device: torch.device | str = "cpu",
    *,
    members: Sequence[Tensor] | None = None,
) -> Method:
    """Build a method and fit it to rows in memory.

    Args:
        x: Float[N D], in feature space; or several by the names of their spaces.
        neighbors: Int[N M], nearest first, −1 where a row has fewer; None for a method that draws no pairs.
        config: the method's settings.
        seed: of everything random.
        device: where to compute.
        members: other partitions of the rows, for a method that takes them; see `Rows.members`.

    Returns:
        The fitted method, on `device`.

    Raises:
        ShapeError: an argument is not a matrix, or the two do not have one length.
        DataError: the method needs neighbours and there are none.
        ConfigError: there are fewer rows than clusters.
    """
    rows = ArrayRows(x, neighbors, members)
    method = build_for(rows, config, seed)
    method.fit(rows, Trainer(seed, device))
    return method.eval()
