"""The map from stored embeddings to the rows that methods work on: centred, standardised, unit rows, joined spaces.

`features` of RUN.yaml, and what it does.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import numpy as np
from pydantic import Field, SerializerFunctionWrapHandler, model_serializer

from rayclust.arrays import FloatArray, require_matrix, unit_rows
from rayclust.settings import Config


class SpaceFeatures(Config):
    """Transform from the embeddings of one space to features."""

    center: bool = False
    """Subtract the mean embedding of the run."""
    normalize: bool = True
    """End with unit rows."""
    standardize: bool = False
    """Z-score each dimension by the mean and deviation of the run (TEMI's `embed_norm`)."""


class FeaturesConfig(SpaceFeatures):
    """Transform from embeddings to the features that methods see."""

    spaces: dict[str, SpaceFeatures] = Field(default_factory=dict)
    """Of spaces that have settings of their own, by name. Written as `features` of an entry of `encoders`."""

    def of(self, space: str) -> SpaceFeatures:
        """Return the settings of a space: its own, or those of the run."""
        return self.spaces.get(space, self)

    @model_serializer(mode="wrap")
    def _write(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        # Left out where no space has its own: so were the settings of runs of before, whose digests stand.
        return {key: value for key, value in handler(self).items() if key != "spaces" or value}


@dataclass(frozen=True)
class FeatureTransform:
    """x ↦ unit((x − mean) / scale), each part optional, with statistics of the rows that were fitted."""

    mean: FloatArray | None = None
    """Float[D], subtracted first; None leaves rows where they are."""
    scale: FloatArray | None = None
    """Float[D], standard deviations to divide by; None does not."""
    normalize: bool = True
    """Whether rows end with length 1. A zero row stays zero."""

    @classmethod
    def from_moments(
        cls,
        count: float,
        total: FloatArray,
        total_squares: FloatArray,
        *,
        center: bool,
        standardize: bool,
        normalize: bool,
    ) -> FeatureTransform:
        """Return the transform whose statistics are given as sums.

        Args:
            count: number of rows summed; above 0.
            total: Float[D], sum of the rows, float64.
            total_squares: Float[D], sum of their squares, float64.
            center: subtract the mean.
            standardize: z-score each dimension (TEMI's `embed_norm`), mean included; a constant dimension is left.
            normalize: end with unit rows.
        """
        mean = total / count
        if not standardize:
            return cls(mean.astype(np.float32) if center else None, None, normalize)
        deviation = np.sqrt(np.maximum(total_squares / count - mean**2, 0.0))
        scale = np.where(deviation > 1e-8, deviation, 1.0)
        return cls(mean.astype(np.float32), scale.astype(np.float32), normalize)

    @classmethod
    def fitted(
        cls, x: FloatArray, weights: FloatArray | None = None, *, center: bool, standardize: bool, normalize: bool
    ) -> FeatureTransform:
        """Return the transform whose statistics are those of `x`, Float[N D]; weights say how often a row counts."""
        require_matrix(x, "x")
        x = x.astype(np.float64)
        count = len(x) if weights is None else float(weights.sum())
        moments = (x.sum(0), (x**2).sum(0)) if weights is None else (weights @ x, weights @ x**2)
        return cls.from_moments(count, *moments, center=center, standardize=standardize, normalize=normalize)

    def __call__(self, x: FloatArray) -> FloatArray:
        """Apply the map to Float[B D]; return Float32[B D], a new array.

        Raises:
            ShapeError: `x` is not a matrix, or not as wide as the statistics.
        """
        require_matrix(x, "x", None if self.mean is None else len(self.mean))
        rows = x.astype(np.float32)
        if self.mean is not None:
            rows -= self.mean
        if self.scale is not None:
            rows /= self.scale
        return unit_rows(rows) if self.normalize else rows


@dataclass(frozen=True)
class SpaceTransforms:
    """Transform of each of a run's spaces; embeddings come as Float[B ΣD], the spaces side by side in this order."""

    transforms: Mapping[str, FeatureTransform]
    """By space."""
    widths: tuple[int, ...]
    """D of each."""

    def __call__(self, x: FloatArray) -> FloatArray:
        """Return the features of all spaces as one.

        Args:
            x: Float[B ΣD].

        Returns:
            Float32[B ΣD]. Of one space its features; of several each one's features as unit rows, divided by √S: the
            cosine of two rows is the mean of their cosines in the S spaces.

        Raises:
            ShapeError: `x` is not a matrix of that width.
        """
        found = list(self.split(x).values())
        if len(found) == 1:
            return found[0]
        return np.concatenate([unit_rows(rows) for rows in found], axis=1) / np.float32(math.sqrt(len(found)))

    def only(self, space: str) -> SpaceTransforms:
        """Return the transform of one space alone, on its own embeddings, Float[B D]."""
        [width] = (width for name, width in zip(self.transforms, self.widths, strict=True) if name == space)
        return SpaceTransforms({space: self.transforms[space]}, (width,))

    def split(self, x: FloatArray) -> dict[str, FloatArray]:
        """Return the features of each space, Float32[B D], as its own transform makes them, by name.

        Raises:
            ShapeError: `x` is not a matrix of width ΣD.
        """
        require_matrix(x, "x", sum(self.widths))
        ends = list(accumulate(self.widths, initial=0))
        slices = map(slice, ends[:-1], ends[1:])
        return {name: self.transforms[name](x[:, some]) for name, some in zip(self.transforms, slices, strict=True)}
