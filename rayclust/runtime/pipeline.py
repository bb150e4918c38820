"""Run the stages of a run in order: skip complete ones, run the others, and write each manifest last."""

from __future__ import annotations

import importlib
import logging
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from rayclust.config import RunConfig
from rayclust.errors import ArtefactError, ConfigError
from rayclust.report.formats import duration
from rayclust.runtime.cluster import is_small, may_use_driver, task_labels, use_driver, with_gpus
from rayclust.runtime.progress import Timing, context_value, keep_progress, stage_timings
from rayclust.store import storage
from rayclust.store.lock import RunLock, run_lock
from rayclust.store.manifest import (
    EncodeOutputs,
    FileListing,
    Manifest,
    Output,
    Outputs,
    SelectKOutputs,
    StageOutputs,
    digest_of,
    read_manifest,
    remove_damaged,
    versions,
    write_manifest,
)
from rayclust.store.run import Run

logger = logging.getLogger(__name__)

SELECT_K, COUNTERPARTS, CURATE = "select-k", "counterparts", "curate"
"""Stages that only some runs have."""
PLAN = "plan"
"""Entry of a manifest's `inputs`: the digest of the plan, of a stage that reads other stages as well."""
CHOSEN = "chosen"
"""Entry of select-k's `extra`: the number of clusters and the files of its model, all that train reads of it."""


@dataclass
class StageContext:
    """Arguments of a stage's `run`."""

    config: RunConfig
    """Of the run. Stages after select-k see the chosen number of clusters."""
    run: Run
    digest: str
    """Of the config and all inputs; the marks of finished tasks carry it."""
    inputs: dict[str, Manifest]
    """Manifests of the stages that it reads, by name."""
    plan: Any = None
    """Result of the stage's `plan`."""


@dataclass
class StageResult:
    """Return value of a stage's `run`, which goes into its manifest."""

    outputs: Outputs
    counts: dict[str, int]
    extra: dict[str, Any] = field(default_factory=dict)
    """JSON of the stage's `outputs`."""
    summary: str = ""
    """End of the log line, "" for none."""


class MetricsListener(Protocol):
    """Receiver of the metrics of a training while it runs."""

    def log(self, row: Mapping[str, Any]) -> None:
        """Take the next row."""

    def close(self) -> None:
        """Finish: the training is over."""


@dataclass(frozen=True)
class Stage:
    """Declaration of a stage: its inputs, and the settings that its results depend on. Its work is in its own file."""

    name: str
    settings: Callable[[RunConfig], dict[str, Any]]
    """Select the part of the config that goes into the stage's digest."""
    needs: tuple[str, ...] = ()
    """Stages that it reads in every run."""
    revision: int = 1
    """Raised when the results change for the same config."""
    own_space_needs: tuple[str, ...] = ()
    """Further stages that it reads where the method has a space of its own."""
    pair_needs: tuple[str, ...] = ()
    """Further stages that it reads where the method draws pairs of neighbours."""
    word_needs: tuple[str, ...] = ()
    """Further stages that it reads where the method reads words."""
    needs_choice: bool = False
    """True if it reads select-k as well, in runs that leave the number of clusters open."""
    needs_curation: bool = False
    """True if it reads curate as well, in runs that ask for it."""
    reads_entry: Mapping[str, str] = field(default_factory=dict)
    """By stage, the one entry of its manifest's `extra` that is read; all outputs of the stages that are not named."""
    outputs: type[StageOutputs] = StageOutputs
    """Type of the `extra` of its manifest."""
    on_gpu: Literal["encode", "train", "trials"] | None = None
    """If it computes on GPUs where there are some, the kind of work in `resources.placement` on whose nodes."""
    resolve: Callable[[RunConfig], RunConfig] | None = None
    """Fill in what the config leaves to the run, before any digest."""
    plan: Callable[[RunConfig], Any] | None = None
    """List the inputs of the stage from outside of the run; the plan's `digest` goes into the stage's."""
    listener: Callable[[RunConfig, str], MetricsListener] | None = None
    """Open the receiver of a training's metrics, in worker 0, from the config and the digest of the fit."""

    def run(self, context: StageContext) -> StageResult:
        """Run the stage by the `run` of its file, which is imported only now."""
        result: StageResult = importlib.import_module(f"rayclust.stages.{self.name.replace('-', '_')}").run(context)
        return result

    def inputs(self, config: RunConfig) -> tuple[str, ...]:
        """Return the stages that it reads in a run with this config."""
        own_space = self.own_space_needs if config.method.has_own_space else ()
        pairs = self.pair_needs if config.method.draws_pairs else ()
        choice = (SELECT_K,) if self.needs_choice and config.needs_selection else ()
        words = self.word_needs if config.method.reads_words else ()
        curation = (CURATE,) if self.needs_curation and config.curates else ()
        return (*self.needs, *own_space, *pairs, *words, *choice, *curation)


