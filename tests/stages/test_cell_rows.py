from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from rayclust import collectives
from rayclust.config import RunConfig, validate
from rayclust.methods import build
from rayclust.methods.base import FOREIGN, Batch
from rayclust.runtime.pipeline import run_all
from rayclust.runtime.rows import StoredRows
from rayclust.stages import cell_rows
from rayclust.stages.cell_rows import CellRows, Division, divided, rows_of
from rayclust.store.layout import Run
from rayclust.store.manifest import Manifest, read_manifest
from rayclust.training.cells import Tally
from rayclust.training.checkpoints import Every
from rayclust.training.loop import CROSSED, Trainer
from rayclust.training.pairs import PairBatches
from rayclust.training.schedules import learning_rate, weight_decay
from rayclust.training.steps import GradientSteps
from tests.stages.in_process import without_ray
from tests.stages.planted import planted, planted_tree
from tests.workers import on_two_workers

N, SEED, CPU = 400, 0, torch.device("cpu")
TEMI = {
    "name": "temi", "clusters": 8, "preset": "none", "heads": 2, "hidden": 8, "bottleneck": 5, "neighbors": 10,
    "batch_size": 40, "epochs": 2, "learning_rate": 0.02, "warmup_epochs": 0, "noise": 0.01,
}  # fmt: skip


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """A run up to its neighbours: eight groups of rows in two parts."""
    folder = tmp_path_factory.mktemp("cells")
    rows, content = planted(8, SEED), planted_tree(folder, np.empty((0, 1)), method=TEMI, resources={"rows": "cells"})
    (folder / "rows" / "rows.npy").unlink()
    for name, part in (("a", rows[:170]), ("b", rows[170:])):
        np.save(folder / "rows" / f"{name}.npy", part)
    found = validate(content)
    with pytest.MonkeyPatch.context() as patch:
        without_ray(patch)
        run_all(found, stop_after="neighbors")
    return found


def encoded(config: RunConfig) -> Manifest:
    found = read_manifest(Run(config.run), "encode")
    assert found is not None
    return found


def whole_rows(config: RunConfig, folder: Path) -> StoredRows:
    return StoredRows(Run(config.run), encoded(config), config.features, folder)


