from __future__ import annotations

import numpy as np
import pytest

from rayclust.errors import ShapeError
from rayclust.metrics.linear_probe import linear_probe_accuracy


def _planted(spread: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    labels = np.array(["a", "b", "c"])[rng.integers(3, size=300)]
    return np.eye(3, 8)[np.searchsorted(["a", "b", "c"], labels)] + spread * rng.normal(size=(300, 8)), labels


def test_classes_apart_are_told_apart_on_new_rows():
    assert linear_probe_accuracy(*_planted(0.1, 0), *_planted(0.1, 1), epochs=30) == 1.0


def test_labels_at_random_are_told_by_chance():
    x, labels = _planted(0.1, 0)
    shuffled = np.random.default_rng(2).permutation(labels)
    other, truth = _planted(0.1, 1)
    assert linear_probe_accuracy(x, shuffled, other, truth, epochs=20) < 0.6


def test_a_class_that_was_not_seen_is_wrong():
    x, labels = _planted(0.1, 0)
    seen = labels != "c"
    other, truth = _planted(0.1, 1)
    found = linear_probe_accuracy(x[seen], labels[seen], other, truth, epochs=30)
    assert found == pytest.approx(float(np.mean(truth != "c")), abs=0.02)


def test_the_same_seed_gives_the_same():
    assert len({linear_probe_accuracy(*_planted(0.6, 0), *_planted(0.6, 1), epochs=5, seed=3) for _ in range(2)}) == 1


def test_lengths_must_fit():
    x, labels = _planted(0.1, 0)
    with pytest.raises(ShapeError):
        linear_probe_accuracy(x, labels[1:], x, labels)
