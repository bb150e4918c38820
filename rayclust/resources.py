"""Settings of the machine or cluster: workers, GPUs, labels of nodes, prices. Changes no result of a run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, StringConstraints, model_validator

from rayclust.settings import Config


def _at_least_one(value: int | str) -> int | str:
    if not isinstance(value, str) and value < 1:
        raise ValueError("must be at least 1, or auto")
    return value


def _few_gpus(value: float | str) -> float | str:
    if not isinstance(value, str) and not 0 <= value <= 16:
        raise ValueError("must be from 0 to 16, or auto")
    return value


CountOrAuto = Annotated[int | Literal["auto"], AfterValidator(_at_least_one)]
GpusOrAuto = Annotated[float | Literal["auto"], AfterValidator(_few_gpus)]

_WORD = r"[A-Za-z0-9]([A-Za-z0-9_.\-]{0,61}[A-Za-z0-9])?"
_Key = Annotated[str, StringConstraints(pattern=rf"^([a-z0-9.\-]{{1,253}}/)?{_WORD}$")]
_Value = Annotated[str, StringConstraints(pattern=rf"^{_WORD}$")]
Labels = dict[_Key, _Value]
"""Label and value, as `ray start --labels` and cluster files write them; a node must carry all of them."""


class PlacementConfig(Config):
    """Labels that a node must carry to get a kind of work; {} is any node. Changes no result."""

    decode: Labels = Field(default_factory=dict)
    """Actors that read and decode images."""
    encode: Labels = Field(default_factory=dict)
    """Actors that encode."""
    train: Labels = Field(default_factory=dict)
    """Training workers."""
    trials: Labels = Field(default_factory=dict)
    """select-k's trials."""
    tasks: Labels = Field(default_factory=dict)
    """All other work: writers, neighbours, assignments, names, indexes, measures."""


def are_disjoint(some: Mapping[str, str], others: Mapping[str, str]) -> bool:
    """Return whether no node can carry both sets of labels."""
    return any(others.get(key, value) != value for key, value in some.items())


def format_labels(labels: Mapping[str, str]) -> str:
    """Return labels in the form market=spot,pool=cpu."""
    return ",".join(f"{key}={value}" for key, value in sorted(labels.items()))


class ResourcesConfig(Config):
    """Resources of the machine or cluster that a run may use."""

    workers: CountOrAuto = "auto"
    """Workers of encode and train. auto: one per GPU; without GPUs, encode takes every CPU and train one worker."""
    min_workers: int | None = Field(None, ge=1)
    """Fewest workers that train goes on with while others are lost, with the same batches. None: all are needed."""
    gpus_per_worker: GpusOrAuto = "auto"
    """GPUs of each worker; 0 computes on the CPU. auto: 1 where the cluster has or can add GPUs, else 0."""
    decode_workers: CountOrAuto = "auto"
    """CPU actors that decode images."""
    max_failures: int = Field(3, ge=0)
    """Times a lost training worker is replaced before the stage fails."""
    checkpoint_seconds: float = Field(30, gt=0)
    """Seconds between two checkpoints of a training."""
    in_driver: Literal["auto", "never"] = "auto"
    """Where small work runs: never: in Ray workers. auto: in the command's own process where no cluster, GPU, placement
    or second worker is asked for; some ten thousand rows are small. Changes no result."""
    placement: PlacementConfig = PlacementConfig()

    @property
    def gpus(self) -> float:
        """`gpus_per_worker` as a number; 0 for an `auto` that no connected run has resolved."""
        return 0.0 if self.gpus_per_worker == "auto" else self.gpus_per_worker

    @model_validator(mode="before")
    @classmethod
    def _without_rows(cls, tree: Any) -> Any:
        if isinstance(tree, dict) and "rows" in tree:
            raise ValueError(
                f"rows = {tree['rows']}: was removed, training workers map all rows; for rows beyond a node's disk, "
                "images.split: 0.99 fits to a seeded hundredth and assigns all"
            )
        return tree

    @model_validator(mode="after")
    def _bounded(self) -> ResourcesConfig:
        if self.min_workers is not None and self.workers != "auto" and self.min_workers > self.workers:
            raise ValueError(f"min_workers = {self.min_workers}: must be at most workers, {self.workers}")
        return self


class NodePrice(Config):
    """Kind of node that can be rented, for the estimates of `check`; a run does not depend on it."""

    dollars_per_hour: float = Field(ge=0)
    """Price of one such node, as its provider states it today."""
    cpus: int = Field(ge=1)
    """CPUs of one node."""
    gpus: int = Field(0, ge=0)
    """GPUs of one node."""
    images_per_second: float | None = Field(None, gt=0)
    """Images that one of its GPUs (without GPUs: one of its CPUs) encodes in a second, as an earlier run shows.
    None: as many as on the machine that checks, if that has a GPU as well."""
