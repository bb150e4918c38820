"""Stage `select-k`: choose the number of clusters by criteria of candidates, fitted over the cluster with Ray Tune.

A finished candidate leaves a mark, like a task of any other stage, and is not fitted again for the same number under
the same settings: neither after a kill nor from another list of candidates. Tune places and repeats the trials;
results go to the run's own files, and nothing is read back from Tune's folder, which is temporary.
"""

from __future__ import annotations

import logging
import os
import re
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from rayclust import errors
from rayclust.arrays import FloatArray, IntArray
from rayclust.config import RunConfig
from rayclust.errors import ArtefactError, RayclustError
from rayclust.methods import build, is_recuttable
from rayclust.methods.base import Method, Recuttable, Transform
from rayclust.metrics import selection
from rayclust.metrics.selection import Candidate, Choice
from rayclust.runtime import cluster
from rayclust.runtime.artefacts import Outputs, put_json
from rayclust.runtime.cluster import connect, on_every_node, require_label
from rayclust.runtime.models import read_method
from rayclust.runtime.pipeline import (
    CHOSEN,
    SELECT_K,
    Stage,
    StageContext,
    StageResult,
    content_digest,
    method_settings,
    settings_of,
)
from rayclust.runtime.progress import Progress
from rayclust.runtime.rows import BLOCK, StoredRows, cache_folder, drop_cache
from rayclust.runtime.tasks import (
    Task,
    TaskResult,
    done_marks,
    finished_tasks,
    read_mark,
    report_resume,
    run_and_mark,
)
from rayclust.stages.train import Job, StoredCheckpoints, drop_rows_on_error, fit, write_fit
from rayclust.store import storage, tables
from rayclust.store.manifest import Manifest, SelectKOutputs, digest_of
from rayclust.store.run import Run
from rayclust.training.loop import CheckpointInterval, Trainer

REVISION = 3
"""Raised when a candidate's result changes for the same settings."""
FIT = 0
"""Index of the one fit among the units, where a method needs no fit for each number of clusters."""
QUIET = {
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # no tables of their own for every trial
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # an interrupt ends the stage, not the experiment alone
    "RAY_AIR_NEW_OUTPUT": "0",  # the other kind of output prints a table whatever it is told
}
logger = logging.getLogger(__name__)


# One candidate: fit, assign every row, measure, write.


@dataclass(frozen=True)
class Search:
    """Inputs that all trials share."""

    config: RunConfig
    """The run's, its number of clusters open."""
    encode: Manifest
    digest: str
    """Of the stage: the name of the rows' copy on each node."""
    settings: str
    """Digest of everything but the number of clusters that a candidate depends on."""
    largest: int
    """The number that the one fit is for, where a method needs no fit for each."""
    gpus: float
    """Of each trial."""

    @classmethod
    def of(cls, context: StageContext) -> Search:
        """Build the search from a stage's context."""
        config, inputs = context.config, context.inputs
        largest = config.select_k.largest(inputs["encode"].counts["rows"])
        content = {
            "revision": REVISION,
            "settings": candidate_settings(config),
            "inputs": {name: content_digest(sealed) for name, sealed in inputs.items()},
            "largest": None if refits(config) else largest,
        }
        gpus = config.select_k.gpus_per_trial
        gpus = config.resources.gpus_per_worker if gpus == "auto" else gpus
        return cls(config, inputs["encode"], context.digest, digest_of(content), largest, gpus)

    @property
    def run(self) -> Run:
        """The run."""
        return Run(self.config.run)

    def unit(self, clusters: int) -> Task:
        """Return the task of a candidate; its index is its number of clusters."""
        return Task(clusters, digest_of([self.settings, clusters]))


def refits(config: RunConfig) -> bool:
    """Return whether the method needs a fit for each number of clusters."""
    return not is_recuttable(config.method.name)


