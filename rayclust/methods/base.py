"""What a clustering method is to the rest of the house.

A method is a module with `losses`, `assign`, `after_step` and `fit`. Whoever trains it knows only these; nothing
anywhere asks which method it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from rayclust.methods.configs import BaseMethodConfig, Plan, TrainedConfig

__all__ = [
    "FOREIGN",
    "NONE",
    "BaseMethodConfig",
    "Batch",
    "CheckpointStore",
    "Every",
    "Export",
    "Method",
    "Pairing",
    "Plan",
    "Rows",
    "Steps",
    "TrainedConfig",
    "Trainer",
]


NONE, FOREIGN = -1, -2
"""In place of a neighbour: there is none; another worker holds it."""


@dataclass(frozen=True)
class Batch:
    """This worker's share of a batch."""

    views: Tensor
    """Float[V B D]. View 0 is the rows themselves, view 1 one neighbour of each; V is 1 for a method without pairs."""
    rows: Tensor
    """Int[B], the rows' numbers."""
    step: int
    """Optimiser steps done before this one."""
    epoch: int
    """From 0."""
    share: float = 1.0
    """Workers × this worker's part of the batch's rows; a mean over workers weighted by it is one over rows."""
    crossed: Tensor | None = None
    """Float[], share of the rows whose neighbour drawn is with another worker, so that view 1 is another one; None
    where every worker holds all rows."""


class Rows(Protocol):
    """The rows of a run in feature space, as a worker sees them."""

    @property
    def count(self) -> int:
        """N, of all workers together."""

    @property
    def dimension(self) -> int:
        """D."""

    def owned(self) -> Tensor | None:
        """Int64[n], increasing: the numbers of the rows that this worker alone holds; None where each holds all N."""

    def tensor(self) -> Tensor:
        """Float[n D]: the rows that this worker holds, all N of them unless `owned` says which."""

    def blocks(self) -> Iterator[Tensor]:
        """Float[B D]s: this worker's share of the rows, each row with exactly one worker."""

    def neighbors(self) -> Tensor:
        """Int[n M]: each row's nearest others, nearest first, as places in `tensor`; −1 behind the last one where there
        are fewer than M, −2 for one that another worker holds.
        """


