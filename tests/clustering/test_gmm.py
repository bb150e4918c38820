"""Mixtures of Gaussians: values by hand, scikit-learn's from the same start, any sharding, the method."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.mixture import GaussianMixture
from torch import Tensor

from rayclust.clustering import gmm
from rayclust.clustering.gmm import Mixture
from rayclust.clustering.row_stats import Blocks
from rayclust.errors import ArtefactError
from rayclust.methods import build, load
from rayclust.methods.base import CheckpointInterval
from rayclust.methods.settings import GmmConfig
from rayclust.settings import GmmOptions
from rayclust.training.loop import Trainer
from rayclust.training.sampling import ArrayRows
from tests.stores import MemoryStore
from tests.workers import on_two_workers

COVARIANCES = {"diagonal": "diag", "spherical": "spherical"}


def planted(seed: int = 0) -> Tensor:
    """Three clusters of unlike size and spread."""
    rng = np.random.default_rng(seed)
    sizes, spreads = (120, 60, 20), (1.0, 0.3, 2.0)
    centers = np.array([[0.0, 0.0, 0.0], [3.0, 1.0, 0.0], [0.0, 5.0, 4.0]])
    rows = [c + s * rng.normal(size=(n, 3)) * (1.0, 0.5, 1.5) for n, s, c in zip(sizes, spreads, centers, strict=True)]
    return torch.tensor(rng.permutation(np.concatenate(rows)))


def fit(blocks: Blocks, options: GmmOptions, seed: int = 0) -> Mixture:
    *_, found = gmm.advance(blocks, options, gmm.start(blocks, options, seed))
    return found


def test_two_far_blobs_of_unlike_size():
    rng = np.random.default_rng(0)
    small = rng.normal(size=(50, 2)) * 0.1
    x = torch.tensor(np.concatenate([small, -small, small, 100 + small]))
    found = fit(lambda: [x], GmmOptions(clusters=2, regularization=1e-3, tolerance=0.0, max_iterations=10))
    order = found.weights.argsort(descending=True)
    assert found.weights[order].tolist() == pytest.approx([0.75, 0.25])
    blob = torch.tensor(np.concatenate([small, -small, small])).var(0, unbiased=False) + 1e-3
    assert torch.allclose(found.variances[order[0]], blob)
    shares = found.log_joint(x).softmax(1)
    assert torch.allclose(shares.amax(1), torch.ones(200, dtype=torch.float64))


def test_log_joint_by_hand():
    mixture = Mixture(
        torch.tensor([0.25, 0.75]).double(),
        torch.tensor([[0.0], [3.0]]).double(),
        torch.tensor([[1.0], [4.0]]).double(),
    )
    x = torch.tensor([[1.0]])
    by_hand = [
        math.log(0.25) - 0.5 - 0.5 * math.log(2 * math.pi),
        math.log(0.75) - 0.5 * 4 / 4 - 0.5 * math.log(2 * math.pi * 4),
    ]
    assert mixture.log_joint(x)[0].tolist() == pytest.approx(by_hand, abs=1e-12)


@pytest.mark.parametrize("covariance", COVARIANCES)
def test_equals_scikit_learns_from_the_same_start(covariance: Any):
    x = planted()
    options = GmmOptions(clusters=3, covariance=covariance, tolerance=0.0, max_iterations=25)
    first = gmm.start(lambda: [x], options, seed=1)
    precisions = 1 / first.variances.numpy()
    theirs = GaussianMixture(
        3, covariance_type=COVARIANCES[covariance], weights_init=first.weights.numpy(), means_init=first.means.numpy(),
        precisions_init=precisions[:, 0] if covariance == "spherical" else precisions, tol=0.0, max_iter=25,
        reg_covar=1e-6,
    )  # fmt: skip
    with pytest.warns(UserWarning, match="converge"):
        theirs.fit(x.numpy())
    mine = fit(lambda: x.split(17), options, seed=1)
    np.testing.assert_allclose(mine.means, theirs.means_, rtol=1e-6, atol=1e-8)
    np.testing.assert_allclose(mine.weights, theirs.weights_, rtol=1e-6)
    np.testing.assert_allclose(mine.log_joint(x).softmax(1), theirs.predict_proba(x.numpy()), atol=1e-7)


@pytest.mark.parametrize("covariance", COVARIANCES)
def test_the_likelihood_never_falls_and_it_stops(covariance: Any):
    x, options = planted(1), GmmOptions(clusters=4, covariance=covariance, tolerance=1e-4, regularization=0.0)
    found = [each.log_likelihood for each in gmm.advance(lambda: [x], options, gmm.start(lambda: [x], options, 0))]
    assert all(b >= a - 1e-12 for a, b in pairwise(found))
    assert len(found) < options.max_iterations
    assert found[-1] - found[-2] < 1e-4


def test_a_component_without_rows_stays_where_it_was():
    sums = torch.zeros((2, 3), dtype=torch.float64)
    sums[0] = torch.tensor([4.0, 8.0, 20.0])
    before = Mixture(torch.ones(2).double(), torch.tensor([[0.0], [7.0]]).double(), torch.full((2, 1), 9.0).double())
    found = gmm._maximize(sums, before, GmmOptions(clusters=2))
    assert found.means[:, 0].tolist() == [2.0, 7.0]
    assert found.variances[:, 0].tolist() == pytest.approx([1.0, 9.0], abs=1e-5)


def _sharded(rank: int, world: int) -> tuple[Tensor, Tensor, Tensor]:
    x = planted()
    own = x[:150] if rank == 0 else x[150:]
    rows = x if world == 1 else own
    found = fit(lambda: [rows], GmmOptions(clusters=3, restarts=1), seed=2)
    return found.weights, found.means, found.variances


def test_two_workers_find_the_mixture_of_one():
    alone = _sharded(0, 1)
    for found in on_two_workers(_sharded):
        for mine, wanted in zip(found, alone, strict=True):
            torch.testing.assert_close(mine, wanted, rtol=1e-9, atol=1e-9)


def test_the_method_resumes_to_the_same_and_is_stored():
    config = GmmConfig(clusters=3, tolerance=0.0, max_iterations=6)
    rows, states = ArrayRows(planted()), []
    for stop_after in (None, 2):
        store = MemoryStore(stop_after)
        for _ in range(2 if stop_after else 1):
            method = build(config, 3, rows.count, 0)
            try:
                method.fit(rows, Trainer(0, store=store, every=CheckpointInterval(epochs=1)))
            except KeyboardInterrupt:
                continue
        assert len(store.kept) == 6
        states.append(method.state())
    assert all(torch.equal(states[0].tensors[name], value) for name, value in states[1].tensors.items())
    shares = load(states[0]).predict_proba(planted())
    assert torch.allclose(shares.sum(1), torch.ones(rows.count, dtype=torch.float64))
    with pytest.raises(ArtefactError, match="checkpoint does not hold"):
        build(GmmConfig(clusters=2), 3, rows.count, 0).fit(rows, Trainer(0, store=store))
