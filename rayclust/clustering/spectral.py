"""Spectral clustering of unit codes by their doubly stochastic membership, at any number of rows.

The kernel is K_ij = exp((|c_i·c_j| − 1)/η), the membership Π = diag(a) K diag(b) with rows and columns that sum to 1.

Up to `dense_rows` rows the eigenproblem is that of all rows. Beyond, it is that of an evenly spread sample of so many
*sites*, in which every site stands for N/S rows, or again of all rows, with the kernel computed in tiles. Eigenvectors
are extended to every other row, old or new, by the membership of its code in the sites (Nyström's extension), which is
exact at the sites: one formula serves the rows that were fitted and rows that come later. One decomposition serves
every K up to the one it was made for.

Source: arXiv 2306.05272, Π = Proj_{Ω,η}; the absolute value and the number of half-steps are the published program's.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from torch.nn import functional

from rayclust import distributed
from rayclust.arrays import require_matrix
from rayclust.clustering import kmeans, row_stats
from rayclust.clustering.row_stats import Blocks, even_sample, gather_rows
from rayclust.errors import ArtefactError, ConfigError
from rayclust.settings import KMeansOptions, SpectralOptions

logger = logging.getLogger(__name__)

PUBLISHED_HALF_STEPS = 5
_MAX_HALF_STEPS = 2_001
_MAX_SYMMETRIC_STEPS = 200
_SUM_TOLERANCE = 1e-6
"""Largest error of a row or column sum at which uncounted Sinkhorn steps end."""
_ROUNDING = 1e-3
"""Below this error, Sinkhorn's symmetric steps also end when the error no longer falls."""
_ENTRIES_ON_CPU, _ENTRIES_ON_GPU = 2**21, 2**28
_KRYLOV_BLOCKS = 4
_DEPENDENT = 1e-5
"""Length below which a unit column's part outside a basis counts as rounding."""
_WHOLE_SPACE_ROWS = 512
_ROWS_AT_ONCE = 256
_SITE_TOLERANCE = 1e-5
"""1 − |cosine| below which a row counts as the site that it comes from."""
_MIN_EIGENVALUE = 1e-6
_TENSORS = ("codes", "scales", "functions", "values")


def unit(codes: Tensor) -> Tensor:
    """Return Float32[B d] unit rows; zero rows stay zero."""
    require_matrix(codes, "codes")
    return functional.normalize(codes.float(), dim=1)


def _require_kernel(codes: Tensor, temperature: float) -> None:
    require_matrix(codes, "codes")
    if not temperature > 0:
        raise ConfigError(f"temperature = {temperature}: must be above 0")


