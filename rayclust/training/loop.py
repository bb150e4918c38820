"""Epochs over any method, on one worker or many, that can be killed and continued."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from rayclust import collectives
from rayclust.errors import ConfigError, RayclustError
from rayclust.methods.base import Batch, CheckpointStore, Every, Method, Rows, TrainedConfig
from rayclust.training import checkpoints
from rayclust.training.pairs import STEPS, PairBatches, mix
from rayclust.training.schedules import learning_rate, weight_decay
from rayclust.training.steps import GradientSteps

logger = logging.getLogger(__name__)

CLOCK_STEPS = 20
"""Steps between two looks at the clock for a checkpoint."""

CROSSED = "cross_pairs"
"""Metric: the share of an epoch's pairs that were drawn across workers, and drawn again."""

MetricsRow = dict[str, Any]


class Trainer:
    """Fits a method to rows by gradient.

    Args:
        seed: of order, partners and all other chance.
        device: where the method and its batches live.
        on_row: takes each epoch's row of metrics, on every worker.
        store: keeps checkpoints; None keeps none.
        every: when checkpoints are due.
    """

    def __init__(
        self,
        seed: int,
        device: torch.device | str = "cpu",
        on_row: Callable[[MetricsRow], None] | None = None,
        store: CheckpointStore | None = None,
        every: Every | None = None,
    ) -> None:
        self.seed, self.device = seed, torch.device(device)
        self.store, self.every = store, every or Every()
        self.history: list[MetricsRow] = []
        """Every row reported so far, those before a resume included."""
        self._on_row = on_row

    def report(self, row: MetricsRow) -> None:
        """Takes one row of metrics: numbers, and lists of numbers."""
        self.history.append(row)
        if self._on_row is not None:
            self._on_row(row)

    def fit(self, method: Method, rows: Rows, start: Callable[[], None] | None = None) -> None:
        """Runs the steps of the method's plan, from the latest checkpoint if there is one.

        Args:
            method: moved to the trainer's device.
            rows: read once.
            start: called before the first step of a training that is not resumed.

        Raises:
            ArtefactError: the checkpoint is of another method.
            ConfigError: the method has no plan, or there are more workers than rows in a batch.
            RayclustError: the loss is no longer a finite number.
        """
        devices = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            _Training(self, method.to(self.device), rows, start).run()


class _Training:
    """One training from its first or a later step to its last."""

    def __init__(self, trainer: Trainer, method: Method, rows: Rows, start: Callable[[], None] | None) -> None:
        if not isinstance(method.config, TrainedConfig):
            raise ConfigError(f"method = {type(method).__name__}: is not trained by gradient")
        self.trainer, self.method, self.config, self.plan = trainer, method, method.config, method.plan
        self.batches = PairBatches(rows, self.plan, method.pairing, trainer.seed, next(method.parameters()))
        self.steps = method.own_steps() or GradientSteps(method, self.config)
        self.step, self.seconds, self.sums = 0, 0.0, dict[str, Tensor]()
        if not self._restore() and start is not None:
            start()
        self.started = self.saved = time.monotonic()

    def run(self) -> None:
        logger.info("training: %d steps of %d rows from step %d", self.plan.steps, self.plan.batch_size, self.step)
        self.method.train()
        per_epoch = self.plan.steps_per_epoch
        while self.step < self.plan.steps and not self.method.finished_early:
            epoch = self.step // per_epoch
            for batch in self.batches.epoch(epoch, skipped=self.step % per_epoch):
                self._take_step(batch)
                if self.step % per_epoch and self.step < self.plan.steps and self._clock_is_due():
                    self._save()
            self._end_epoch(epoch)
        self.method.eval()

    def _take_step(self, batch: Batch) -> None:
        torch.manual_seed(mix(self.trainer.seed, STEPS, batch.step, collectives.rank()))
        rate = learning_rate(self.config, self.plan, batch.step)
        losses = self.steps.take(batch, rate, weight_decay(self.config, self.plan, batch.step))
        self.step = batch.step + 1
        self._watch(losses if batch.crossed is None else losses | {CROSSED: batch.crossed}, batch.share)

    def _watch(self, losses: dict[str, Tensor], share: float) -> None:
        for name, value in losses.items():
            if name not in self.sums:
                self.sums[name] = torch.zeros_like(value, dtype=torch.float64)
            self.sums[name].add_(value, alpha=share)

    def _end_epoch(self, epoch: int) -> None:
        steps = self.step - epoch * self.plan.steps_per_epoch
        divisor = steps * collectives.world_size()
        means = self.method.whole({n: collectives.all_sum(self.sums[n]) / divisor for n in sorted(self.sums)})
        self.sums = {}
        seconds = self._elapsed()
        row = {"epoch": epoch, "step": self.step, "loss": float(means["loss"])}
        row["learning_rate"] = learning_rate(self.config, self.plan, self.step - 1)
        row.update(self.method.after_epoch(means))
        if CROSSED in means:
            row[CROSSED] = float(means[CROSSED])
        row["rows_per_second"] = steps * self.plan.batch_size / max(seconds - self._seconds_before(), 1e-9)
        row["seconds"] = seconds
        self.trainer.report(row)
        if not all(bool(mean.isfinite().all()) for mean in means.values()):
            raise RayclustError(
                f"training loss = {row['loss']} in epoch {epoch}: lower learning_rate or use precision: fp32"
            )
        if self._epoch_is_due(epoch):
            self._save()

    def _elapsed(self) -> float:
        return self.seconds + time.monotonic() - self.started

    def _seconds_before(self) -> float:
        return float(self.trainer.history[-1]["seconds"]) if self.trainer.history else 0.0

    def _epoch_is_due(self, epoch: int) -> bool:
        every = self.trainer.every.epochs
        over = self.step == self.plan.steps or self.method.finished_early
        return over or (every is not None and (epoch + 1) % every == 0) or self._clock_is_due()

    def _clock_is_due(self) -> bool:
        """Whether the first worker finds that the seconds between two checkpoints are over."""
        seconds = self.trainer.every.seconds
        if seconds is None or self.trainer.store is None or self.step % CLOCK_STEPS:
            return False
        due = collectives.is_first() and time.monotonic() - self.saved >= seconds
        return bool(collectives.everyone().all_sum(torch.tensor(int(due), device=self.trainer.device)))

    def _save(self) -> None:
        if self.trainer.store is None:
            return
        sums = {name: collectives.all_sum(self.sums[name]) for name in sorted(self.sums)}
        state = {"step": self.step, "seconds": self._elapsed(), "history": self.trainer.history}
        state["sharing"] = collectives.world_size()
        self.trainer.store.save(self.step, checkpoints.pack(self.method, self.steps, sums), state)
        self.saved = time.monotonic()

    def _restore(self) -> bool:
        """Whether there was a checkpoint to go on from."""
        found = self.trainer.store.latest() if self.trainer.store is not None else None
        if found is None:
            return False
        tensors, state = found
        sums = checkpoints.unpack(tensors, self.method, self.steps)
        if collectives.rank() == 0:
            # The shares of W workers add up to W means: more or fewer workers than before count in their own measure.
            scale = collectives.world_size() / state.get("sharing", collectives.world_size())
            self.sums = {name: total.to(self.trainer.device) * scale for name, total in sums.items()}
        self.step, self.seconds = int(state["step"]), float(state["seconds"])
        self.trainer.history[:] = state["history"]
        return True
