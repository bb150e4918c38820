"""The map from stored embeddings to the rows that methods work on: centred, standardised, unit rows."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from rayclust.arrays import FloatArray, require_matrix, unit_rows


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
