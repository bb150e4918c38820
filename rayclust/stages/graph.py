"""The graph of stages: which there are, what of the config each depends on, and which others it reads."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from rayclust.config import RunConfig
from rayclust.language.vocabulary import kind_of
from rayclust.methods import has_own_space
from rayclust.store import filesystem

SELECT_K = "select-k"
CHOSEN = "chosen"
"""Entry of select-k's `extra`: the number of clusters and the files of its model, which is all that train reads."""


@dataclass(frozen=True)
class Stage:
    """A stage: what of the config it depends on and which stages it reads."""

    name: str
    needs: tuple[str, ...]
    settings: Callable[[RunConfig], dict[str, Any]]
    """The part of the config that its results depend on."""
    revision: int = 1
    """Raised when the stage's results change for the same config."""
    for_own_space: tuple[str, ...] = ()
    """Stages that it reads besides where the method has a space of its own."""
    for_pairs: tuple[str, ...] = ()
    """Stages that it reads besides where the method draws pairs of neighbours."""
    reads_choice: bool = False
    """Whether it reads select-k as well, in a run that leaves the number of clusters open."""
    takes: Mapping[str, str] = field(default_factory=dict)
    """Inputs of which it reads no more than one entry of their manifest's `extra`, and which."""

    @property
    def module(self) -> Any:
        """The stage's file, imported when it is first needed: it brings torch and Ray."""
        return importlib.import_module(f"rayclust.stages.{self.name.replace('-', '_')}")

    def inputs(self, config: RunConfig) -> tuple[str, ...]:
        """The stages that it reads in a run of this config."""
        own = self.for_own_space if has_own_space(config.method.name) else ()
        pairs = self.for_pairs if config.method.draws_pairs else ()
        choice = (SELECT_K,) if self.reads_choice and config.is_open else ()
        return (*self.needs, *own, *pairs, *choice)


def _part(config: Any, *keys: str) -> dict[str, Any]:
    dumped: dict[str, Any] = config.model_dump(mode="json")
    return {key: dumped[key] for key in keys} if keys else dumped


_ROOM = ("worker_memory",)


def _method(config: RunConfig) -> dict[str, Any]:
    # What was set by hand matters besides the values: a preset fills only what was left open.
    # What a worker has room for bounds who holds what, as their number does, and not what comes out.
    method = {key: value for key, value in _part(config.method).items() if key not in _ROOM}
    return {"all": method, "set": sorted(config.method.model_fields_set.difference(_ROOM))}


def _words(config: RunConfig) -> dict[str, Any]:
    content: dict[str, Any] = {"label": _part(config.label), "encoder": _part(config.encoder)}
    files = [name for name in config.label.lists if kind_of(name) in ("text", "embeddings")]
    if files:
        found = [filesystem.stat(name) for name in files]
        content["words"] = [file.stamp if file else None for file in found]
    return content


def candidate_settings(config: RunConfig) -> dict[str, Any]:
    """What one candidate of select-k depends on, besides its number of clusters: not which others there are."""
    method = _method(config)
    method["all"].pop("clusters")
    method["set"] = [key for key in method["set"] if key != "clusters"]
    measured = _part(config.select_k, "seeds", "rows", "distortion")
    return {"method": method, "measured": measured, "features": _part(config.features), "seed": config.seed}


def _index(config: RunConfig) -> dict[str, Any]:
    settings = {"index": _part(config.index), "seed": config.seed}
    return settings | ({"features": _part(config.features)} if has_own_space(config.method.name) else {})


def _division(config: RunConfig) -> dict[str, Any]:
    # Cells leave some pairs out; all rows on every worker are the same training whatever the resources.
    return {"rows": "cells"} if config.resources.rows == "cells" else {}


def _levels(config: RunConfig) -> dict[str, Any]:
    return {"levels": config.assign.levels, "seed": config.seed} if config.assign.levels else {}


_SEARCH = ("candidates", "least", "most", "rounds", "rule")
_IMAGES = ("format", "labels", "classes", "shard_size", "max_bytes", "max_pixels")

STAGES: dict[str, Stage] = {
    stage.name: stage
    for stage in (
        Stage("encode", (), lambda c: {"images": _part(c.images, *_IMAGES), "encoder": _part(c.encoder)}),
        Stage(
            "neighbors",
            ("encode",),
            lambda c: {"neighbors": _part(c.neighbors), "features": _part(c.features)},
            revision=2,
        ),
        Stage(
            SELECT_K,
            ("encode", "neighbors"),
            lambda c: {"candidate": candidate_settings(c), "search": _part(c.select_k, *_SEARCH)},
        ),
        Stage(
            "train",
            ("encode",),
            lambda c: {"method": _method(c), "features": _part(c.features), "seed": c.seed} | _division(c),
            for_pairs=("neighbors",),
            reads_choice=True,
            takes={SELECT_K: CHOSEN},
        ),
        Stage("assign", ("encode", "train"), lambda c: {"features": _part(c.features)} | _levels(c)),
        Stage("label", ("encode", "assign"), lambda c: _words(c) | {"features": _part(c.features), "seed": c.seed}),
        Stage("index", ("encode",), _index, for_own_space=("train",)),
        Stage(
            "evaluate",
            ("encode", "neighbors", "assign"),
            lambda c: {"evaluate": _part(c.evaluate), "features": _part(c.features), "seed": c.seed},
            for_own_space=("train",),
        ),
        Stage("figures", ("encode", "train", "assign"), lambda c: {"features": _part(c.features), "seed": c.seed}),
        Stage(
            "report",
            ("encode", "train", "assign", "label", "evaluate", "figures"),
            lambda c: {"report": _part(c.report)},
            for_own_space=("index",),
            reads_choice=True,
        ),
    )
}


def stages_of(config: RunConfig) -> tuple[str, ...]:
    """The stages of a run of this config, in order: all, and select-k only where the number of clusters is open."""
    return tuple(name for name in STAGES if name != SELECT_K or config.is_open)
