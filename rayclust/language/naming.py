"""Names of clusters by votes of their images for the nearest words, and each cluster's typical and odd images.

Votes are sums over images, so those of shards are counted separately and added. Source: arXiv 2306.05272, Algorithm 2
(self-labelling), with the released code's softmax scale of 100 and its five words per image.

Names that tell clusters apart weigh a word's votes by how specific it is to the cluster, are given to one cluster each,
and are refused where clusters of shuffled images would be named as well.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
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
"""Words per cluster that are looked at."""
SPECIFICITY = 0.5
"""λ, weight of a word's specificity in distinct naming."""
MOST_VOTED = 50
"""Words of each cluster, by votes, among which distinct naming chooses."""
CONTAINER, ALONE = 0.6, 0.3
"""Mean probability of all words below a more general one from which that names the cluster, where no word has the
latter alone."""
COMMON = 2.0
"""Times that a more general word must have of what it has in the mean over clusters."""
NARROWED = 0.25
"""Share of a word's own probability that the words below it must have together to name the cluster in its place."""
NULL_DRAWS, NULL_QUANTILE = 20, 0.99
"""Times that members are shuffled, and the quantile over these of the best score that a name must pass."""


@dataclass(frozen=True)
class ClusterName:
    """The name of a cluster; None where no image voted."""

    name: str | None
    score: float | None
    """Mean probability that a member gives the name, in [0, 1]; larger is better."""
    runners_up: tuple[tuple[str, float], ...]
    """The next names and their scores, best first."""
    margin: float | None = None
    """Of distinct names: how far, in nats, the best word that no other cluster has stands behind."""
    is_changed: bool = False
    """Whether the most voted word is another one: distinctness changed the name, or refused it."""


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
    block, wanted = max(1, _BLOCK // len(nouns)), min(top, len(nouns))
    member = np.flatnonzero(clusters >= 0)
    for start in range(0, len(member), block):
        rows = member[start : start + block]
        x = embeddings[rows].astype(np.float32)
        logits = scale * ((unit_rows(x) if transform is None else transform(x)) @ words)
        # 1. The `top` words of each image. Where more share the last place than there are places, the first get it.
        least = np.partition(logits, -wanted, axis=1)[:, -wanted]
        image, word = np.nonzero(logits >= least[:, None])
        level = logits[image, word] == least[image]
        free = wanted - np.bincount(image[~level], minlength=len(logits))
        before = np.concatenate([[0], np.cumsum(level)])
        place = before[:-1] - before[np.searchsorted(image, image)]
        kept = ~level | (place < free[image])
        image, word = image[kept], word[kept]
        # 2. Their probabilities among all words, counted for the image's cluster.
        mass = np.exp(logits - logits.max(1, keepdims=True))
        votes_cast = mass[image, word].astype(np.float64) / mass.sum(1, dtype=np.float64)[image]
        votes = votes + sparse.csr_array((votes_cast, (clusters[rows][image], word)), shape=votes.shape)
    return votes


def name_clusters(
    votes: sparse.csr_array, sizes: IntArray, words: Sequence[str], *, runners_up: int = 5
) -> list[ClusterName]:
    """Return the K clusters' names by their votes; two may share a name, as when a class is split in two.

    Args:
        votes: Float64[K V], the sum over all shards.
        sizes: Int[K], members of each cluster.
        words: V names.
        runners_up: number of further names to list.

    Raises:
        ShapeError: sizes differ.
    """
    names = []
    for ranked in _ranked(votes, sizes, len(words)):
        shown = [(words[word], share) for word, share in ranked[: runners_up + 1]]
        name, share = shown[0] if shown else (None, None)
        names.append(ClusterName(name, share, tuple(shown[1:])))
    return names


@dataclass(frozen=True)
class NamingNull:
    """Scores of names that clusters of the same sizes get when their members are shuffled."""

    score: FloatArray
    """Float64[K], the score that a cluster's name must pass."""
    margin: float
    """Median of how far the second word stood behind."""


def shuffled_null(
    votes: sparse.csr_array, clusters: IntArray, count: int, *, specificity: float = SPECIFICITY, seed: int = 0
) -> NamingNull:
    """Name clusters of shuffled members, and return what a name must pass to say more than these.

    Small clusters get high scores by chance. A cluster is compared with the best name of each draw among clusters that
    are at least half as large.

    Args:
        votes: Float64[B V], of each image by itself.
        clusters: Int[B], 0 to count − 1.
        count: K.
        specificity: λ.
        seed: of the draws.
    """
    from scipy import sparse

    random, sizes = np.random.default_rng(seed), np.bincount(clusters, minlength=count)
    best, margins = np.full((NULL_DRAWS, count), -np.inf), []
    for draw in range(NULL_DRAWS):
        place = (random.permutation(clusters), np.arange(len(clusters)))
        members = sparse.csr_array((np.ones(len(clusters)), place), shape=(count, len(clusters)))
        for cluster, scores in enumerate(_scores(_ranked(members @ votes, sizes, votes.shape[1]), specificity)):
            ordered = sorted(scores.values(), reverse=True)
            best[draw, cluster] = ordered[0] if ordered else -np.inf
            margins += [ordered[0] - ordered[1]] if len(ordered) > 1 else []
    # The best among clusters at least half as large: a running maximum from the largest on.
    order = np.argsort(-sizes, kind="stable")
    running = np.maximum.accumulate(best[:, order], axis=1)
    highest = running[:, np.searchsorted(-sizes[order], -sizes / 2, side="right") - 1]
    bound = np.quantile(highest, NULL_QUANTILE, axis=0, method="higher")
    return NamingNull(bound, float(np.median(margins)) if margins else 0.0)


def name_distinctly(
    votes: sparse.csr_array,
    sizes: IntArray,
    words: Sequence[str],
    *,
    specificity: float = SPECIFICITY,
    null: NamingNull | None = None,
    hypernyms: Mapping[str, Sequence[str]] | None = None,
    runners_up: int = 5,
) -> list[ClusterName]:
    """Return names of which no two clusters share one, and None where a name would say nothing.

    With v_kn the mean probability that cluster k gives word n and v̄_n its mean over clusters, a word's score is
    s_kn = ln v_kn + λ (ln v_kn − ln v̄_n). Words are assigned so that the sum of scores is largest. Where a cluster's
    words are many but have a more general one in common, that is its name, with the word that tells it apart from
    another cluster of that name in brackets.

    Args:
        votes: Float64[K V], the sum over all shards.
        sizes: Int[K], members of each cluster.
        words: V names.
        specificity: λ; 0 scores by votes alone.
        null: what a name's score must reach, and its margin where `hypernyms` are known; None refuses nothing.
        hypernyms: more general words by word, both in lower case.
        runners_up: number of further names to list.

    Returns:
        K names; the score of a word is v_kn, that of a more general one the sum over the words below it.

    Raises:
        ShapeError: sizes differ.
    """
    shares = _ranked(votes, sizes, len(words))
    scores, taxonomy = _scores(shares, specificity), _Taxonomy(shares, words, hypernyms or {})
    # 1. More general words stand behind the words, one column for each cluster that wants one.
    containers = dict[int, str]()
    for cluster, ranked in enumerate(shares):
        general = taxonomy.container(ranked)
        if general is None:
            continue
        mass = taxonomy.mass(ranked, general)
        mean = sum(taxonomy.mass(each, general) for each in shares) / len(shares)
        if mass >= COMMON * mean:  # else it names most of everything
            containers[cluster] = general
            scores[cluster][len(words) + cluster] = math.log(mass) + specificity * math.log(mass / mean)
    # 2. The assignment, with a column of its own for each cluster that stays without a name.
    bound = np.full(len(sizes), -np.inf) if null is None else null.score
    given = _assigned(scores, bound, len(words) + len(sizes))
    # 3. Refusals, where an unrelated word that no other cluster has is about as good.
    margins: list[float | None] = [None] * len(given)
    taken = {word for word in given if word is not None}
    for cluster, word in enumerate(given):
        if word is None:
            continue
        free = [other for other in scores[cluster] if other < len(words) and other not in taken]
        own = containers[cluster] if word >= len(words) else words[word].casefold()
        broader = taxonomy.above(own)
        rivals = [
            scores[cluster][other]
            for other in free
            if words[other].casefold() not in broader and own not in taxonomy.above(words[other].casefold())
        ]
        margins[cluster] = scores[cluster][word] - max(rivals) if rivals else None
        # Without hypernyms nobody knows which words are related: a pump beside a gas pump does not speak against it.
        if null is not None and hypernyms and rivals and scores[cluster][word] - max(rivals) < null.margin:
            given[cluster] = None
    # 4. Names. A word gives way to a less general one with most of the votes below it, if only one cluster wants that.
    narrowed = [
        taxonomy.narrowed(shares[k], word) if word is not None and word < len(words) else word
        for k, word in enumerate(given)
    ]
    wanted, holders, found = Counter(narrowed), Counter(given), []
    for cluster, (ranked, word, narrow) in enumerate(zip(shares, given, narrowed, strict=True)):
        name: str | None = None
        share: float | None = None
        if word is not None and word >= len(words):
            name = taxonomy.distinguished(cluster, shares, containers)
            share = taxonomy.mass(ranked, containers[cluster])
        elif word is not None and narrow is not None:
            is_free = wanted[narrow] == 1 and holders[narrow] == int(narrow == word)
            chosen = narrow if is_free else word
            name, share = words[chosen], dict(ranked)[chosen]
        shown = tuple((words[other], s) for other, s in ranked if words[other] != name)
        changed = bool(ranked) and name != words[ranked[0][0]]
        found.append(ClusterName(name, share, shown[:runners_up], margins[cluster], changed))
    return found


def _ranked(votes: sparse.csr_array, sizes: IntArray, width: int) -> list[list[tuple[int, float]]]:
    """Return each cluster's words with their mean probabilities, best first, of equal ones the first word first."""
    from scipy import sparse

    if votes.shape != (len(sizes), width):
        raise ShapeError(f"votes have shape {votes.shape}: {(len(sizes), width)} are needed")
    votes = sparse.csr_array(votes)
    votes.sort_indices()
    shares: list[list[tuple[int, float]]] = []
    for low, high, size in zip(votes.indptr[:-1], votes.indptr[1:], sizes, strict=True):
        ids, masses = votes.indices[low:high], votes.data[low:high]
        order = np.lexsort((ids, -masses))[:_CANDIDATES]
        shares.append([(int(ids[i]), float(masses[i] / max(int(size), 1))) for i in order])
    return shares


def _scores(shares: list[list[tuple[int, float]]], specificity: float) -> list[dict[int, float]]:
    """Return s_kn of each cluster's most voted words."""
    total = dict[int, float]()
    for ranked in shares:
        for word, share in ranked:
            total[word] = total.get(word, 0.0) + share
    return [
        {
            word: (1 + specificity) * math.log(share) - specificity * math.log(total[word] / len(shares))
            for word, share in ranked[:MOST_VOTED]
            if share > 0
        }
        for ranked in shares
    ]


def _assigned(scores: list[dict[int, float]], bound: FloatArray, width: int) -> list[int | None]:
    """Assign words, none twice, so that the sum of scores is largest; None where none is left above the bound."""
    from scipy import sparse
    from scipy.sparse.csgraph import min_weight_full_bipartite_matching

    known = [score for one in scores for score in one.values()]
    least = min(known, default=0.0) - 1.0
    # Of all scores of a row the same may be subtracted; entries must not be 0. What is below the bound is worth less
    # than the column of no name.
    cells = [(k, word, score) for k, one in enumerate(scores) for word, score in one.items() if score > bound[k]]
    cells += [(k, width + k, max(float(bound[k]), least)) for k in range(len(scores))]
    rows, columns, values = zip(*cells, strict=True)
    weights = np.array(values) - min(values) + 1.0
    matrix = sparse.csr_array((weights, (rows, columns)), shape=(len(scores), width + len(scores)))
    given = min_weight_full_bipartite_matching(matrix, maximize=True)[1]
    return [int(word) if word < width else None for word in given]


class _Taxonomy:
    """The words that clusters voted for, below and above each other.

    Args:
        shares: each cluster's words with their mean probabilities.
        words: V names.
        hypernyms: more general words by word, both in lower case.
    """

    def __init__(
        self, shares: list[list[tuple[int, float]]], words: Sequence[str], hypernyms: Mapping[str, Sequence[str]]
    ) -> None:
        self._words, self._hypernyms = words, hypernyms
        self._below = dict[str, set[int]]()
        for word in {word for ranked in shares for word, _ in ranked} if hypernyms else ():
            for name in self.above(words[word].casefold()):
                self._below.setdefault(name, set()).add(word)

    def above(self, name: str) -> set[str]:
        """Return a word and all that is more general."""
        found, new = set[str](), {name}
        while new:
            found |= new
            new = {more for one in new for more in self._hypernyms.get(one, ())} - found
        return found

    def mass(self, ranked: list[tuple[int, float]], name: str) -> float:
        """Return a cluster's sum of mean probabilities of a word and of those below it."""
        below = self._below.get(name, ())
        return sum(share for word, share in ranked if word in below)

    def container(self, ranked: list[tuple[int, float]]) -> str | None:
        """Return the least general word that has most of a cluster's votes below it, where no word alone has enough.

        A word's more general ones do not speak against it.
        """
        if not ranked or not self._below:
            return None
        shares = {self._words[word].casefold(): share for word, share in ranked}
        alone = max(sum(shares.get(name, 0.0) for name in self.above(word)) for word in shares)
        enough = [] if alone >= ALONE else [name for name in self._below if self.mass(ranked, name) >= CONTAINER]
        enough = [name for name in enough if len(self._below[name]) > 1]
        # Of two with the same words below, the one that has more above itself is the less general.
        return min(enough, key=lambda name: (len(self._below[name]), -len(self.above(name)), name), default=None)

    def narrowed(self, ranked: list[tuple[int, float]], word: int) -> int:
        """Return a less general word of a cluster that has most of the votes below this one; itself if there is none.

        A more general word is near to all that is below it and takes votes from each.
        """
        shares = dict(ranked)
        while True:
            name = self._words[word].casefold()
            below = {other for other in self._below.get(name, ()) if other in shares and other != word}
            # Of words that are below each other neither counts.
            lower = {o: {self._words[x].casefold() for x in self._below[self._words[o].casefold()]} for o in below}
            below = {other for other in below if name not in lower[other]}
            mass = {other: self.mass(ranked, self._words[other].casefold()) for other in below}
            total = sum(shares[other] for other in below)
            wanted = [other for other in below if 2 * mass[other] > total and total >= NARROWED * shares[word]]
            if not wanted:
                return word
            # The most general of them: the next step looks below that.
            word = max(wanted, key=lambda other: (len(self._below[self._words[other].casefold()]), -other))

    def distinguished(self, cluster: int, shares: list[list[tuple[int, float]]], containers: Mapping[int, str]) -> str:
        """Return a cluster's more general word; where others have it, with the word of the largest contrast to them."""
        name = containers[cluster]
        rivals = [dict(shares[other]) for other, shared in containers.items() if other != cluster and shared == name]
        if not rivals:
            return name
        most = {word: max(rival.get(word, 0.0) for rival in rivals) for word, _ in shares[cluster]}
        contrast = max(shares[cluster], key=lambda pair: pair[1] - most[pair[0]])[0]
        return f"{name} ({self._words[contrast]})"


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
