"""The number of clusters, chosen from a table of criteria of several candidates."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from rayclust.errors import ConfigError, DataError

RULES = ("vote", "coding_length", "knee")
"""Rules by which `choose` chooses; the name of any criterion below is one too."""


@dataclass(frozen=True)
class Candidate:
    """One number of clusters and what was measured of it."""

    k: int
    """K."""
    criteria: Mapping[str, float]
    """Values by name; see `metrics.criteria.measure`."""


@dataclass(frozen=True)
class Choice:
    """The number of clusters that was chosen."""

    k: int
    """K."""
    rule: str
    """By which rule."""
    reason: str
    """In words."""
    picks: Mapping[str, int]
    """What each criterion alone would choose."""


@dataclass(frozen=True)
class _Criterion:
    larger_is_better: bool
    votes: bool


_SLOPES_SHOW = 5
"""Candidates from which on an end of them is known for one."""

CRITERIA = {
    "coding_length": _Criterion(larger_is_better=False, votes=True),
    "silhouette": _Criterion(larger_is_better=True, votes=True),
    "calinski_harabasz": _Criterion(larger_is_better=True, votes=False),
    "davies_bouldin": _Criterion(larger_is_better=False, votes=True),
    "modularity": _Criterion(larger_is_better=True, votes=True),
    "map_equation": _Criterion(larger_is_better=False, votes=True),
    "stability": _Criterion(larger_is_better=True, votes=True),
}


def choose(candidates: Sequence[Candidate], rule: str = "vote") -> Choice:
    """The number of clusters by a rule, with the reason.

    Args:
        candidates: in any order, each K once.
        rule: `vote`: the middle, in ratio, of what the criteria pick; `coding_length`: the least coding length;
            `knee`: the elbow of the coding length; or the name of any criterion.

    Raises:
        ConfigError: the rule is unknown.
        DataError: there are no candidates, or none has the criterion that the rule asks for.
    """
    ordered = _ordered(candidates)
    if rule not in RULES and rule not in CRITERIA:
        raise ConfigError(f"rule = {rule!r}: must be one of {', '.join(dict.fromkeys([*RULES, *CRITERIA]))}")
    found = picks(ordered)
    if rule == "vote":
        ks = [c.k for c in ordered]
        return Choice(vote(found, ks), rule, _reason(found, ks), found)
    if rule not in found:
        raise DataError(f"rule = {rule!r}: no candidate has what it asks for")
    k = found[rule]
    words = "the elbow of the coding length" if rule == "knee" else f"the best {rule.replace('_', ' ')}"
    return Choice(k, rule, f"K = {k} has {words} among {', '.join(str(c.k) for c in ordered)}", found)


def picks(candidates: Sequence[Candidate]) -> dict[str, int]:
    """What each criterion alone chooses: its best value, the smaller K on a tie; and `knee` of the coding length."""
    ordered, found = _ordered(candidates), {}
    for name, criterion in CRITERIA.items():
        ks, values = _curve(ordered, name)
        if ks:
            found[name] = ks[int(np.argmax(values if criterion.larger_is_better else -values))]
    if "coding_length" in found:
        ks, values = _curve(ordered, "coding_length")
        found["knee"] = knee(ks, values.tolist())
    return found


def argmin_coding_length(candidates: Sequence[Candidate]) -> int:
    """The K of the least coding length; the smaller one on a tie."""
    return choose(candidates, "coding_length").k


def knee(ks: Sequence[int], values: Sequence[float], *, log: bool = True) -> int:
    """The K at which a falling curve lies farthest below the chord from its first to its lowest point.

    Both axes are scaled to from 0 to 1 first. The lowest point itself where nothing lies below the chord.

    Args:
        ks: increasing, at least 1.
        values: one for each.
        log: whether the K axis is ln K: right for coding lengths and inertias, whose costs and gains go with ratios
            of K.

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


