"""Choice of the number of clusters: its settings, and the choice from a table of criteria of several candidates."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from pydantic import Field, model_validator

from rayclust.errors import ConfigError, DataError
from rayclust.resources import CountOrAuto, GpusOrAuto
from rayclust.settings import Config

RULES = ("vote", "coding_length", "knee", "merge")
"""Rules of `choose`; the name of any criterion below is one too."""


Candidates = Mapping[int, Mapping[str, float]]
"""K to its criteria, values by name; see `metrics.internal.measure`."""


@dataclass(frozen=True)
class Choice:
    """The chosen number of clusters, why in words, the K that each criterion alone would choose, and its evidence."""

    k: int
    rule: str
    reason: str
    picks: Mapping[str, int]
    evidence: Mapping[str, float]
    """See `evidence`."""


@dataclass(frozen=True)
class Criterion:
    """How a criterion is read: whether the largest value is the best, and whether it takes part in the vote."""

    larger_is_better: bool
    votes: bool = True


CRITERIA = {
    "coding_length": Criterion(larger_is_better=False),
    "feature_coding_length": Criterion(larger_is_better=False),
    "eigengap": Criterion(larger_is_better=True),
    "silhouette": Criterion(larger_is_better=True),
    "calinski_harabasz": Criterion(larger_is_better=True, votes=False),
    "davies_bouldin": Criterion(larger_is_better=False, votes=False),
    "modularity": Criterion(larger_is_better=True),
    "near_modularity": Criterion(larger_is_better=True),
    "map_equation": Criterion(larger_is_better=False),
    "stability": Criterion(larger_is_better=True, votes=False),
    "prediction_strength": Criterion(larger_is_better=True, votes=False),
    "null_contrast": Criterion(larger_is_better=True),
    "resampled_silhouette": Criterion(larger_is_better=True, votes=False),
    "umap_silhouette": Criterion(larger_is_better=True, votes=False),
}
STAND_INS = {"silhouette": "null_contrast"}
"""Criteria that vote only where another was not measured: there are too few rows for null models."""
MIN_STRENGTH = 0.8
"""Prediction strength that a number of clusters must have; the largest that has it is the pick (Tibshirani & Walther
2005, section 2, who take 0.8 to 0.9)."""
_MIN_CANDIDATES_FOR_ENDS = 5
"""With at least this many candidates, a pick at either end counts as the end of a slope."""


def geometric_grid(least: int, most: int, ratio: float = 1.5) -> tuple[int, ...]:
    """Return whole numbers from `least` to `most`, each at most about `ratio` times the one before."""
    steps = math.ceil(math.log(most / least) / math.log(ratio))
    return tuple(sorted({round(least * (most / least) ** (i / max(steps, 1))) for i in range(steps + 1)}))


def choose(candidates: Candidates, rule: str = "vote") -> Choice:
    """Choose the number of clusters by a rule, and give the reason.

    Args:
        candidates: in any order.
        rule: `vote`: the middle, in ratio and weighted by `evidence`, of the K that the criteria pick;
            `coding_length`: the least coding length;
            `knee`: the elbow of the coding length; `merge`: the clusters that are left of the most clusters when these
            are merged (`internal.merged_clusters`), or the candidate next to that; or the name of any criterion.

    Raises:
        ConfigError: the rule is unknown.
        DataError: there are no candidates, or none has the criterion of the rule.
    """
    picked, weights, ks = picks(candidates), evidence(candidates), sorted(candidates)
    if rule not in RULES and rule not in CRITERIA:
        raise ConfigError(f"rule = {rule!r}: must be one of {', '.join(dict.fromkeys([*RULES, *CRITERIA]))}")
    if rule == "vote":
        k = vote(picked, weights, ks)
        voting, abstaining = _votes(picked, weights, ks)
        others = {name: k for name, k in picked.items() if name not in voting and name not in abstaining}
        heads = (
            f"K = {k} is the middle, in ratio and weighted by the evidence in brackets, of",
            "no vote, being an end of the candidates:",
            "for comparison:",
        )
        said = {name: f" ({weight:.2f})" for name, weight in weights.items() if name not in others}
        groups = (
            (head, ", ".join(f"{name.replace('_', ' ')} {k}{said.get(name, '')}" for name, k in group.items()))
            for head, group in zip(heads, (voting, abstaining, others), strict=True)
        )
        reason = "; ".join(f"{head} {listed}" for head, listed in groups if listed)
        if "null_contrast" in candidates[k]:
            sample, contrast = (candidates[k][name] for name in ("silhouette_sample", "null_contrast"))
            reason += f"; k-means of a sample: silhouette {sample:.2f}, of null models {sample - contrast:.2f}"
        return Choice(k, rule, reason, picked, weights)
    if rule not in picked:
        raise DataError(f"rule = {rule!r}: no candidate has what it asks for")
    k = picked[rule]
    words = {
        "knee": "the elbow of the coding length",
        "merge": f"the number next to what is left of {max(ks)} clusters when they are merged,",
        "prediction_strength": f"the most clusters of prediction strength {MIN_STRENGTH}",
        "resampled_silhouette": "the most clusters that come back in subsamples as well as the surest number does",
    }.get(rule, f"the best {rule.replace('_', ' ')}")
    return Choice(k, rule, f"K = {k} has {words} among {', '.join(map(str, ks))}", picked, weights)


def picks(candidates: Candidates) -> dict[str, int]:
    """Return the K that each criterion alone chooses, the smaller one on a tie; `knee` of the coding length; `merge`.

    Values that are missing or not finite are left out. Prediction strength chooses the most clusters that have enough
    of it, and nothing where none has; the silhouette of subsamples the most whose median is not below the largest of
    all candidates' lower bounds (chooseR).

    Raises:
        DataError: there are no candidates.
    """
    if not candidates:
        raise DataError("candidates = 0: at least one is needed")
    picked, elbow = dict[str, int](), dict[str, int]()
    for name, criterion in CRITERIA.items():
        values = {k: candidates[k].get(name, math.nan) for k in sorted(candidates)}
        values = {k: value for k, value in values.items() if math.isfinite(value)}
        if values:
            if name in ("prediction_strength", "resampled_silhouette"):  # the most clusters that have enough of it
                bounds = [candidates[k].get("resampled_bound", math.nan) for k in values]
                enough = MIN_STRENGTH if name == "prediction_strength" else max(bounds)
                values = {k: float(k) for k, value in values.items() if value >= enough}
                if not values:
                    continue
            picked[name] = (max if criterion.larger_is_better else min)(values, key=lambda k: values[k])
            elbow = {"knee": knee([*values], [*values.values()])} if name == "coding_length" else elbow
    merged = candidates[max(candidates)].get("merged", math.nan)
    if math.isfinite(merged):
        elbow["merge"] = min(sorted(candidates), key=lambda k: abs(math.log(k / max(merged, 1.0))))
    return picked | elbow


def knee(ks: Sequence[int], values: Sequence[float], *, log: bool = True) -> int:
    """Return the K at which a falling curve lies farthest below the chord from its first to its lowest point.

    Both axes are scaled to [0, 1] first. Returns the lowest point itself if nothing lies below the chord.

    Args:
        ks: increasing, at least 1.
        values: one for each.
        log: whether the K axis is ln K, as for coding lengths and inertias, which depend on ratios of K.

    Raises:
        DataError: there are no values, or not one for each K.
    """
    if not len(ks) or len(ks) != len(values):
        raise DataError(f"knee: {len(ks)} numbers of clusters and {len(values)} values: one for each is needed")
    y = np.asarray(values, dtype=np.float64)
    last = int(y.argmin())
    if last < 2:
        return ks[last]
    x = np.asarray(ks[: last + 1], dtype=np.float64)
    x = np.log(x) if log else x
    x, y = (x - x[0]) / (x[-1] - x[0]), (y[: last + 1] - y[last]) / (y[0] - y[last])
    below = 1.0 - x - y
    return ks[int(below.argmax())] if below.max() > 1e-12 else ks[last]


def evidence(candidates: Candidates) -> dict[str, float]:
    """Return how far each criterion's pick stands out among the candidates, by criterion.

    From 0 to 1: the share of the range of its values by which the pick is better than the median of the others. About
    0 for a curve that is flat around its best, however far its worst; 1 for a single peak over a floor. Without units,
    so that criteria compare; 0 where there is one value, or where all are equal. In the median a candidate weighs as
    much as the range of ln K that it stands for, so that further candidates around the best change little.

    Raises:
        DataError: there are no candidates.
    """
    found = dict[str, float]()
    for name, k in picks(candidates).items():
        if name in CRITERIA:
            values = {each: candidates[each].get(name, math.nan) for each in candidates}
            values = {each: value for each, value in values.items() if math.isfinite(value)}
            span, gain = max(values.values()) - min(values.values()), 0.0
            if len(values) > 1:
                ks = np.array(sorted(values))
                edges = np.concatenate([ks[:1], np.sqrt(ks[1:] * ks[:-1]), ks[-1:]])
                widths = dict(zip(ks.tolist(), np.diff(np.log(edges)).tolist(), strict=True))
                others = sorted((value, widths[each]) for each, value in values.items() if each != k)
                gain = values[k] - _weighted_median(others)
            gain = gain if CRITERIA[name].larger_is_better else -gain
            found[name] = min(max(gain / span, 0.0), 1.0) if span > 0 else 0.0
    return found


def vote(picked: Mapping[str, int], weights: Mapping[str, float], ks: Sequence[int]) -> int:
    """Return the candidate nearest, in ratio, to the weighted median of the picks of the criteria that vote.

    A pick at either end of the candidates is the end of a slope rather than an optimum: it abstains, unless one end
    holds more than two thirds of the weight or there are fewer than five candidates.

    Args:
        picked: K by criterion.
        weights: at least 0, by criterion; see `evidence`. Where all are 0, all count alike.
        ks: the candidates.

    Raises:
        DataError: no criterion votes.
    """
    voting, _ = _votes(picked, weights, ks)
    if not voting:
        raise DataError("vote: no criterion was measured")
    middle = _weighted_median(sorted((math.log(k), weights[name]) for name, k in voting.items()))
    return min(sorted(ks), key=lambda k: abs(math.log(k) - middle))


def _weighted_median(pairs: Sequence[tuple[float, float]]) -> float:
    """Return the value with half of the weight on either side, of pairs (value, weight) in order of the values.

    Where just half of the weight lies below, the middle of the two values beside it; without weights all count alike.
    """
    total = np.cumsum([weight for _, weight in pairs])
    total = total if total[-1] > 0 else np.arange(1.0, len(pairs) + 1)
    sides = np.searchsorted(total, [total[-1] * (0.5 - 1e-9), total[-1] * (0.5 + 1e-9)])
    return float(np.mean([pairs[side][0] for side in sides]))


def _votes(
    picked: Mapping[str, int], weights: Mapping[str, float], ks: Sequence[int]
) -> tuple[dict[str, int], dict[str, int]]:
    """Divide the picks into those that count and those that abstain."""
    measured = {name: k for name, k in picked.items() if name in CRITERIA and CRITERIA[name].votes}
    votes = {name: k for name, k in measured.items() if STAND_INS.get(name) not in measured}
    ends = {name: k for name, k in votes.items() if not min(ks) < k < max(ks)}
    inside = {name: k for name, k in votes.items() if name not in ends}
    at_one = max(sum(weights[name] for name, k in ends.items() if k == end) for end in (min(ks), max(ks)))
    is_most = 3 * at_one > 2 * sum(weights[name] for name in votes)
    if len(ks) < _MIN_CANDIDATES_FOR_ENDS or not inside or is_most:
        return votes, {}
    return inside, ends


def refine(ks: Sequence[int], best: int, *, points: int = 4) -> tuple[int, ...]:
    """Return further candidates between the best one's neighbours, geometrically spread, none tried before.

    At most `points`, increasing; none when every number between the neighbours has been tried.

    Raises:
        ConfigError: `best` was not tried.
    """
    tried = sorted(set(ks))
    if best not in tried:
        raise ConfigError(f"best = {best}: must be one of the numbers tried, {tried}")
    place = tried.index(best)
    low, high = tried[max(place - 1, 0)], tried[min(place + 1, len(tried) - 1)]
    free = [k for k in range(low + 1, high) if k != best]
    if len(free) <= points:
        return tuple(free)
    chosen = set[int]()
    for target in np.geomspace(low, high, points + 2)[1:-1]:
        chosen.add(min((k for k in free if k not in chosen), key=lambda k: abs(math.log(k / target))))
    return tuple(sorted(chosen))


# The number of clusters.
#
# `method.clusters: auto` or a list leaves it to select-k: written there because that is where the number would stand,
# and read as `select_k.candidates` because it is a setting of the search and of no method.

Rule = Literal[
    "vote",
    "coding_length",
    "feature_coding_length",
    "eigengap",
    "knee",
    "silhouette",
    "calinski_harabasz",
    "davies_bouldin",
    "modularity",
    "near_modularity",
    "map_equation",
    "stability",
    "prediction_strength",
    "null_contrast",
    "resampled_silhouette",
    "umap_silhouette",
    "merge",
]

_LIST = "a list of integers such as [5, 8, 10]"


class SelectKConfig(Config):
    """The choice of K: the stage select-k."""

    candidates: tuple[int, ...] | Literal["auto"] | None = None
    """Numbers of clusters to try: a list, or `auto`; the same as writing that for `method.clusters`. None: nothing to
    choose."""
    least: int = Field(2, ge=2)
    """Smallest number that `auto` tries."""
    most: int | Literal["auto"] = "auto"
    """Largest number that `auto` tries, at most the rows. auto: 2·√N."""
    rounds: int = Field(2, ge=0, le=10)
    """Times that `auto` tries numbers between the best so far and its neighbours, after its first, geometric grid."""
    seeds: int = Field(2, ge=1, le=100)
    """Fits of each number, from `seed` on; their agreement is its stability. With 1 it is not measured."""
    rule: Rule = "vote"
    """vote: the middle, in ratio, of what the criteria pick, each with the weight of its evidence.
    knee: where the curve of coding lengths bends most.
    merge: what is left of the largest candidate's clusters when they are merged along a tree while modularity rises.
    prediction_strength: the most clusters that two seeds agree on, worst cluster by worst cluster.
    resampled_silhouette: the most clusters that come back in subsamples as well as the surest number does (chooseR).
    Any other: the number that is best by that criterion."""
    rows: int = Field(15_000, ge=2)
    """Rows of the seeded sample on which coding length, silhouette, Calinski–Harabasz and Davies–Bouldin are taken."""
    resamples: int = Field(0, ge=0)
    """Subsamples of 1,000 rows in which k-means is to find each candidate's clusters again; 100 as published (chooseR),
    some 0.1 s each. 0 measures none."""
    umap: bool = False
    """Whether the silhouette in a UMAP of 10 dimensions is listed too, on 2,000 rows; needs umap-learn."""
    distortion: float = Field(0.1, gt=0)
    """Squared error allowed per row in the coding length, in squared row lengths. The paper's ε²."""
    cpus_per_trial: int = Field(1, ge=1)
    """CPUs, and threads, of each trial."""
    gpus_per_trial: GpusOrAuto = "auto"
    """GPUs of each trial; 0 computes on the CPU. auto: as many as `resources.gpus_per_worker`."""
    max_concurrent: CountOrAuto = "auto"
    """Trials at a time. auto: as many as the cluster has room for when the stage begins."""

    @model_validator(mode="after")
    def _bounded(self) -> SelectKConfig:
        if self.most != "auto" and self.most < self.least:
            raise ValueError(f"most = {self.most}: must be at least select_k.least = {self.least}, or auto")
        if self.rule in ("stability", "prediction_strength") and self.seeds < 2:
            raise ValueError(f"rule = {self.rule}: needs select_k.seeds of at least 2, whose partitions it compares")
        for rule, name, is_set in (
            ("resampled_silhouette", "resamples", self.resamples > 0),
            ("umap_silhouette", "umap", self.umap),
        ):
            if self.rule == rule and not is_set:
                raise ValueError(f"rule = {rule}: needs select_k.{name}")
        return self

    def refuse_above(self, rows: int) -> None:
        """Raise `ConfigError` if a candidate, or the least that `auto` tries, is above the number of rows."""
        if self.candidates == "auto" and self.least > rows:
            raise ConfigError(f"select_k.least = {self.least}: must be at most the number of rows, {rows}")
        if isinstance(self.candidates, tuple) and max(self.candidates) > rows:
            shown = list(self.candidates)
            raise ConfigError(f"method.clusters = {shown}: {max(shown)} is above the number of rows, {rows}")

    def first(self, rows: int) -> tuple[int, ...]:
        """Return the candidates of the first round: the list, or for `auto` a geometric grid of ratio 1.5."""
        if isinstance(self.candidates, tuple):
            return self.candidates
        return geometric_grid(min(self.least, rows), self.largest(rows))

    def largest(self, rows: int) -> int:
        """Return the largest candidate on so many rows."""
        if isinstance(self.candidates, tuple):
            return max(self.candidates)
        most = math.ceil(2 * math.sqrt(rows)) if self.most == "auto" else self.most
        return min(max(most, self.least), rows)


