"""The kernel of unit codes and its balancing into a doubly stochastic membership, without the N×N matrix where asked.

K_ij = exp((|c_i·c_j| − 1)/η) and Π = diag(a) K diag(b), with rows and columns that sum to 1. The codes are a sample of
N rows where there are more: then each stands for `weight` rows, and every other row's entry counts that often.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from rayclust import collectives
from rayclust.arrays import require_matrix
from rayclust.errors import ConfigError

_ENTRIES_ON_CPU, _ENTRIES_ON_GPU = 2**21, 2**28
_BALANCED = 1e-6
_ROUNDED = 1e-3
_MOST_ROUNDS = 200


def kernel(queries: Tensor, codes: Tensor, temperature: float) -> Tensor:
    """exp((|c_i·c_j| − 1)/η).

    Args:
        queries: Float[B d], unit rows.
        codes: Float[S d], unit rows.
        temperature: η, above 0.

    Returns:
        Float[B S], from exp(−1/η) to 1.
    """
    return (queries @ codes.T).abs_().sub_(1.0).div_(temperature).exp_()


class Affinity:
    """The kernel of S codes without its diagonal, as an operator that workers share by rows.

    Args:
        codes: Float[S d], unit rows, the same on all workers.
        temperature: η, above 0.
        weight: rows that each code stands for, at least 1.
        keep: whether this worker's rows of the kernel stay in memory; otherwise each product makes them anew, tile by
            tile.

    Raises:
        ConfigError: the temperature is not above 0.
        ShapeError: `codes` is no matrix.
    """

    def __init__(self, codes: Tensor, temperature: float, *, weight: float = 1.0, keep: bool = True) -> None:
        require_matrix(codes, "codes")
        if not temperature > 0:
            raise ConfigError(f"temperature = {temperature}: must be above 0")
        self.codes, self.temperature, self.weight = codes, temperature, weight
        workers, rank = collectives.world_size(), collectives.rank()
        self._first, self._last = rank * len(codes) // workers, (rank + 1) * len(codes) // workers
        entries = _ENTRIES_ON_GPU if codes.is_cuda else _ENTRIES_ON_CPU
        self._rows_at_once = max(1, min(1024, self._last - self._first))
        self._columns_at_once = max(1024, entries // self._rows_at_once)
        self._kept = self._whole() if keep else None

    def product(self, x: Tensor) -> Tensor:
        """Off-diagonal kernel times x: Float[S B] to Float[S B], on all workers."""
        result = x.new_zeros(x.shape)
        own = slice(self._first, self._last)
        if self._kept is not None:
            result[own] = self._kept @ x
        else:
            for start in range(self._first, self._last, self._rows_at_once):
                stop = min(start + self._rows_at_once, self._last)
                for low in range(0, len(self.codes), self._columns_at_once):
                    high = min(low + self._columns_at_once, len(self.codes))
                    result[start:stop].addmm_(self._tile(start, stop, low, high), x[low:high])
        return collectives.all_sum(result.mul_(self.weight))

    def _whole(self) -> Tensor:
        """Float[S/W S], this worker's rows."""
        whole = self.codes.new_empty((self._last - self._first, len(self.codes)))
        for start in range(self._first, self._last, self._rows_at_once):
            stop = min(start + self._rows_at_once, self._last)
            whole[start - self._first : stop - self._first] = self._tile(start, stop, 0, len(self.codes))
        return whole

    def _tile(self, start: int, stop: int, low: int, high: int) -> Tensor:
        """Float[stop − start, high − low] with zeros where a code meets itself."""
        tile = kernel(self.codes[start:stop], self.codes[low:high], self.temperature)
        first = max(start, low)
        both = torch.arange(first, max(first, min(stop, high)), device=tile.device)
        tile[both - start, both - low] = 0.0
        return tile


@dataclass(frozen=True)
class Balance:
    """Π = diag(rows) K diag(columns)."""

    rows: Tensor
    """Float[S], a."""
    columns: Tensor
    """Float[S], b; equal to a when converged."""
    error: float
    """Largest distance of a row or column sum of Π from 1."""


def balance(affinity: Affinity, half_steps: int | None = None) -> Balance:
    """Sinkhorn scaling of the kernel with its diagonal.

    Args:
        affinity: the kernel.
        half_steps: alternating updates of rows and columns, rows first, as published (5); None goes on until rows and
            columns sum to 1 within 1e-6, by symmetric steps s ← √(s / K s), whose result is symmetric.

    Raises:
        ConfigError: `half_steps` is not odd: rows would not come last and not sum to 1.
    """
    ones = affinity.codes.new_ones((len(affinity.codes), 1))
    if half_steps is None:
        return _symmetric(affinity, ones)
    if half_steps < 1 or half_steps % 2 == 0:
        raise ConfigError(f"half_steps = {half_steps}: must be odd")
    rows = columns = ones
    for step in range(half_steps):
        if step % 2 == 0:
            rows = 1.0 / (affinity.product(columns) + columns)
        else:
            columns = 1.0 / (affinity.product(rows) + rows)
    error = (columns * (affinity.product(rows) + rows) - 1.0).abs().max()
    return Balance(rows[:, 0], columns[:, 0], float(error))


def _symmetric(affinity: Affinity, ones: Tensor) -> Balance:
    scale, error = (affinity.product(ones) + ones).rsqrt(), torch.inf
    for _ in range(_MOST_ROUNDS):
        sums = scale * (affinity.product(scale) + scale)
        before, error = error, float((sums - 1.0).abs().max())
        if error <= _BALANCED or _ROUNDED > error >= before:  # the error halves each time until rounding is left
            break
        scale = scale / sums.sqrt()
    return Balance(scale[:, 0], scale[:, 0], error)


class NormalizedMembership:
    """D^{-1/2} ½(Π + Πᵀ) D^{-1/2} with the diagonal dropped, D its column sums: what is left of 1 in the Laplacian.

    Args:
        affinity: the kernel.
        scaling: what makes it Π.
    """

    def __init__(self, affinity: Affinity, scaling: Balance) -> None:
        self._affinity = affinity
        self._rows, self._columns = scaling.rows[:, None], scaling.columns[:, None]
        self._is_symmetric = torch.equal(scaling.rows, scaling.columns)
        self.degrees = (self._columns * affinity.product(self._rows))[:, 0]
        """Float[S], column sums of Π without its diagonal; 0 for a code that meets no other."""
        positive = self.degrees > 0
        self.inverse_root = torch.where(positive, self.degrees.clamp(min=torch.finfo(torch.float32).tiny).rsqrt(), 0.0)
        """Float[S], D^{-1/2}, 0 where D is 0."""

    def product(self, x: Tensor) -> Tensor:
        """Float[S B] to Float[S B]."""
        x = self.inverse_root[:, None] * x
        if self._is_symmetric:
            y = self._rows * self._affinity.product(self._rows * x)
        else:
            both = self._affinity.product(torch.cat([self._columns * x, self._rows * x], dim=1))
            first, second = both[:, : x.shape[1]], both[:, x.shape[1] :]
            y = 0.5 * (self._rows * first + self._columns * second)
        return self.inverse_root[:, None] * y


def unit(codes: Tensor) -> Tensor:
    """Float32[B d] unit rows; zero rows stay zero."""
    require_matrix(codes, "codes")
    return functional.normalize(codes.float(), dim=1)
