"""Stage `train`: fit the method to the run's rows, in one Ray task or with Ray Train; a small set in the driver.

Checkpoints are ours: safetensors and JSON below the run, written by worker 0. After the loss of a worker, the driver or
the cluster, training resumes from the newest complete one. Ray Train only places, watches and replaces several workers;
a single one is a task, for which Ray has a process ready.
"""

from __future__ import annotations

import hashlib
import logging
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import safetensors.torch
import torch
from torch import Tensor

from rayclust import distributed
from rayclust.config import RunConfig
from rayclust.errors import ArtefactError, ConfigError, RayclustError
from rayclust.methods import build_for
from rayclust.methods.base import CheckpointInterval, Method, RowTable
from rayclust.runtime.cluster import (
    connect,
    cores,
    in_driver,
    on_every_node,
    plain_errors,
    require_label,
    run_remotely,
    training_workers,
)
from rayclust.runtime.pipeline import CHOSEN, SELECT_K, STAGES, MetricsListener, StageContext, StageResult
from rayclust.runtime.progress import Progress, watch_metrics
from rayclust.runtime.rows import cache_folder, drop_cache, fitted_count
from rayclust.runtime.tensors import Partitions, StoredRows, save_method
from rayclust.store import manifest, storage
from rayclust.store.manifest import EncodeOutputs, Manifest, Outputs, put_bytes, put_table, read_unchanged
from rayclust.store.run import Run
from rayclust.training.loop import Trainer

logger = logging.getLogger(__name__)

CHECKPOINTS_KEPT = 2
"""The newest, and the one before it while the newest is being written."""
ELASTIC_START_SECONDS = "30"
"""Timeout for starting a group of workers where fewer would do. Ray refreshes its view of the nodes every 20 s, so that
just after a loss it may still ask for the resources of a lost node; its own timeout is 60 s."""


def run(context: StageContext) -> StageResult:
    """Train on the cluster; where select-k has fitted this very model, copy it."""
    config, encode = context.config, context.inputs["encode"]
    rows = fitted_count(encode)
    if rows < config.method.clusters:  # refused here, not after every worker has tried
        raise ConfigError(f"method.clusters = {config.method.clusters}: must be at most the number of rows, {rows}")
    is_own = config.method.model_copy(update=config.method.selection_settings) == config.method
    if SELECT_K in context.inputs and is_own:
        # The chosen candidate's model has the same settings and seed.
        chosen, outputs = context.inputs[SELECT_K].extra[CHOSEN], Outputs()
        for path, digest in chosen["outputs"].items():
            data = read_unchanged(context.run.at(path), digest, SELECT_K)
            outputs |= put_bytes(context.run, storage.join(context.run.model_folder, path.rpartition("/")[2]), data)
        summary = f"{config.method.name} with {chosen['clusters']} clusters, as fitted by select-k"
        return StageResult(outputs, {"rows": rows, "steps": chosen["steps"]}, {}, summary)
    folder, listener = context.run.model_folder, STAGES["train"].listener
    result = fit(Job("train", config, context.digest, encode, folder, context.plan, listener))
    summary = f"{config.method.name} with {config.method.clusters} clusters, {result['steps']:,} steps"
    if result["loss"] is not None:
        summary += f", loss {result['loss']:.4f}"
    return StageResult(result["outputs"], {"rows": rows, "steps": result["steps"]}, {}, summary)


@dataclass(frozen=True)
class Job:
    """One fit, as it is sent to every worker."""

    stage: str
    """The stage that asks for it, for the progress display."""
    config: RunConfig
    digest: str
    """Of everything that the fit depends on; names its checkpoints."""
    encode: Manifest
    folder: str
    """Folder of the model, below the run."""
    partitions: Partitions | None = None
    """Those that the method reads, if any."""
    listener: Callable[[RunConfig, str], MetricsListener] | None = None
    """Opens the receiver of the rows of metrics, in worker 0."""


