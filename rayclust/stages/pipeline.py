"""Which stages there are, what each depends on, and how one is run, skipped or run again."""

from __future__ import annotations

import importlib
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from rayclust.config import RunConfig
from rayclust.errors import ArtefactError
from rayclust.language.vocabulary import kind_of
from rayclust.methods import has_own_space
from rayclust.stages.outputs import Listing, Outputs
from rayclust.stages.progress import duration
from rayclust.store import filesystem
from rayclust.store.layout import Run
from rayclust.store.lease import Lease, held
from rayclust.store.manifest import Manifest, Output, digest_of, read_manifest, seal, versions

logger = logging.getLogger(__name__)


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

    def inputs(self, config: RunConfig) -> tuple[str, ...]:
        """The stages that it reads in a run of this config."""
        return (*self.needs, *self.for_own_space) if has_own_space(config.method.name) else self.needs

    @property
    def module(self) -> Any:
        """The stage's file, imported when it is first needed: it brings torch and Ray."""
        return importlib.import_module(f"rayclust.stages.{self.name}")


@dataclass
class StageContext:
    """What a stage's `run` is given."""

    config: RunConfig
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


def _part(config: Any, *keys: str) -> dict[str, Any]:
    dumped: dict[str, Any] = config.model_dump(mode="json")
    return {key: dumped[key] for key in keys} if keys else dumped


def _method(config: RunConfig) -> dict[str, Any]:
    # What was set by hand matters besides the values: a preset fills only what was left open.
    return {"all": _part(config.method), "set": sorted(config.method.model_fields_set)}


def _words(config: RunConfig) -> dict[str, Any]:
    content: dict[str, Any] = {"label": _part(config.label), "encoder": _part(config.encoder)}
    if kind_of(config.label.vocabulary) in ("text", "embeddings"):
        found = filesystem.stat(config.label.vocabulary)
        content["words"] = found.stamp if found else None
    return content


def _index(config: RunConfig) -> dict[str, Any]:
    settings = {"index": _part(config.index), "seed": config.seed}
    return settings | ({"features": _part(config.features)} if has_own_space(config.method.name) else {})


def _levels(config: RunConfig) -> dict[str, Any]:
    return {"levels": config.assign.levels, "seed": config.seed} if config.assign.levels else {}


_IMAGES = ("format", "labels", "classes", "shard_size", "max_bytes", "max_pixels")

STAGES: dict[str, Stage] = {
    stage.name: stage
    for stage in (
        Stage("encode", (), lambda c: {"images": _part(c.images, *_IMAGES), "encoder": _part(c.encoder)}),
        Stage("neighbors", ("encode",), lambda c: {"neighbors": _part(c.neighbors), "features": _part(c.features)}),
        Stage(
            "train",
            ("encode", "neighbors"),
            lambda c: {"method": _method(c), "features": _part(c.features), "seed": c.seed},
        ),
        Stage("assign", ("encode", "train"), lambda c: {"features": _part(c.features)} | _levels(c)),
        Stage("label", ("encode", "assign"), lambda c: _words(c) | {"features": _part(c.features)}),
        Stage("index", ("encode",), _index, for_own_space=("train",)),
        Stage(
            "evaluate",
            ("encode", "neighbors", "assign"),
            lambda c: {"evaluate": _part(c.evaluate), "features": _part(c.features), "seed": c.seed},
        ),
        Stage("figures", ("encode", "train", "assign"), lambda c: {"features": _part(c.features), "seed": c.seed}),
        Stage(
            "report",
            ("encode", "train", "assign", "label", "evaluate", "figures"),
            lambda c: {"report": _part(c.report)},
            for_own_space=("index",),
        ),
    )
}


def run_stage(name: str, config: RunConfig, *, force: bool = False) -> Manifest:
    """Runs one stage, unless it is sealed for the same config and inputs.

    Raises:
        ArtefactError: a stage that it reads is not sealed.
        HeldError: another process works on the run.
        RayclustError: whatever the stage raises.
    """
    with held(Run(config.run)) as lease:
        return _run_held(name, config, lease, force)


