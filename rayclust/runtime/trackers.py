"""Trackers of experiments: settings, losses, final scores and the report of a run, in the services of `tracking.to`.

A training sends its metrics while it runs, the stage `report` scores and page. Both find the same run of a service by
the id in `tracking.json`, so that a training that is resumed goes on where it was. Trackers change no result.
"""

from __future__ import annotations

import importlib
import logging
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from rayclust.config import RunConfig
from rayclust.errors import ArtefactError, ConfigError
from rayclust.store import storage
from rayclust.store.run import Run

logger = logging.getLogger(__name__)

UPLOAD_SECONDS = 10.0
"""Least time between two uploads of TensorBoard's event files."""
TAG = "rayclust.id"
"""Tag by which MLflow's run of a fit is found again."""


def refuse_missing(config: RunConfig) -> None:
    """Raise `ConfigError` where the package of a service in `tracking.to` is not installed."""
    for name in config.tracking.to:
        package = _SERVICES[name][0]
        if find_spec(package) is None:
            raise ConfigError(f"tracking.to = {name}: the package {package} is not installed, remove it or install it")


class Trackers:
    """The services of `tracking.to`, open for one fit; one that fails is logged and dropped.

    Args:
        config: of the run.
        fit: digest of the training; another one is another run of the service.

    Raises:
        ConfigError: a package is not installed.
    """

    def __init__(self, config: RunConfig, fit: str) -> None:
        refuse_missing(config)
        self._open = dict[str, _Tracker]()
        tracking_id = _tracking_id(Run(config.run), fit)
        for name in config.tracking.to:
            package, start = _SERVICES[name]
            try:
                self._open[name] = start(importlib.import_module(package), config, tracking_id)
            except Exception as error:  # noqa: BLE001 - as in _each: services and networks fail in their own ways
                _warn(name, error)

    def log(self, row: Mapping[str, Any]) -> None:
        """Send a row of a training's metrics: numbers, and lists of numbers as name/index."""
        values = {key: value for key, value in row.items() if key not in ("epoch", "step", "steps")}
        lists = {key: value for key, value in values.items() if isinstance(value, list | tuple)}
        numbers = flat_numbers(values | {key: dict(enumerate(value)) for key, value in lists.items()})
        self._each(lambda tracker: tracker.log(numbers, int(row.get("step", 0))))

    def finish(self, scores: Mapping[str, Any], report: str) -> None:
        """Send the run's scores, each below `final/`, and its page at a URI, with the files beside it; then close."""
        numbers, folder = flat_numbers({"final": scores}), report.rpartition("/")[0]

        def files() -> Iterator[tuple[str, str]]:
            """Yield name and text of each file of the report, one in memory at a time, the page first."""
            yield "index.html", storage.read_bytes(report).decode()
            for file in storage.walk(storage.join(folder, "data"), missing_ok=True):
                yield f"data/{file.key}", storage.read_bytes(file.uri).decode()

        self._each(lambda tracker: tracker.finish(numbers, files()))
        self.close()

    def close(self) -> None:
        """Send what is left."""
        self._each(lambda tracker: tracker.close())

    def _each(self, action: Callable[[_Tracker], Any]) -> None:
        for name, tracker in list(self._open.items()):
            try:
                action(tracker)
            except Exception as error:  # noqa: BLE001 - whatever a service does, the run goes on
                _warn(name, error)
                del self._open[name]


def _warn(name: str, error: Exception) -> None:
    logger.warning("tracking.to = %s: %s; no more is sent there", name, " ".join(str(error).split()))


def flat(values: Mapping[Any, Any], separator: str) -> dict[str, Any]:
    """Return a mapping with those in it laid out flat, names joined by a separator."""
    found = dict[str, Any]()
    for name, value in values.items():
        if isinstance(value, Mapping):
            found |= {f"{name}{separator}{key}": each for key, each in flat(value, separator).items()}
        else:
            found[str(name)] = value
    return found


def flat_numbers(values: Mapping[Any, Any]) -> dict[str, float]:
    """Return the numbers in a mapping, those of mappings in it as name/name."""
    numbers = flat(values, "/").items()
    return {k: float(v) for k, v in numbers if isinstance(v, int | float) and not isinstance(v, bool)}


def flat_settings(config: RunConfig) -> dict[str, Any]:
    """Return every setting of a run by its full key, as in RUN.yaml."""
    return flat(config.model_dump(mode="json"), ".")


def _tracking_id(run: Run, fit: str) -> str:
    """Return the id of a fit for trackers, a new one where there is none yet."""
    try:
        known = storage.read_json(run.tracking)
        if known["fit"] == fit:
            return str(known["id"])
    except (storage.MissingError, ArtefactError, KeyError, TypeError):
        pass
    new = uuid.uuid4().hex[:16]
    storage.write_json(run.tracking, {"fit": fit, "id": new})
    return new