def examine(search: Search, clusters: int) -> TaskResult:
    """Fit, measure and write one candidate.

    Returns:
        The files written; `criteria` in `extra`.
    """
    run, threads = search.run, search.config.select_k.cpus_per_trial
    torch.set_num_threads(threads)
    config = search.config.with_clusters(clusters)
    rows = StoredRows(run, search.encode, config.features, cache_folder(search.digest))
    labels, kept = list[IntArray](), None
    for method, history in _fits(search, config, rows):
        labels.append(_labels(method, rows))
        kept = kept or (method, history)
    if kept is None:
        raise ValueError("select_k.seeds = 0")
    criteria = _criteria(config, kept[0], rows, labels)
    written = write_fit(run, run.candidate(clusters), *kept)
    result = {"k": clusters, "criteria": criteria}
    outputs = written["outputs"] | put_json(run, run.candidate(clusters) + ".json", result)
    drop_checkpoints(search, clusters)
    return TaskResult(outputs, {"steps": written["steps"]}, result)


def drop_checkpoints(search: Search, clusters: int) -> None:
    """Remove the checkpoints of a candidate's fits."""
    for seed in range(search.config.select_k.seeds):
        storage.remove_tree(search.run.checkpoints(_fit_digest(search, clusters, seed)))


def _fits(search: Search, config: RunConfig, rows: StoredRows) -> Iterator[tuple[Method, list[dict[str, Any]]]]:
    """Yield the candidate's fits and their metrics, one per seed; the first seed is the run's own."""
    clusters = config.method.clusters
    if not refits(config):
        folder = search.run.selection_fit
        history = tables.read_table(storage.join(folder, "metrics.parquet")).to_pylist()
        marked = read_mark(search.run.shard_manifest(FIT, SELECT_K))
        digests = {path: written["digest"] for path, written in marked[1].outputs.items()} if marked else {}
        fitted = read_method(folder, SELECT_K, digests)
        if not isinstance(fitted, Recuttable):
            raise ArtefactError(f"{folder}: holds another method; run select-k again with --force")
        yield fitted.recut(clusters), history
        for seed in range(1, config.select_k.seeds):
            yield fitted.recut(clusters, config.seed + seed), history
        return
    device = "cuda" if search.gpus else "cpu"
    for seed in range(config.select_k.seeds):
        method = build(config.method, rows.dimension, rows.count, config.seed + seed)
        store = StoredCheckpoints(search.run, _fit_digest(search, clusters, seed))
        every = CheckpointInterval(epochs=None, seconds=config.resources.checkpoint_seconds)
        trainer = Trainer(config.seed + seed, device, None, store, every)
        method.fit(rows, trainer)
        yield method.eval(), trainer.history


def _fit_digest(search: Search, clusters: int, seed: int) -> str:
    return digest_of([search.settings, clusters, seed])


def _labels(method: Method, rows: StoredRows) -> IntArray:
    """Return the most probable cluster of each row, Int32[N]."""
    device = _device(method)
    with torch.inference_mode():
        found = [method.predict_proba(block.to(device)).argmax(dim=1).int().cpu().numpy() for block in rows.blocks()]
    return np.concatenate(found)


def _device(method: Method) -> torch.device:
    return next((tensor.device for tensor in method.state_dict().values()), torch.device("cpu"))


def _criteria(config: RunConfig, method: Method, rows: StoredRows, labels: list[IntArray]) -> dict[str, float]:
    """Compute every criterion: those in the rows' space on a sample, the others on all rows.

    Undefined ones (the silhouette of one occupied cluster, the stability of one fit) are left out.
    """
    from rayclust.metrics import internal
    from rayclust.metrics.internal import CriteriaOptions, measure, size_summary

    options = config.select_k
    sample = _sample(rows.count, options.rows, config.seed)
    space = _space(method, rows.tensor(), sample)
    chosen = CriteriaOptions(options.distortion, silhouette_rows=options.rows, seed=config.seed)
    found = measure(space, [labels[0][sample]], None, chosen)
    neighbors = rows.neighbors().numpy()
    found["neighbor_agreement"] = internal.neighbor_agreement(labels[0], neighbors)
    found["modularity"] = internal.modularity(labels[0], neighbors)
    found["map_equation"] = internal.map_equation(labels[0], neighbors)
    if len(labels) > 1:
        found["stability"] = internal.stability(labels)
    found |= size_summary(labels[0], config.method.clusters)
    found["empty"] = config.method.clusters - found["occupied"]
    return {name: float(value) for name, value in found.items() if np.isfinite(value)}