class _Registry(Mapping[str, Stage]):
    """Stages by name, in order. They lie above, in `stages/registry.py`, and are imported when first asked for."""

    def __getitem__(self, name: str) -> Stage:
        stage: Stage = importlib.import_module("rayclust.stages.registry").STAGES[name]
        return stage

    def __iter__(self) -> Iterator[str]:
        return iter(importlib.import_module("rayclust.stages.registry").STAGES)

    def __len__(self) -> int:
        return sum(1 for _ in self)


STAGES: Mapping[str, Stage] = _Registry()
"""Every stage by name, in the order in which a run does them."""


def stages_of(config: RunConfig) -> tuple[str, ...]:
    """Return the names of a run's stages in order.

    select-k is one only with K open, counterparts if the method reads words, and curate with a preset named.
    """
    asked = {SELECT_K: config.needs_selection, COUNTERPARTS: config.method.reads_words, CURATE: config.curates}
    return tuple(name for name in STAGES if asked.get(name, True))


def settings_of(group: Any, *keys: str) -> dict[str, Any]:
    """Return some fields of a group of settings, all if none is named, as JSON for a stage's digest."""
    dumped: dict[str, Any] = group.model_dump(mode="json")
    if dumped.get("engine") == "auto":  # came later: runs without it keep their digests
        del dumped["engine"]
    return {key: dumped[key] for key in keys} if keys else dumped


def method_settings(config: RunConfig) -> dict[str, Any]:
    """Return the method's settings for a digest.

    The names of those that were set by hand count as well as the values, since a preset fills only the open ones. The
    memory of a worker decides how data is distributed, changes no result, and is left out. So are the places of
    members, whose content counts by the plan of train, and options that came later and are off.
    """
    dumped = settings_of(config.method)
    later = ("keep_heads", "components", "fix_predictor_rate", "e_step_rows", "cosine_by_epochs", "milestones")
    off: tuple[Any, ...] = (None, False, 0, "images", [])
    left_out = {"worker_memory", "members", *(name for name in later if dumped.get(name) in off)}
    values = {key: value for key, value in dumped.items() if key not in left_out}
    settings = {"all": values, "set": sorted(config.method.model_fields_set.difference(left_out))}
    revision = type(config.method).revision
    return settings | ({"revision": revision} if revision > 1 else {})


def stage_digest(stage: Stage, config: RunConfig, inputs: dict[str, Manifest], plan: str | None = None) -> str:
    """Return the digest that a manifest must carry to be valid for a resolved config, inputs and a plan's digest."""
    return digest_of(
        {
            "stage": stage.name,
            "revision": stage.revision,
            "settings": stage.settings(config),
            "inputs": _input_digests(stage, inputs),
            "plan": plan,
        }
    )


def content_digest(manifest: Manifest) -> str:
    """Return the digest of a stage's outputs. Equal bytes from another config make no later stage run again."""
    files = {path: written.model_dump(include={"digest", "size"}) for path, written in manifest.outputs.items()}
    return digest_of({"outputs": files, "extra": manifest.extra})


def _input_digests(stage: Stage, inputs: dict[str, Manifest]) -> dict[str, str]:
    return {
        need: digest_of(manifest.extra[stage.reads_entry[need]])
        if need in stage.reads_entry
        else content_digest(manifest)
        for need, manifest in inputs.items()
    }


