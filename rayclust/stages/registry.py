"""Every stage's declaration: what it reads, which settings its results depend on, its revision.

Apart from the stages' own files, which bring torch: `status` and a run with nothing to do read declarations alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from rayclust.config import RunConfig
from rayclust.runtime.cluster import with_gpus
from rayclust.runtime.inputs import plan_inputs, with_encoder
from rayclust.runtime.pipeline import (
    CHOSEN,
    COUNTERPARTS,
    CURATE,
    SELECT_K,
    Stage,
    method_settings,
    settings_of,
)
from rayclust.runtime.trackers import Trackers
from rayclust.runtime.vocabularies import word_stamps
from rayclust.store import storage
from rayclust.store.manifest import (
    AssignOutputs,
    CounterpartsOutputs,
    CurateOutputs,
    EncodeOutputs,
    IndexOutputs,
    LabelOutputs,
    MapOutputs,
    NeighborsOutputs,
    SelectKOutputs,
    digest_of,
)
from rayclust.store.overlay import read_overlay
from rayclust.store.run import Run


def _encode_settings(config: RunConfig) -> dict[str, Any]:
    names = ["format", "labels", "columns", "classes", "shard_size", "max_bytes", "max_pixels"]
    names += [name for name in ("split", "test") if getattr(config.images, name) is not None]
    settings: dict[str, Any] = {"images": settings_of(config.images, *names)}
    if config.encoders:  # their features decide nothing here
        encoders = (encoder.model_copy(update={"features": None}) for encoder in config.encoders)
        settings["encoders"] = [settings_of(encoder) for encoder in encoders]
    else:
        settings["encoder"] = settings_of(config.encoder)
    return settings | ({} if config.images.split is None else {"seed": config.seed})


def _neighbors_settings(config: RunConfig) -> dict[str, Any]:
    neighbors = settings_of(config.neighbors)
    if config.neighbors.features == "run":  # runs of before had no other
        del neighbors["features"]
    if config.neighbors.spaces == "joint":
        del neighbors["spaces"]
    return {"neighbors": neighbors, "features": settings_of(config.features)}


OF_NOUNS = (
    "preset", "train", "templates", "normalize_prompts", "verbatim", "centers", "center_restarts", "center_rows",
    "nouns_per_center", "retrieval_temperature", "retrieval_nouns", "neighbors",
)  # fmt: skip
"""Keys of the method on which the stage depends."""


def _counterparts_settings(config: RunConfig) -> dict[str, Any]:
    method = config.method
    names = getattr(method, "vocabulary", None)
    names = config.label.lists if names is None else (names,) if isinstance(names, str) else names
    clusters = (
        settings_of(config.select_k, "candidates", "least", "most") if config.needs_selection else method.clusters
    )
    # How neighbours are searched; the defaults leave runs of before as they are.
    usual, ways = type(config.neighbors)(), ("method", "exact_rows", "min_recall")
    search = {key: value for key, value in settings_of(config.neighbors, *ways).items() if value != getattr(usual, key)}
    return {
        "method": {key: value for key, value in settings_of(method).items() if key in OF_NOUNS},
        "clusters": clusters,
        "set": sorted(method.model_fields_set.intersection(OF_NOUNS)),
        "vocabulary": list(names),
        "words": word_stamps(names),
        "features": settings_of(config.features),
        "encoder": settings_of(config.text_encoder),
        "seed": config.seed,
    } | ({"search": search} if search else {})


def candidate_settings(config: RunConfig) -> dict[str, Any]:
    """Return the settings that one candidate depends on besides its number of clusters; not the other candidates."""
    method = method_settings(config)
    method["all"].pop("clusters")
    method["set"] = [key for key in method["set"] if key != "clusters"]
    measured = settings_of(config.select_k, "seeds", "rows", "distortion")
    # What is off leaves the candidates of before as they are.
    measured |= {name: value for name, value in settings_of(config.select_k, "resamples", "umap").items() if value}
    return {"method": method, "measured": measured, "features": settings_of(config.features), "seed": config.seed}


def _select_k_settings(config: RunConfig) -> dict[str, Any]:
    search = settings_of(config.select_k, "candidates", "least", "most", "rounds", "rule")
    return {"candidate": candidate_settings(config), "search": search}


LEARNT_SPACE = {"learnt_space": 2}
"""Of stages that measure, for methods that learn from pixels, what was learnt: a revision of its own, so that a change
there leaves all other runs as they are."""


def _assign_settings(config: RunConfig) -> dict[str, Any]:
    levels = {"levels": config.assign.levels, "seed": config.seed} if config.assign.levels else {}
    learnt = LEARNT_SPACE if config.method.reads_pixels else {}
    return {"features": settings_of(config.features)} | levels | learnt


def _label_settings(config: RunConfig) -> dict[str, Any]:
    groups = {name: settings_of(getattr(config, name)) for name in ("label", "features")}
    groups["encoder"] = settings_of(config.text_encoder)
    # Runs of before had no such keys, and `unique` in place of the last two.
    own = {name: groups["label"].pop(name) for name in ("encoder_space", "distinct", "specificity")}
    groups["label"] |= {"encoder_space": own["encoder_space"]} if own["encoder_space"] is not None else {}
    groups["label"] |= {k: own[k] for k in ("distinct", "specificity")} if own["distinct"] else {"unique": False}
    stamps = word_stamps(config.label.lists)
    return groups | ({"words": stamps} if stamps else {}) | {"seed": config.seed}


def _curate_settings(config: RunConfig) -> dict[str, Any]:
    values = config.curate.duplicates.values
    stamp = storage.stat(storage.absolute(values)) if values else None
    return {
        "curate": settings_of(config.curate),
        "features": settings_of(config.features),
        "space": config.neighbors.features,
        "exact_rows": config.neighbors.exact_rows,
        "seed": config.seed,
        "values": stamp.stamp if stamp else None,
    }


def _report_settings(config: RunConfig) -> dict[str, Any]:
    overlay, _ = read_overlay(Run(config.run))  # the page shows the edits
    edits = {"overlay": digest_of(overlay.model_dump(mode="json"))} if overlay.edits else {}
    return {"report": settings_of(config.report)} | edits


def _plan_members(config: RunConfig) -> Any:
    """Digest the partitions that the method reads; None if it reads none."""
    if not config.method.partitions():
        return None
    from rayclust.runtime.members import plan_members  # which brings torch

    return plan_members(config)


def _seeded(
    *groups: str, of_own_space: tuple[str, ...] = (), measures_learnt: bool = False
) -> Callable[[RunConfig], dict[str, Any]]:
    """Return the settings of a stage that depends on the seed and on whole groups, some only with a space of its own.

    `measures_learnt` adds `LEARNT_SPACE`.
    """

    def settings(config: RunConfig) -> dict[str, Any]:
        names = (*groups, *(of_own_space if config.method.has_own_space else ()))
        learnt = LEARNT_SPACE if measures_learnt and config.method.reads_pixels else {}
        return {name: settings_of(getattr(config, name)) for name in names} | {"seed": config.seed} | learnt

    return settings


_DECLARED = (
    Stage(
        "encode",
        _encode_settings,
        revision=2,
        outputs=EncodeOutputs,
        on_gpu="encode",
        resolve=lambda config: with_encoder(config, lambda: with_gpus(config, "encode").resources.gpus > 0),
        plan=lambda config: plan_inputs(config, _encode_settings(config)),
    ),
    Stage("neighbors", _neighbors_settings, needs=("encode",), revision=2, on_gpu="train", outputs=NeighborsOutputs),
    Stage(COUNTERPARTS, _counterparts_settings, needs=("encode",), on_gpu="train", outputs=CounterpartsOutputs),
    Stage(
        SELECT_K,
        _select_k_settings,
        needs=("encode", "neighbors"),
        word_needs=("counterparts",),
        revision=4,
        on_gpu="trials",
        outputs=SelectKOutputs,
    ),
    Stage(
        "train",
        lambda config: _seeded("features")(config) | {"method": method_settings(config)},
        needs=("encode",),
        pair_needs=("neighbors",),
        word_needs=("counterparts",),
        needs_choice=True,
        reads_entry={SELECT_K: CHOSEN},
        on_gpu="train",
        plan=_plan_members,
        listener=Trackers,
    ),
    Stage(
        "assign",
        _assign_settings,
        needs=("encode", "train"),
        revision=4,
        on_gpu="train",
        outputs=AssignOutputs,
    ),
    Stage("label", _label_settings, needs=("encode", "assign"), outputs=LabelOutputs),
    Stage(CURATE, _curate_settings, needs=("encode", "neighbors", "assign"), outputs=CurateOutputs),
    Stage(
        "index",
        _seeded("index", of_own_space=("features",)),
        needs=("encode",),
        own_space_needs=("train",),
        on_gpu="train",
        outputs=IndexOutputs,
    ),
    Stage(
        "evaluate",
        _seeded("evaluate", "features", measures_learnt=True),
        needs=("encode", "neighbors", "assign"),
        own_space_needs=("train",),
        revision=4,
    ),
    Stage(
        "map",
        _seeded("map", "features"),
        needs=("encode",),
        own_space_needs=("train",),
        on_gpu="train",
        outputs=MapOutputs,
    ),
    Stage("figures", _seeded("features", measures_learnt=True), needs=("encode", "train", "assign", "map"), revision=3),
    Stage(
        "report",
        _report_settings,
        needs=("encode", "neighbors", "train", "assign", "label", "evaluate", "map", "figures"),
        own_space_needs=("index",),
        needs_choice=True,
        needs_curation=True,
        revision=4,
    ),
)
STAGES: Mapping[str, Stage] = {stage.name: stage for stage in _DECLARED}
"""Every stage by name, in the order in which a run does them."""
