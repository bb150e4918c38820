"""Settings of k-means, mixtures and spectral clustering.

Apart from the arithmetic, so that a config is read without torch.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator

from rayclust.settings import Config

Metric = Literal["cosine", "euclidean"]


class KMeansOptions(Config):
    """Settings of k-means."""

    clusters: int = Field(ge=1)
    """K."""
    metric: Metric = "cosine"
    """`cosine`: rows and centres are unit vectors (spherical k-means). `euclidean`: rows as given, centres means."""
    restarts: int = Field(10, ge=1)
    """Starts from different seeds; the one with the least inertia is kept. They share every pass over the rows."""
    max_iterations: int = Field(300, ge=1)
    """Most passes of one restart."""
    tolerance: float = Field(1e-4, ge=0)
    """A restart stops when the squared shift of its centres, summed, is at most this times the mean variance of a
    dimension; it always stops when no row changes cluster."""
    seeding_rows: int = Field(65_536, ge=1)
    """k-means++ sees all rows up to this many, else an evenly spread sample of this many (at least 32 per cluster)."""


class GmmOptions(Config):
    """Settings of a mixture."""

    clusters: int = Field(ge=1)
    """K, number of components."""
    covariance: Literal["diagonal", "spherical"] = "diagonal"
    """diagonal: a variance for each dimension of each component. spherical: one for each component."""
    regularization: float = Field(1e-6, ge=0)
    """Added to every variance."""
    restarts: int = Field(10, ge=1)
    """Starts of the k-means whose partition is the first estimate."""
    max_iterations: int = Field(100, ge=1)
    """Most passes over the rows."""
    tolerance: float = Field(1e-3, ge=0)
    """Rise of the mean log-likelihood, in nats per row, below which it stops."""


class SpectralOptions(Config):
    """Settings of spectral clustering."""

    temperature: float = Field(0.15, gt=0)
    """η: entropy of the membership; smaller looks at nearer rows only. Published: 0.15 after training."""
    half_steps: int | None = Field(None, ge=1)
    """Sinkhorn half-steps, an odd number (published: 5); None goes on until rows and columns sum to 1."""
    dense_rows: int = Field(15_000, ge=2)
    """Rows whose kernel is held at once, as float32: 900 MB at 15,000. Of more rows a sample of so many is solved, or
    all in tiles."""
    beyond: Literal["sample", "tiles"] = "sample"
    """What to do with more rows: `sample` solves for an evenly spread sample; `tiles` for all of them, exactly and in
    O(N) memory, making the kernel anew for each of some 30 products with it, N² · (width + K) operations each. The
    partition then keeps all codes, and assigning all rows costs one product more."""
    restarts: int = Field(10, ge=1)
    """Starts of the k-means of the eigenvectors' rows."""
    tolerance: float = Field(1e-5, gt=0)
    """Longest residual of an eigenvector, relative to the largest eigenvalue."""
    confidence: float = Field(0.1, gt=0)
    """Temperature of the probabilities when assigning, relative to the mean squared distance to the centres."""

    @field_validator("half_steps", "final_half_steps", check_fields=False)
    @classmethod
    def _odd(cls, value: int | None) -> int | None:
        if value is not None and value % 2 == 0:
            raise ValueError("must be odd, rows are normalised last")
        return value