def _run_held(name: str, config: RunConfig, lease: Lease, force: bool) -> Manifest:
    stage, run = STAGES[name], Run(config.run)
    inputs = _sealed_inputs(config, stage)
    plan = _listed(config) if name == "encode" else None
    digest = stage_digest(stage, config, inputs, plan)
    manifest = read_manifest(run, name)
    if manifest and manifest.digest == digest and not force and outputs_present(run, manifest):
        save_config(config)
        logger.info("%s: done before, skipped", name)
        return manifest
    filesystem.remove(run.manifest(name))
    save_config(config)  # only now: what is still sealed was made with the config that was there
    if force:
        filesystem.remove_tree(run.at("manifests", name))
    logger.info("%s: started", name)
    started = time.monotonic()
    result: StageResult = stage.module.run(StageContext(config, run, digest, inputs, plan))
    seconds = time.monotonic() - started
    manifest = Manifest(
        stage=name,
        digest=digest,
        inputs={need: content_digest(sealed) for need, sealed in inputs.items()} | _settings_digest(stage, config),
        counts=result.counts,
        outputs={path: Output(**written) for path, written in result.outputs.items()},
        versions=versions(),
        seconds=round(seconds, 3),
        extra=result.extra,
    )
    lease.check()
    seal(run, manifest)
    logger.info("%s: done in %s%s", name, duration(seconds), f", {result.summary}" if result.summary else "")
    return manifest


def run_all(config: RunConfig, *, force: bool = False, stop_after: str | None = None) -> dict[str, Manifest]:
    """Runs every stage that is not done, in order, up to and with `stop_after`."""
    sealed = {}
    with held(Run(config.run)):
        for name in STAGES:
            sealed[name] = run_stage(name, config, force=force)
            if name == stop_after:
                break
    return sealed


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
            "inputs": {need: content_digest(manifest) for need, manifest in inputs.items()},
            "plan": plan.digest if plan else None,
        }
    )


def content_digest(manifest: Manifest) -> str:
    """Digest of what a stage wrote, so that equal bytes from another config make nothing run again."""
    return digest_of(manifest.model_dump(mode="json", include={"outputs", "extra"}))


def outputs_present(run: Run, manifest: Manifest) -> bool:
    """Whether every file that the manifest lists is there with its size; one listing per folder."""
    listing = Listing(run)
    for path, written in manifest.outputs.items():
        if not listing.has(path, written.size):
            logger.warning("%s: %s is missing or has another size than was sealed: made again", manifest.stage, path)
            return False
    return True


def _listed(config: RunConfig) -> Any:
    """The input as it is now; imported late, for what it brings."""
    return importlib.import_module("rayclust.stages.inputs").plan(config)


class Seals:
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

    def _holds(self, stage: Stage, manifest: Manifest) -> bool:
        needs = stage.inputs(self._config)
        if not needs:
            wanted = _settings_digest(stage, self._config)["settings"]
            return manifest.inputs.get("settings", wanted) == wanted
        inputs = {need: found for need in needs if (found := self.of(need)) is not None}
        return len(inputs) == len(needs) and manifest.digest == stage_digest(stage, self._config, inputs)


def _settings_digest(stage: Stage, config: RunConfig) -> dict[str, str]:
    return {"settings": digest_of(stage.settings(config))}


def _sealed_inputs(config: RunConfig, stage: Stage) -> dict[str, Manifest]:
    seals, inputs = Seals(config), dict[str, Manifest]()
    for need in stage.inputs(config):
        manifest = seals.of(need)
        if manifest is None:
            raise ArtefactError(
                f"{stage.name}: the stage {need} of {config.run} is not finished for this config: "
                f"run `rayclust {need} RUN.yaml` first"
            )
        inputs[need] = manifest
    return inputs