class CheckpointStore(Protocol):
    """Keeps checkpoints of one training."""

    def save(self, step: int, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        """Keeps a checkpoint; called by every worker at the same step with equal content, so that the first may write.

        Args:
            step: steps done.
            tensors: on the CPU, contiguous, sharing no memory with the training.
            state: JSON.
        """

    def latest(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """The newest whole checkpoint, the same on every worker, or None."""


@dataclass(frozen=True)
class Every:
    """When checkpoints are due: whichever comes first. The end of a training is always kept."""

    epochs: int | None = 1
    """Epochs between two; None does not count them."""
    seconds: float | None = None
    """Seconds between two, looked at every few steps; None has no clock."""


class Trainer(Protocol):
    """Who fits a method by gradient, and to whom a method that fits itself reports."""

    seed: int
    device: torch.device
    store: CheckpointStore | None
    every: Every

    def fit(self, method: Method, rows: Rows, start: Callable[[], None] | None = None) -> None:
        """Runs all steps of the method's plan; `start` is called before the first one, and not on a resume."""

    def report(self, row: dict[str, Any]) -> None:
        """Takes one row of metrics."""


@dataclass(frozen=True)
class Pairing:
    """What views of a row a method wants."""

    columns: int = 0
    """Nearest neighbours from which one is drawn each time; 0 asks for the rows alone."""
    noise: float = 0.0
    """Standard deviation of Gaussian noise on each value."""
    repeats: int = 1
    """Views drawn of the row and of its neighbour, each with its own noise."""


@dataclass(frozen=True)
class Export:
    """A fitted method as data: what `methods.load` turns back into a method that assigns."""

    settings: dict[str, Any]
    """JSON: the config, and what else `build` needs."""
    tensors: dict[str, Tensor]
    """The state, without pickles."""


class Steps(Protocol):
    """Takes optimiser steps on one method."""

    def take(self, batch: Batch, learning_rate: float, weight_decay: float) -> dict[str, Tensor]:
        """One whole step: losses, gradients over all workers, optimiser, and the method's `after_step`.

        Returns:
            What `Method.losses` gives, detached.
        """

    def state(self) -> dict[str, Tensor]:
        """The optimiser's state under flat names, enough to go on with the same bits."""

    def load(self, state: dict[str, Tensor]) -> None:
        """Takes back what `state` gave."""


class Method(nn.Module):
    """A clustering method. `plan` is set by those that are trained by gradient."""

    config: BaseMethodConfig
    plan: Plan
    pairing: Pairing = Pairing()
    refits_for_clusters: bool = True
    """Whether another number of clusters needs another fit; where not, `repartition` serves."""
    finished_early: bool = False
    """Whether training is to end with this epoch; looked at after each, and the same on every worker."""
    own_space: int | None = None
    """Width of the rows that `represent` gives; None for a method without a space of its own."""

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        """The loss of this worker's share and what else to watch.

        Returns:
            "loss": Float[], minimised, a mean over the share's rows; every other entry is a metric of any shape.
        """
        raise NotImplementedError

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """`losses`, under the name by which data-parallel wrappers call it."""
        return self.losses(batch)

    def assign(self, x: Tensor) -> Tensor:
        """Probabilities of the clusters: Float[B D] to Float[B K], rows sum to 1."""
        raise NotImplementedError

    def represent(self, x: Tensor) -> Tensor:
        """Rows in the method's own space: Float[B D] to unit rows Float[B d], d = `own_space`."""
        raise NotImplementedError

    def membership(self, x: Tensor) -> Tensor | None:
        """Which rows belong together: Float[B D] to Float[B B], doubly stochastic; None for methods without a Π."""
        return None

    def prototypes(self) -> Tensor | None:
        """A unit row for each cluster, near each other where clusters are alike: Float[K d], d the method's own.

        None for a method without any.
        """
        return None

    def repartition(self, clusters: int, seed: int | None = None) -> Method:
        """This fitted method with another number of clusters, at most those it was fitted for, without another fit.

        Args:
            clusters: K.
            seed: of the partition; None takes that of the fit.

        Raises:
            ConfigError: it was fitted for fewer.
        """
        raise NotImplementedError

    def fit(self, rows: Rows, trainer: Trainer) -> None:
        """Fits the method to the rows; by gradient unless a method knows better."""
        trainer.fit(self, rows)

    def own_steps(self) -> Steps | None:
        """A faster way to take this method's steps than autograd, where there is one on the parameters' device."""
        return None

    def frozen(self, batch: Batch) -> list[nn.Parameter]:
        """Parameters that this step's optimiser passes over."""
        return []

    def is_decayed(self, name: str, parameter: nn.Parameter) -> bool:
        """Whether weight decay acts on a parameter: on those with two axes or more."""
        return parameter.dim() > 1

    def is_stacked(self, name: str, parameter: nn.Parameter) -> bool:
        """Whether a parameter is one layer per first index, each with norms of its own: where it has three axes."""
        return parameter.dim() > 2

    def after_step(self, step: int) -> None:
        """Called after the optimiser's step number `step`, from 0."""

    def after_epoch(self, means: dict[str, Tensor]) -> dict[str, Any]:
        """Called after each epoch with the means of what `losses` gave, over all rows and workers, made `whole`.

        Returns:
            More for the epoch's row of metrics: numbers or lists of numbers.
        """
        return {}

    def whole(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Named tensors of the whole method, where each worker holds a part; called by all of them together.

        Args:
            tensors: this worker's part of the state, of the optimiser's state, or of the metrics of an epoch.

        Returns:
            The same names; the tensors themselves for a method that every worker holds whole.
        """
        return tensors

    def part(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """This worker's part of what `whole` gave."""
        return tensors

    def export(self) -> Export:
        """The fitted method as data."""
        raise NotImplementedError

    def load_exported(self, tensors: dict[str, Tensor]) -> None:
        """Takes the tensors of an `Export` made by a method of the same config."""
        self.load_state_dict(tensors)
