"""Interface between clustering methods and the rest of the package.

A method is a module with a `training_step`, a `fit` and a `predict_proba`. The training loop and the stages know only
what is declared here. What only some methods can do are protocols that callers ask for with `isinstance`.
"""

from __future__ import annotations

import copy
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Protocol, Self, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from rayclust import distributed
from rayclust.errors import DataError
from rayclust.methods.settings import BaseMethodConfig, Plan

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Pairing:
    """Views of a row that a method's batches hold."""

    columns: int = 0
    """Nearest neighbours from which one is drawn each time; 0 asks for the rows alone."""
    noise: float = 0.0
    """Standard deviation of Gaussian noise on each value."""
    repeats: int = 1
    """Views drawn of the row and of its neighbour, each with its own noise."""
    own_neighbors: bool = False
    """Whether each space draws among its own neighbours; otherwise those of the first space stand in all."""
    epoch_order: Callable[[int], Tensor | None] | None = None
    """Returns the rows of an epoch in order, Int64[N], with repeats and gaps. None, for all epochs or returned for one,
    visits every row once, in random order."""


@dataclass(frozen=True)
class Batch:
    """One worker's part of a batch."""

    views: dict[str, Tensor]
    """Float[V B D] by space. View 0 is the rows themselves, view 1 one neighbour of each; V is 1 without pairs."""
    rows: Tensor
    """Int64[B], the rows' numbers."""
    step: int
    """Optimiser steps done before this one."""
    epoch: int
    """From 0."""
    weight: float = 1.0
    """W·B / batch size: a mean over workers weighted by it is a mean over the rows of the batch."""
    part: int = 0
    """Number of the part of the worker's rows that this is, of `parts`."""
    parts: int = 1

    @property
    def x(self) -> Tensor:
        """Float[V B D], the views of the only space.

        Raises:
            ValueError: there are several spaces.
        """
        (only,) = self.views.values()
        return only

    def split(self, parts: int) -> Iterator[Batch]:
        """Yield every `parts`-th of the rows, whose weighted losses add up to that of the batch."""
        for part in range(parts):
            views = {space: x[:, part::parts] for space, x in self.views.items()}
            rows = self.rows[part::parts]
            weight = self.weight * len(rows) / len(self.rows)
            yield replace(self, views=views, rows=rows, weight=weight, part=part, parts=parts)

    def own(self, whole: Tensor) -> Tensor:
        """Return these rows' part of a tensor that was drawn for the batch of all workers, on the rows' device."""
        group = distributed.data_group()
        drawn = whole[group.rank :: group.size][self.part :: self.parts]
        return drawn.to(next(iter(self.views.values())).device)


class Rows(Protocol):
    """The rows of a run as a worker sees them: in one space, or in several.

    Without the name of a space rows come with all of them side by side: each space's features as unit rows divided by
    √S, so that the cosine of two rows is the mean of their cosines in the S spaces.
    """

    count: int
    """N."""
    dimension: int
    """D, of all spaces side by side."""
    spaces: tuple[str, ...]
    """Names of the spaces, in order; `EMBEDDINGS` in a run with one encoder."""
    dimensions: dict[str, int]
    """D of each space."""

    def tensor(self, space: str | None = None) -> Tensor:
        """Return all rows, Float[N D]: the features of one space, or all spaces side by side."""

    def blocks(self, space: str | None = None) -> Iterator[Tensor]:
        """Yield this worker's share of the rows as Float[B D]s; each row belongs to exactly one worker.

        Blocks of all spaces hold the same rows.
        """

    def neighbors(self) -> Tensor:
        """Return Int[N M], the numbers of each row's nearest others, nearest first, −1 behind the last one."""

    def members(self) -> Sequence[Tensor] | None:
        """Return other partitions of the rows; None if none were named.

        Each is Int[N], −1 where it has no opinion, or Float[N K], probabilities.
        """
        return None


