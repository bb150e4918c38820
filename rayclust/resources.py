"""What a run may use of the machine or cluster, and who holds what there."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from rayclust.options import Config
from rayclust.placement import PlacementConfig


class ResourcesConfig(Config):
    """What a run may use of the machine or cluster."""

    workers: int | Literal["auto"] = "auto"
    """Workers of encode and train. auto: one per GPU; without GPUs, encode takes every CPU and train one worker."""
    min_workers: int | None = Field(None, ge=1)
    """Fewest workers that train goes on with while others are lost, with the same batches. None: all are needed."""
    gpus_per_worker: float = Field(0, ge=0, le=16)
    """GPUs of each worker; 0 computes on the CPU."""
    decode_workers: int | Literal["auto"] = "auto"
    """CPU actors that decode images."""
    max_failures: int = Field(3, ge=0)
    """Times a lost training worker is replaced before the stage fails."""
    checkpoint_seconds: float = Field(30, gt=0)
    """Seconds between two checkpoints of a training."""
    rows: Literal["whole", "cells"] = "whole"
    """What a training worker holds. whole: all rows, mapped from one file per node. cells: those of its own coarse
    cells alone, for rows beyond a node's disk; pairs that two workers hold are left out, and their share is told."""
    placement: PlacementConfig = PlacementConfig()

    @model_validator(mode="after")
    def _positive(self) -> ResourcesConfig:
        for key in ("workers", "decode_workers"):
            value = getattr(self, key)
            if value != "auto" and value < 1:
                raise ValueError(f"{key} = {value}: must be at least 1, or auto")
        if self.min_workers is not None and self.workers != "auto" and self.min_workers > self.workers:
            raise ValueError(f"min_workers = {self.min_workers}: must be at most workers, {self.workers}")
        return self
