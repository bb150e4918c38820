"""Nouns that fit a set of images, and each image's counterpart in text: the language side of TAC.

Images are grouped into a few hundred semantic centres, which classify the nouns of a large vocabulary; the most certain
nouns of each centre stay. An image's counterpart is the softmax-weighted mean of those near to it.

Source: arXiv 2310.11989, section 3.2. Similarities are float32 or wider: in halves, as published, confidences near 1/k
have so few values that the choice is left to the order of a sort.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from rayclust.arrays import require_matrix
from rayclust.errors import ConfigError

ROWS_PER_CENTER, CENTERS_PER_CLUSTER = 300, 3
"""Images for which there is a semantic centre, and centres of each cluster where clusters are smaller than that."""
LEAST_LOGIT = -60.0
"""Logarithm of the least weight, relative to the largest. Near −90 float32 has denormal numbers, with which a product
took 30 times as long."""
_SCORES, _COLUMNS = 2**22, 4096
"""Similarities held at once, and nouns that are compared at once with a block of images."""


def center_count(rows: int, clusters: int) -> int:
    """Return k, the number of semantic centres: round(N / 300) if N / K is at least 300, else 3K; at most N.

    Args:
        rows: N.
        clusters: K.

    Source: the rule gives the released program's number for each of its eight data sets.
    """
    large = rows >= ROWS_PER_CENTER * clusters
    return min(rows, (rows + ROWS_PER_CENTER // 2) // ROWS_PER_CENTER if large else CENTERS_PER_CLUSTER * clusters)


@dataclass(frozen=True)
class NounScores:
    """The centre that each noun belongs to, and how certainly."""

    centers: Tensor
    """Int64[V]; −1 for a noun without direction."""
    confidence: Tensor
    """Float64[V], from 1/k to 1: the largest of the noun's softmax over centres."""


def classify_nouns(similarity: Tensor) -> NounScores:
    """Return each noun's most probable centre, of equal ones the first, with its probability.

    Args:
        similarity: Float[V k], cosines of nouns and centres; −inf for a centre that takes none.

    Returns:
        Of the softmax over centres at temperature 1. Of its values only the order matters.

    Source: arXiv 2310.11989, eq. 2 and 3.
    """
    wide = similarity.double()
    best, centers = wide.max(1)
    return NounScores(centers, (best - wide.logsumexp(1)).exp())


@torch.no_grad()
def score_nouns(centers: Tensor, nouns: Tensor) -> NounScores:
    """Classify nouns by semantic centres, block by block.

    Args:
        centers: Float[k D]; one without direction (zero or not finite) takes no noun.
        nouns: Float[V D]; one without direction belongs to no centre.

    Raises:
        ConfigError: no centre has a direction.
        ShapeError: the widths differ.
    """
    require_matrix(nouns, "nouns", centers.shape[1])
    is_center, is_noun = (x.isfinite().all(1) & (x != 0).any(1) for x in (centers, nouns))
    if not bool(is_center.any()):
        raise ConfigError(f"centers: none of {len(centers)} has a direction")
    unit = functional.normalize(torch.where(is_center[:, None], centers, 0.0), dim=1)
    found = []
    for block in torch.split(nouns, max(1, _SCORES // len(centers))):
        similarity = functional.normalize(block.to(unit), dim=1) @ unit.T
        found.append(classify_nouns(similarity.masked_fill(~is_center, -torch.inf)))
    chosen = torch.cat([part.centers for part in found]).masked_fill(~is_noun, -1)
    return NounScores(chosen, torch.cat([part.confidence for part in found]))


def choose_nouns(scores: NounScores, per_center: int = 5) -> Tensor:
    """Return the most certain nouns of each centre, of equal ones the first; a centre may have fewer, or none.

    Args:
        scores: of V nouns.
        per_center: nouns kept of each centre.

    Returns:
        Int64[M], M ≤ V: nouns by centre, the most certain first.

    Source: arXiv 2310.11989, section 3.2, with the released program's five.
    """
    confidence = torch.where(scores.centers >= 0, scores.confidence, -1.0)
    order = confidence.sort(descending=True, stable=True)[1]
    order = order[scores.centers[order].sort(stable=True)[1]]
    centers = scores.centers[order].contiguous()
    rank = torch.arange(len(order), device=order.device) - torch.searchsorted(centers, centers)
    return order[(rank < per_center) & (centers >= 0)]


@torch.no_grad()
def counterparts(x: Tensor, nouns: Tensor, temperature: float = 0.005, top: int | None = None) -> Tensor:
    """Return each image's counterpart in text: t̃ = normalise(Σ_j softmax_j(x · t_j / τ) t_j).

    The softmax is streamed over blocks of nouns, so that memory does not grow with their number.

    Args:
        x: Float[B D], unit rows of images.
        nouns: Float[M D], unit rows t_j of the chosen nouns, at least one.
        temperature: τ, above 0; infinity weighs all nouns alike.
        top: only so many nouns nearest to an image count; None counts all.

    Returns:
        Float[B D], unit rows, in the type of `x`.

    Raises:
        ConfigError: there is no noun.
        ShapeError: the widths differ.

    Source: arXiv 2310.11989, eq. 4.
    """
    require_matrix(x, "x", nouns.shape[1])
    if not len(nouns):
        raise ConfigError("nouns = 0: at least one is needed")
    nouns = nouns.to(x)
    rows = max(1, _SCORES // min(len(nouns), _COLUMNS))
    mixed = [_mix(block, nouns, temperature, top) for block in torch.split(x, rows)]
    return functional.normalize(torch.cat(mixed), dim=1) if mixed else x


def _mix(x: Tensor, nouns: Tensor, temperature: float, top: int | None) -> Tensor:
    """Return the weighted sums of nouns for one block of rows, up to a positive factor: Float[B D]."""
    if top is not None and top < len(nouns):
        # The nearest of each block of nouns, merged: Float[B r] and Int64[B r].
        best = x.new_empty((len(x), 0))
        ids = torch.empty((len(x), 0), dtype=torch.int64, device=x.device)
        for start in range(0, len(nouns), _COLUMNS):
            similarity = x @ nouns[start : start + _COLUMNS].T
            some, places = similarity.topk(min(top, similarity.shape[1]), dim=1)
            best, ids = torch.cat([best, some], dim=1), torch.cat([ids, places + start], dim=1)
            best, kept = best.topk(min(top, best.shape[1]), dim=1)
            ids = ids.gather(1, kept)
        weights = (best / temperature).softmax(1)
        return functional.embedding_bag(ids, nouns, per_sample_weights=weights, mode="sum")
    total, peak = torch.zeros_like(x), x.new_full((len(x), 1), -torch.inf)
    for block in torch.split(nouns, _COLUMNS):
        logits = (x @ block.T).div_(temperature)
        higher = torch.maximum(peak, logits.amax(1, keepdim=True))
        # What was summed so far was relative to a lower peak.
        total = total * (peak - higher).exp()
        total.addmm_(logits.sub_(higher).clamp_(min=LEAST_LOGIT).exp_(), block)
        peak = higher
    return total
