from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from rayclust.clustering import kmeans as clustering
from rayclust.errors import ArtefactError, ConfigError, ShapeError
from rayclust.methods import build, load
from rayclust.methods.base import CheckpointInterval
from rayclust.methods.kmeans import KMeans
from rayclust.methods.settings import KMeansConfig
from rayclust.settings import KMeansOptions
from rayclust.training.loop import Trainer
from rayclust.training.sampling import ArrayRows
from tests.stores import MemoryStore
from tests.workers import on_two_workers


def planted(count: int = 400, clusters: int = 8) -> Tensor:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(clusters, 6))[rng.integers(clusters, size=count)] + 0.6 * rng.normal(size=(count, 6))
    return torch.from_numpy(x.astype(np.float32))


def fitted(
    x: Tensor, store: MemoryStore | None = None, every: CheckpointInterval | None = None, **options: Any
) -> tuple[KMeans, list[dict[str, Any]]]:
    config = KMeansConfig(**{"clusters": 8, "restarts": 3, "tolerance": 0.0} | options)
    method = build(config, x.shape[1], len(x), seed=4)
    trainer = Trainer(4, store=store, every=every or CheckpointInterval(epochs=1))
    method.fit(ArrayRows(x), trainer)
    assert isinstance(method, KMeans)
    return method, trainer.history


@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
def test_fits_what_clustering_fits_and_assigns_to_the_nearest(metric):
    x = planted()
    method, history = fitted(x, metric=metric)
    options = KMeansOptions(clusters=8, restarts=3, tolerance=0, metric=metric)
    result = clustering.fit(lambda: [x], options, seed=4)
    assert torch.equal(method.centers, result.centers)
    probabilities = method.predict_proba(x)
    rows = torch.nn.functional.normalize(x, dim=1) if metric == "cosine" else x
    assert torch.equal(probabilities.argmax(1), clustering.assign(rows, result.centers)[0])
    assert torch.allclose(probabilities.sum(1), torch.ones(len(x)))
    assert history[-1]["inertia"] == result.inertia
    assert history[-1]["loss"] == result.inertia / len(x)
    assert [row["step"] for row in history] == list(range(1, len(history) + 1))


def test_probabilities_worked_by_hand():
    method = KMeans(KMeansConfig(clusters=2, metric="euclidean", temperature=0.5), dimension=1, count=4, seed=0)
    method.centers.copy_(torch.tensor([[0.0], [2.0]]))
    method.inertia.fill_(8.0)  # mean d² is 2, so probabilities go as exp(−d²)
    odds = np.exp(-0.25 + 2.25)
    assert method.predict_proba(torch.tensor([[0.5], [1.0]]))[:, 0].tolist() == pytest.approx([odds / (1 + odds), 0.5])


def test_a_perfect_fit_still_gives_probabilities():
    x = torch.eye(4).repeat(3, 1)
    method, _ = fitted(x, clusters=4)
    assert float(method.inertia) == pytest.approx(0.0, abs=1e-6)
    assert (method.predict_proba(x).max(1)[0] > 0.99).all()


def test_length_of_rows_plays_no_part_for_cosine():
    x = planted()
    method, _ = fitted(x)
    assert torch.allclose(method.predict_proba(x), method.predict_proba(7.0 * x), atol=1e-5)


def test_killed_anywhere_it_goes_on_to_the_same_end():
    x = planted()
    whole, history = fitted(x, store := MemoryStore())
    assert len(store.kept) == len(history) - 1
    for stop_after in (1, 2, len(store.kept) - 1, None):
        kept = MemoryStore(stop_after)
        with pytest.raises(KeyboardInterrupt) if stop_after else nullcontext():
            fitted(x, kept)
        again, rows = fitted(x, kept)
        assert torch.allclose(again.centers, whole.centers, atol=1e-6)
        assert [row["inertia"] for row in rows] == pytest.approx([row["inertia"] for row in history])


def test_keeps_checkpoints_by_the_clock_or_by_the_count():
    kept = {}
    for every in (
        CheckpointInterval(epochs=1),
        CheckpointInterval(epochs=2),
        CheckpointInterval(None, seconds=0.0),
        CheckpointInterval(None, seconds=1e9),
        CheckpointInterval(None),
    ):
        fitted(planted(), store := MemoryStore(), every)
        kept[every] = len(store.kept)
    passes, halves, always, late, never = kept.values()
    assert passes == always > 1
    assert halves == passes // 2
    assert late == never == 0


def test_refuses_a_checkpoint_of_other_sizes():
    store = MemoryStore()
    fitted(planted(), store)
    with pytest.raises(ArtefactError, match="does not hold"):
        fitted(planted(), store, clusters=5)


def test_a_loaded_state_assigns_the_same():
    x = planted()
    method, _ = fitted(x, metric="euclidean")
    again = load(method.state())
    assert torch.equal(again.predict_proba(x), method.predict_proba(x))
    assert again.config == method.config


def worker_fit(rank: int, world: int, x: Tensor) -> Tensor:
    return fitted(x, MemoryStore())[0].centers


def test_two_workers_equal_one():
    x = planted()
    alone, _ = fitted(x)
    for centers in on_two_workers(worker_fit, x):
        assert torch.allclose(centers, alone.centers, atol=1e-6)


def stopped(rank: int, world: int, x: Tensor) -> MemoryStore:
    store = MemoryStore(stop_after=2)
    with pytest.raises(KeyboardInterrupt):
        fitted(x, store)
    return store


def test_one_worker_goes_on_where_two_were():
    x = planted()
    alone, history = fitted(x)
    gone_on, rows = fitted(x, on_two_workers(stopped, x)[0])
    assert torch.allclose(gone_on.centers, alone.centers, atol=1e-6)
    assert [row["inertia"] for row in rows] == pytest.approx([row["inertia"] for row in history])


def test_refuses_what_cannot_be():
    with pytest.raises(ConfigError, match=r"method.clusters = 8: must be at most the number of rows, 5"):
        fitted(planted(5))
    with pytest.raises(ShapeError, match="width"):
        fitted(planted())[0].predict_proba(torch.zeros(2, 5))
