"""Settings that methods share, and the steps that they stand for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, Self

from pydantic import Field

from rayclust.options import Config


class BaseMethodConfig(Config):
    """Settings that every method has."""

    draws_pairs: ClassVar[bool] = False
    """Whether the method's `pairing` asks for neighbours, so that they are searched before it is fitted."""
    name: str
    """What the method is called in RUN.yaml."""
    clusters: int = Field(ge=2)
    """K, the number of clusters."""

    def outlook(self, count: int, dimension: int, workers: int, device: str = "cpu") -> str:
        """How N = `count` rows of width D = `dimension` will be fitted, in a few words; may be empty.

        Args:
            count: N.
            dimension: D.
            workers: W.
            device: `cpu` or `cuda`, where they compute.

        Raises:
            ConfigError: they cannot be fitted so.
        """
        return ""

    def dividing_rows(self) -> Self:
        """These settings for workers of which each holds its own rows alone: what they divide is the rows.

        Raises:
            ConfigError: another division is asked for.
        """
        return self


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


@dataclass(frozen=True)
class Plan:
    """How many steps of what size a training takes."""

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
        """The plan for `count` rows. The rest of an epoch that does not fill a batch is left out, as published."""
        batch = min(config.batch_size, count)
        per_epoch = max(1, count // batch)
        steps = config.steps or config.epochs * per_epoch
        warmup = config.warmup_epochs * per_epoch if config.warmup_steps is None else config.warmup_steps
        return cls(batch, per_epoch, steps, min(warmup, steps))

    @property
    def epochs(self) -> int:
        """Epochs begun."""
        return -(-self.steps // self.steps_per_epoch)