def _sample(count: int, wanted: int, seed: int) -> IntArray:
    return np.sort(np.random.default_rng(seed).choice(count, min(wanted, count), replace=False))


def _space(method: Method, x: Tensor, sample: IntArray) -> FloatArray:
    """Return the sample in the method's own space where it has one, else as unit features; Float32[n d]."""
    blocks, device = [], _device(method)
    with torch.inference_mode():
        for start in range(0, len(sample), BLOCK):
            block = x[torch.from_numpy(sample[start : start + BLOCK])].to(device)
            z = method.transform(block) if isinstance(method, Transform) else functional.normalize(block, dim=1)
            blocks.append(z.float().cpu().numpy())
    return np.concatenate(blocks)


# Candidates over the cluster: one Ray Tune trial each.

OnChange = Callable[[Sequence[int], int], None]
"""Callback with the candidates that are running and the number that just finished."""


def run_trials(search: Search, candidates: Sequence[int], on_change: OnChange) -> None:
    """Fit and measure candidates on the cluster.

    Args:
        search: what they have in common.
        candidates: numbers of clusters; each leaves its mark.
        on_change: called whenever a trial begins or ends.

    Raises:
        RayclustError: a trial failed; the line names the candidate. Those under way are stopped, those finished kept.
    """
    connect()
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)  # failed trials are reported below
    folder = tempfile.TemporaryDirectory(prefix="rayclust-select-k-", ignore_cleanup_errors=True)
    with folder as storage:
        results = _tuner(search, candidates, storage, on_change).fit()
        # In the order of the candidates; fewer where Tune stopped before it had made a trial of each.
        for k, result in zip(candidates, results, strict=False):
            _raise_failure(k, result)


def _tuner(search: Search, candidates: Sequence[int], storage: str, on_change: OnChange) -> Any:
    from ray import tune

    options, labels = search.config.select_k, search.config.resources.placement.trials
    require_label("trials", labels)
    bundle = {"CPU": options.cpus_per_trial} | ({"GPU": search.gpus} if search.gpus else {})
    resources = tune.PlacementGroupFactory([bundle], **({"bundle_label_selector": [dict(labels)]} if labels else {}))
    return tune.Tuner(
        tune.with_resources(partial(_trial, search), resources),
        param_space={"k": tune.grid_search(list(candidates))},
        tune_config=tune.TuneConfig(max_concurrent_trials=concurrent(search), reuse_actors=True),
        run_config=tune.RunConfig(
            name=f"rayclust-{search.digest[:12]}-{time.time_ns()}",
            storage_path=storage,
            verbose=0,
            stop=_error_callback(),
            callbacks=[_watcher(on_change)],
            failure_config=tune.FailureConfig(max_failures=search.config.resources.max_failures),
        ),
    )


def _trial(search: Search, space: dict[str, Any]) -> None:
    """Run one candidate in its worker; our own errors are reported and not retried."""
    from ray import tune

    unit = search.unit(int(space["k"]))
    try:
        run_and_mark(search.run.shard_manifest(unit.index, SELECT_K), unit, lambda: examine(search, unit.index))
    except RayclustError as error:
        tune.report({"refused": str(error), "kind": type(error).__name__})
    else:
        tune.report({"refused": None})


