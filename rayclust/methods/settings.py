"""What the settings of all methods share, and those of methods without presets.

Apart from the methods, so that a config is read without torch; a paper with presets has a file of its own,
`PAPER_settings.py`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from pydantic import Field

from rayclust.settings import Config, GmmOptions, KMeansOptions, SpectralOptions

Precision = Literal["auto", "fp32", "bf16"]
"""Of matrix products in training. auto: bf16 where the processor multiplies it fast, else float32."""
NO_NEIGHBOR = -1
"""Neighbour number that stands behind the last neighbour of a row that has fewer than M."""
RATE_ROWS = 256
"""Rows of batch that a learning rate is given for."""
EMBEDDINGS = "embeddings"
"""Name of the space of a run with one encoder."""


class BaseMethodConfig(Config):
    """Settings that every method has."""

    revision: ClassVar[int] = 1
    """Raised when fits of the method change for the same settings, so that finished trainings run again."""
    draws_pairs: ClassVar[bool] = False
    """Whether the method's `pairing` asks for neighbours, so that they are searched before it is fitted."""
    reads_words: ClassVar[bool] = False
    """Whether the method is fitted to rows with counterparts in text, so that nouns are chosen before."""
    has_own_space: ClassVar[bool] = False
    """Whether the method learns a space of its own, a `methods.base.Transform`."""
    reads_pixels: ClassVar[bool] = False
    """Whether the method learns from pixels instead of embeddings."""
    pixel_settings: ClassVar[Mapping[str, Any]] = {}
    """Settings of the encoder `pixels` of a method that reads pixels, unless the run's config has its own."""
    selection_settings: ClassVar[Mapping[str, Any]] = {}
    """Settings of the many fits in `select-k` that are not the config's own; where they differ, train fits the chosen
    number anew."""
    fast_rows: ClassVar[float] = 0
    """Most rows of a small set of which a fit takes about a second of one core; a number of clusters is then chosen
    without workers."""
    name: str
    """What the method is called in RUN.yaml."""
    clusters: int = Field(ge=2)
    """K, the number of clusters."""

    def partitions(self) -> tuple[str, ...]:
        """Return where other partitions of the rows lie that a fit reads (`Rows.members`): URIs; none by default."""
        return ()

    def describe_plan(self, count: int, dimension: int, workers: int, device: str = "cpu") -> str:
        """Describe in a few words how the rows will be fitted; may be empty.

        Args:
            count: N.
            dimension: D.
            workers: W.
            device: `cpu` or `cuda`, where they compute.

        Raises:
            ConfigError: they cannot be fitted so.
        """
        return ""


class TrainedConfig(BaseMethodConfig):
    """Settings that every method trained by gradient has."""

    epochs: int = Field(100, ge=1)
    """Passes over the rows; not used when `steps` is set."""
    steps: int | None = Field(None, ge=1)
    """Optimiser steps; None counts `epochs` instead."""
    batch_size: int = Field(512, ge=2)
    """Rows per step over all workers; a smaller set is taken whole."""
    learning_rate: float = Field(1e-4, gt=0)
    """Peak learning rate per 256 rows of batch: the rate used is this × batch_size / 256."""
    min_learning_rate: float = Field(1e-4, ge=0)
    """Learning rate at the end of the cosine, per 256 rows of batch as well."""
    warmup_epochs: int = Field(20, ge=0)
    """Epochs in which the learning rate rises linearly from 0; not used when `warmup_steps` is set."""
    warmup_steps: int | None = Field(None, ge=0)
    """Steps in which the learning rate rises linearly from 0; None counts `warmup_epochs`."""
    optimizer: Literal["adamw", "sgd", "lars"] = "adamw"
    """adamw (0.9, 0.999), sgd and lars with momentum 0.9."""
    weight_decay: float = Field(1e-4, ge=0)
    """Decay of matrices at the start; biases and norms have none."""
    final_weight_decay: float = Field(1e-4, ge=0)
    """Decay at the end of a cosine."""
    clip_norm: float | None = Field(None, gt=0)
    """Longest gradient, all parameters together; None does not cut."""

    def rate_at(self, step: int, plan: Plan) -> float:
        """Return the learning rate: linear from 0 to the peak over the warm-up, then a cosine to the minimum.

        Args:
            step: from 0; the first step of a warm-up has rate 0, its last one the peak.
            plan: batch size, warm-up and length.

        Source: arXiv 1706.02677 for the scaling by the batch and the warm-up.
        """
        peak, end = self.rates_for(plan.batch_size)
        if step < plan.warmup_steps:
            return peak * step / max(plan.warmup_steps - 1, 1)
        return cosine_schedule(peak, end, step - plan.warmup_steps, plan.steps - plan.warmup_steps)

    def rates_for(self, batch_size: int) -> tuple[float, float]:
        """Return the peak and the end of the learning rate for batches of this many rows."""
        scale = batch_size / RATE_ROWS
        return self.learning_rate * scale, self.min_learning_rate * scale


