"""TEMI divided over workers: by rows, by heads or by both, the training is that of one worker."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from rayclust import distributed
from rayclust.losses import information
from rayclust.methods import build, temi
from rayclust.methods.base import CheckpointInterval
from rayclust.methods.temi import Temi
from rayclust.methods.temi_settings import TemiConfig
from rayclust.training.loop import Trainer
from rayclust.training.sampling import ArrayRows
from tests.stores import MemoryStore
from tests.workers import on_two_workers, on_workers

D, K, B, H, STEPS = 6, 4, 9, 5, 5
MESHES = ("data", "heads", "2x2")
FORMS = {"at once": (1 << 26, 1 << 31), "chunks": (512, 0)}
"""Bytes of a chunk of logits (here two pairs of one head), and of those that are kept: none, they are made twice."""
Kept = tuple[dict[str, Tensor], dict[str, Any]]


@pytest.fixture(autouse=True)
def _put_back(monkeypatch: pytest.MonkeyPatch):
    """What `_trained` sets."""
    for sizes in (information.CHUNK_BYTES, information.KEPT_BYTES):
        monkeypatch.setitem(sizes, "cpu", sizes["cpu"])


def _config(**settings: Any) -> TemiConfig:
    written = {"clusters": K, "preset": "none", "heads": H, "hidden": 8, "bottleneck": 5, "batch_size": B}
    written |= {"epochs": STEPS, "neighbors": 3, "learning_rate": 0.3, "warmup_epochs": 1, "weight_decay": 0.1}
    return TemiConfig.model_validate({**written, "teacher_momentum": 0.5, **settings})


def _trained(form: str, start: Kept | None = None, **settings: Any) -> dict[str, Any]:
    """Train for five epochs of one step each; return metrics of every step, all checkpoints, and all fitted heads."""
    information.CHUNK_BYTES["cpu"], information.KEPT_BYTES["cpu"] = FORMS[form]
    x = torch.randn(B, D, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    method, store = build(_config(**settings), D, B, seed=0).double(), MemoryStore()
    store.kept += [start] if start else []
    trainer = Trainer(3, store=store, every=CheckpointInterval(epochs=2))
    method.fit(ArrayRows(x, (torch.arange(B)[:, None] + torch.arange(1, 4)) % B), trainer)
    history = [{k: v for k, v in row.items() if "second" not in k} for row in trainer.history]
    return {"history": history, "kept": store.kept, "state": dict(method.state_dict())}


def _assert_close(found: Any, expected: Any, what: str) -> None:
    torch.testing.assert_close(
        torch.as_tensor(found).double(), torch.as_tensor(expected).double(), rtol=1e-10, atol=1e-10, msg=what
    )


def _assert_same(found: dict[str, Any], alone: dict[str, Any], what: str) -> None:
    assert len(found["history"]) == STEPS
    for row, wanted in zip(found["history"], alone["history"], strict=True):
        assert row.keys() == wanted.keys()
        for name, value in wanted.items():
            _assert_close(row[name], value, f"{what}: {name}")
    for kind, mine, wanted in (
        ("state", found["state"], alone["state"]),
        ("checkpoint", found["kept"][-1][0], alone["kept"][-1][0]),
    ):
        assert mine.keys() == wanted.keys()
        for name, tensor in wanted.items():
            _assert_close(mine[name], tensor, f"{what}: {kind}: {name}")


def _in_every_mesh(rank: int, world: int, starts: dict[str, Kept]) -> dict[str, dict[str, Any]]:
    found = {f"{form}, {mesh}": _trained(form, parallel=mesh) for form in FORMS for mesh in MESHES}
    return found | {f"{form}, resumed": _trained(form, starts[form], parallel="2x2") for form in FORMS}


def test_four_workers_divide_rows_heads_or_both_and_train_and_resume_as_one():
    """Loss of each step, health, checkpoints and heads to 1e-10; heads and rows do not divide evenly."""
    alone = {form: _trained(form) for form in FORMS}
    starts = {form: found["kept"][0] for form, found in alone.items()}
    for worker in on_workers(4, _in_every_mesh, starts):
        for what, found in worker.items():
            _assert_same(found, alone[what.partition(",")[0]], what)


OPTIONS: dict[str, dict[str, Any]] = {
    "scan": {"loss": "scan"},
    "wmi": {"loss": "wmi", "entropy_weight": 0.7},
    "pmi": {"loss": "pmi", "positive_pmi": True},
    "repeats": {"repeats": 2, "noise": 0.1},
    # A bias in front of a batch norm has no gradient but rounding, which AdamW would blow up.
    "sgd": {"optimizer": "sgd", "batch_norm": True, "learn_scale": False, "freeze_last_layer": 2},
    "lars": {"optimizer": "lars", "learning_rate": 30.0},
    "start": {"warm_start": "kmeans", "start_restarts": 3, "start_neighbors": 2, "selection": "modularity"},
}


def _with_options(rank: int, world: int) -> dict[str, dict[str, Any]]:
    return {name: _trained("chunks", parallel="heads", **options) for name, options in OPTIONS.items()}


def test_every_option_trains_as_one_worker_where_heads_are_divided():
    alone = {name: _trained("chunks", parallel="auto", **options) for name, options in OPTIONS.items()}
    for worker in on_two_workers(_with_options):
        for name, found in worker.items():
            _assert_same(found, alone[name], name)


def _divided(rank: int, world: int) -> dict[str, Any]:
    method = build(_config(parallel="2x2"), D, B, seed=0)
    assert isinstance(method, Temi)
    own = {name: x.clone() for name, x in method.state_dict().items()}
    whole = method.gather_state({**own, "loss": torch.tensor(1.0 + method.mesh.heads.rank)})
    found = {"own": own, "whole": whole, "shard": method.shard_state(whole)}
    with distributed.data_parallel(method.mesh.data):
        agreements = torch.full((method.student.shape.heads, 2), 1.0 + method.mesh.heads.rank)
        found["mean"] = method.mean_agreement(agreements)
    return found


def test_state_is_sharded_by_heads_and_gathered_again():
    alone = build(_config(), D, B, seed=0).state_dict()
    for rank, found in enumerate(on_workers(4, _divided)):
        heads = distributed.even_slices(H, 2)[rank // 2]
        assert found["whole"].pop("loss") == 3.0  # the sum over both parts of the heads
        assert found["shard"].pop("loss") == (3.0 if rank < 2 else 0.0)
        assert found["own"].keys() == found["whole"].keys() == found["shard"].keys() == alone.keys()
        for name, expected in alone.items():
            part = expected if name in temi.WHOLE_STATE else expected[heads]
            assert found["whole"][name].equal(expected), name
            assert found["own"][name].equal(part), name
            assert found["shard"][name].equal(part), name
        assert found["mean"].tolist() == [pytest.approx([(2 * 1.0 + 3 * 2.0) / 5] * 2)]