class _Tracker(NamedTuple):
    """The calls into one service."""

    log: Callable[[dict[str, float], int], Any]
    """Takes numbers by name, and the step."""
    finish: Callable[[dict[str, float], Iterator[tuple[str, str]]], Any]
    """Takes the final scores by name, and the report's files by name, the page first."""
    close: Callable[[], Any]


def _tensorboard(library: Any, config: RunConfig, tracking_id: str) -> _Tracker:
    """Write event files to a local folder, and copy them to `tensorboard/` below the run; one more after each resume.

    They are no artefact: no manifest lists them and nothing reads them. TensorBoard shows no pages: of the report it
    gets the place. Settings and scores are a row of its table of hyperparameters.
    """
    folder = tempfile.TemporaryDirectory(prefix="rayclust-tensorboard-", ignore_cleanup_errors=True)
    # The suffix: whose curves they are, and a part of its own, since files are named by the second.
    suffix = f".{tracking_id}.{uuid.uuid4().hex[:8]}"
    writer = library.SummaryWriter(folder.name, flush_secs=int(UPLOAD_SECONDS) // 2, filename_suffix=suffix)
    run, uploaded = Run(config.run), time.monotonic()

    def upload() -> None:
        nonlocal uploaded
        for file in Path(folder.name).rglob("*tfevents*"):
            storage.write_bytes(run.at("tensorboard", *file.relative_to(folder.name).parts), file.read_bytes())
        uploaded = time.monotonic()

    def log(numbers: dict[str, float], step: int) -> None:
        for name, value in numbers.items():
            writer.add_scalar(name, value, step)
        if time.monotonic() - uploaded >= UPLOAD_SECONDS:
            upload()

    def finish(numbers: dict[str, float], files: Iterator[tuple[str, str]]) -> None:
        settings = {
            key: value if isinstance(value, int | float | str) else str(value)
            for key, value in flat_settings(config).items()
        }
        writer.add_hparams(settings, numbers, name=tracking_id)
        writer.add_text("report", run.report)

    def close() -> None:
        writer.close()  # waits for what is still on its way to the file, which a flush does not
        upload()
        folder.cleanup()

    return _Tracker(log, finish, close)


def _wandb(library: Any, config: RunConfig, tracking_id: str) -> _Tracker:
    """Start or resume a run of Weights & Biases, configured by its own environment variables."""
    settings = config.model_dump(mode="json")
    run = library.init(
        project=config.tracking.project, name=config.run, id=tracking_id, resume="allow", config=settings
    )
    # A training that is resumed sends some steps again, which W&B's own count would refuse.
    run.define_metric("*", step_metric="step")

    def finish(numbers: dict[str, float], files: Iterator[tuple[str, str]]) -> None:
        run.summary.update(numbers)
        artifact = library.Artifact(f"report-{tracking_id}", "report")
        for name, text in files:
            if name == "index.html":  # shown beside the curves, without what lies beside it
                run.log({"report": library.Html(text, inject=False)})
            with artifact.new_file(name, mode="w", encoding="utf-8") as file:
                file.write(text)
        run.log_artifact(artifact)

    return _Tracker(lambda numbers, step: run.log(numbers | {"step": step}), finish, run.finish)


def _mlflow(library: Any, config: RunConfig, tracking_id: str) -> _Tracker:
    """Start or resume a run of MLflow, configured by its own environment variables."""
    project, condition = config.tracking.project, f"tags.`{TAG}` = '{tracking_id}'"
    library.set_experiment(project)
    found = library.search_runs(experiment_names=[project], filter_string=condition, output_format="list")
    if found:
        run = library.start_run(run_id=found[0].info.run_id)
    else:
        run = library.start_run(run_name=config.run, tags={TAG: tracking_id})
        library.log_params(flat_settings(config))  # they are for good: resumed runs keep the first
    send = partial(library.log_metrics, run_id=run.info.run_id)

    def finish(numbers: dict[str, float], files: Iterator[tuple[str, str]]) -> None:
        send(numbers)
        for name, text in files:
            library.log_text(text, f"report/{name}")

    return _Tracker(lambda numbers, step: send(numbers, step=step), finish, library.end_run)


_SERVICES: dict[str, tuple[str, Callable[[Any, RunConfig, str], _Tracker]]] = {
    "tensorboard": ("tensorboardX", _tensorboard),
    "wandb": ("wandb", _wandb),
    "mlflow": ("mlflow", _mlflow),
}
"""By name in `tracking.to`: the package, and the function that starts or resumes its run."""