def fit(job: Job) -> dict[str, Any]:
    """Fit a method on the cluster or in the driver, from the newest checkpoint if there is one, and write it.

    Returns:
        `outputs`, `steps`, and `loss` (None for a method without metrics).
    """
    with drop_rows_on_error(job.digest), plain_errors(), Progress(job.stage, "steps") as progress:
        if in_driver():
            settings = {"job": job, "report": progress.show_metrics}
            result: dict[str, Any] = run_remotely(_train, settings, cpus=cores())
        else:
            connect()
            with watch_metrics(progress) as report:
                result = _fit(job, report)
    storage.remove_tree(Run(job.config.run).checkpoints(job.digest))
    return result


@contextmanager
def drop_rows_on_error(digest: str) -> Iterator[None]:
    """Remove the rows' copies from every node on an error of ours; after a kill they stay for the run that resumes."""
    try:
        yield
    except RayclustError:
        on_every_node(drop_cache, digest)
        raise


def _fit(job: Job, report: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """Fit on the cluster; `report` is called in worker 0 with its rows of metrics.

    A single worker is a task: Ray Train would start a controller and a process of its own first, for seconds.
    """
    resources, (fewest, workers, cpus) = job.config.resources, training_workers(job.config)
    if fewest < workers:
        os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", ELASTIC_START_SECONDS)
        _check_every_worker_count(job, fewest, workers)
    labels, gpus = resources.placement.train, resources.gpus
    settings = {"job": job, "report": report}
    if workers == 1:
        retries = resources.max_failures
        return dict(run_remotely(_train, settings, cpus=cpus, gpus=gpus, kind="train", retries=retries))
    require_label("train", labels)
    from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    # Ray Train wants a folder for checkpoints; nothing is put there, ours lie below the run.
    with tempfile.TemporaryDirectory(prefix="rayclust-train-", ignore_cleanup_errors=True) as scratch:
        trainer = TorchTrainer(
            _train,
            train_loop_config=settings | {"threads": cpus},
            scaling_config=ScalingConfig(
                num_workers=(fewest, workers) if fewest < workers else workers,
                use_gpu=bool(gpus),
                resources_per_worker={"CPU": cpus} | ({"GPU": gpus} if gpus else {}),
                label_selector=dict(labels) or None,
            ),
            run_config=RunConfig(
                # A name of its own each time: what is resumed is our checkpoint, never Ray's idea of a finished run.
                name=f"rayclust-{job.digest[:12]}-{time.time_ns()}",
                storage_path=scratch,
                failure_config=FailureConfig(max_failures=resources.max_failures),
                checkpoint_config=CheckpointConfig(num_to_keep=1),
            ),
        )
        result: dict[str, Any] = trainer.fit().return_value
    return result


def _check_every_worker_count(job: Job, fewest: int, most: int) -> None:
    """Refuse settings that some of the possible numbers of workers cannot fit, before a worker is lost."""
    rows, dimension = fitted_count(job.encode), job.encode.outputs_of(EncodeOutputs).dimension
    device = "cuda" if job.config.resources.gpus else "cpu"
    for count in range(fewest, most + 1):
        try:
            job.config.method.describe_plan(rows, dimension, count, device)
        except ConfigError as error:
            raise ConfigError(f"resources.min_workers = {fewest}: {count} workers cannot go on ({error})") from None


def _train(settings: dict[str, Any]) -> dict[str, Any] | None:
    """Fit in one worker; worker 0 writes the model and returns the result."""
    job: Job = settings["job"]
    if "threads" in settings:  # of a worker of Ray Train; a task has those of its CPUs
        torch.set_num_threads(settings["threads"])
    config, run = job.config, Run(job.config.run, job.config.spaces)
    group = distributed.data_group()
    device = torch.device("cuda", torch.cuda.current_device()) if config.resources.gpus else "cpu"
    # Rows that are the bytes over 255, and nothing else was done to them.
    are_bytes = config.method.reads_pixels and config.encoder.mean is None and config.encoder.std is None
    place = cache_folder(job.digest), group.rank, group.size
    rows = StoredRows(run, job.encode, config.features, *place, are_bytes=are_bytes, partitions=job.partitions)
    method = build_for(rows, config.method, config.seed)
    total = {"steps": method.plan.steps} if hasattr(method, "plan") else {}
    listener = job.listener(config, job.digest) if group.rank == 0 and job.listener is not None else None

    def on_row(row: dict[str, Any]) -> None:
        settings["report"](row | total)
        if listener is not None:
            listener.log(row)

    every = CheckpointInterval(epochs=None, seconds=config.resources.checkpoint_seconds)
    store = StoredCheckpoints(run, job.digest)
    trainer = Trainer(config.seed, device, on_row if group.rank == 0 else None, store, every)
    method.fit(rows, trainer)
    if listener is not None:
        listener.close()
    distributed.barrier()
    drop_cache(job.digest)
    return None if group.rank else write_fit(rows, job.folder, method, trainer.history)


def write_fit(rows: StoredRows, folder: str, method: Method, history: list[dict[str, Any]]) -> dict[str, Any]:
    """Write a fitted method, its table of metrics, and that of its rows if any; return the same dict as `fit`."""
    # Seconds and rates differ from run to run; they stay out so that the same training gives the same bytes.
    steps = [{k: v for k, v in row.items() if k not in ("seconds", "rows_per_second")} for row in history]
    names = sorted({name for row in steps for name in row})  # rows from a checkpoint come in another order
    table = pa.table({name: [row.get(name) for row in steps] for name in names or ["epoch"]})
    outputs = save_method(rows.run, method.state(), folder)
    outputs |= put_table(rows.run, storage.join(folder, "metrics.parquet"), table)
    if isinstance(method, RowTable):
        outputs |= put_table(rows.run, storage.join(folder, "rows.parquet"), rows.table(method.row_table))
    last = history[-1] if history else {}
    return {"outputs": outputs, "steps": int(last.get("step", 0)), "loss": last.get("loss")}


class StoredCheckpoints:
    """Checkpoints below the run (`training.checkpoints.CheckpointStore`).

    The tensors are written first and the state last, with their digest: a state without its tensors does not count.
    """

    def __init__(self, run: Run, digest: str) -> None:
        self._folder = run.checkpoints(digest)

    def save(self, step: int, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        """Write on worker 0; return at once on the others."""
        if distributed.world().rank != 0:
            return
        data = safetensors.torch.save(tensors)
        storage.write_bytes(self._at(step, "tensors.safetensors"), data)
        content = {"digest": hashlib.sha256(data).hexdigest(), "state": state}
        manifest.write_checked(self._at(step, "state.json"), content)
        for old in self._steps()[:-CHECKPOINTS_KEPT]:
            storage.remove_tree(storage.join(self._folder, f"step-{old:09d}"))

    def latest(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """Return the newest checkpoint whose tensors match its state, or None."""
        for step in reversed(self._steps()):
            try:
                content = manifest.read_checked(self._at(step, "state.json"))
                data = storage.read_bytes(self._at(step, "tensors.safetensors"))
                if content["digest"] == hashlib.sha256(data).hexdigest():
                    logger.info("train: resuming at step %d", step)
                    return safetensors.torch.load(data), content["state"]
            except (storage.MissingError, ArtefactError, KeyError, TypeError):
                continue
        return None

    def _at(self, step: int, name: str) -> str:
        return storage.join(self._folder, f"step-{step:09d}", name)

    def _steps(self) -> list[int]:
        """Return the steps with a state, in order."""
        files = storage.walk(self._folder, suffixes=("state.json",), missing_ok=True)
        return sorted(int(file.key[5:14]) for file in files)
