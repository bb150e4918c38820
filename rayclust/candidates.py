"""Which numbers of clusters a run tries, and by what rule it takes one of them.

`method.clusters: auto` or a list opens the number of clusters: written there because that is where the number would
stand, and read as `select_k.candidates` because it is a setting of the search and of no method.
"""

from __future__ import annotations

import math
from typing import Any, Literal

from pydantic import Field, model_validator

from rayclust.errors import ConfigError
from rayclust.metrics.selection import grid
from rayclust.options import Config

Rule = Literal[
    "vote",
    "coding_length",
    "knee",
    "silhouette",
    "calinski_harabasz",
    "davies_bouldin",
    "modularity",
    "map_equation",
    "stability",
]

STAND_IN = 2
LIST = "a list of integers such as [5, 8, 10]"


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
    """Fits of each number, from `seed` on; their agreement is its stability. With 1 nothing is said about it."""
    rule: Rule = "vote"
    """vote: the middle, in ratio, of what the criteria pick. knee: where the curve of coding lengths bends most.
    Any other: the number that is best by that criterion."""
    rows: int = Field(15_000, ge=2)
    """Rows of the seeded sample on which coding length, silhouette, Calinski–Harabasz and Davies–Bouldin are taken."""
    distortion: float = Field(0.1, gt=0)
    """Squared error allowed per row in the coding length, in squared row lengths. The paper's ε²."""
    cpus_per_trial: int = Field(1, ge=1)
    """CPUs, and threads, of each trial."""
    gpus_per_trial: float | Literal["auto"] = "auto"
    """GPUs of each trial; 0 computes on the CPU. auto: as many as `resources.gpus_per_worker`."""
    max_concurrent: int | Literal["auto"] = "auto"
    """Trials at a time. auto: as many as the cluster holds when the stage begins."""

    @model_validator(mode="after")
    def _bounded(self) -> SelectKConfig:
        if self.most != "auto" and self.most < self.least:
            raise ValueError(f"most = {self.most}: must be at least select_k.least = {self.least}, or auto")
        if self.rule == "stability" and self.seeds < 2:
            raise ValueError("rule = stability: needs select_k.seeds of at least 2, whose partitions it compares")
        if self.gpus_per_trial != "auto" and not 0 <= self.gpus_per_trial <= 16:
            raise ValueError(f"gpus_per_trial = {self.gpus_per_trial:g}: must be from 0 to 16, or auto")
        if self.max_concurrent != "auto" and self.max_concurrent < 1:
            raise ValueError(f"max_concurrent = {self.max_concurrent}: must be at least 1, or auto")
        return self

    def refuse_above(self, rows: int) -> None:
        """Refuses numbers that there are too few rows for.

        Raises:
            ConfigError: a candidate, or the least that `auto` tries, is above the number of rows.
        """
        if self.candidates == "auto" and self.least > rows:
            raise ConfigError(f"select_k.least = {self.least}: must be at most the number of rows, {rows}")
        if isinstance(self.candidates, tuple) and max(self.candidates) > rows:
            shown = list(self.candidates)
            raise ConfigError(f"method.clusters = {shown}: {max(shown)} is above the number of rows, {rows}")

    def first(self, rows: int) -> tuple[int, ...]:
        """What is tried first on so many rows: the list, or for `auto` a geometric grid."""
        if isinstance(self.candidates, tuple):
            return self.candidates
        return grid(min(self.least, rows), self.largest(rows))

    def largest(self, rows: int) -> int:
        """The largest number that is tried on so many rows."""
        if isinstance(self.candidates, tuple):
            return max(self.candidates)
        most = math.ceil(2 * math.sqrt(rows)) if self.most == "auto" else self.most
        return min(max(most, self.least), rows)


def opened(tree: dict[str, Any]) -> dict[str, Any]:
    """A RUN.yaml's tree with an open number of clusters where it is read: `select_k.candidates`.

    Args:
        tree: as written; not changed.

    Returns:
        The tree, with a number in `method.clusters` in any case: an open one is stood in for by its largest candidate,
        or by 2 for `auto`.

    Raises:
        ValueError: candidates that are none, by full key; or both keys are set.
    """
    method, group = tree.get("method"), tree.get("select_k", {})
    if not isinstance(method, dict) or not isinstance(group, dict):
        return tree
    clusters, candidates = method.get("clusters"), group.get("candidates")
    if isinstance(clusters, str | list | tuple) and not _is_number(clusters):
        if candidates is not None:
            raise ValueError(f"select_k.candidates = {candidates}: method.clusters = {clusters} says it already")
        key, candidates = "method.clusters", clusters
    elif candidates is None:
        return tree
    elif clusters is not None:
        raise ValueError(f"method.clusters = {clusters}: select_k.candidates = {candidates} leaves it open; keep one")
    else:
        key = "select_k.candidates"
    found = _checked(key, candidates)
    stand_in = STAND_IN if found == "auto" else found[-1]
    return tree | {"method": method | {"clusters": stand_in}, "select_k": group | {"candidates": found}}


def written(tree: dict[str, Any]) -> dict[str, Any]:
    """The inverse of `opened`: a dumped tree as a person would write it."""
    group = dict(tree.get("select_k") or {})
    candidates = group.pop("candidates", None)
    if candidates is None:
        return tree
    method = tree["method"] | {"clusters": candidates if candidates == "auto" else list(candidates)}
    rest = {key: value for key, value in tree.items() if key != "select_k"}
    return rest | {"method": method} | ({"select_k": group} if group else {})


def open_schema(method: dict[str, Any]) -> None:
    """Lets a method's JSON schema take what `opened` reads: `clusters` open, or left to `select_k.candidates`."""
    clusters = method["properties"]["clusters"]
    number = {key: clusters.pop(key) for key in ("type", "minimum")}
    candidates = {"type": "array", "items": number, "minItems": 1, "uniqueItems": True}
    clusters["anyOf"] = [number, {"const": "auto"}, candidates]
    method["required"] = [key for key in method.get("required", []) if key != "clusters"]


def _is_number(value: Any) -> bool:
    return isinstance(value, str) and value.strip().isdecimal()


def _checked(key: str, value: Any) -> tuple[int, ...] | Literal["auto"]:
    if value == "auto":
        return "auto"
    if not isinstance(value, list | tuple):
        one = "an integer, " if key == "method.clusters" else ""
        raise ValueError(f"{key} = {value!r}: must be {one}auto, or {LIST}")
    shown = list(value)
    if not shown:
        raise ValueError(f"{key} = []: names no candidate; write auto, or {LIST}")
    for one in shown:
        if not isinstance(one, int) or isinstance(one, bool):
            raise ValueError(f"{key} = {shown}: {one!r} is no integer; write auto, or {LIST}")
        if one < 2:
            raise ValueError(f"{key} = {shown}: {one} must be at least 2")
        if shown.count(one) > 1:
            raise ValueError(f"{key} = {shown}: names {one} more than once")
    return tuple(sorted(shown))
