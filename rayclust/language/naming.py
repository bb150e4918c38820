"""Names of clusters by votes of their images for the nearest words, and each cluster's typical and odd images.

Votes are sums over images, so those of shards are counted separately and added. Source: arXiv 2306.05272, Algorithm 2
(self-labelling), with the released code's softmax scale of 100 and its five words per image.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from rayclust.arrays import FloatArray, IntArray, require_matrix, unit_rows
from rayclust.errors import ConfigError, ShapeError
from rayclust.features import FeatureTransform

if TYPE_CHECKING:  # imported where it is used: `status` and a run with nothing to do go without it
    from scipy import sparse

TEMPLATES = ("a photo of a {}",)
"""The prompt of arXiv 2306.05272."""
SCALE, TOP = 100.0, 5
"""Of cosines before the softmax, and words per image that count."""
_BLOCK = 1 << 24
"""Similarities held at once."""
_CANDIDATES = 256
"""Words per cluster that unique naming considers."""


@dataclass(frozen=True)
class ClusterName:
    """The name of a cluster; None where no image voted."""

    name: str | None
    score: float | None
    """Mean probability that a member gives the name, in [0, 1]; larger is better."""
    runners_up: tuple[tuple[str, float], ...]
    """The next names and their scores, best first."""


def encode_words(
    encode_texts: Callable[[list[str]], NDArray[np.float32]],
    words: Sequence[str],
    templates: Sequence[str] = TEMPLATES,
    *,
    normalize_each: bool = True,
) -> NDArray[np.float32]:
    """Encode words to Float32[V D]: the mean of the rows of their prompts, scaled to unit rows.

    Args:
        encode_texts: phrases to Float32[V D], an encoder's.
        words: V names.
        templates: prompts with one {} each.
        normalize_each: unit rows before the mean, as CLIP's authors do; TAC's code averages raw ones.

    Raises:
        ConfigError: no template, or one without {}.
    """
    for template in templates or ("",):
        if template.count("{}") != 1:
            raise ConfigError(f"label.templates: {template!r} must hold {{}} once, where the name goes")
    prompts = ([template.replace("{}", word) for word in words] for template in templates)
    rows = [encode_texts(texts).astype(np.float64) for texts in prompts]
    mean = sum((unit_rows(x) if normalize_each else x for x in rows), np.zeros_like(rows[0]))
    return unit_rows(mean).astype(np.float32)


def cluster_votes(
    embeddings: FloatArray,
    clusters: IntArray,
    nouns: FloatArray,
    count: int,
    *,
    transform: FeatureTransform | None = None,
    scale: float = SCALE,
    top: int = TOP,
) -> sparse.csr_array:
    """Count the votes of some images; votes of several shards are added.

    Each image spreads softmax(scale · cosine) over all words, and its `top` largest probabilities count. Equal words
    share their probability; of equal probabilities the first words count.

    Args:
        embeddings: Float[B D].
        clusters: Int[B], 0 to count − 1; images of −1 do not vote.
        nouns: Float[V D].
        count: K.
        transform: applied to images first, e.g. centring at the data set's mean; None makes unit rows.
        scale: of cosines; CLIP's own is 100.
        top: words per image.

    Returns:
        Float64[K V], sparse, at most `top` entries per image.

    Raises:
        ShapeError: widths or lengths differ, or a cluster is out of range.
    """
    from scipy import sparse

    require_matrix(nouns, "nouns")
    require_matrix(embeddings, "embeddings", nouns.shape[1])
    if len(clusters) != len(embeddings):
        raise ShapeError(f"clusters have length {len(clusters)}: {len(embeddings)} are needed, one per embedding")
    if len(clusters) and not -1 <= int(np.min(clusters)) <= int(np.max(clusters)) < count:
        raise ShapeError(
            f"clusters run from {np.min(clusters)} to {np.max(clusters)}: from -1 to {count - 1} are possible"
        )
    words = unit_rows(nouns.astype(np.float32)).T
    votes = sparse.csr_array((count, len(nouns)), dtype=np.float64)
    block = max(1, _BLOCK // len(nouns))
    member = np.flatnonzero(clusters >= 0)
    for start in range(0, len(member), block):
        rows = member[start : start + block]
        x = embeddings[rows].astype(np.float32)
        logits = scale * ((unit_rows(x) if transform is None else transform(x)) @ words)
        image, word, mass = _largest(logits, min(top, len(nouns)))
        cells = (clusters[rows][image], word)
        votes = votes + sparse.csr_array((mass, cells), shape=votes.shape)
    return votes


def name_clusters(
    votes: sparse.csr_array, sizes: IntArray, words: Sequence[str], *, unique: bool = False, runners_up: int = 5
) -> list[ClusterName]:
    """Return the K clusters' names by their votes.

    By default two clusters may share a name, as when a class is split in two. With `unique`, distinct names are
    assigned so that the sum of scores is largest.

    Args:
        votes: Float64[K V], the sum over all shards.
        sizes: Int[K], members of each cluster.
        words: V names.
        unique: use each name once. A cluster without a word left keeps its best, numbered.
        runners_up: number of further names to list.

    Raises:
        ShapeError: sizes differ.
    """
    from scipy import sparse

    if votes.shape != (len(sizes), len(words)):
        raise ShapeError(f"votes have shape {votes.shape}: {(len(sizes), len(words))} are needed")
    votes = sparse.csr_array(votes)
    votes.sort_indices()
    # 1. Words of each cluster with their scores, best first, of equal ones the first word first.
    shares: list[list[tuple[int, float]]] = []
    for low, high, size in zip(votes.indptr[:-1], votes.indptr[1:], sizes, strict=True):
        ids, masses = votes.indices[low:high], votes.data[low:high]
        order = np.lexsort((ids, -masses))[:_CANDIDATES]
        shares.append([(int(ids[i]), float(masses[i] / max(int(size), 1))) for i in order])
    # 2. One word for each cluster.
    chosen = _matched(shares, len(words)) if unique else [ranked[0][0] if ranked else None for ranked in shares]
    names, given = [], dict[str, int]()
    for ranked, word in zip(shares, chosen, strict=True):
        if not ranked:
            names.append(ClusterName(None, None, ()))
            continue
        best = ranked[0][0] if word is None else word
        name = words[best]
        if word is None:
            given[name] = given.get(name, 1) + 1
            name = f"{name} ({given[name]})"
        rest = tuple((words[other], score) for other, score in ranked if other != best)
        names.append(ClusterName(name, dict(ranked)[best], rest[:runners_up]))
    return names


def _largest(logits: FloatArray, top: int) -> tuple[IntArray, IntArray, FloatArray]:
    """Return row, column and value of the `top` largest softmax probabilities of each row, of equal ones the first."""
    least = np.partition(logits, -top, axis=1)[:, -top]
    row, column = np.nonzero(logits >= least[:, None])
    level = logits[row, column] == least[row]
    # Where more words than room share the last place, the first of them get it.
    room = top - np.bincount(row[~level], minlength=len(logits))
    before = np.concatenate([[0], np.cumsum(level)])
    place = before[:-1] - before[np.searchsorted(row, row)]
    kept = ~level | (place < room[row])
    row, column = row[kept], column[kept]
    mass = np.exp(logits - logits.max(1, keepdims=True))
    return row, column, mass[row, column].astype(np.float64) / mass.sum(1, dtype=np.float64)[row]


def _matched(shares: list[list[tuple[int, float]]], width: int) -> list[int | None]:
    """Match each cluster with a word, none twice, so that the sum of scores is largest; None where none is left."""
    from scipy import sparse
    from scipy.sparse.csgraph import min_weight_full_bipartite_matching

    cells = [(k, word, score) for k, ranked in enumerate(shares) for word, score in ranked if score > 0]
    # A private column of negligible score lets a cluster remain without a word.
    cells += [(k, width + k, 1e-9) for k in range(len(shares))]
    rows, columns, scores = zip(*cells, strict=True)
    matrix = sparse.csr_array((np.array(scores), (rows, columns)), shape=(len(shares), width + len(shares)))
    _, given = min_weight_full_bipartite_matching(matrix, maximize=True)
    return [int(word) if word < width else None for word in given]


class TopRows:
    """The rows of each cluster with the largest scores, of equal ones the smaller rows, whatever the order of blocks.

    Args:
        count: rows to keep per cluster.
        largest: False keeps the smallest scores instead: the outliers.
    """

    def __init__(self, count: int, *, largest: bool = True) -> None:
        self._count, self._sign = count, 1.0 if largest else -1.0
        self._clusters: IntArray = np.empty(0, np.int64)
        self._rows: IntArray = np.empty(0, np.int64)
        self._scores: FloatArray = np.empty(0, np.float64)

    def update(self, rows: IntArray, clusters: IntArray, scores: FloatArray) -> None:
        """Merge some rows.

        Args:
            rows: Int[B], ids.
            clusters: Int[B]; rows of −1 are skipped.
            scores: Float[B], larger is more typical; rows whose score is not a number are skipped.

        Raises:
            ShapeError: lengths differ.
        """
        if not len(rows) == len(clusters) == len(scores):
            raise ShapeError(
                f"rows, clusters, scores have lengths {len(rows)}, {len(clusters)}, {len(scores)}: must be equal"
            )
        known = (np.asarray(clusters) >= 0) & ~np.isnan(scores)
        clusters = np.concatenate([self._clusters, np.asarray(clusters)[known]])
        rows = np.concatenate([self._rows, np.asarray(rows)[known]])
        scores = np.concatenate([self._scores, self._sign * np.asarray(scores, np.float64)[known]])
        order = np.lexsort((rows, -scores, clusters))
        rank = np.arange(len(order)) - np.searchsorted(clusters[order], clusters[order])
        kept = order[rank < self._count]
        self._clusters, self._rows, self._scores = clusters[kept], rows[kept], scores[kept]

    def of(self, cluster: int) -> list[int]:
        """Return the row ids of one cluster, the most typical (for outliers, the oddest) first; at most `count`."""
        begin, end = np.searchsorted(self._clusters, [cluster, cluster + 1])
        return [int(row) for row in self._rows[begin:end]]


def typicality(embeddings: FloatArray, clusters: IntArray, prototypes: FloatArray) -> FloatArray:
    """Return Float64[B] in [−1, 1], the cosine of each row and its cluster's prototype; 0 for a zero row or prototype.

    Args:
        embeddings: Float[B D].
        clusters: Int[B], below K; −1 gives NaN.
        prototypes: Float[K D], of any length, e.g. sums of members.

    Raises:
        ShapeError: widths or lengths differ, or a cluster is out of range.
    """
    require_matrix(prototypes, "prototypes")
    require_matrix(embeddings, "embeddings", prototypes.shape[1])
    if len(clusters) != len(embeddings) or (len(clusters) and int(np.max(clusters)) >= len(prototypes)):
        raise ShapeError(f"{len(clusters)} clusters for {len(embeddings)} embeddings and {len(prototypes)} prototypes")
    x, centers = embeddings.astype(np.float64), prototypes.astype(np.float64)[clusters]
    lengths = np.linalg.norm(x, axis=1) * np.linalg.norm(centers, axis=1)
    cosine = np.einsum("bd,bd->b", x, centers) / np.where(lengths > 0, lengths, 1.0)
    return np.where(np.asarray(clusters) >= 0, cosine, np.nan)