class Manifests:
    """Valid manifests of a run; each is read once."""

    def __init__(self, config: RunConfig) -> None:
        self._config, self._run = config, Run(config.run)
        self._found: dict[str, Manifest | None] = {}

    def of(self, name: str) -> Manifest | None:
        """Return a stage's manifest; None if it is missing or was written for another config or other inputs.

        Changes of the images, and of other runs, are not seen here, only by a stage's `plan`.
        """
        if name not in self._found:
            stage, manifest = STAGES[name], read_manifest(self._run, name)
            needs, is_valid = stage.inputs(self._config), False
            if manifest and needs:
                inputs = {need: found for need in needs if (found := self.of(need)) is not None}
                if len(inputs) == len(needs):
                    plan = manifest.inputs.get(PLAN)
                    is_valid = manifest.digest == stage_digest(stage, self.resolved(name), inputs, plan)
            elif manifest:
                # The digest holds the plan, which is not listed here: the digest of the settings alone must do.
                settings = digest_of(stage.settings(self._config))
                is_valid = manifest.inputs.get("settings", settings) == settings
            self._found[name] = manifest if is_valid else None
        return self._found[name]

    def resolved(self, name: str) -> RunConfig:
        """Return the config as a stage is given it: with the chosen number of clusters, once there is one."""
        chosen = self.of(SELECT_K) if self._config.needs_selection and self._follows_choice(name) else None
        if chosen is None:
            return self._config
        return self._config.with_clusters(chosen.outputs_of(SelectKOutputs).chosen.clusters)

    def _follows_choice(self, name: str) -> bool:
        needs = STAGES[name].inputs(self._config)
        return SELECT_K in needs or any(self._follows_choice(need) for need in needs)


class DamagedInputError(ArtefactError):
    """A file of an earlier stage was damaged and has been removed; its stage writes it again."""


def run_stage(name: str, config: RunConfig, *, force: bool = False) -> Manifest:
    """Run one stage, unless it is complete for the same config and inputs and `force` is false; return its manifest.

    Raises:
        ArtefactError: a stage that it reads is not complete.
        HeldError: another process works on the run.
        RayclustError: the stage itself fails.
    """
    with run_lock(Run(config.run)) as lease:
        return _run_or_skip(name, _resolved(config), lease, force=force)


def run_all(config: RunConfig, *, force: bool = False, stop_after: str | None = None) -> dict[str, Manifest]:
    """Run every stage that is not complete, in order; return the manifests by stage.

    If a stage finds a damaged file of an earlier one, the loop begins again and that stage writes the file once more.

    Args:
        config: of the run.
        force: run all stages, complete or not.
        stop_after: the last stage to run; None runs all.

    Raises:
        HeldError: another process works on the run.
        RayclustError: a stage fails, or the same file is found damaged twice.
    """
    done, damaged = dict[str, Manifest](), set[str]()
    with run_lock(Run(config.run)) as lease:
        config = _resolved(config)
        while True:
            try:
                for name in stages_of(config):
                    forced = force and name not in done
                    # Inputs were checked a moment ago, when this loop ran or skipped their stages.
                    done[name] = _run_or_skip(name, config, lease, force=forced, check_inputs=False)
                    if name == stop_after:
                        break
                return done
            except DamagedInputError as error:
                if str(error) in damaged:
                    raise
                damaged.add(str(error))


def _resolved(config: RunConfig) -> RunConfig:
    for stage in STAGES.values():
        config = stage.resolve(config) if stage.resolve is not None else config
    return config


