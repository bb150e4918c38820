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
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial, partialmethod
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from rayclust import errors
from rayclust.arrays import IntArray
from rayclust.config import RunConfig
from rayclust.errors import ArtefactError, RayclustError
from rayclust.methods import build_for, is_recuttable
from rayclust.methods.base import CheckpointInterval, Method, Recuttable, Transform
from rayclust.metrics import selection
from rayclust.metrics.selection import Choice
from rayclust.runtime import cluster
from rayclust.runtime.cluster import connect, in_driver, on_every_node, require_label, threads
from rayclust.runtime.pipeline import (
    CHOSEN,
    SELECT_K,
    StageContext,
    StageResult,
    content_digest,
)
from rayclust.runtime.progress import Progress
from rayclust.runtime.rows import cache_folder, drop_cache, fitted_count
from rayclust.runtime.tasks import Task, TaskResult, finished_tasks, read_mark, report_resume, run_and_mark
from rayclust.runtime.tensors import BLOCK, StoredRows, read_method
from rayclust.stages.registry import candidate_settings
from rayclust.stages.train import Job, StoredCheckpoints, drop_rows_on_error, fit, write_fit
from rayclust.store import storage, tables
from rayclust.store.manifest import Manifest, Outputs, digest_of, put_json
from rayclust.store.run import Run
from rayclust.training.loop import Trainer

