"""Candidates over the cluster: one Ray Tune trial each, as many at a time as there is room for.

Tune places, watches and repeats the trials. What they find goes to the run's own files, and nothing is ever read back
from Tune's: its folder is a scratch one.
"""

from __future__ import annotations

import logging
import os
import re
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from rayclust import errors
from rayclust.errors import RayclustError
from rayclust.stages import placing
from rayclust.stages.candidate import Search, examine
from rayclust.stages.cluster import connect
from rayclust.stages.graph import SELECT_K
from rayclust.stages.placing import require
from rayclust.stages.units import finish

QUIET = {
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # no tables of their own for every trial
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # an interrupt ends the stage, not the experiment alone
    "RAY_AIR_NEW_OUTPUT": "0",  # the other kind of output prints a table whatever it is told
}

OnChange = Callable[[Sequence[int], int], None]
"""Told which candidates are being tried, and how many more have been finished."""


def run_trials(search: Search, candidates: Sequence[int], on_change: OnChange) -> None:
    """Examines candidates on the cluster.

    Args:
        search: what they have in common.
        candidates: numbers of clusters; each leaves its marker.
        on_change: called whenever a trial begins or ends.

    Raises:
        RayclustError: a trial failed; the line names the candidate. Those under way are stopped, those finished kept.
    """
    connect()
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)  # what it has to say of a failed trial is said below
    folder = tempfile.TemporaryDirectory(prefix="rayclust-select-k-", ignore_cleanup_errors=True)
    with folder as storage:
        results = _tuner(search, candidates, storage, on_change).fit()
        # In the order of the candidates; fewer where Tune stopped before it had made a trial of each.
        for k, result in zip(candidates, results, strict=False):
            _refuse_failed(k, result)


def _tuner(search: Search, candidates: Sequence[int], storage: str, on_change: OnChange) -> Any:
    from ray import tune

    options, labels = search.config.select_k, search.config.resources.placement.trials
    require("trials", labels)
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
            stop=_refusals(),
            callbacks=[_watcher(on_change)],
            failure_config=tune.FailureConfig(max_failures=search.config.resources.max_failures),
        ),
    )


def _trial(search: Search, space: dict[str, Any]) -> None:
    """One candidate, in its worker; what is refused on purpose is reported and not tried again."""
    from ray import tune

    unit = search.unit(int(space["k"]))
    try:
        finish(search.run.shard_manifest(unit.index, SELECT_K), unit, lambda: examine(search, unit.index))
    except RayclustError as error:
        tune.report({"refused": str(error), "kind": type(error).__name__})
    else:
        tune.report({"refused": None})


def concurrent(search: Search) -> int:
    """How many trials may run at a time."""
    options = search.config.select_k
    if options.max_concurrent != "auto":
        return options.max_concurrent
    nodes = placing.nodes(search.config.resources.placement.trials)
    return max(1, sum(_room(node, options.cpus_per_trial, search.gpus) for node in nodes))


def _room(node: dict[str, float], cpus: float, gpus: float) -> int:
    """Trials that a node holds."""
    room = int(node.get("CPU", 0) / cpus)
    return min(room, int(node.get("GPU", 0) / gpus)) if gpus else room


def _refuse_failed(k: int, result: Any) -> None:
    """Raises what a trial was refused for, or what it ended of."""
    if result.error is not None:
        raise RayclustError(f"select-k: the candidate k = {k} failed: {_cause(result.error)}")
    if (result.metrics or {}).get("refused"):
        kind: type[RayclustError] = getattr(errors, result.metrics["kind"], RayclustError)
        raise kind(f"select-k: the candidate k = {k} failed: {result.metrics['refused']}")


def _cause(error: BaseException) -> str:
    """The line of a trial's error that names it: the last that reads as an exception, else the first."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    named = [line for line in lines if re.match(r"[\w.]+(Error|Exception|Exit)\b", line)]
    return (named[-1:] or lines[:1] or [type(error).__name__])[0]


def _refusals() -> Any:
    """Stops every trial once one has been refused: the stage fails in any case."""
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
        """Tells `on_change` what the driver sees of the trials, in the place of the lines that Tune prints."""

        def __init__(self, on_change: OnChange) -> None:
            super().__init__()
            self._running, self._on_change = set[int](), on_change

        def __getstate__(self) -> dict[str, Any]:
            return {}  # Tune keeps a copy of its settings, which is never read back

        def on_trial_result(self, iteration: int, trials: list[Any], trial: Any, result: Any, **info: Any) -> None:
            """Says nothing."""

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