def concurrent(search: Search) -> int:
    """Return how many trials may run at a time."""
    options = search.config.select_k
    if options.max_concurrent != "auto":
        return options.max_concurrent
    nodes = cluster.live_nodes(search.config.resources.placement.trials)
    return max(1, sum(_trials_of_node(node, options.cpus_per_trial, search.gpus) for node in nodes))


def _trials_of_node(node: dict[str, float], cpus: float, gpus: float) -> int:
    fits = int(node.get("CPU", 0) / cpus)
    return min(fits, int(node.get("GPU", 0) / gpus)) if gpus else fits


def _raise_failure(k: int, result: Any) -> None:
    """Raise the error that a trial reported or died of."""
    if result.error is not None:
        raise RayclustError(f"select-k: the candidate k = {k} failed: {_cause(result.error)}")
    if (result.metrics or {}).get("refused"):
        kind: type[RayclustError] = getattr(errors, result.metrics["kind"], RayclustError)
        raise kind(f"select-k: the candidate k = {k} failed: {result.metrics['refused']}")


def _cause(error: BaseException) -> str:
    """Return the line of a trial's error that names it: the last that reads as an exception, else the first."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    named = [line for line in lines if re.match(r"[\w.]+(Error|Exception|Exit)\b", line)]
    return (named[-1:] or lines[:1] or [type(error).__name__])[0]


def _error_callback() -> Any:
    """Return a stopper that ends all trials after the first error: the stage fails in any case."""
    from ray import tune

    class Refusals(tune.Stopper):
        def __init__(self) -> None:
            self._seen = False

        def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
            self._seen = self._seen or bool(result.get("refused"))
            return False

        def stop_all(self) -> bool:
            return self._seen

    return Refusals()


def _watcher(on_change: OnChange) -> Any:
    from ray.tune.progress_reporter import TrialProgressCallback

    class Watcher(TrialProgressCallback):
        """Calls `on_change` in place of the lines that Tune prints."""

        def __init__(self, on_change: OnChange) -> None:
            super().__init__()
            self._running, self._on_change = set[int](), on_change

        def __getstate__(self) -> dict[str, Any]:
            return {}  # Tune keeps a copy of its settings, which is never read back

        def on_trial_result(self, iteration: int, trials: list[Any], trial: Any, result: Any, **info: Any) -> None:
            """Print nothing."""

        def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
            self._running.add(trial.config["k"])
            self._on_change(sorted(self._running), 0)

        def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
            self._running.discard(trial.config["k"])
            self._on_change(sorted(self._running), 1)

        def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
            self._running.discard(trial.config["k"])
            self._on_change(sorted(self._running), 0)

    return Watcher(on_change)


def run(context: StageContext) -> StageResult:
    """Fit every candidate that is not done, choose one, and write the choice with its reason."""
    config, rows = context.config, context.inputs["encode"].counts["rows"]
    config.select_k.refuse_above(rows)
    search = Search.of(context)
    outputs = Outputs() if refits(config) else _fit_once(search).outputs
    tried, choice = _search(search, rows)
    _drop_outdated(search, tried)
    for result in tried.values():
        outputs |= result.outputs
    outputs |= put_json(context.run, context.run.selection, _selection(choice, tried))
    extra = {CHOSEN: _model(tried[choice.k]), "rule": choice.rule, "reason": choice.reason}
    return StageResult(outputs, {"candidates": len(tried)}, extra, choice.reason)


def _fit_once(search: Search) -> TaskResult:
    """Run the one fit from which every candidate is cut."""
    run, largest = search.run, search.largest
    unit = Task(FIT, digest_of([search.settings, "fit", largest]))
    found = finished_tasks(run, SELECT_K, [unit])
    if found:
        return found[FIT]
    job = Job(SELECT_K, search.config.with_clusters(largest), unit.digest, search.encode, run.selection_fit)
    return run_and_mark(run.shard_manifest(FIT, SELECT_K), unit, lambda: TaskResult(fit(job)["outputs"]))


def _search(search: Search, rows: int) -> tuple[dict[int, TaskResult], Choice]:
    """Return all candidates with their results, by number, and the choice among them."""
    options, tried = search.config.select_k, dict[int, TaskResult]()
    wanted = options.first(rows)
    with drop_rows_on_error(search.digest), Progress(SELECT_K, "candidates", total=0) as progress:
        for number in range(1 + (options.rounds if options.candidates == "auto" else 0)):
            tried |= _fit_candidates(search, wanted, progress)
            measured = [Candidate(k, result.extra["criteria"]) for k, result in tried.items()]
            choice = selection.choose(measured, options.rule)
            wanted = selection.refine(list(tried), choice.k)
            if not wanted:
                break
            logger.info("select-k: after round %d of candidates k = %d is best", number + 1, choice.k)
    on_every_node(drop_cache, search.digest)
    for k in tried if refits(search.config) else ():
        # A trial that outlives its killed driver for a moment may save once more what another has finished.
        drop_checkpoints(search, k)
    return dict(sorted(tried.items())), choice


def _fit_candidates(search: Search, candidates: Sequence[int], progress: Progress) -> dict[int, TaskResult]:
    """Return the results of candidates; those without one are fitted on the cluster."""
    run, units = search.run, [search.unit(k) for k in candidates]
    before = finished_tasks(run, SELECT_K, units)
    progress.more(len(units), done=len(before))
    report_resume(SELECT_K, len(units), len(before))
    missing = [k for k in candidates if k not in before]
    if missing:

        def show(running: Sequence[int], ended: int) -> None:
            progress.advance(ended, note="trying k = " + ", ".join(map(str, running)) if running else "")

        run_trials(search, missing, show)
    results = finished_tasks(run, SELECT_K, units)
    for k in candidates:
        if k not in results:
            raise RayclustError(f"select-k: the candidate k = {k} left no result: run the same line again")
    return results


def _model(result: TaskResult) -> dict[str, Any]:
    """Return what train reads of the chosen candidate."""
    criteria = f"{result.extra['k']:05d}.json"
    files = {path: file["digest"] for path, file in sorted(result.outputs.items()) if not path.endswith(criteria)}
    return {"clusters": result.extra["k"], "steps": result.counts["steps"], "outputs": files}


def _selection(choice: Choice, tried: dict[int, TaskResult]) -> dict[str, Any]:
    candidates = [{"k": k, **result.extra["criteria"]} for k, result in tried.items()]
    reason = {"chosen": choice.k, "rule": choice.rule, "reason": choice.reason}
    return reason | {"picks": dict(choice.picks), "candidates": candidates}


def _drop_outdated(search: Search, tried: Iterable[int]) -> None:
    """Remove candidates of other settings; those of these settings from another list are kept for reuse."""
    run = search.run
    for k, marker in done_marks(run, SELECT_K):
        if k != FIT and k not in tried and marker != search.unit(k).digest:
            storage.remove_tree(run.candidate(k))
            storage.remove(run.candidate(k) + ".json")
            storage.remove(run.shard_manifest(k, SELECT_K))


def candidate_settings(config: RunConfig) -> dict[str, Any]:
    """Return the settings that one candidate depends on besides its number of clusters; not the other candidates."""
    method = method_settings(config)
    method["all"].pop("clusters")
    method["set"] = [key for key in method["set"] if key != "clusters"]
    measured = settings_of(config.select_k, "seeds", "rows", "distortion")
    return {"method": method, "measured": measured, "features": settings_of(config.features), "seed": config.seed}


def _settings(config: RunConfig) -> dict[str, Any]:
    search = settings_of(config.select_k, "candidates", "least", "most", "rounds", "rule")
    return {"candidate": candidate_settings(config), "search": search}


STAGE = Stage(SELECT_K, _settings, run, needs=("encode", "neighbors"), revision=2, outputs=SelectKOutputs)
