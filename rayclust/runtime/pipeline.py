"""How a stage is run, skipped or run again."""

from __future__ import annotations

import importlib
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from rayclust.config import RunConfig
from rayclust.errors import ArtefactError
from rayclust.language.vocabulary import kind_of
from rayclust.methods import has_own_space
from rayclust.runtime import progress
from rayclust.runtime.artefacts import FileListing, Outputs, drop_damaged
from rayclust.runtime.cluster import scheduling
from rayclust.runtime.progress import duration
from rayclust.store import filesystem
from rayclust.store.layout import Run
from rayclust.store.lease import Lease, held
from rayclust.store.manifest import Manifest, Output, digest_of, read_manifest, seal, versions

# The graph of stages: which there are, what of the config each depends on, and which others it reads.


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


logger = logging.getLogger(__name__)


@dataclass
class StageContext:
    """What a stage's `run` is given."""

    config: RunConfig
    """With the number of clusters that was chosen, for stages that come after the choice."""
    run: Run
    digest: str
    """Of the config and all inputs; units of work carry it in their markers."""
    inputs: dict[str, Manifest]
    """The manifests of the stages that it reads."""
    plan: Any = None
    """The encode stage's plan of input shards."""


@dataclass
class StageResult:
    """What a stage hands back to be sealed."""

    outputs: Outputs
    counts: dict[str, int]
    extra: dict[str, Any] = field(default_factory=dict)
    summary: str = ""
    """One line for the log."""


class DamagedInputError(ArtefactError):
    """A file of an earlier stage was damaged; it is removed, so that its stage makes it again."""


def run_stage(name: str, config: RunConfig, *, force: bool = False) -> Manifest:
    """Runs one stage, unless it is sealed for the same config and inputs.

    Raises:
        ArtefactError: a stage that it reads is not sealed.
        HeldError: another process works on the run.
        RayclustError: whatever the stage raises.
    """
    with held(Run(config.run)) as lease:
        return _run_locked(name, config, lease, force)


def _run_locked(
    name: str, config: RunConfig, lease: Lease, force: bool, *, inputs_are_checked: bool = False
) -> Manifest:
    stage, run = STAGES[name], Run(config.run)
    if name not in stages_of(config):
        logger.info("%s: method.clusters = %d leaves nothing to choose, skipped", name, config.method.clusters)
        return Manifest(stage=name, digest="")
    seals = Manifests(config)
    inputs, settled = _complete_inputs(seals, config, stage), seals.settled(name)
    plan = _list_inputs(config) if name == "encode" else None
    digest = stage_digest(stage, settled, inputs, plan)
    manifest, listing = read_manifest(run, name), FileListing(run)
    if manifest and manifest.digest == digest and not force and outputs_present(run, manifest, listing):
        save_config(config)
        logger.info("%s: done before, skipped", name)
        return _refresh_stamps(run, manifest, listing)
    if not inputs_are_checked:
        _refuse_damaged(name, run, inputs)
    filesystem.remove(run.manifest(name))
    save_config(config)  # only now: what is still sealed was made with the config that was there
    if force:
        filesystem.remove_tree(run.at("manifests", name))
    logger.info("%s: started", name)
    started = time.monotonic()
    with scheduling(config.resources.placement), progress.collect_timings() as measured:
        result = _result(stage, StageContext(settled, run, digest, inputs, plan))
    seconds = time.monotonic() - started
    manifest = Manifest(
        stage=name,
        digest=digest,
        inputs=_input_digests(stage, inputs) | _settings_digest(stage, settled),
        counts=result.counts,
        outputs={path: Output(**written) for path, written in result.outputs.items()},
        versions=versions(),
        seconds=round(seconds, 3),
        measured=tuple(part.sealed() for part in measured),
        extra=result.extra,
    )
    lease.check()
    seal(run, manifest)
    logger.info("%s: done in %s%s", name, duration(seconds), f", {result.summary}" if result.summary else "")
    return manifest


def run_all(config: RunConfig, *, force: bool = False, stop_after: str | None = None) -> dict[str, Manifest]:
    """Runs every stage that is not done, in order, up to and with `stop_after`.

    Where a stage finds that bits of what it reads have turned, the stage that wrote it comes first again, once a file.
    """
    sealed, told = dict[str, Manifest](), set[str]()
    with held(Run(config.run)) as lease:
        while True:
            try:
                for name in stages_of(config):
                    # What a stage reads was looked at when it was this command's turn to make it.
                    forced = force and name not in sealed
                    sealed[name] = _run_locked(name, config, lease, forced, inputs_are_checked=True)
                    if name == stop_after:
                        break
                return sealed
            except DamagedInputError as error:
                if str(error) in told:
                    raise
                told.add(str(error))


def _result(stage: Stage, context: StageContext) -> StageResult:
    """What a stage makes.

    Raises:
        DamagedInputError: a file that it read is not what its stage wrote.
    """
    try:
        result: StageResult = stage.module.run(context)
    except ArtefactError as error:
        dropped = drop_damaged(context.run, str(error))
        if dropped is None:
            raise
        uri, maker = dropped
        raise DamagedInputError(
            f"{stage.name}: {uri} was damaged and is removed: run `rayclust {maker} RUN.yaml` first, "
            "which makes it again"
        ) from error
    return result


