"""Choice of the number of clusters from a table of criteria of several candidates."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from rayclust.errors import ConfigError, DataError

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