def as_member(values: NDArray[Any]) -> Tensor:
    """Return a partition as `Rows.members` has it: Int64[N] labels, −1 for no opinion; or Float[N K] as it is.

    Args:
        values: [N] labels of any kind, where None, NaN, −1 and whole numbers below are no opinion; or [N K]
            probabilities. Whole numbers are kept, unless they are far more than rows.

    Raises:
        DataError: probabilities are not finite numbers.
    """
    if values.ndim != 1:
        if values.dtype.kind not in "fiub" or not np.isfinite(values).all():
            raise DataError(f"members: [N K] of {values.dtype} with values that are no probabilities")
        return torch.from_numpy(values.astype(np.float32))
    if values.dtype.kind in "iu":
        known = values >= 0
        if int(values.max(initial=0)) < 2 * len(values):
            return torch.from_numpy(np.where(known, values, -1).astype(np.int64))
    else:
        known = np.array([value is not None and value == value and value != -1 for value in values.tolist()], bool)
    codes = np.full(len(values), -1, dtype=np.int64)
    codes[known] = np.unique(values[known].astype(str), return_inverse=True)[1]
    return torch.from_numpy(codes)


def blocks_on(rows: Rows, device: torch.device) -> Iterator[Tensor]:
    """Yield a worker's share of the rows on a device, Float[B D]s; an empty one if it has none.

    With more workers than rows the others still wait for this one's sums.
    """
    empty = True
    for block in rows.blocks():
        yield block.to(device)
        empty = False
    if empty:
        yield torch.zeros((0, rows.dimension), device=device)