def vote(found: Mapping[str, int], ks: Sequence[int]) -> int:
    """The candidate nearest, in ratio, to the median of the picks of the criteria that vote.

    A pick at either end of the candidates is no optimum but the end of a slope: it abstains, unless more than two
    thirds of the criteria pick an end or there are fewer than five candidates.

    Args:
        found: K by criterion.
        ks: the candidates.

    Raises:
        DataError: no criterion votes.
    """
    voices = _voices(found, ks)
    if not voices:
        raise DataError("vote: no criterion was measured")
    middle = float(np.median(np.log(list(voices.values()))))
    return min(sorted(ks), key=lambda k: abs(math.log(k) - middle))


def _voices(found: Mapping[str, int], ks: Sequence[int]) -> dict[str, int]:
    """The picks that count."""
    picked = {name: k for name, k in found.items() if name in CRITERIA and CRITERIA[name].votes}
    inner = {name: k for name, k in picked.items() if min(ks) < k < max(ks)}
    slopes = len(picked) - len(inner)
    return picked if len(ks) < _SLOPES_SHOW or 3 * slopes > 2 * len(picked) else inner


def _reason(found: Mapping[str, int], ks: Sequence[int]) -> str:
    """The vote in words."""
    voices = _voices(found, ks)
    silent = {name: k for name, k in found.items() if name in CRITERIA and CRITERIA[name].votes and name not in voices}
    others = {name: k for name, k in found.items() if name not in voices and name not in silent}
    parts = [f"K = {vote(found, ks)} is the middle, in ratio, of {_said(voices)}"]
    parts += [f"no vote, being an end of the candidates: {_said(silent)}"] if silent else []
    parts += [f"for comparison: {_said(others)}"] if others else []
    return "; ".join(parts)


def _said(found: Mapping[str, int]) -> str:
    return ", ".join(f"{name.replace('_', ' ')} {k}" for name, k in found.items())


def grid(least: int, most: int, *, ratio: float = 1.5) -> tuple[int, ...]:
    """Candidates from `least` to `most`, each about `ratio` times the one before.

    Args:
        least: at least 1.
        most: at least `least`.
        ratio: above 1.

    Raises:
        ConfigError: a bound is broken.
    """
    if not 1 <= least <= most:
        raise ConfigError(f"least = {least}, most = {most}: 1 ≤ least ≤ most is needed")
    if not ratio > 1:
        raise ConfigError(f"ratio = {ratio}: must be above 1")
    steps = max(1, math.ceil(math.log(most / least) / math.log(ratio))) if most > least else 0
    return tuple(sorted({round(least * (most / least) ** (i / max(steps, 1))) for i in range(steps + 1)}))


def refine(ks: Sequence[int], best: int, *, points: int = 4) -> tuple[int, ...]:
    """Further candidates between the best one's neighbours, geometrically spread, none tried before.

    Args:
        ks: tried so far, among them `best`.
        best: around which.
        points: at most this many.

    Returns:
        Increasing; empty when every number between the neighbours has been tried.

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
    wanted = np.geomspace(low, high, points + 2)[1:-1]
    chosen = set[int]()
    for target in wanted:
        chosen.add(min((k for k in free if k not in chosen), key=lambda k: abs(math.log(k / target))))
    return tuple(sorted(chosen))


def _ordered(candidates: Sequence[Candidate]) -> list[Candidate]:
    ordered = sorted(candidates, key=lambda candidate: candidate.k)
    if not ordered:
        raise DataError("candidates = 0: at least one is needed")
    if len({c.k for c in ordered}) < len(ordered):
        raise DataError(f"candidates hold a number of clusters twice: {[c.k for c in ordered]}")
    return ordered


def _curve(ordered: Sequence[Candidate], name: str) -> tuple[list[int], NDArray[np.float64]]:
    """The candidates that have a finite value of a criterion, and the values."""
    having = [(c.k, c.criteria[name]) for c in ordered if math.isfinite(c.criteria.get(name, math.nan))]
    return [k for k, _ in having], np.array([value for _, value in having])