def normalize_clusters(tree: dict[str, Any]) -> dict[str, Any]:
    """Move an open number of clusters from `method.clusters` to `select_k.candidates`; the tree is not changed.

    Returns:
        The tree with a number in `method.clusters` in any case: for an open one the largest candidate, or 2 for `auto`.

    Raises:
        ValueError: a candidate is no number of clusters, or both keys are set.
    """
    method, group = tree.get("method"), tree.get("select_k", {})
    if not isinstance(method, dict) or not isinstance(group, dict):
        return tree
    clusters, candidates = method.get("clusters"), group.get("candidates")
    is_number = isinstance(clusters, str) and clusters.strip().isdecimal()
    if isinstance(clusters, str | list | tuple) and not is_number:
        if candidates is not None:
            raise ValueError(f"select_k.candidates = {candidates}: method.clusters = {clusters} says it already")
        key, candidates = "method.clusters", clusters
    elif candidates is None:
        return tree
    elif clusters is not None:
        raise ValueError(f"method.clusters = {clusters}: select_k.candidates = {candidates} leaves it open; keep one")
    else:
        key = "select_k.candidates"
    found = _validate_clusters(key, candidates)
    stand_in = 2 if found == "auto" else found[-1]  # nothing reads the 2
    return tree | {"method": method | {"clusters": stand_in}, "select_k": group | {"candidates": found}}


