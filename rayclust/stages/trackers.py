"""Where a training's metrics can be followed while it runs: TensorBoard, Weights & Biases, MLflow.

TensorBoard's event files lie below the run, in `tensorboard/`; one more for each time a training was continued. They
are no artefact: no manifest lists them, and nothing reads them.
"""

from __future__ import annotations

import importlib
import logging
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from rayclust.config import RunConfig
from rayclust.errors import ConfigError
from rayclust.store import filesystem
from rayclust.store.layout import Run

logger = logging.getLogger(__name__)

Send = Callable[[dict[str, float], int], None]
"""Takes numbers by name, and the optimiser steps done."""
PUBLISHED_SECONDS = 10.0
"""Between two uploads of TensorBoard's events, at least."""
PLACES = ("epoch", "step", "steps")
"""Keys of a row that say when, not what."""


class Trackers:
    """Sends each epoch's row to everything that follows the training; a failure of one of them is told and no more.

    Args:
        config: the run's.

    Raises:
        ConfigError: a package is not installed.
    """

    def __init__(self, config: RunConfig) -> None:
        self._open: dict[str, Any] = {name: _TRACKERS[name](config) for name in config.tracking.to}

    def log(self, row: dict[str, Any]) -> None:
        """A row of metrics: numbers, and lists of numbers."""
        numbers = dict(_numbers(row))
        for name, tracker in list(self._open.items()):
            self._tried(name, partial(tracker.send, numbers, int(row.get("step", 0))))

    def close(self) -> None:
        """Sends what is left."""
        for name, tracker in list(self._open.items()):
            self._tried(name, tracker.close)

    def _tried(self, name: str, action: Callable[[], None]) -> None:
        try:
            action()
        except Exception as error:  # noqa: BLE001 - whatever a tracker's service does, the training goes on
            logger.warning("tracking.to = %s: %s; no more is sent there", name, " ".join(str(error).split()))
            self._open.pop(name, None)


def _numbers(row: dict[str, Any]) -> Iterator[tuple[str, float]]:
    for key, value in row.items():
        if key in PLACES:
            continue
        if isinstance(value, Sequence) and not isinstance(value, str):
            yield from ((f"{key}/{place}", float(each)) for place, each in enumerate(value))
        elif isinstance(value, int | float):
            yield key, float(value)


class _TensorBoard:
    """Event files, written here and copied below the run."""

    def __init__(self, config: RunConfig) -> None:
        self._target = Run(config.run).at("tensorboard")
        self._folder = tempfile.TemporaryDirectory(prefix="rayclust-tensorboard-", ignore_cleanup_errors=True)
        self._writer = _imported("tensorboardX", "tensorboard").SummaryWriter(
            self._folder.name, flush_secs=int(PUBLISHED_SECONDS) // 2
        )
        self._published = time.monotonic()

    def send(self, numbers: dict[str, float], step: int) -> None:
        for name, value in numbers.items():
            self._writer.add_scalar(name, value, step)
        if time.monotonic() - self._published >= PUBLISHED_SECONDS:
            self._publish()

    def close(self) -> None:
        self._writer.close()  # waits for what is still on its way to the file, which a flush does not
        self._publish()
        self._folder.cleanup()

    def _publish(self) -> None:
        for file in Path(self._folder.name).iterdir():
            filesystem.write_bytes(filesystem.join(self._target, file.name), file.read_bytes())
        self._published = time.monotonic()


class _WandB:
    """Weights & Biases; it finds its key in its own variables."""

    def __init__(self, config: RunConfig) -> None:
        wandb = _imported("wandb", "wandb")
        settings = config.model_dump(mode="json")
        self._run = wandb.init(project=config.tracking.project, name=config.run, config=settings)

    def send(self, numbers: dict[str, float], step: int) -> None:
        self._run.log(numbers, step=step)

    def close(self) -> None:
        self._run.finish()


class _MLflow:
    """MLflow; it finds its server in its own variables."""

    def __init__(self, config: RunConfig) -> None:
        self._mlflow = _imported("mlflow", "mlflow")
        self._mlflow.set_experiment(config.tracking.project)
        self._mlflow.start_run(run_name=config.run)
        self._mlflow.log_params({"method": config.method.name, "clusters": config.method.clusters})

    def send(self, numbers: dict[str, float], step: int) -> None:
        self._mlflow.log_metrics(numbers, step=step)

    def close(self) -> None:
        self._mlflow.end_run()


def _imported(package: str, name: str) -> Any:
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise ConfigError(
            f"tracking.to = {name}: the package {package} is not installed, remove it or install it"
        ) from error


_TRACKERS: dict[str, Callable[[RunConfig], Any]] = {"tensorboard": _TensorBoard, "wandb": _WandB, "mlflow": _MLflow}