class CheckpointStore(Protocol):
    """Keeps checkpoints of one training."""

    def save(self, step: int, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        """Store a checkpoint; called by every worker at the same step with equal content, so that the first may write.

        Args:
            step: steps done.
            tensors: on the CPU, contiguous, sharing no memory with the training.
            state: JSON.
        """

    def latest(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """Return the newest whole checkpoint, the same on every worker, or None."""


@dataclass(frozen=True)
class CheckpointInterval:
    """Time between two checkpoints, by whichever count comes first; the end of a training is always kept."""

    epochs: int | None = 1
    """Epochs between two; None does not count them."""
    seconds: float | None = None
    """Seconds between two, looked at every few steps; None has no clock."""


class BaseTrainer:
    """Metrics and checkpoints of a fit, also of methods that fit themselves; a subclass adds the fit by gradient.

    Args:
        seed: of order, neighbours and all other chance.
        device: where the method and its batches live.
        on_row: takes each epoch's row of metrics, on every worker.
        store: keeps checkpoints; None keeps none.
        every: when checkpoints are due.
    """

    def __init__(
        self,
        seed: int,
        device: torch.device | str = "cpu",
        on_row: Callable[[dict[str, Any]], None] | None = None,
        store: CheckpointStore | None = None,
        every: CheckpointInterval | None = None,
    ) -> None:
        self.seed, self.device = seed, torch.device(device)
        self.store, self.every = store, every or CheckpointInterval()
        self.history: list[dict[str, Any]] = []
        """Every row reported so far, those before a resume included."""
        self._on_row = on_row
        self._seconds_before, self._started = 0.0, time.monotonic()
        self._saved = self._started

    def fit(self, method: Method, data: Rows | Mapping[str, Rows], start: Callable[[], None] | None = None) -> None:
        """Run all steps of the method's plan.

        Args:
            method: to be trained.
            data: the rows, or those of each space by its name.
            start: called before the first step, and not on a resume.
        """
        raise NotImplementedError

    def without_checkpoints(self) -> Self:
        """Return one that shares its metrics and keeps no checkpoints, for a training of seconds within a fit."""
        other = copy.copy(self)
        other.store = None
        return other

    def report(self, row: dict[str, Any]) -> None:
        """Record one row of metrics: numbers, and lists of numbers."""
        self.history.append(row)
        logger.debug("epoch %d, step %d: loss %.4g, %.1f s", row["epoch"], row["step"], row["loss"], row["seconds"])
        if self._on_row is not None:
            self._on_row(row)

    def seconds(self) -> float:
        """Return the seconds of this fit so far, those before a resume included."""
        return self._seconds_before + time.monotonic() - self._started

    def is_due(self, epochs: int | None) -> bool:
        """Return whether a checkpoint is due; called by all workers together.

        Args:
            epochs: done so far; None within an epoch.
        """
        if self.store is None:
            return False
        if epochs is not None and self.every.epochs is not None and epochs % self.every.epochs == 0:
            return True
        if self.every.seconds is None:
            return False
        everyone = distributed.world()
        due = everyone.rank == 0 and time.monotonic() - self._saved >= self.every.seconds  # one clock for all
        return bool(everyone.all_reduce(torch.tensor(int(due), device=self.device)))

    def save(self, step: int, tensors: dict[str, Tensor], **state: Any) -> None:
        """Save a checkpoint with history and seconds; called by all workers with equal content.

        Args:
            step: steps done.
            tensors: on any device; copied.
            state: JSON.
        """
        if self.store is None:
            return
        copies = {name: x.detach().to("cpu", copy=True).contiguous() for name, x in tensors.items()}
        self.store.save(step, copies, {**state, "step": step, "seconds": self.seconds(), "history": self.history})
        self._saved = time.monotonic()

    def restore(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """Return the newest checkpoint's tensors and state, if any, and restore its history and seconds."""
        checkpoint = self.store.latest() if self.store is not None else None
        self._started = self._saved = time.monotonic()
        if checkpoint is not None:
            self._seconds_before = float(checkpoint[1]["seconds"])
            self.history[:] = checkpoint[1]["history"]
        return checkpoint


@dataclass(frozen=True)
class MethodState:
    """A fitted method as data; `methods.load` makes a method of it."""

    settings: dict[str, Any]
    """JSON: `config`, `dimension` and `count`."""
    tensors: dict[str, Tensor]
    """On the CPU, contiguous, without pickles."""


class Method(nn.Module):
    """A clustering method.

    Args:
        config: the settings.
        dimension: D, the width of the rows; of each space by its name where `spaces` is None.
        count: N, the rows of all workers.
        seed: of everything random in the method.
    """

    spaces: ClassVar[int | None] = 1
    """Number of spaces in a batch. With None batches and `predict_proba` have each of the run's spaces by its name,
    and the method is built from their widths; else the spaces come side by side as one, called `EMBEDDINGS`."""
    config_type: ClassVar[type[BaseMethodConfig]]
    """Class of its config."""

    kept: ClassVar[tuple[str, ...]] = ("",)
    """Prefixes of the tensors of its `state_dict` that a fitted method holds; by default all."""

    config: BaseMethodConfig
    plan: Plan
    """Set by methods that are trained by gradient."""
    pairing: Pairing = Pairing()
    parts: int = 1
    """Parts of a worker's batch that go through `training_step` one after another, each with its own loss, before the
    optimiser's step."""
    scales_loss: bool = False
    """Whether gradients are in fp16, so that the loss is scaled before backward."""
    stop: bool = False
    """Set by `on_epoch_end` to end the training; the same on every worker, and kept in checkpoints by the loop."""

    def __init__(self, config: BaseMethodConfig, dimension: Any, count: int, seed: int) -> None:
        super().__init__()
        self.config, self.dimension, self.count, self.seed = config, dimension, count, seed

    @property
    def device(self) -> torch.device:
        """Device of its parameters and buffers; the CPU if it has none."""
        return next((tensor.device for tensor in self.state_dict().values()), torch.device("cpu"))

    def training_step(self, batch: Batch) -> dict[str, Tensor]:
        """Compute the loss of one worker's part of a batch.

        Args:
            batch: of `spaces` spaces, with the views that `pairing` asks for.

        Returns:
            "loss": Float[], minimised, a mean over the part's rows; every other entry is a metric of any shape.
        """
        raise NotImplementedError

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Return the trainable parameters in groups for the optimiser.

        Each group is a dict with these keys, all but the first optional:

        - `params`: list of parameters.
        - `lr_scale`: factor on the learning rate; 1 by default.
        - `constant_lr`: whether the rate is the peak in every step, in place of the schedule; False by default.
        - `weight_decay`: at the first step; the config's by default. 0 also exempts from LARS' adaptive rates.
        - `final_weight_decay`: at the end of a cosine; by default the config's, or `weight_decay` where that is given.
        - `stacked`: whether each index of axis 0 is a layer with norms of its own (LARS); False by default.
        - `frozen_epochs`: epochs at the start in which the group is not trained; 0 by default.
        - `betas`: Adam's; (0.9, 0.999) by default.

        By default matrices decay, and parameters with one axis or none do not.
        """
        groups: list[dict[str, Any]] = [{"params": []}, {"params": [], "stacked": True}]
        groups.append({"params": [], "weight_decay": 0.0})
        for parameter in self.parameters():
            if parameter.requires_grad:
                groups[2 if parameter.dim() < 2 else int(parameter.dim() > 2)]["params"].append(parameter)
        return [group for group in groups if group["params"]]

    def on_step_end(self, step: int) -> None:
        """Run after the optimiser's step number `step`, from 0."""

    def on_epoch_end(self, metrics: dict[str, Tensor]) -> dict[str, Any]:
        """Run after each epoch; may set `stop`.

        Args:
            metrics: means of `training_step`'s entries over all rows and workers; of all heads, for `HeadParallel`.

        Returns:
            More for the epoch's row of metrics: numbers or lists of numbers; by default all but the loss.
        """
        return {name: value.tolist() for name, value in metrics.items() if name != "loss"}

    def predict_proba(self, x: Any) -> Tensor:
        """Return probabilities of the clusters, Float[B K]; rows sum to 1.

        Args:
            x: Float[B D]; where `spaces` is None a dict of them by space.
        """
        raise NotImplementedError

    def predict_rows(self, rows: Rows) -> Iterator[Tensor]:
        """Yield probabilities of this worker's rows, Float[B K], block by block, on the method's device."""
        if self.spaces is not None:
            for block in rows.blocks():
                yield self.predict_proba(block.to(self.device))
            return
        for blocks in zip(*(rows.blocks(space) for space in rows.spaces), strict=True):
            yield self.predict_proba({space: x.to(self.device) for space, x in zip(rows.spaces, blocks, strict=True)})

    def fit(self, rows: Rows, trainer: BaseTrainer) -> None:
        """Fit the method to the rows; by gradient unless overridden.

        Args:
            rows: all workers'.
            trainer: runs the steps, and takes metrics and checkpoints.
        """
        trainer.fit(self, rows)

    def state(self) -> MethodState:
        """Return the fitted method as data."""
        config = self.config.model_dump(mode="json")
        tensors = {n: x.detach().cpu().clone() for n, x in self.state_dict().items() if n.startswith(self.kept)}
        return MethodState({"config": config, "dimension": self.dimension, "count": self.count}, tensors)

    def load_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Load the tensors of a state, which may be taken out of the dict.

        Raises:
            ValueError: one that `kept` names is missing, or there are others.
        """
        found = self.load_state_dict(tensors, strict=False)
        missing = [name for name in found.missing_keys if name.startswith(self.kept)]
        if missing or found.unexpected_keys:
            raise ValueError(f"tensors missing: {missing}, unknown: {found.unexpected_keys}")


@runtime_checkable
class Transform(Protocol):
    """A method that learns a space of its own."""

    width: int
    """d, the width of its rows."""

    def transform(self, x: Tensor) -> Tensor:
        """Map rows into the method's space: Float[B D] to unit rows Float[B d]."""


@runtime_checkable
class Membership(Protocol):
    """A method with a soft membership of pairs."""

    def membership(self, x: Tensor) -> Tensor:
        """Return which rows belong together: Float[B D] to Float[B B], doubly stochastic."""


@runtime_checkable
class Recuttable(Protocol):
    """A method whose fit serves other numbers of clusters."""

    def recut(self, clusters: int, seed: int | None = None) -> Method:
        """Return the fitted method with another number of clusters, at most those it was fitted for.

        Args:
            clusters: K.
            seed: of the partition; None takes that of the fit.

        Raises:
            ConfigError: it was fitted for fewer.
        """


@runtime_checkable
class ManyHeads(Protocol):
    """A method whose fitted state may hold several heads."""

    def predict_heads(self, x: Tensor) -> Tensor:
        """Return the most probable cluster by each head: Float[B D] to Int64[H B]."""


@runtime_checkable
class RowTable(Protocol):
    """A method that knows more of the rows that it was fitted to than their clusters, until it is stored."""

    row_table: dict[str, Tensor]
    """Columns [N], in the order of the fitted rows; set by a fit."""


@runtime_checkable
class Prototypes(Protocol):
    """A method with a vector for each cluster."""

    def prototypes(self) -> Tensor:
        """Return unit rows Float[K d], near each other where clusters are alike; d is the method's own."""


@runtime_checkable
class HeadParallel(Protocol):
    """A method of which each worker may hold some of the heads; tensors have the heads along axis 0."""

    def gather_state(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return tensors of all heads; called by all workers together.

        Args:
            tensors: a part of this worker's state, of its optimiser's state, or of the metrics of an epoch, by name.
        """

    def shard_state(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return this worker's part of what `gather_state` gave."""