REVISION = 5
"""Raised when a candidate's result changes for the same settings."""
FIT = 0
"""Index of the one fit among the tasks, where a method needs no fit for each number of clusters."""
QUIET = {
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # no tables of their own for every trial
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # an interrupt ends the stage, not the experiment alone
    "RAY_AIR_NEW_OUTPUT": "0",  # the other kind of output prints a table whatever `verbose` says
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
        _, largest = config.select_k.bounds(fitted_count(inputs["encode"]))
        content = {
            "revision": REVISION,
            "settings": candidate_settings(config),
            "inputs": {name: content_digest(manifest) for name, manifest in inputs.items()},
            "largest": largest if is_recuttable(config.method.name) else None,
        }
        gpus = config.select_k.gpus_per_trial
        gpus = config.resources.gpus if gpus == "auto" else gpus
        return cls(config, inputs["encode"], context.digest, digest_of(content), largest, gpus)

    @property
    def run(self) -> Run:
        """The run."""
        return Run(self.config.run, self.config.spaces)

    def task(self, clusters: int) -> Task:
        """Return the task of a candidate; its index is its number of clusters."""
        return Task(clusters, digest_of([self.settings, clusters]))


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
        # The most probable cluster of each row, Int32[N].
        with torch.inference_mode():
            parts = [found.argmax(1).int().cpu().numpy() for found in method.predict_rows(rows)]
        labels.append(np.concatenate(parts))
        kept = kept or (method, history)
    if kept is None:
        raise ValueError("select_k.seeds = 0")
    criteria = _criteria(config, kept[0], rows, labels)
    written = write_fit(rows, run.candidate(clusters), *kept)
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
    if is_recuttable(config.method.name):
        folder = search.run.selection_fit
        history = tables.read_table(storage.join(folder, "metrics.parquet")).to_pylist()
        marked = read_mark(search.run.mark(FIT, SELECT_K))
        digests = {path: written["digest"] for path, written in marked[1].outputs.items()} if marked else {}
        fitted = read_method(folder, SELECT_K, digests)
        if not isinstance(fitted, Recuttable):
            raise ArtefactError(f"{folder}: holds another method; run select-k again with --force")
        yield fitted.recut(clusters), history
        for seed in range(1, config.select_k.seeds):
            yield fitted.recut(clusters, config.seed + seed), history
        return
    device = "cuda" if search.gpus else "cpu"
    settings = config.method.model_copy(update=config.method.selection_settings)
    for seed in range(config.select_k.seeds):
        method = build_for(rows, settings, config.seed + seed)
        store = StoredCheckpoints(search.run, _fit_digest(search, clusters, seed))
        every = CheckpointInterval(epochs=None, seconds=config.resources.checkpoint_seconds)
        trainer = Trainer(config.seed + seed, device, None, store, every)
        method.fit(rows, trainer)
        yield method.eval(), trainer.history


def _fit_digest(search: Search, clusters: int, seed: int) -> str:
    return digest_of([search.settings, clusters, seed])


def _criteria(config: RunConfig, method: Method, rows: StoredRows, labels: list[IntArray]) -> dict[str, float]:
    """Compute every criterion: those in the rows' space on a sample, the others on all rows.

    Undefined ones (the silhouette of one occupied cluster, the stability of one fit) are left out.
    """
    from rayclust.methods.spectral import SpectralMethod
    from rayclust.metrics import internal
    from rayclust.metrics.internal import coding_length, measure, size_summary, umap_silhouette
    from rayclust.metrics.nulls import null_silhouettes, resampled_silhouettes

    options = config.select_k
    sample = np.random.default_rng(config.seed).choice(rows.count, min(options.rows, rows.count), replace=False)
    sample.sort()
    # The sample in the method's own space where it has one, else as unit features; Float32[n d].
    blocks, units, x = [], [], rows.tensor()
    with torch.inference_mode():
        for some in torch.from_numpy(sample).split(BLOCK):
            block = x[some].to(method.device)
            units.append(functional.normalize(block, dim=1).float().cpu().numpy())
            if isinstance(method, Transform):
                blocks.append(method.transform(block).float().cpu().numpy())
    unit, kept = np.concatenate(units), [labels[0][sample]]
    z = np.concatenate(blocks) if blocks else unit
    found = measure(z, kept, None, distortion=options.distortion, silhouette_rows=options.rows, seed=config.seed)
    if blocks:  # a space of its own spreads what is a subspace among the features over more dimensions
        found["feature_coding_length"] = coding_length(unit, kept[0], options.distortion) / len(unit)
    if isinstance(method, SpectralMethod):
        found["eigengap"] = method.fitted().eigengap(config.method.clusters)
    found |= null_silhouettes(z, config.method.clusters, seed=config.seed)
    if options.resamples:
        found |= resampled_silhouettes(z, kept[0], options.resamples, seed=config.seed)
    if options.umap and len(np.unique(kept[0])) > 1:
        found["umap_silhouette"] = umap_silhouette(z, kept[0], seed=config.seed)
    found |= internal.graph_criteria(labels[0], rows.neighbors().numpy())
    if len(labels) > 1:
        found["stability"] = internal.stability(labels)
        found["prediction_strength"] = internal.prediction_strength(labels)
    found |= size_summary(labels[0], config.method.clusters)
    found["empty"] = config.method.clusters - found["occupied"]
    return {name: float(value) for name, value in found.items() if np.isfinite(value)}


# Candidates over the cluster: one Ray Tune trial each.


def run_trials(search: Search, candidates: Sequence[int], on_change: Callable[[Sequence[int], int], None]) -> None:
    """Fit and measure candidates on the cluster; one after the other in the driver where a fit of a small set is fast.

    Args:
        search: what they have in common.
        candidates: numbers of clusters; each leaves its mark.
        on_change: called whenever a trial begins or ends, with the candidates that run and how many just finished.

    Raises:
        RayclustError: a trial failed; the line names the candidate. Those under way are stopped, those finished kept.
    """
    method = search.config.method
    if in_driver() and (fitted_count(search.encode) <= method.fast_rows or is_recuttable(method.name)):
        for k in candidates:
            on_change([k], 0)
            try:
                with threads(search.config.select_k.cpus_per_trial):
                    _examine_and_mark(search, k)
            except RayclustError as error:
                raise type(error)(f"select-k: the candidate k = {k} failed: {error}") from error
            on_change([], 1)
        return
    connect()
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    from ray import tune

    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)  # failed trials are reported below
    options, labels = search.config.select_k, search.config.resources.placement.trials
    require_label("trials", labels)
    bundle = {"CPU": options.cpus_per_trial} | ({"GPU": search.gpus} if search.gpus else {})
    resources = tune.PlacementGroupFactory([bundle], **({"bundle_label_selector": [dict(labels)]} if labels else {}))
    # As many trials at a time as the nodes have room for, each by its scarcest resource.
    most = options.max_concurrent
    if most == "auto":
        nodes = cluster.live_nodes(labels)
        most = max(1, sum(min(int(node.get(name, 0) / each) for name, each in bundle.items()) for node in nodes))
    stopper, watcher = _callbacks(on_change)
    with tempfile.TemporaryDirectory(prefix="rayclust-select-k-", ignore_cleanup_errors=True) as folder:
        tuner = tune.Tuner(
            tune.with_resources(partial(_trial, search), resources),
            param_space={"k": tune.grid_search(list(candidates))},
            tune_config=tune.TuneConfig(max_concurrent_trials=most, reuse_actors=True),
            run_config=tune.RunConfig(
                name=f"rayclust-{search.digest[:12]}-{time.time_ns()}",
                storage_path=folder,
                verbose=0,
                stop=stopper,
                callbacks=[watcher],
                failure_config=tune.FailureConfig(max_failures=search.config.resources.max_failures),
            ),
        )
        results = tuner.fit()
        # In the order of the candidates; fewer where Tune stopped before it had made a trial of each.
        for k, result in zip(candidates, results, strict=False):
            _raise_failure(k, result)