def membership(codes: Tensor, temperature: float, half_steps: int | None = PUBLISHED_HALF_STEPS) -> Tensor:
    """Return Π of unit codes: the entropic projection of |C Cᵀ| onto doubly stochastic matrices, differentiable.

    In logarithms, with ℓ = |C Cᵀ|/η: a row half-step sets a_i = −LSE_j(ℓ_ij + b_j), a column half-step
    b_j = −LSE_i(ℓ_ij + a_i), and Π = exp(a + ℓ + b). The columns' b carries no gradient and the rows' a cancels, so
    that exactly Π = row-softmax(ℓ + stopgrad(b)).

    Args:
        codes: Float[n d], unit rows, already gathered across workers; taken in float32 or wider. Their signs do not
            matter.
        temperature: η, above 0; towards 0 each row belongs to itself alone, towards infinity to all alike.
        half_steps: odd, rows first and last; None iterates until the columns sum to 1 as well.

    Returns:
        Float[n n], positive; rows sum to 1, columns nearly; differentiable in `codes`.

    Raises:
        ConfigError: the temperature is not above 0, or the half-steps are not odd.
        ShapeError: `codes` is no matrix.
    """
    _require_kernel(codes, temperature)
    if half_steps is not None and (half_steps < 1 or half_steps % 2 == 0):
        raise ConfigError(f"half_steps = {half_steps}: must be odd, rows are normalised last")
    codes = codes if codes.dtype == torch.float64 else codes.float()
    logits = (codes @ codes.T).abs() / temperature
    # The logits are symmetric: sums over i are taken along rows, which are contiguous in memory.
    fixed, b = logits.detach(), logits.new_zeros(len(logits))
    for _ in range(((_MAX_HALF_STEPS if half_steps is None else half_steps) - 1) // 2):
        a = -(fixed + b).logsumexp(dim=1)
        column_sums = (fixed + a).logsumexp(dim=1)
        if half_steps is None and float((column_sums + b).expm1().abs().max()) < _SUM_TOLERANCE:
            break
        b = -column_sums
    return (logits + b).softmax(dim=1)


def kernel(queries: Tensor, codes: Tensor, temperature: float) -> Tensor:
    """Return exp((|c_i·c_j| − 1)/η), from exp(−1/η) to 1: Float[B d] and Float[S d], unit rows, to Float[B S]."""
    return (queries @ codes.T).abs_().sub_(1.0).div_(temperature).exp_()


class Affinity:
    """The kernel of S codes without its diagonal, as an operator whose rows are divided over workers.

    Args:
        codes: Float[S d], unit rows, the same on all workers.
        temperature: η, above 0.
        weight: rows that each code stands for, at least 1.
        keep: whether this worker's rows of the kernel stay in memory; otherwise each product computes them anew, tile
            by tile.

    Raises:
        ConfigError: the temperature is not above 0.
        ShapeError: `codes` is no matrix.
    """

    def __init__(self, codes: Tensor, temperature: float, *, weight: float = 1.0, keep: bool = True) -> None:
        _require_kernel(codes, temperature)
        self.codes, self.temperature, self.weight = codes, temperature, weight
        self._own = own = distributed.own_slice(len(codes))
        entries = _ENTRIES_ON_GPU if codes.is_cuda else _ENTRIES_ON_CPU
        step = max(1, min(1024, own.stop - own.start))
        self._row_spans = [(start, min(start + step, own.stop)) for start in range(own.start, own.stop, step)]
        self._columns_at_once = max(1024, entries // step)
        self._kept: Tensor | None = None
        if keep:
            self._kept = codes.new_empty((own.stop - own.start, len(codes)))
            for start, stop in self._row_spans:
                self._kept[start - own.start : stop - own.start] = self._tile(start, stop, 0, len(codes))

    def product(self, x: Tensor) -> Tensor:
        """Multiply the off-diagonal kernel with x: Float[S B] to Float[S B], on all workers."""
        result = x.new_zeros(x.shape)
        if self._kept is not None:
            result[self._own] = self._kept @ x
        else:
            for start, stop in self._row_spans:
                for low in range(0, len(self.codes), self._columns_at_once):
                    high = min(low + self._columns_at_once, len(self.codes))
                    result[start:stop].addmm_(self._tile(start, stop, low, high), x[low:high])
        return distributed.all_reduce(result.mul_(self.weight))

    def _tile(self, start: int, stop: int, low: int, high: int) -> Tensor:
        """Return Float[stop − start, high − low] with zeros on the kernel's diagonal."""
        tile = kernel(self.codes[start:stop], self.codes[low:high], self.temperature)
        first = max(start, low)
        both = torch.arange(first, max(first, min(stop, high)), device=tile.device)
        tile[both - start, both - low] = 0.0
        return tile


@dataclass(frozen=True)
class Balance:
    """Scaling factors of Π = diag(rows) K diag(columns), each Float[S]; the two are equal when converged."""

    rows: Tensor
    columns: Tensor
    error: float
    """Largest distance of a row or column sum of Π from 1."""


def balance(affinity: Affinity, half_steps: int | None = None) -> Balance:
    """Scale the kernel, with its diagonal, to Π by Sinkhorn's iteration.

    Args:
        affinity: the kernel.
        half_steps: alternating updates of rows and columns, rows first, as published (5); None iterates until rows and
            columns sum to 1 within 1e-6, by symmetric steps s ← √(s / K s), whose result is symmetric.

    Raises:
        ConfigError: `half_steps` is not odd; rows must be normalised last to sum to 1.
    """
    ones = affinity.codes.new_ones((len(affinity.codes), 1))
    if half_steps is None:
        scale, error = (affinity.product(ones) + ones).rsqrt(), torch.inf
        for _ in range(_MAX_SYMMETRIC_STEPS):
            sums = scale * (affinity.product(scale) + scale)
            before, error = error, float((sums - 1.0).abs().max())
            # The error halves with each step until only rounding remains.
            if error <= _SUM_TOLERANCE or _ROUNDING > error >= before:
                break
            scale = scale / sums.sqrt()
        return Balance(scale[:, 0], scale[:, 0], error)
    if half_steps < 1 or half_steps % 2 == 0:
        raise ConfigError(f"half_steps = {half_steps}: must be odd")
    rows, columns = 1.0 / (affinity.product(ones) + ones), ones
    for _ in range(half_steps // 2):
        columns = 1.0 / (affinity.product(rows) + rows)
        rows = 1.0 / (affinity.product(columns) + columns)
    error = float((columns * (affinity.product(rows) + rows) - 1.0).abs().max())
    return Balance(rows[:, 0], columns[:, 0], error)


class NormalizedMembership:
    """The operator D^{-1/2} ½(Π + Πᵀ) D^{-1/2} without its diagonal, D its column sums: 1 minus the Laplacian."""

    def __init__(self, affinity: Affinity, scaling: Balance) -> None:
        self._affinity = affinity
        self._rows, self._columns = scaling.rows[:, None], scaling.columns[:, None]
        self._is_symmetric = torch.equal(scaling.rows, scaling.columns)
        self.degrees = (self._columns * affinity.product(self._rows))[:, 0]
        """Float[S], column sums of Π without its diagonal; 0 for an isolated code."""
        positive = self.degrees > 0
        self.inverse_root = torch.where(positive, self.degrees.clamp(min=torch.finfo(torch.float32).tiny).rsqrt(), 0.0)
        """Float[S], D^{-1/2}, 0 where D is 0."""

    def product(self, x: Tensor) -> Tensor:
        """Multiply the operator with x: Float[S B] to Float[S B]."""
        x = self.inverse_root[:, None] * x
        if self._is_symmetric:
            y = self._rows * self._affinity.product(self._rows * x)
        else:
            both = self._affinity.product(torch.cat([self._columns * x, self._rows * x], dim=1))
            first, second = both[:, : x.shape[1]], both[:, x.shape[1] :]
            y = 0.5 * (self._rows * first + self._columns * second)
        return self.inverse_root[:, None] * y


@dataclass(frozen=True)
class Eigenpairs:
    """Leading eigenpairs, largest eigenvalue first."""

    values: Tensor
    """Float64[K]."""
    vectors: Tensor
    """Float[N K], orthonormal; each one's largest entry by size is positive."""
    residual: float
    """Largest length of A v − λ v among them."""
    products: int
    """Blocks of vectors that the operator was multiplied with."""


def leading_eigenpairs(
    product: Callable[[Tensor], Tensor],
    start: Tensor,
    count: int,
    *,
    tolerance: float = 1e-5,
    max_products: int = 100,
) -> Eigenpairs:
    """Return the eigenvectors of the largest (not: largest by size) eigenvalues, by a block Krylov space with restarts.

    The space spanned by the blocks so far gives the Ritz vectors; the next block holds their residuals, orthogonal to
    it. When the space holds four blocks it is restarted from its leading Ritz vectors and the newest block.

    ARPACK and LOBPCG were measured against it: as accurate, but 5 and 2.5 times the passes over the kernel, which is
    what a product costs where the kernel is computed in tiles or summed over workers.

    Args:
        product: Float[N B] to Float[N B], symmetric.
        start: Float[N B], B at least `count`; a few columns more hasten convergence.
        count: K, number of eigenvectors.
        tolerance: longest residual A v − λ v, relative to the largest eigenvalue by size.
        max_products: blocks multiplied at most; a longer residual is then logged and returned.

    Raises:
        ConfigError: fewer columns in `start` than `count`.

    Source: Stewart 2002 (Krylov–Schur restarts), in block form with full orthogonalisation.
    """
    if not 1 <= count <= start.shape[1]:
        raise ConfigError(f"count = {count}: from 1 to the {start.shape[1]} columns of the first block is needed")
    newest = _orthonormal(start, start.new_zeros((len(start), 0)))
    width, products = newest.shape[1], 0
    basis, images = newest[:, :0], newest[:, :0]
    while True:
        # 1. Extend the basis V and its image A V.
        image = product(newest)
        products += 1
        basis, images = torch.cat([basis, newest], 1), torch.cat([images, image], 1)
        # 2. Rayleigh–Ritz: eigenpairs of VᵀAV, in float64, largest first.
        inner = (basis.T @ images).double()
        values, turn = torch.linalg.eigh(0.5 * (inner + inner.T))
        values, kept = values.flip(0), turn.flip(1)[:, : max(width, count)].to(basis)
        vectors, moved = basis @ kept, images @ kept
        # 3. Stop at the tolerance.
        errors = moved[:, :count] - vectors[:, :count] * values[:count].to(basis)
        residual, scale = float(errors.norm(dim=0).max()), float(values.abs().max())
        if residual <= tolerance * scale or products >= max_products:
            break
        # 4. Restart with the leading Ritz vectors; go on with their residuals.
        if basis.shape[1] + width > _KRYLOV_BLOCKS * width:
            basis, images = vectors, moved
        residuals = moved[:, :width] - vectors[:, :width] * values[:width].to(basis)
        newest = _orthonormal(residuals, basis)
        if newest.shape[1] == 0:  # the space is invariant and the pairs are exact
            break
    if residual > tolerance * scale:
        logger.info("eigenvectors: residual %.1e after %d products, aimed for %.1e", residual, products, tolerance)
    vectors = vectors[:, :count]
    largest = vectors.gather(0, vectors.abs().argmax(0, keepdim=True))
    signs = torch.where(largest < 0, -1.0, 1.0).to(vectors)
    return Eigenpairs(values[:count], vectors * signs, residual, products)


def _orthonormal(block: Tensor, basis: Tensor) -> Tensor:
    """Return an orthonormal basis of the block's part outside the span of `basis`; dependent columns are left out."""
    lengths = block.norm(dim=0)
    block = block[:, lengths > 0] / lengths[lengths > 0]
    for _ in range(2):  # once loses digits
        block = block - basis @ (basis.T @ block)
        q, r = torch.linalg.qr(block)
        block = q[:, r.diagonal().abs() > _DEPENDENT]
    return block


def unit_means(x: Tensor, labels: Tensor, clusters: int) -> Tensor:
    """Return the means of unit rows Float[N D] in clusters Int64[N]: Float[K D]; far from all rows for an empty one."""
    sizes = torch.bincount(labels, minlength=clusters)[:, None]
    sums = x.new_zeros((clusters, x.shape[1])).index_add_(0, labels, x)
    return torch.where(sizes > 0, sums / sizes.clamp(min=1), 2.0)


@dataclass(frozen=True)
class Spectral:
    """A spectral partition, which assigns rows to clusters for any K up to the one it was made for.

    A larger K is a ConfigError, codes that are not as wide as the sites' a ShapeError.
    """

    options: SpectralOptions
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
    """Float32[K + 1 K] by K, as far as computed: the k-means centres, then their mean squared distance."""

    def labels(self, clusters: int, seed: int | None = None) -> Tensor:
        """Return the clusters of the sites, Int64[S], which are all rows where those are at most `dense_rows`.

        `seed` is that of another k-means than the partition's own.
        """
        centers, _ = self._centers(clusters, self.seed if seed is None else seed)
        return kmeans.assign(functional.normalize(self.functions[:, :clusters], dim=1), centers)[0]

    def eigengap(self, clusters: int) -> float:
        """Return ln(ln λ_{K+1} / ln λ_K) of the walk's eigenvalues, at least about 0; NaN where there is no λ_{K+1}.

        −ln λ is the rate at which the walk forgets along an eigenvector: up to the K-th the slow ones between clusters,
        then those within. A difference of the eigenvalues would not tell 0.99 from 0.95 as well as 0.19 from 0.12.
        """
        if not 1 <= clusters < len(self.values):
            return math.nan
        pair = self.values[clusters - 1 : clusters + 1].clamp(_MIN_EIGENVALUE, 1.0 - self.options.tolerance)
        return float((pair[1].log() / pair[0].log()).log())

    def cut(self, clusters: int, seed: int | None = None, start: Tensor | None = None) -> Spectral:
        """Return this partition, or that of another seed, with the centres of K clusters kept for `assign`.

        `start` are clusters of the sites, Int64[S], from which k-means goes on; None starts by the seed.
        """
        partition = self if seed is None or seed == self.seed else replace(self, seed=seed, centers={})
        partition._centers(clusters, partition.seed, start)
        return partition

    @torch.no_grad()
    def assign(self, codes: Tensor, clusters: int) -> Tensor:
        """Return probabilities of the clusters, ∝ exp(−d² / (confidence · mean d²)), d the distance to the centre.

        Takes Float[B d] to Float32[B K], rows sum to 1. A row's probabilities depend on its own code alone, and a
        site's largest is that of its label.
        """
        centers, spread = self._centers(clusters, self.seed)
        distances = kmeans.squared_distances(functional.normalize(self.embed(codes)[:, :clusters], dim=1), centers)
        return (distances / (-self.options.confidence * spread)).softmax(dim=1)

    @torch.no_grad()
    def embed(self, codes: Tensor) -> Tensor:
        """Extend the eigenvectors to any codes: f(c) = Σ_s p(c, s) f(s) / λ, p ∝ exp(|c·c_s|/η) b_s.

        A site's own term is left out, as the eigenproblem has no diagonal. Takes Float[B d] to Float32[B Kmax]; 0 for a
        code without any link to a site.
        """
        require_matrix(codes, "codes", self.codes.shape[1])
        rows = unit(codes.to(self.codes.device))
        values = self.values[: self.functions.shape[1]].to(self.functions)
        inverse = torch.where(values > _MIN_EIGENVALUE, 1.0 / values.clamp(min=_MIN_EIGENVALUE), 0.0)
        # One column more sums p's denominator.
        scaled = self.scales[:, None] * torch.cat([self.functions * inverse, torch.ones_like(self.functions[:, :1])], 1)
        lacks_some, embedded = bool((values <= _MIN_EIGENVALUE).any()), []
        for part in torch.split(rows, _ROWS_AT_ONCE):
            cosines = (part @ self.codes.T).abs_()
            nearest, site = cosines.max(dim=1)
            links = cosines.sub_(1.0).div_(self.options.temperature).exp_()
            own = (nearest >= 1.0 - _SITE_TOLERANCE).nonzero().squeeze(1)
            links[own, site[own]] = 0.0
            weighted = links @ scaled
            found = weighted[:, :-1] / weighted[:, -1:].clamp(min=torch.finfo(torch.float32).tiny)
            if lacks_some:  # what extends to no other row, for want of a positive eigenvalue, is still the sites' own
                found[own] = self.functions[site[own]]
            embedded.append(found)
        return torch.cat(embedded)

    def tensors(self) -> dict[str, Tensor]:
        """Return the partition by name, for safetensors; see `from_tensors`."""
        named = {name: getattr(self, name) for name in _TENSORS}
        named |= {f"centers.{clusters}": centers for clusters, centers in sorted(self.centers.items())}
        return {name: value.detach().cpu().contiguous() for name, value in named.items()}

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor], options: SpectralOptions, seed: int) -> Spectral:
        """Rebuild the partition from its `tensors`; options and seed are those that it was made with.

        Raises:
            ArtefactError: a tensor is missing.
        """
        missing = [name for name in _TENSORS if name not in tensors]
        if missing:
            raise ArtefactError(f"spectral partition lacks {', '.join(missing)}: fit it again")
        centers = {int(name.split(".")[1]): value for name, value in tensors.items() if name.startswith("centers.")}
        return cls(options, seed, **{name: tensors[name] for name in _TENSORS}, centers=centers)

    def _centers(self, clusters: int, seed: int, start: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return Float32[K K] centres of the embedding and Float32[] their mean squared distance.

        Those of the own seed are kept; `start` makes them anew, see `cut`.
        """
        most = self.functions.shape[1]
        if not 1 <= clusters <= most:
            raise ConfigError(f"clusters = {clusters}: from 1 to {most}, what the partition was made for")
        centers = self.centers.get(clusters) if seed == self.seed and start is None else None
        if centers is None:  # k-means of the sites' rows, Float32[S K]
            rows = functional.normalize(self.functions[:, :clusters], dim=1)
            own, init = rows[distributed.own_slice(len(rows))], None
            if start is not None:
                init = unit_means(rows, start.to(rows.device), clusters)
            settings = KMeansOptions(clusters=clusters, metric="euclidean", restarts=self.options.restarts)
            result = kmeans.fit(lambda: [own], settings, seed=seed, init=init)
            mean = max(result.inertia / len(rows), torch.finfo(torch.float32).eps)
            centers = torch.cat([result.centers, result.centers.new_full((1, clusters), mean)])
            if seed == self.seed:
                self.centers[clusters] = centers
        centers = centers.to(self.functions.device)
        return centers[:-1], centers[-1, 0]


def partition(blocks: Blocks, max_clusters: int, options: SpectralOptions, seed: int = 0) -> Spectral:
    """Compute the spectral partition of all workers' codes; the same on every worker and for every sharding of rows.

    Args:
        blocks: this worker's codes Float[B d]; workers hold the rows in order of rank.
        max_clusters: the largest K for which it will be used.
        options: of the kernel, its sites and the k-means.
        seed: of the sample, of the first block of vectors and of the k-means.

    Raises:
        ConfigError: more clusters than rows.
        DataError: rows are missing or not finite.

    Source: arXiv 2306.05272, section 3 (membership) and its spectral clustering; Ng, Jordan & Weiss 2001.
    """
    stats = row_stats.compute(blocks, "cosine")
    if not 1 <= max_clusters <= stats.count:
        raise ConfigError(f"clusters = {max_clusters}: from 1 to the number of rows, {stats.count}")
    # 1. The sites. Eigenvectors of all rows, restricted to a sample of them and extended again, would be a sample's:
    # where the eigenvalue after the K-th is nearly equal, labels were then 0.7 to 0.9 (ARI) those of the exact route.
    is_sample = options.beyond == "sample"
    sites = even_sample(stats.count, options.dense_rows, seed) if is_sample else torch.arange(stats.count)
    codes = unit(gather_rows(stats, sites))
    # 2. The membership as an operator.
    keep = len(codes) <= options.dense_rows
    affinity = Affinity(codes, options.temperature, weight=stats.count / len(codes), keep=keep)
    scaling = balance(affinity, options.half_steps)
    operator = NormalizedMembership(affinity, scaling)
    if isolated := int((operator.degrees == 0).sum()):
        logger.warning(
            "spectral clusters: %d of %d rows have no neighbour at η = %g, where the kernel is 0 in float32 if "
            "1 − |cosine| is above 100 η: raise the temperature", isolated, len(codes), options.temperature,
        )  # fmt: skip
    # 3. Its eigenvectors. The Krylov space starts with the whole space where that is small.
    if len(codes) <= _WHOLE_SPACE_ROWS:
        start = torch.eye(len(codes), dtype=codes.dtype, device=codes.device)
    else:
        columns = min(max_clusters + 1 + max(10, max_clusters // 5), len(codes))
        start = torch.randn((len(codes), columns), generator=torch.Generator().manual_seed(seed)).to(codes)
    count = min(max_clusters + 1, len(codes))
    pairs = leading_eigenpairs(operator.product, start, count, tolerance=options.tolerance)
    functions = operator.inverse_root[:, None] * pairs.vectors[:, :max_clusters]
    return Spectral(options, seed, codes, scaling.columns, functions, pairs.values)
