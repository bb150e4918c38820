"""Spectral clustering of unit codes by their doubly stochastic membership, at any number of rows.

Up to `dense_rows` rows the eigenproblem is that of all of them. Beyond, it is that of an evenly spread sample of so
many *sites*, in which every site stands for N/S rows, or again of all of them, with the kernel made in tiles.
Eigenvectors reach every other row, old or new, by the membership of its code in the sites (Nyström's extension), which
gives the sites their own values back: one formula serves the rows that were fitted and rows that come later. One
decomposition serves every K up to the one it was made for.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional

from rayclust import collectives
from rayclust.arrays import require_matrix
from rayclust.clustering import eigen, kmeans
from rayclust.clustering.affinity import Affinity, NormalizedMembership, balance, unit
from rayclust.clustering.lloyd import Blocks
from rayclust.clustering.population import even_sample, gather_rows, survey
from rayclust.errors import ArtefactError, ConfigError
from rayclust.options import Config

_WHOLE_SPACE = 512
_ROWS_AT_ONCE = 256
_ITSELF = 1e-5
"""1 − |cosine| below which a row counts as the site that it comes from."""
_LEAST_VALUE = 1e-6


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


@dataclass(frozen=True)
class Spectral:
    """A spectral partition: everything that gives rows their cluster, for any K up to the one it was made for."""

    options: SpectralOptions
    """Settings."""
    seed: int
    """Of the k-means."""
    codes: Tensor
    """Float32[S d], the sites' unit codes, in the order of the rows."""
    scales: Tensor
    """Float32[S], b of Π = diag(a) K diag(b)."""
    functions: Tensor
    """Float32[S Kmax], eigenvectors of the walk D⁻¹Π over the sites; a row's direction is the site's embedding."""
    values: Tensor
    """Float64[Kmax + 1], or fewer for few sites: eigenvalues of D^{-1/2} Π D^{-1/2}, falling, the first is 1."""
    centers: dict[int, Tensor] = field(default_factory=dict)
    """Float32[K + 1 K] for each K asked so far: the k-means centres, then their mean squared distance."""

    @property
    def most(self) -> int:
        """The largest K."""
        return self.functions.shape[1]

    def labels(self, clusters: int, seed: int | None = None) -> Tensor:
        """Clusters of the sites, which are all rows where those are at most `dense_rows`.

        Args:
            clusters: K, at most `most`.
            seed: of another k-means than the partition's own.

        Returns:
            Int64[S].

        Raises:
            ConfigError: K is above `most`.
        """
        centers, _ = self._centers(clusters, self.seed if seed is None else seed)
        return kmeans.assign(_directions(self.functions, clusters), centers)[0]

    def cut(self, clusters: int, seed: int | None = None) -> Spectral:
        """This partition, or that of another seed, with the centres of K clusters kept for `assign`.

        Raises:
            ConfigError: K is above `most`.
        """
        found = self if seed is None or seed == self.seed else replace(self, seed=seed, centers={})
        found.labels(clusters)
        return found

    @torch.no_grad()
    def assign(self, codes: Tensor, clusters: int) -> Tensor:
        """Probabilities of the clusters, ∝ exp(−d² / (confidence · mean d²)), d the distance to the centre.

        A row's probabilities depend on its own code alone, and a site's largest is that of its label.

        Args:
            codes: Float[B d].
            clusters: K, at most `most`.

        Returns:
            Float32[B K], rows sum to 1.

        Raises:
            ConfigError: K is above `most`.
            ShapeError: the codes are not as wide as the sites'.
        """
        centers, spread = self._centers(clusters, self.seed)
        distances = kmeans.squared_distances(functional.normalize(self.embed(codes)[:, :clusters], dim=1), centers)
        return (distances / (-self.options.confidence * spread)).softmax(dim=1)

    @torch.no_grad()
    def embed(self, codes: Tensor) -> Tensor:
        """The eigenvectors at any codes: f(c) = Σ_s p(c, s) f(s) / λ, p ∝ exp(|c·c_s|/η) b_s without the site itself.

        Args:
            codes: Float[B d].

        Returns:
            Float32[B Kmax]; 0 for a code that meets no site.

        Raises:
            ShapeError: the codes are not as wide as the sites'.
        """
        require_matrix(codes, "codes", self.codes.shape[1])
        rows = unit(codes.to(self.codes.device))
        values = self.values[: self.most].to(self.functions)
        inverse = torch.where(values > _LEAST_VALUE, 1.0 / values.clamp(min=_LEAST_VALUE), 0.0)
        scaled = self.scales[:, None] * torch.cat([self.functions * inverse, torch.ones_like(self.functions[:, :1])], 1)
        sums = torch.cat([self._links(part) @ scaled for part in torch.split(rows, _ROWS_AT_ONCE)])
        return sums[:, :-1] / sums[:, -1:].clamp(min=torch.finfo(torch.float32).tiny)

    def tensors(self) -> dict[str, Tensor]:
        """The partition by name, for safetensors; see `from_tensors`."""
        named = {"codes": self.codes, "scales": self.scales, "functions": self.functions, "values": self.values}
        named |= {f"centers.{clusters}": centers for clusters, centers in sorted(self.centers.items())}
        return {name: value.detach().cpu().contiguous() for name, value in named.items()}

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor], options: SpectralOptions, seed: int) -> Spectral:
        """The partition that gave `tensors`; options and seed are those that it was made with.

        Raises:
            ArtefactError: a tensor is missing.
        """
        missing = [name for name in ("codes", "scales", "functions", "values") if name not in tensors]
        if missing:
            raise ArtefactError(f"spectral partition lacks {', '.join(missing)}: fit it again")
        centers = {int(name.split(".")[1]): value for name, value in tensors.items() if name.startswith("centers.")}
        plain = {name: tensors[name] for name in ("codes", "scales", "functions", "values")}
        return cls(options, seed, **plain, centers=centers)

    def _links(self, rows: Tensor) -> Tensor:
        """exp((|c·c_s| − 1)/η), Float32[B S], 0 where the code is the site's own: the eigenproblem has no diagonal."""
        cosines = (rows @ self.codes.T).abs_()
        nearest, site = cosines.max(dim=1)
        links = cosines.sub_(1.0).div_(self.options.temperature).exp_()
        own = (nearest >= 1.0 - _ITSELF).nonzero().squeeze(1)
        links[own, site[own]] = 0.0
        return links

    def _centers(self, clusters: int, seed: int) -> tuple[Tensor, Tensor]:
        """Float32[K K] centres of the embedding and Float32[] their mean squared distance; kept for the own seed."""
        if not 1 <= clusters <= self.most:
            raise ConfigError(f"clusters = {clusters}: from 1 to {self.most}, what the partition was made for")
        found = self.centers.get(clusters) if seed == self.seed else None
        if found is None:
            rows = _directions(self.functions, clusters)
            workers, rank = collectives.world_size(), collectives.rank()
            own = rows[rank * len(rows) // workers : (rank + 1) * len(rows) // workers]
            settings = kmeans.KMeansOptions(clusters=clusters, metric="euclidean", restarts=self.options.restarts)
            result = kmeans.fit(lambda: [own], settings, seed=seed)
            mean = max(result.inertia / len(rows), torch.finfo(torch.float32).eps)
            found = torch.cat([result.centers, result.centers.new_full((1, clusters), mean)])
            if seed == self.seed:
                self.centers[clusters] = found
        found = found.to(self.functions.device)
        return found[:-1], found[-1, 0]


def partition(blocks: Blocks, most: int, options: SpectralOptions, seed: int = 0) -> Spectral:
    """The spectral partition of all workers' codes; the same on every worker, however the rows are shared.

    Args:
        blocks: this worker's codes Float[B d]; workers hold the rows in order of rank.
        most: the largest K it will be asked for.
        options: settings.
        seed: of the sample, of the first block of vectors and of the k-means.

    Raises:
        ConfigError: more clusters than rows.
        DataError: rows are missing or not finite.

    Source: arXiv 2306.05272, section 3 (membership) and its spectral clustering; Ng, Jordan & Weiss 2001.
    """
    population = survey(blocks, "cosine")
    if not 1 <= most <= population.count:
        raise ConfigError(f"clusters = {most}: from 1 to the number of rows, {population.count}")
    # Eigenvectors of all rows put on a sample of them would again be a sample's: where the eigenvalue after the K-th is
    # nearly equal, labels of all rows were then 0.7 to 0.9 (ARI) those of the exact route.
    is_sample = options.beyond == "sample"
    sites = even_sample(population.count, options.dense_rows, seed) if is_sample else torch.arange(population.count)
    codes = unit(gather_rows(population, sites))
    keep = len(codes) <= options.dense_rows
    affinity = Affinity(codes, options.temperature, weight=population.count / len(codes), keep=keep)
    scaling = balance(affinity, options.half_steps)
    membership = NormalizedMembership(affinity, scaling)
    pairs = eigen.leading(
        membership.product, _start(codes, most, seed), min(most + 1, len(codes)), tolerance=options.tolerance
    )
    functions = membership.inverse_root[:, None] * pairs.vectors[:, :most]
    return Spectral(options, seed, codes, scaling.columns, functions, pairs.values)


def _start(codes: Tensor, most: int, seed: int) -> Tensor:
    """The first block of the Krylov space; the whole space where that is small."""
    if len(codes) <= _WHOLE_SPACE:
        return torch.eye(len(codes), dtype=codes.dtype, device=codes.device)
    columns = min(most + 1 + max(10, most // 5), len(codes))
    return torch.randn((len(codes), columns), generator=torch.Generator().manual_seed(seed)).to(codes)


def _directions(functions: Tensor, clusters: int) -> Tensor:
    """Unit rows of the first K eigenvectors; isolated codes stay zero."""
    return functional.normalize(functions[:, :clusters], dim=1)
