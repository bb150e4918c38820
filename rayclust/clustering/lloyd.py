"""Lloyd's step for several partitions at once: nearest centres by one product, sums kept up to date."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor

Blocks = Callable[[], Iterable[Tensor]]
"""Gives this worker's rows as Float[B D] blocks: the same blocks in the same order at every call."""

_SCORES_ON_CPU, _SCORES_ON_GPU = 2**20, 2**26
_MOVED_AT_ONCE = 1024
_MULTIPLIED_AT_ONCE = 512


def in_parts(blocks: Blocks, columns: int) -> Iterator[Tensor]:
    """The rows again, in parts whose scores against `columns` centres fit the processor's caches.

    Args:
        blocks: this worker's rows.
        columns: centres that every row is compared with.

    Returns:
        Float[B D] parts of at most 4096 rows (more on a GPU), half precision widened to float32.
    """
    for block in blocks():
        rows = (_SCORES_ON_GPU if block.is_cuda else _SCORES_ON_CPU) // max(columns, 1)
        for part in torch.split(block, max(256, min(rows, 2**20 if block.is_cuda else 4096))):
            yield part if part.dtype in (torch.float32, torch.float64) else part.float()


def half_squares(centers: Tensor, origin: Tensor) -> Tensor:
    """What a product with a centre lacks to order rows by distance.

    With y = x − origin and e a centre seen from the origin, |y − e|² = |y|² − 2·(x·e − b), b = origin·e + ½|e|². Rows
    far from zero lose few digits, although they are never centred: |origin||e| is rounded, not |origin|².

    Args:
        centers: Float[R K D], seen from the origin.
        origin: Float64[D].

    Returns:
        Float[R K] b, in the centres' dtype, summed in float64.
    """
    wide = centers.double()
    return (wide @ origin + 0.5 * wide.square().sum(-1)).to(centers.dtype)


def nearest(x: Tensor, centers: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """The nearest centre of each row in each of R partitions; ties go to the smaller id.

    Args:
        x: Float[B D].
        centers: Float[R K D], seen from the origin.
        bias: Float[R K] of `half_squares`.

    Returns:
        Float[B R] scores x·e − b of the nearest centres; Int64[B R] their ids.
    """
    R, K, D = centers.shape
    scores = torch.addmm(-bias.reshape(1, R * K), x, centers.reshape(R * K, D).T)
    best: tuple[Tensor, Tensor] = scores.view(-1, R, K).max(-1)
    return best


class Partitions:
    """R partitions of this worker's rows into K clusters: labels, and sums and counts of the clusters.

    A pass compares every row with every centre, but adds up only rows that changed cluster since the pass before: after
    a few passes those are few, and float64 sums do not drift. Rows are read once for all R partitions.
    """

    def __init__(self, centers: Tensor) -> None:
        R, K, _ = centers.shape
        self.labels: list[Tensor] = []
        """Int32[B R] of each part of the rows, in order; empty before the first pass."""
        self.sums = centers.new_zeros(centers.shape, dtype=torch.float64)
        """Float64[R K D] over this worker's rows, not seen from the origin."""
        self.counts = centers.new_zeros((R, K), dtype=torch.int64)
        """Int64[R K] over this worker's rows."""
        self.columns = R * K
        """What the rows are parted by; it stays when partitions are dropped."""

    def assign_and_sum(self, blocks: Blocks, centers: Tensor, origin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """One pass: assigns every row to its nearest centre and adds up the clusters.

        Args:
            blocks: this worker's rows; the same at every call.
            centers: Float[R K D], seen from the origin.
            origin: Float64[D].

        Returns:
            Float64[R K D] sums and Int64[R K] counts of this worker's rows by cluster, not to be changed by the caller;
            Float64[R] totals of the nearest centres' scores (see `half_squares`).
        """
        bias = half_squares(centers, origin)
        total = centers.new_zeros(len(centers), dtype=torch.float64)
        for i, part in enumerate(in_parts(blocks, self.columns)):
            scores, labels = nearest(part, centers, bias)
            total += scores.sum(0, dtype=torch.float64)
            self._move(part, labels, self.labels[i] if i < len(self.labels) else None)
            self.labels[i : i + 1] = [labels.int()]
        return self.sums, self.counts, total

    def _move(self, x: Tensor, labels: Tensor, old: Tensor | None) -> None:
        """Adds rows that are new in a cluster and takes them from the one they were in."""
        R, K, _ = self.sums.shape
        moved = (torch.ones_like(labels, dtype=torch.bool) if old is None else labels != old).nonzero()
        row, partition = moved.unbind(1)
        into = partition * K + labels[row, partition]
        out_of = None if old is None else partition * K + old[row, partition].long()
        counts = self.counts.view(-1)
        counts += torch.bincount(into, minlength=R * K)
        if out_of is not None:
            counts -= torch.bincount(out_of, minlength=R * K)
        # Measured on AVX-512 cores: a row that moves costs as much as 100 columns of a float64 product for a row.
        dense = not x.is_cuda and len(row) > len(x) * (0.4 + 0.01 * R * K)
        (self._add_product if dense else self._add_rows)(x, row, into, out_of)

    def _add_rows(self, x: Tensor, row: Tensor, into: Tensor, out_of: Tensor | None) -> None:
        sums = self.sums.view(-1, x.shape[1])
        for start in range(0, len(row), _MOVED_AT_ONCE):
            some = slice(start, start + _MOVED_AT_ONCE)
            values = x[row[some]].double()
            sums.index_add_(0, into[some], values)
            if out_of is not None:
                sums.index_add_(0, out_of[some], values, alpha=-1)

    def _add_product(self, x: Tensor, row: Tensor, into: Tensor, out_of: Tensor | None) -> None:
        """The same as a product with +1 where a row came and −1 where it went: better when most rows move."""
        sums = self.sums.view(-1, x.shape[1])
        signs = sums.new_zeros((len(x), len(sums)))
        signs[row, into] = 1.0
        if out_of is not None:
            signs[row, out_of] = -1.0
        for start in range(0, len(x), _MULTIPLIED_AT_ONCE):
            some = slice(start, start + _MULTIPLIED_AT_ONCE)
            sums.addmm_(signs[some].T, x[some].double())

    def keep(self, chosen: Tensor) -> None:
        """Drops all partitions but the chosen ones, Bool[R]."""
        self.labels = [labels[:, chosen] for labels in self.labels]
        self.sums, self.counts = self.sums[chosen], self.counts[chosen]