def _run_or_skip(name: str, config: RunConfig, lease: RunLock, *, force: bool, check_inputs: bool = True) -> Manifest:
    stage, run, manifests = STAGES[name], Run(config.run, config.spaces), Manifests(config)
    if name not in stages_of(config):
        return _left_out(name, config)

    # 1. The manifests of its inputs, and with them the digest that its own must carry.
    inputs = dict[str, Manifest]()
    for need in stage.inputs(config):
        found = manifests.of(need)
        if found is None:
            raise ArtefactError(
                f"{name}: the stage {need} of {config.run} is not finished for this config: "
                f"run `rayclust {need} RUN.yaml` first"
            )
        inputs[need] = found
    context = StageContext(manifests.resolved(name), run, "", inputs, stage.plan(config) if stage.plan else None)
    context.digest = stage_digest(stage, context.config, inputs, context.plan.digest if context.plan else None)

    # 2. Skip what is complete. Its stamps become today's: files that were copied are not read again next time.
    manifest, listing = read_manifest(run, name), FileListing(run)
    if (
        manifest
        and manifest.digest == context.digest
        and not force
        and listing.has_all(manifest.model_dump()["outputs"])
    ):
        save_config(config)
        logger.info("%s: done before, skipped", name)
        stamps = {path: getattr(listing.find(path), "stamp", "") for path in manifest.outputs}
        outputs = {path: file.model_copy(update={"stamp": stamps[path]}) for path, file in manifest.outputs.items()}
        if outputs != manifest.outputs:
            manifest = manifest.model_copy(update={"outputs": outputs})
            write_manifest(run, manifest)
        return manifest
    for need, found in inputs.items() if check_inputs else ():
        if not listing.has_all(found.model_dump()["outputs"]):
            raise ArtefactError(
                f"{name}: a file of the stage {need} of {run.uri} is missing or damaged: "
                f"run `rayclust {need} RUN.yaml` first, which makes it again"
            )

    # 3. Run it. The config is saved only now: what is complete so far was made with the config that was there.
    storage.remove(run.manifest(name))
    save_config(config)
    if force:
        storage.remove_tree(run.at("manifests", name))
    if stage.on_gpu:
        # Not saved: `predict` and `search` may run on another machine.
        context.config = with_gpus(context.config, stage.on_gpu)
    return _run(stage, context, lease)


def _left_out(name: str, config: RunConfig) -> Manifest:
    """Return the manifest of a stage that the run does not have."""
    if name == CURATE:
        raise ConfigError("curate.preset = none: the run has no such stage; add for example curate.preset=list")
    why = f"method.clusters = {config.method.clusters} leaves nothing to choose"
    if name == COUNTERPARTS:
        why = f"method.name = {config.method.name} reads no words"
    logger.info("%s: %s, skipped", name, why)
    return Manifest(stage=name, digest="")


def _run(stage: Stage, context: StageContext, lease: RunLock) -> Manifest:
    """Run a stage and write its manifest, which comes last, and only from the process that still holds the run."""
    logger.info("%s: started", stage.name)
    started = time.monotonic()
    try:
        small, encode = False, context.inputs.get("encode")  # encode itself, without rows to count yet, decides alone
        if encode is not None and may_use_driver(context.config):
            rows = encode.outputs_of(EncodeOutputs)
            small = is_small(sum(rows.parts), rows.dimension)
        # Tasks go to the nodes for `tasks`, with GPUs to those for `train`.
        places, timings = context.config.resources.placement, list[Timing]()
        labels = {"tasks": places.tasks, "train": places.train}
        with (
            context_value(task_labels, labels),
            context_value(stage_timings, timings),
            use_driver(small),
            keep_progress(context.run),
        ):
            result = stage.run(context)
    except ArtefactError as error:
        uri, source = remove_damaged(context.run, STAGES, str(error))
        if not uri:
            raise
        raise DamagedInputError(
            f"{stage.name}: {uri} was damaged and is removed: run `rayclust {source} RUN.yaml` first, "
            "which makes it again"
        ) from error
    seconds = time.monotonic() - started
    settings = digest_of(stage.settings(context.config))
    planned = {PLAN: context.plan.digest} if context.plan and stage.needs else {}
    manifest = Manifest(
        stage=stage.name,
        digest=context.digest,
        inputs=_input_digests(stage, context.inputs) | {"settings": settings} | planned,
        counts=result.counts,
        outputs={path: Output(**written) for path, written in result.outputs.items()},
        versions=versions(),
        seconds=round(seconds, 3),
        measured=tuple(timing.section() for timing in timings),
        extra=stage.outputs.model_validate(result.extra).model_dump(mode="json", exclude_unset=True),
    )
    lease.check()
    write_manifest(context.run, manifest)
    summary = f", {result.summary}" if result.summary else ""
    logger.info("%s: done in %s%s", stage.name, duration(seconds), summary)
    return manifest


def save_config(config: RunConfig) -> None:
    """Write the config to the run, so that `status`, `search` and `predict` need the run alone."""
    run, content = Run(config.run), config.model_dump(mode="json", exclude_unset=True)
    try:
        if storage.read_json(run.config) == content:
            return
    except (storage.MissingError, ArtefactError):
        pass
    storage.write_json(run.config, content)
