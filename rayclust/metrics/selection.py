"""Choice of the number of clusters from a table of criteria of several candidates."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from rayclust.errors import ConfigError, DataError

RULES = ("vote", "coding_length", "knee")
"""Rules of `choose`; the name of any criterion below is one too."""


Candidates = Mapping[int, Mapping[str, float]]
"""K to its criteria, values by name; see `metrics.internal.measure`."""


@dataclass(frozen=True)
class Choice:
    """The chosen number of clusters, why in words, and the K that each criterion alone would choose."""

    k: int
    rule: str
    reason: str
    picks: Mapping[str, int]


@dataclass(frozen=True)
class Criterion:
    """How a criterion is read: whether the largest value is the best, and whether it takes part in the vote."""

    larger_is_better: bool
    votes: bool = True


CRITERIA = {
    "coding_length": Criterion(larger_is_better=False),
    "silhouette": Criterion(larger_is_better=True),
    "calinski_harabasz": Criterion(larger_is_better=True, votes=False),
    "davies_bouldin": Criterion(larger_is_better=False),
    "modularity": Criterion(larger_is_better=True),
    "map_equation": Criterion(larger_is_better=False),
    "stability": Criterion(larger_is_better=True),
}
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
        rule: `vote`: the middle, in ratio, of the K that the criteria pick; `coding_length`: the least coding length;
            `knee`: the elbow of the coding length; or the name of any criterion.

    Raises:
        ConfigError: the rule is unknown.
        DataError: there are no candidates, or none has the criterion of the rule.
    """
    picked = picks(candidates)
    ks = sorted(candidates)
    if rule not in RULES and rule not in CRITERIA:
        raise ConfigError(f"rule = {rule!r}: must be one of {', '.join(dict.fromkeys([*RULES, *CRITERIA]))}")
    if rule == "vote":
        k = vote(picked, ks)
        voting, abstaining = _votes(picked, ks)
        others = {name: k for name, k in picked.items() if name not in voting and name not in abstaining}
        heads = f"K = {k} is the middle, in ratio, of", "no vote, being an end of the candidates:", "for comparison:"
        groups = (
            (head, ", ".join(f"{name.replace('_', ' ')} {k}" for name, k in group.items()))
            for head, group in zip(heads, (voting, abstaining, others), strict=True)
        )
        return Choice(k, rule, "; ".join(f"{head} {listed}" for head, listed in groups if listed), picked)
    if rule not in picked:
        raise DataError(f"rule = {rule!r}: no candidate has what it asks for")
    k = picked[rule]
    words = "the elbow of the coding length" if rule == "knee" else f"the best {rule.replace('_', ' ')}"
    return Choice(k, rule, f"K = {k} has {words} among {', '.join(map(str, ks))}", picked)


def picks(candidates: Candidates) -> dict[str, int]:
    """Return the K that each criterion alone chooses, the smaller one on a tie; and `knee` of the coding length.

    Values that are missing or not finite are left out.

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
            picked[name] = (max if criterion.larger_is_better else min)(values, key=lambda k: values[k])
            elbow = {"knee": knee([*values], [*values.values()])} if name == "coding_length" else elbow
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


def vote(picked: Mapping[str, int], ks: Sequence[int]) -> int:
    """Return the candidate nearest, in ratio, to the median of the picks of the criteria that vote.

    A pick at either end of the candidates is the end of a slope rather than an optimum: it abstains, unless more than
    two thirds of the criteria pick an end or there are fewer than five candidates.

    Raises:
        DataError: no criterion votes.
    """
    voting, _ = _votes(picked, ks)
    if not voting:
        raise DataError("vote: no criterion was measured")
    middle = float(np.median(np.log(list(voting.values()))))
    return min(sorted(ks), key=lambda k: abs(math.log(k) - middle))


def _votes(picked: Mapping[str, int], ks: Sequence[int]) -> tuple[dict[str, int], dict[str, int]]:
    """Divide the picks into those that count and those that abstain."""
    votes = {name: k for name, k in picked.items() if name in CRITERIA and CRITERIA[name].votes}
    ends = {name: k for name, k in votes.items() if not min(ks) < k < max(ks)}
    if len(ks) < _MIN_CANDIDATES_FOR_ENDS or 3 * len(ends) > 2 * len(votes):
        ends = {}
    return {name: k for name, k in votes.items() if name not in ends}, ends


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
