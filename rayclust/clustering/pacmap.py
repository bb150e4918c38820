"""PaCMAP: rows on a plane, so that near rows stay near and far groups keep some of their order (arXiv 2012.04456)."""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rayclust.arrays import require_matrix

CANDIDATES = 50
"""Further neighbours among which the nearest by scaled distance are sought."""
FEW_ROWS = 8
"""Up to so many rows are mapped by their principal components: too few to have neighbourhoods."""
_COMPONENTS = 100
_PHASES = (100, 100, 250)
"""Steps of the three phases."""
_LEARNING_RATE, _BETA1, _BETA2, _EPSILON = 1.0, 0.9, 0.999, 1e-7
_MID_NEAR_DRAWS = 6
_BLOCK = 1024


def near_pairs(count: int) -> int:
    """Return how many near neighbours of each of N rows are drawn together: 10, and more of more than 10,000 rows.

    Of fewer than 40 rows there are fewer, which the paper leaves open: with 10 neighbours all groups would be one.
    """
    return min(max(1, count // 4), round(10 + 15 * max(0.0, math.log10(max(count, 1)) - 4)))


def planar_map(x: Tensor, neighbors: Tensor, similarity: Tensor, seed: int = 0) -> NDArray[np.float32]:
    """Return rows on a plane by PaCMAP, started from the first two principal components.

    Equal rows and seeds give equal maps on equal machines, with one thread. Distances between far groups mean little.

    Args:
        x: Float[N D], unit rows.
        neighbors: Int64[N M], each row's nearest others, nearest first; M should be `near_pairs(N) + CANDIDATES` where
            there are so many.
        similarity: Float[N M], their cosines.
        seed: of what is random.

    Returns:
        Float32[N 2] within [−1, 1], centred, both axes to one scale.

    Raises:
        ShapeError: `x` does not have two axes.
    """
    from sklearn.decomposition import PCA

    require_matrix(x, "x")
    # 1. Up to 100 principal components, Float32[N C], at least 2: zeros where there are none.
    rows = np.asarray(x, np.float64)
    width = min(_COMPONENTS, *rows.shape)
    components = np.zeros((len(rows), max(2, width)), np.float32)
    if len(rows) > 1 and np.ptp(rows, axis=0).any():
        solver = "covariance_eigh" if rows.shape[1] <= 4 * len(rows) else "full"
        components[:, :width] = PCA(width, svd_solver=solver).fit_transform(rows)
    y = torch.from_numpy(components[:, :2].T.copy())  # Float32[2 N]
    # 2. The places, moved by Adam through three phases: whole, groups, details.
    if len(x) > FEW_ROWS and bool(y.any()):
        pairs, y = _Pairs(torch.from_numpy(components), neighbors, similarity, seed), 0.01 * y
        first, second = torch.zeros_like(y), torch.zeros_like(y)
        whole, groups = _PHASES[:2]
        for step in range(sum(_PHASES)):
            if step < whole:
                share = step / whole
                gradient = pairs.gradient(y, 2.0, 1000 * (1 - share) + 3 * share)
            elif step < whole + groups:
                gradient = pairs.gradient(y, 3.0, 3.0)
            else:
                gradient = pairs.gradient(y, 1.0, 0.0)
            first.lerp_(gradient, 1 - _BETA1)
            second.lerp_(gradient.square_(), 1 - _BETA2)
            rate = _LEARNING_RATE * (1 - _BETA2 ** (step + 1)) ** 0.5 / (1 - _BETA1 ** (step + 1))
            y = y.addcdiv(first, second.sqrt().add_(_EPSILON), value=-rate)
    # 3. Centred, within [−1, 1].
    y = y - (y.amin(1, keepdim=True) + y.amax(1, keepdim=True)) / 2 if y.shape[1] else y
    return np.ascontiguousarray((y / (y.abs().max() if bool(y.any()) else 1.0)).T.numpy(), np.float32)


def place(places: Tensor, neighbors: Tensor, similarity: Tensor) -> Tensor:
    """Return places for new rows: the means of their neighbours' places, the nearest with the largest weight.

    A neighbour's weight is exp(−(d − d₁) / s), with d₁ the least distance and s the mean of d − d₁ over the nearest
    three: where three are near, far ones count for nothing.

    Args:
        places: Float[n 2], of rows on the plane.
        neighbors: Int64[B M], for each new row the nearest of these, nearest first.
        similarity: Float[B M], their cosines.

    Returns:
        Float[B 2], each within the span of its neighbours.
    """
    distance = (2 - 2 * similarity).clamp(min=0).sqrt()
    farther = distance - distance[:, :1]
    weight = torch.exp(-farther / farther[:, :3].mean(1, keepdim=True).clamp(min=1e-6))
    return (weight.unsqueeze(2) * places[neighbors]).sum(1) / weight.sum(1, keepdim=True)


class _Pairs:
    """The pairs that pull and push: for each row its near, mid-near and further partners, Int64[N m] each."""

    def __init__(self, x: Tensor, neighbors: Tensor, similarity: Tensor, seed: int) -> None:
        generator, count = torch.Generator().manual_seed(seed), len(x)
        near = near_pairs(count)
        # 1. Near: of the candidates those with the smallest d²ᵢⱼ / (σᵢ σⱼ), σ the mean distance to neighbours 4 to 6.
        squared = (2 - 2 * similarity.float()).clamp(min=0)
        scale = squared[:, 3:6].sqrt().mean(1).clamp(min=1e-10)
        scaled = squared / (scale[:, None] * scale[neighbors])
        order = scaled.argsort(dim=1, stable=True)[:, :near]
        self.near = neighbors.gather(1, order)
        # 2. Mid-near: of six rows drawn the second nearest.
        mid = max(1, near // 2)
        drawn = torch.randint(count - 1, (count, mid, _MID_NEAR_DRAWS), generator=generator)
        drawn += drawn >= torch.arange(count)[:, None, None]  # not itself
        found = []
        for own, some in zip(torch.split(x, _BLOCK), torch.split(drawn, _BLOCK), strict=True):
            distance = (x[some] - own[:, None, None]).square_().sum(3)
            second = distance.topk(2, dim=2, largest=False)[1][:, :, 1:]
            found.append(some.gather(2, second).squeeze(2))
        self.mid_near = torch.cat(found)
        # 3. Further: any but itself and the near ones. Each of these, in order, moves the numbers from it on by one.
        left_out = torch.cat([self.near, torch.arange(count)[:, None]], dim=1).sort(1)[0]
        self.further = torch.zeros((count, 0), dtype=torch.int64)
        if count > near + 1:
            self.further = torch.randint(count - near - 1, (count, 2 * near), generator=generator)
            for each in left_out.T:
                self.further += self.further >= each[:, None]

    def gradient(self, y: Tensor, near: float, mid_near: float) -> Tensor:
        """Return the gradient of the loss by the places, Float32[2 N] both, with weights of the kinds of pairs.

        With d = 1 + ‖yᵢ − yⱼ‖² near pairs lose d / (10 + d), mid-near ones d / (10000 + d), further ones 1 / (1 + d).
        """
        gradient = torch.zeros_like(y)
        for partners, weight, offset in (
            (self.near, 2 * 10 * near, 10.0),
            (self.mid_near, 2 * 10_000 * mid_near, 10_000.0),
            (self.further, -2.0, 1.0),
        ):
            if weight == 0:
                continue
            apart = [axis[:, None] - axis[partners] for axis in y]
            force = torch.addcmul(apart[0].square().add_(1 + offset), apart[1], apart[1])
            force = force.square_().reciprocal_().mul_(weight)
            for axis, difference in zip(gradient, apart, strict=True):
                pull = difference.mul_(force)
                axis.add_(pull.sum(1)).index_add_(0, partners.view(-1), pull.view(-1), alpha=-1)
        return gradient