def _trial(search: Search, space: dict[str, Any]) -> None:
    """Run one candidate in its worker; our own errors are reported and not retried."""
    from ray import tune

    try:
        _examine_and_mark(search, int(space["k"]))
    except RayclustError as error:
        tune.report({"refused": str(error), "kind": type(error).__name__})
    else:
        tune.report({"refused": None})


def _examine_and_mark(search: Search, clusters: int) -> None:
    task = search.task(clusters)
    run_and_mark(search.run.mark(clusters, SELECT_K), task, lambda: examine(search, clusters))


def _raise_failure(k: int, result: Any) -> None:
    """Raise the error that a trial reported or died of."""
    if result.error is not None:
        # The line that names the error: the last that reads as an exception, else the first.
        lines = [line.strip() for line in str(result.error).splitlines() if line.strip()]
        named = [line for line in lines if re.match(r"[\w.]+(Error|Exception|Exit)\b", line)]
        cause = (named[-1:] or lines[:1] or [type(result.error).__name__])[0]
        raise RayclustError(f"select-k: the candidate k = {k} failed: {cause}")
    if (result.metrics or {}).get("refused"):
        kind: type[RayclustError] = getattr(errors, result.metrics["kind"], RayclustError)
        raise kind(f"select-k: the candidate k = {k} failed: {result.metrics['refused']}")


