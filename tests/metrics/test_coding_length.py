from __future__ import annotations

import numpy as np
import pytest
import torch

from rayclust.clustering.spectral import SpectralOptions, partition
from rayclust.errors import ConfigError, DataError, ShapeError
from rayclust.metrics import coding_length as module
from rayclust.metrics.coding_length import Moments, coding_length, group_length, label_length
from rayclust.metrics.selection import Candidate, argmin_coding_length
from tests.references import coding_length as plain


def two_lines() -> tuple[np.ndarray, np.ndarray]:
    """Twenty times each of two basis vectors of eight."""
    labels = np.repeat([0, 1], 20)
    return np.eye(8)[labels], labels


def rows(count: int, width: int, clusters: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    z = rng.normal(size=(count, width))
    return z / np.linalg.norm(z, axis=1, keepdims=True), rng.integers(clusters, size=count)


def test_two_orthogonal_lines_by_hand():
    z, labels = two_lines()
    # d / (ε² m) · 20 = 80: each line is one eigenvalue of 81.
    assert group_length(z[:20]) == pytest.approx(28 / 2 * np.log(81))
    assert coding_length(z, labels) == pytest.approx(2 * (14 * np.log(81) + 20 * np.log(2)))
    assert coding_length(z, labels) == pytest.approx(150.770, abs=5e-4)
    # Together: two eigenvalues of 1 + 8 / (0.1 · 40) · 20 = 41.
    assert coding_length(z, np.zeros(40, int)) == pytest.approx(24 * 2 * np.log(41))
    assert coding_length(z, np.zeros(40, int)) == pytest.approx(178.251, abs=5e-4)


def test_splitting_a_line_costs():
    z, labels = two_lines()
    split = labels.copy()
    split[:10] = 2
    assert coding_length(z, split) > coding_length(z, labels)


def test_ids_by_hand():
    assert label_length([2, 0, 2]) == pytest.approx(4 * np.log(2))
    assert label_length([5]) == 0.0


@pytest.mark.parametrize(("count", "width", "clusters"), [(60, 7, 3), (60, 40, 5), (17, 30, 17)])
def test_every_route_is_the_plain_form(count: int, width: int, clusters: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "_ROWS_AT_ONCE", 9)
    z, labels = rows(count, width, clusters)
    expected = plain(z, labels, 0.1)
    assert coding_length(z, labels) == pytest.approx(expected, rel=1e-10)
    assert Moments.of(z, labels, clusters).coding_length() == pytest.approx(expected, rel=1e-10)
    assert coding_length(z, labels, 0.5) == pytest.approx(plain(z, labels, 0.5), rel=1e-10)


def test_moments_add_up_over_blocks_and_skip_empty_clusters():
    z, labels = rows(50, 6, 4)
    parts = [Moments.of(z[part], labels[part], 6) for part in (slice(0, 13), slice(13, 13), slice(13, 50))]
    total = parts[0] + parts[1] + parts[2]
    assert total.counts.tolist() == [*np.bincount(labels), 0, 0]
    assert total.coding_length() == pytest.approx(coding_length(z, labels), rel=1e-12)


@pytest.mark.parametrize("seed", range(10))
def test_planted_subspaces_give_their_number(seed: int):
    clusters, rng = 2 + seed, np.random.default_rng(seed)
    truth = np.repeat(np.arange(clusters), 40)
    bases = np.linalg.qr(rng.normal(size=(48, 2 * clusters)))[0].reshape(48, clusters, 2)
    z = np.einsum("nr,dnr->nd", rng.normal(size=(len(truth), 2)), bases[:, truth])
    z = z / np.linalg.norm(z, axis=1, keepdims=True) + 0.1 * rng.normal(size=z.shape) / 48**0.5
    z = (z / np.linalg.norm(z, axis=1, keepdims=True)).astype(np.float32)
    found = partition(lambda: [torch.from_numpy(z)], 12, SpectralOptions(temperature=0.1, restarts=5), seed)
    candidates = [Candidate(k, {"coding_length": coding_length(z, found.labels(k).numpy())}) for k in range(2, 13)]
    assert argmin_coding_length(candidates) == clusters


def test_names_order_and_rotation_play_no_part():
    z, labels = rows(80, 9, 4)
    order = np.random.default_rng(1).permutation(80)
    turn, _ = np.linalg.qr(np.random.default_rng(2).normal(size=(9, 9)))
    value = coding_length(z, labels)
    assert coding_length(z[order], np.array([9, -4, 2, 70])[labels[order]]) == pytest.approx(value, rel=1e-12)
    assert coding_length(z @ turn, labels) == pytest.approx(value, rel=1e-12)


def test_half_precision_is_widened():
    z, labels = rows(80, 9, 4)
    assert coding_length(z.astype(np.float16), labels) == pytest.approx(coding_length(z, labels), rel=1e-3)


def test_refuses_what_cannot_be():
    z, labels = rows(10, 3, 2)
    with pytest.raises(ConfigError, match="distortion = 0: must be above 0"):
        coding_length(z, labels, 0)
    with pytest.raises(ShapeError, match="one label for each of 10 rows"):
        coding_length(z, labels[:-1])
    with pytest.raises(ShapeError, match="two axes"):
        group_length(z[0])
    with pytest.raises(DataError, match="from 0 to 0 is needed"):
        Moments.of(z, labels, 1)
    with pytest.raises(ShapeError, match="moments have shapes"):
        Moments.of(z, labels, 2) + Moments.of(z, labels, 3)
