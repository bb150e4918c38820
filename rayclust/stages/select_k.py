"""select-k: the number of clusters, by criteria of candidates that are tried over the cluster with Ray Tune."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from typing import Any

from rayclust.errors import RayclustError
from rayclust.metrics import selection
from rayclust.metrics.selection import Candidate, Choice
from rayclust.stages.candidate import FIT, Search, drop_checkpoints, refits
from rayclust.stages.cluster import on_every_node
from rayclust.stages.graph import CHOSEN, SELECT_K
from rayclust.stages.outputs import Outputs, put_json
from rayclust.stages.pipeline import StageContext, StageResult
from rayclust.stages.progress import Progress
from rayclust.stages.rows import drop_cache
from rayclust.stages.train import Job, fit, no_rows_left
from rayclust.stages.trials import run_trials
from rayclust.stages.units import Unit, UnitResult, finish, finished, markers, report_resume
from rayclust.store import filesystem
from rayclust.store.manifest import digest_of

logger = logging.getLogger(__name__)


def run(context: StageContext) -> StageResult:
    """Tries every candidate that has not been tried, chooses, and writes the choice with its reason."""
    config, rows = context.config, context.inputs["encode"].counts["rows"]
    config.select_k.refuse_above(rows)
    search = Search.of(context)
    outputs = Outputs() if refits(config) else _fit_once(search).outputs
    tried, choice = _search(search, rows)
    _drop_outdated(search, tried)
    for result in tried.values():
        outputs |= result.outputs
    outputs |= put_json(context.run, context.run.selection, _written(choice, tried))
    extra = {CHOSEN: _model(tried[choice.k]), "rule": choice.rule, "reason": choice.reason}
    return StageResult(outputs, {"candidates": len(tried)}, extra, choice.reason)


def _fit_once(search: Search) -> UnitResult:
    """The one fit of which every candidate is cut."""
    run, largest = search.run, search.largest
    unit = Unit(FIT, digest_of([search.settings, "fit", largest]))
    found = finished(run, SELECT_K, [unit])
    if found:
        return found[FIT]
    job = Job(SELECT_K, search.config.closed(largest), unit.digest, search.encode, run.selection_fit)
    return finish(run.shard_manifest(FIT, SELECT_K), unit, lambda: UnitResult(fit(job)["outputs"]))


def _search(search: Search, rows: int) -> tuple[dict[int, UnitResult], Choice]:
    """All candidates with their results, by number, and the choice among them."""
    options, tried = search.config.select_k, dict[int, UnitResult]()
    wanted = options.first(rows)
    with no_rows_left(search.digest), Progress(SELECT_K, "candidates", total=0) as progress:
        for number in range(1 + (options.rounds if options.candidates == "auto" else 0)):
            tried |= _tried(search, wanted, progress)
            choice = _choice(tried, options.rule)
            wanted = selection.refine(list(tried), choice.k)
            if not wanted:
                break
            logger.info("select-k: after round %d of candidates k = %d is best", number + 1, choice.k)
    on_every_node(drop_cache, search.digest)
    for k in tried if refits(search.config) else ():
        # A trial that outlives its killed driver for a moment may save once more what another has finished.
        drop_checkpoints(search, k)
    return dict(sorted(tried.items())), choice


def _tried(search: Search, candidates: Sequence[int], progress: Progress) -> dict[int, UnitResult]:
    """Results of candidates; those without one are sent to the cluster."""
    run, units = search.run, [search.unit(k) for k in candidates]
    before = finished(run, SELECT_K, units)
    progress.more(len(units), done=len(before))
    report_resume(SELECT_K, len(units), len(before))
    missing = [k for k in candidates if k not in before]
    if missing:
        run_trials(search, missing, lambda running, ended: progress.advance(ended, note=_trying(running)))
    results = finished(run, SELECT_K, units)
    for k in candidates:
        if k not in results:
            raise RayclustError(f"select-k: the candidate k = {k} left no result: run the same line again")
    return results


def _trying(running: Sequence[int]) -> str:
    return "trying k = " + ", ".join(map(str, running)) if running else ""


def _choice(tried: dict[int, UnitResult], rule: str) -> Choice:
    return selection.choose([Candidate(k, result.extra["criteria"]) for k, result in tried.items()], rule)


def _model(result: UnitResult) -> dict[str, Any]:
    """What train takes of the chosen candidate."""
    criteria = f"{result.extra['k']:05d}.json"
    files = {path: file["digest"] for path, file in sorted(result.outputs.items()) if not path.endswith(criteria)}
    return {"clusters": result.extra["k"], "steps": result.counts["steps"], "outputs": files}


def _written(choice: Choice, tried: dict[int, UnitResult]) -> dict[str, Any]:
    candidates = [{"k": k, **result.extra["criteria"]} for k, result in tried.items()]
    reason = {"chosen": choice.k, "rule": choice.rule, "reason": choice.reason}
    return reason | {"picks": dict(choice.picks), "candidates": candidates}


def _drop_outdated(search: Search, tried: Iterable[int]) -> None:
    """Removes candidates of other settings; those of these settings from another list stay for when it comes back."""
    run = search.run
    for k, marker in markers(run, SELECT_K):
        if k != FIT and k not in tried and marker != search.unit(k).digest:
            filesystem.remove_tree(run.candidate(k))
            filesystem.remove(run.candidate(k) + ".json")
            filesystem.remove(run.shard_manifest(k, SELECT_K))