def _callbacks(on_change: Callable[[Sequence[int], int], None]) -> tuple[Any, Any]:
    """Return a stopper that ends all trials after the first error, since the stage fails then, and a watcher."""
    from ray import tune
    from ray.tune.progress_reporter import TrialProgressCallback

    class Stopper(tune.Stopper):
        has_error = False

        def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
            self.has_error |= bool(result.get("refused"))
            return False

        def stop_all(self) -> bool:
            return self.has_error

    class Watcher(TrialProgressCallback):
        """Calls `on_change` in place of the lines that Tune prints."""

        def __init__(
            self, on_change: Callable[[Sequence[int], int], None]
        ) -> None:  # not from the closure: Tune pickles the class
            super().__init__()
            self._running, self._on_change = set[int](), on_change

        def __getstate__(self) -> dict[str, Any]:
            return {}  # Tune keeps a copy of its settings, which is never read back

        def on_trial_result(self, iteration: int, trials: list[Any], trial: Any, result: Any, **info: Any) -> None:
            """Print nothing."""

        def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
            self._running.add(trial.config["k"])
            self._on_change(sorted(self._running), 0)

        def _end(self, finished: int, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
            self._running.discard(trial.config["k"])
            self._on_change(sorted(self._running), finished)

        on_trial_complete, on_trial_error = partialmethod(_end, 1), partialmethod(_end, 0)

    return Stopper(), Watcher(on_change)


def run(context: StageContext) -> StageResult:
    """Fit every candidate that is not done, choose one, and write the choice with its reason."""
    config, rows = context.config, fitted_count(context.inputs["encode"])
    config.select_k.refuse_above(rows)
    search = Search.of(context)
    run, outputs = search.run, Outputs()
    if is_recuttable(config.method.name):
        # The one fit from which every candidate is cut.
        task = Task(FIT, digest_of([search.settings, "fit", search.largest]))
        done = finished_tasks(run, SELECT_K, [task])
        if not done:
            job = Job(SELECT_K, config.with_clusters(search.largest), task.digest, search.encode, run.selection_fit)
            mark = run.mark(FIT, SELECT_K)
            done = {FIT: run_and_mark(mark, task, lambda: TaskResult(fit(job)["outputs"]))}
        outputs |= done[FIT].outputs
    tried, choice = _search(search, rows)
    # Candidates of other settings are removed; those of these settings from another list are kept for reuse.
    for file in list(storage.walk(run.at("manifests", SELECT_K), suffixes=(".json",), missing_ok=True)):
        marked = read_mark(file.uri) if file.key.startswith("part-") else None
        if marked is None:
            continue
        k, (digest, _) = int(file.key[5:-5]), marked
        if k != FIT and k not in tried and digest != search.task(k).digest:
            storage.remove_tree(run.candidate(k))
            storage.remove(run.candidate(k) + ".json")
            storage.remove(run.mark(k, SELECT_K))
    for result in tried.values():
        outputs |= result.outputs
    reason = {"rule": choice.rule, "reason": choice.reason}
    candidates = [{"k": k, **result.extra["criteria"]} for k, result in tried.items()]
    picked = {"picks": dict(choice.picks), "evidence": dict(choice.evidence)}
    selection = {"chosen": choice.k, **picked, "candidates": candidates}
    outputs |= put_json(run, run.selection, selection | reason)
    # What train reads of the chosen candidate.
    best = tried[choice.k]
    criteria = f"{choice.k:05d}.json"
    files = {path: file["digest"] for path, file in sorted(best.outputs.items()) if not path.endswith(criteria)}
    chosen = {"clusters": choice.k, "steps": best.counts["steps"], "outputs": files}
    return StageResult(outputs, {"candidates": len(tried)}, {CHOSEN: chosen} | reason, choice.reason)


def _search(search: Search, rows: int) -> tuple[dict[int, TaskResult], Choice]:
    """Return all candidates with their results, by number, and the choice among them."""
    run, options, tried = search.run, search.config.select_k, dict[int, TaskResult]()
    listed, bounds = options.candidates, options.bounds(rows)
    wanted = listed if isinstance(listed, tuple) else selection.geometric_grid(*bounds)
    with drop_rows_on_error(search.digest), Progress(SELECT_K, "candidates", total=0) as progress:

        def show(running: Sequence[int], ended: int) -> None:
            progress.advance(ended, f"trying k = {', '.join(map(str, running))}" if running else "")

        for number in range(1 + (options.rounds if options.candidates == "auto" else 0)):
            # Those without a result are fitted on the cluster.
            tasks = [search.task(k) for k in wanted]
            results = finished_tasks(run, SELECT_K, tasks)
            progress.more(len(tasks), done=len(results))
            report_resume(SELECT_K, len(tasks), len(results))
            if len(results) < len(tasks):
                run_trials(search, [k for k in wanted if k not in results], show)
                results = finished_tasks(run, SELECT_K, tasks)
            for k in wanted:
                if k not in results:
                    raise RayclustError(f"select-k: the candidate k = {k} left no result: run the same line again")
            tried |= results
            measured = {k: result.extra["criteria"] for k, result in tried.items()}
            choice = selection.choose(measured, options.rule)
            wanted = selection.refine(list(tried), choice.k)
            if not wanted:
                break
            logger.info("select-k: after round %d of candidates k = %d is best", number + 1, choice.k)
    on_every_node(drop_cache, search.digest)
    for k in () if is_recuttable(search.config.method.name) else tried:
        # A trial that outlives its killed driver for a moment may save once more what another has finished.
        drop_checkpoints(search, k)
    return dict(sorted(tried.items())), choice