def test_each_worker_keeps_its_own_rows_and_neighbours(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    holder = (torch.rand(N, generator=torch.Generator().manual_seed(5)) * 3).short()
    whole = whole_rows(config, tmp_path)
    monkeypatch.setattr(collectives, "world_size", lambda: 3)
    seen = []
    for worker in range(3):
        monkeypatch.setattr(collectives, "rank", lambda worker=worker: worker)
        rows = CellRows(Run(config.run), encoded(config), config.features, tmp_path, Division(holder, CPU))
        monkeypatch.setattr(cell_rows, "tally", lambda found, device: Tally(1, 2, 3, 4, len(found)))
        assert rows.tally is None
        owned = (holder == worker).nonzero()[:, 0]
        assert (rows.count, rows.dimension) == (N, whole.dimension)
        assert rows.owned().equal(owned)
        assert rows.tensor().equal(whole.tensor()[owned])
        assert torch.cat(list(rows.blocks())).equal(rows.tensor())
        theirs, mine = whole.neighbors()[owned], rows.neighbors()
        assert mine.dtype == torch.int32
        assert rows.tally == Tally(1, 2, 3, 4, len(owned))
        assert (mine == FOREIGN).equal(holder[theirs] != worker)
        assert owned[mine[mine >= 0].long()].equal(theirs[mine >= 0])
        seen.append(owned)
        size = sum(path.stat().st_size for path in tmp_path.glob(f"*-{worker}/*.npy"))
        share = len(owned) / N
        assert size == pytest.approx(share * sum(path.stat().st_size for path in tmp_path.glob("*.npy")), rel=0.5)
        assert size < 1000 + len(owned) * 4 * (whole.dimension + 10)
    assert torch.cat(seen).sort().values.equal(torch.arange(N))


def test_one_worker_holds_all_rows(config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("RAYCLUST_SCRATCH", str(tmp_path))
    assert isinstance(rows_of(config, encoded(config), "digest", CPU), StoredRows)


def test_a_division_is_kept_and_a_damaged_one_made_again(config: RunConfig, tmp_path: Path):
    run, kept = Run(config.run), str(tmp_path)
    first = divided(run, encoded(config), config, kept, CPU)
    file = tmp_path / "holders-1"
    whole = file.read_bytes()
    other = first.clone().fill_(7)
    data = other.numpy().tobytes()
    file.write_bytes(hashlib.sha256(data).digest() + data)
    assert divided(run, encoded(config), config, kept, CPU).equal(other)
    file.write_bytes(whole[:-1])
    assert divided(run, encoded(config), config, kept, CPU).equal(first)
    assert file.read_bytes() == whole


class InterruptedTrainingError(Exception):
    """A training's end before its end."""


class Store:
    """Keeps checkpoints, and ends a training at the third."""

    def __init__(self) -> None:
        self.kept: list[tuple[dict[str, Tensor], dict[str, Any]]] = []

    def save(self, step: int, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        self.kept.append((tensors, json.loads(json.dumps(state))))
        if len(self.kept) == 3:
            raise InterruptedTrainingError

    def latest(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        return self.kept[-1] if self.kept else None


def _fit(config: RunConfig, store: Store | None, **settings: Any) -> tuple[dict[str, Tensor], Trainer]:
    chosen = config.fitted().model_copy(update=settings)
    rows = rows_of(config, encoded(config), "digest", CPU)
    method = build(chosen, rows.dimension, rows.count, SEED).double()
    trainer = Trainer(SEED, CPU, None, store, Every(epochs=None, seconds=1e-9))
    method.fit(rows, trainer)
    return method.state_dict(), trainer


def _work(rank: int, world: int, config: RunConfig, scratch: str) -> dict[str, Any]:
    """Batches, and trainings straight, resumed and with a warm start, of one of two workers."""
    from rayclust.training import loop

    loop.CLOCK_STEPS = 3
    patch = pytest.MonkeyPatch()
    patch.setenv("RAYCLUST_SCRATCH", scratch)
    rows = rows_of(config, encoded(config), "digest", CPU)
    method = build(config.fitted(), rows.dimension, rows.count, SEED).double()
    batches = PairBatches(rows, method.plan, method.pairing, SEED, torch.zeros(0, dtype=torch.float64))
    found = {"batches": [list(batches.epoch(epoch)) for epoch in range(2)], "held": rows.tensor().shape[0]}
    found["neighbors"] = rows.neighbors()
    found["state"], trainer = _fit(config, None)
    found["history"] = trainer.history
    store = Store()
    with pytest.raises(InterruptedTrainingError):
        _fit(config, store)
    assert store.kept[-1][1]["step"] == 9
    found["resumed"], trainer = _fit(config, store)
    assert [row[CROSSED] for row in trainer.history] == [row[CROSSED] for row in found["history"]]
    found["warm"], _ = _fit(config, None, warm_start="kmeans", selection="modularity", epochs=1)
    found["tally"] = rows.tally
    return found


def test_two_workers_train_on_their_own_rows(config: RunConfig, tmp_path: Path):
    """Every row comes once an epoch, the training is that of one worker on the joined batches, and can be resumed."""
    both = on_two_workers(_work, config, str(tmp_path))
    assert sum(found["held"] for found in both) == N
    assert max(found["held"] for found in both) < 0.65 * N
    for epoch in range(2):
        visited = torch.cat([batch.rows for found in both for batch in found["batches"][epoch]])
        assert visited.sort().values.equal(torch.arange(N))
    for name in ("state", "resumed", "warm"):
        for key, value in both[0][name].items():
            assert value.equal(both[1][name][key]), (name, key)
    for key, value in both[0]["state"].items():
        assert value.equal(both[0]["resumed"][key]), key
    joined = [_joined(pair) for epoch in range(2) for pair in zip(*(f["batches"][epoch] for f in both), strict=True)]
    for key, value in _alone(config, joined, tmp_path).items():
        if key != "head_losses":
            assert value.allclose(both[0]["state"][key], rtol=0, atol=1e-9), key
    crossed = [float(batch.crossed) for batch in joined if batch.crossed is not None]
    history = both[0]["history"]
    assert [row[CROSSED] for row in history] == pytest.approx([np.mean(crossed[:10]), np.mean(crossed[10:])], abs=1e-6)
    foreign = sum(int((found["neighbors"] == FOREIGN).sum()) for found in both)
    assert foreign / (10 * N) < 0.25
    alone = sum(int((found["neighbors"] < 0).all(1).sum()) for found in both)
    told = Tally(N, alone, 10 * N, foreign, max(found["held"] for found in both))
    assert [found["tally"] for found in both] == [told, told]


def _joined(pair: tuple[Batch, Batch]) -> Batch:
    crossed = sum(float(b.crossed) * len(b.rows) for b in pair if b.crossed is not None) / 40
    views, rows = torch.cat([b.views for b in pair], dim=1), torch.cat([b.rows for b in pair])
    assert len(rows) == 40
    return Batch(views, rows, pair[0].step, pair[0].epoch, crossed=torch.tensor(crossed))


def _alone(config: RunConfig, batches: list[Batch], folder: Path) -> dict[str, Tensor]:
    """What one worker's steps on these batches end in."""
    chosen: Any = config.fitted()
    rows = whole_rows(config, folder / "whole")
    method = build(chosen, rows.dimension, N, SEED).double()
    steps = GradientSteps(method, chosen)
    method.train()
    for batch in batches:
        rate = learning_rate(chosen, method.plan, batch.step)
        steps.take(batch, rate, weight_decay(chosen, method.plan, batch.step))
    return {name: value for name, value in method.state_dict().items() if name != "best_head"}