def save_config(config: RunConfig) -> None:
    """Keeps the config with the run, so that `status`, `search` and `predict` need the run alone."""
    run, content = Run(config.run), config.model_dump(mode="json", exclude_unset=True)
    try:
        if filesystem.read_json(run.config) == content:
            return
    except (filesystem.MissingError, ArtefactError):
        pass
    filesystem.write_json(run.config, content)


def stage_digest(stage: Stage, config: RunConfig, inputs: dict[str, Manifest], plan: Any = None) -> str:
    """The digest that a sealed manifest must carry to be good for this config and these inputs."""
    return digest_of(
        {
            "stage": stage.name,
            "revision": stage.revision,
            "settings": stage.settings(config),
            "inputs": _input_digests(stage, inputs),
            "plan": plan.digest if plan else None,
        }
    )


def content_digest(manifest: Manifest) -> str:
    """Digest of what a stage wrote, so that equal bytes from another config make nothing run again."""
    files = {path: written.model_dump(include={"digest", "size"}) for path, written in manifest.outputs.items()}
    return digest_of({"outputs": files, "extra": manifest.extra})


def _input_digests(stage: Stage, inputs: dict[str, Manifest]) -> dict[str, str]:
    return {
        need: digest_of(sealed.extra[stage.takes[need]]) if need in stage.takes else content_digest(sealed)
        for need, sealed in inputs.items()
    }


def outputs_present(run: Run, manifest: Manifest, listing: FileListing | None = None) -> bool:
    """Whether every file that the manifest lists is there as it was written; one listing per folder."""
    listing = listing or FileListing(run)
    return all(listing.has(path, written.model_dump()) for path, written in manifest.outputs.items())


def _refuse_damaged(name: str, run: Run, inputs: dict[str, Manifest]) -> None:
    for need, manifest in inputs.items():
        if not outputs_present(run, manifest):
            raise ArtefactError(
                f"{name}: a file of the stage {need} of {run.uri} is missing or damaged: "
                f"run `rayclust {need} RUN.yaml` first, which makes it again"
            )


def _refresh_stamps(run: Run, manifest: Manifest, listing: FileListing) -> Manifest:
    """The manifest of outputs that are all there, sealed anew where they were copied: they need not be read again."""
    stamps = {path: found.stamp for path in manifest.outputs if (found := listing.find(path)) is not None}
    outputs = {
        path: written.model_copy(update={"stamp": stamps.get(path, "")}) for path, written in manifest.outputs.items()
    }
    if outputs != manifest.outputs:
        manifest = manifest.model_copy(update={"outputs": outputs})
        seal(run, manifest)
    return manifest


def _list_inputs(config: RunConfig) -> Any:
    """The input as it is now; imported late, for what it brings."""
    return importlib.import_module("rayclust.runtime.inputs").plan_inputs(config)


class Manifests:
    """The manifests of a run that hold for a config and for what their own inputs hold now; each is read once."""

    def __init__(self, config: RunConfig) -> None:
        self._config, self._run = config, Run(config.run)
        self._found: dict[str, Manifest | None] = {}

    def of(self, name: str) -> Manifest | None:
        """The stage's manifest; None where it is missing or was sealed for another config or other inputs.

        Whether the images themselves have changed only their listing tells, which is not done here.
        """
        if name not in self._found:
            manifest = read_manifest(self._run, name)
            self._found[name] = manifest if manifest and self._holds(STAGES[name], manifest) else None
        return self._found[name]

    def settled(self, name: str) -> RunConfig:
        """The config as a stage is given it: with the number of clusters that was chosen, once it has been."""
        chosen = self.of(SELECT_K) if self._config.is_open and self._is_after_choice(name) else None
        return self._config if chosen is None else self._config.closed(chosen.extra[CHOSEN]["clusters"])

    def _is_after_choice(self, name: str) -> bool:
        needs = STAGES[name].inputs(self._config)
        return SELECT_K in needs or any(self._is_after_choice(need) for need in needs)

    def _holds(self, stage: Stage, manifest: Manifest) -> bool:
        needs = stage.inputs(self._config)
        if not needs:
            wanted = _settings_digest(stage, self._config)["settings"]
            return manifest.inputs.get("settings", wanted) == wanted
        inputs = {need: found for need in needs if (found := self.of(need)) is not None}
        if len(inputs) < len(needs):
            return False
        return manifest.digest == stage_digest(stage, self.settled(stage.name), inputs)


def _settings_digest(stage: Stage, config: RunConfig) -> dict[str, str]:
    return {"settings": digest_of(stage.settings(config))}


def _complete_inputs(seals: Manifests, config: RunConfig, stage: Stage) -> dict[str, Manifest]:
    inputs = dict[str, Manifest]()
    for need in stage.inputs(config):
        manifest = seals.of(need)
        if manifest is None:
            raise ArtefactError(
                f"{stage.name}: the stage {need} of {config.run} is not finished for this config: "
                f"run `rayclust {need} RUN.yaml` first"
            )
        inputs[need] = manifest
    return inputs