def denormalize_clusters(tree: dict[str, Any]) -> dict[str, Any]:
    """Return the inverse of `normalize_clusters`: a dumped tree as a RUN.yaml has it."""
    group = dict(tree.get("select_k") or {})
    candidates = group.pop("candidates", None)
    if candidates is None:
        return tree
    method = tree["method"] | {"clusters": candidates if candidates == "auto" else list(candidates)}
    rest = {key: value for key, value in tree.items() if key != "select_k"}
    return rest | {"method": method} | ({"select_k": group} if group else {})


def _validate_clusters(key: str, value: Any) -> tuple[int, ...] | Literal["auto"]:
    if value == "auto":
        return "auto"
    if not isinstance(value, list | tuple):
        one = "an integer, " if key == "method.clusters" else ""
        raise ValueError(f"{key} = {value!r}: must be {one}auto, or {_LIST}")
    shown = list(value)
    if not shown:
        raise ValueError(f"{key} = []: names no candidate; write auto, or {_LIST}")
    for one in shown:
        if not isinstance(one, int) or isinstance(one, bool):
            raise ValueError(f"{key} = {shown}: {one!r} is no integer; write auto, or {_LIST}")
        if one < 2:
            raise ValueError(f"{key} = {shown}: {one} must be at least 2")
        if shown.count(one) > 1:
            raise ValueError(f"{key} = {shown}: names {one} more than once")
    return tuple(sorted(shown))