def cosine_schedule(start: float, end: float, step: int, steps: int) -> float:
    """Return half a cosine from `start` at step 0 towards `end`, which it would reach at step `steps`.

    Args:
        start: value at step 0.
        end: value at and after `steps`.
        step: from 0.
        steps: length; 0 is over at once.

    Source: arXiv 1608.03983, eq. 5, without restarts.
    """
    if start == end or step >= steps:
        return end
    return end + 0.5 * (start - end) * (1.0 + math.cos(math.pi * step / steps))


@dataclass(frozen=True)
class Plan:
    """Number and size of the steps of a training."""

    batch_size: int
    """Rows per step over all workers."""
    steps_per_epoch: int
    """Whole batches that the rows give."""
    steps: int
    """Steps of the whole training; the last epoch may be cut short."""
    warmup_steps: int
    """Steps in which the learning rate rises."""

    @classmethod
    def of(cls, config: TrainedConfig, count: int) -> Plan:
        """Return the plan for `count` rows. The rest of an epoch that does not fill a batch is left out, as published.

        Args:
            config: batch size, steps or epochs, warm-up.
            count: N.
        """
        batch = min(config.batch_size, count)
        per_epoch = max(1, count // batch)
        steps = config.steps or config.epochs * per_epoch
        warmup = config.warmup_epochs * per_epoch if config.warmup_steps is None else config.warmup_steps
        return cls(batch, per_epoch, steps, min(warmup, steps))

    @property
    def epochs(self) -> int:
        """Epochs begun."""
        return -(-self.steps // self.steps_per_epoch)


class AutoConfig(BaseMethodConfig):
    """A consensus of k-means and spectral partitions, moved by what trainings find where evidence says so."""

    fast_rows: ClassVar[float] = 1000
    selection_settings: ClassVar[Mapping[str, Any]] = {"budget": 0.0}
    revision: ClassVar[int] = 6
    draws_pairs: ClassVar[bool] = True
    name: Literal["auto"] = "auto"
    """The default: never a partition that the neighbour graph speaks against."""
    restarts: int = Field(16, ge=1)
    """Starts of k-means in each view; fewer where they would take long."""
    neighbors: int = Field(10, ge=1)
    """Nearest neighbours of a row that count as evidence, and the most that are averaged."""
    rounds: int = Field(2, ge=0)
    """How often rows are averaged with their neighbours in the smoothed view."""
    candidates: bool = True
    """Whether candidates are made at all; without, the result is k-means."""
    budget: float = Field(40.0, ge=0)
    """Seconds of one core that trainings may take: a head of TEMI, then CPP, where they fit in. It is a count of
    multiplications and no clock, so that a run gives the same on any machine. 0 trains nothing."""


class KMeansConfig(KMeansOptions, BaseMethodConfig):
    """k-means (Lloyd) from greedy k-means++ seeds."""

    fast_rows: ClassVar[float] = math.inf
    revision: ClassVar[int] = 2
    name: Literal["kmeans"] = "kmeans"
    """Nearest of K centres."""
    clusters: int = Field(ge=2)
    """K."""
    temperature: float = Field(0.1, gt=0)
    """Of the probabilities when assigning: a cluster's is ∝ exp(−d² / (temperature · mean d²)), d the distance to its
    centre and mean d² that of the fitted rows to theirs. Does not change which is largest."""


class GmmConfig(GmmOptions, BaseMethodConfig):
    """Gaussians with diagonal or spherical covariances, by expectation-maximisation from k-means."""

    name: Literal["gmm"] = "gmm"
    """A mixture of K Gaussians."""
    clusters: int = Field(ge=2)
    """K."""


class SpectralConfig(SpectralOptions, BaseMethodConfig):
    """Spectral clustering of the rows by their doubly stochastic membership (arXiv 2306.05272's last step)."""

    name: Literal["spectral"] = "spectral"
    """K-means of the leading eigenvectors."""
    clusters: int = Field(ge=2)
    """K."""


class ConsensusConfig(BaseMethodConfig):
    """Vote of several partitions, and a classifier that is fitted to the rows on which they agree."""

    draws_pairs: ClassVar[bool] = True
    revision: ClassVar[int] = 4
    name: Literal["consensus"] = "consensus"
    """One partition out of many."""
    members: tuple[str, ...] = ()
    """Partitions of the same rows that vote: a run (its clusters), `RUN#heads` (all heads of a model that was trained
    with `keep_heads`), or a table *.parquet with the columns key and cluster, -1 for no opinion. Empty: k-means from
    `restarts` starts."""
    restarts: int = Field(16, ge=2)
    """Members that k-means makes where none are given, each from random rows."""
    neighbors: int = Field(15, ge=1)
    """Nearest neighbours of a row that count as evidence for a member."""
    classifier: Literal["auto", "ridge", "head"] = "auto"
    """What gives all rows, old and new, their clusters. ridge: a linear classifier. head: a head of TEMI that learns
    the voters' shares by cross-entropy. auto: ridge, or the head where that loses less of the modularity of what it is
    fitted to than ridge does, as with members that are not linear."""

    def partitions(self) -> tuple[str, ...]:
        """Return the partitions that the fit reads."""
        return self.members
