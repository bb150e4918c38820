"""How a stage is run, skipped or run again."""

from __future__ import annotations

import importlib
import logging
import time
from dataclasses import dataclass, field
from typing import Any

from rayclust.config import RunConfig
from rayclust.errors import ArtefactError
from rayclust.stages import meter
from rayclust.stages.graph import CHOSEN, SELECT_K, STAGES, Stage, stages_of
from rayclust.stages.outputs import Listing, Outputs, drop_damaged
from rayclust.stages.placing import placed
from rayclust.stages.progress import duration
from rayclust.store import filesystem
from rayclust.store.layout import Run
from rayclust.store.lease import Lease, held
from rayclust.store.manifest import Manifest, Output, digest_of, read_manifest, seal, versions

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
        return _run_held(name, config, lease, force)


def _run_held(name: str, config: RunConfig, lease: Lease, force: bool, *, inputs_are_checked: bool = False) -> Manifest:
    stage, run = STAGES[name], Run(config.run)
    if name not in stages_of(config):
        logger.info("%s: method.clusters = %d leaves nothing to choose, skipped", name, config.method.clusters)
        return Manifest(stage=name, digest="")
    seals = Seals(config)
    inputs, settled = _sealed_inputs(seals, config, stage), seals.settled(name)
    plan = _listed(config) if name == "encode" else None
    digest = stage_digest(stage, settled, inputs, plan)
    manifest, listing = read_manifest(run, name), Listing(run)
    if manifest and manifest.digest == digest and not force and outputs_present(run, manifest, listing):
        save_config(config)
        logger.info("%s: done before, skipped", name)
        return _restamped(run, manifest, listing)
    if not inputs_are_checked:
        _refuse_damaged(name, run, inputs)
    filesystem.remove(run.manifest(name))
    save_config(config)  # only now: what is still sealed was made with the config that was there
    if force:
        filesystem.remove_tree(run.at("manifests", name))
    logger.info("%s: started", name)
    started = time.monotonic()
    with placed(config.resources.placement), meter.measuring() as measured:
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
                    sealed[name] = _run_held(name, config, lease, forced, inputs_are_checked=True)
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


def outputs_present(run: Run, manifest: Manifest, listing: Listing | None = None) -> bool:
    """Whether every file that the manifest lists is there as it was written; one listing per folder."""
    listing = listing or Listing(run)
    return all(listing.has(path, written.model_dump()) for path, written in manifest.outputs.items())


def _refuse_damaged(name: str, run: Run, inputs: dict[str, Manifest]) -> None:
    for need, manifest in inputs.items():
        if not outputs_present(run, manifest):
            raise ArtefactError(
                f"{name}: a file of the stage {need} of {run.uri} is missing or damaged: "
                f"run `rayclust {need} RUN.yaml` first, which makes it again"
            )


def _restamped(run: Run, manifest: Manifest, listing: Listing) -> Manifest:
    """The manifest of outputs that are all there, sealed anew where they were copied: they need not be read again."""
    stamps = {path: found.stamp for path in manifest.outputs if (found := listing.find(path)) is not None}
    outputs = {
        path: written.model_copy(update={"stamp": stamps.get(path, "")}) for path, written in manifest.outputs.items()
    }
    if outputs != manifest.outputs:
        manifest = manifest.model_copy(update={"outputs": outputs})
        seal(run, manifest)
    return manifest


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


def _sealed_inputs(seals: Seals, config: RunConfig, stage: Stage) -> dict[str, Manifest]:
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
