from __future__ import annotations

import numpy as np
import pytest
import torch

from rayclust.errors import ShapeError
from rayclust.features import FeatureTransform
from rayclust.metrics.probes import class_mean_accuracy, knn_accuracy, linear_evaluation, linear_probe_accuracy
from rayclust.search.knn import top_k


def test_knn_vote_worked_by_hand():
    labels = np.array([0, 0, 1, 1])
    neighbors = np.array([[1, 2, 3], [0, 2, 3], [3, 0, 1], [0, 1, 2]])
    similarity = np.array([[0.9, 0.1, 0.1], [0.2, 0.1, 0.1], [0.5, 0.4, 0.0], [0.5, 0.4, 0.3]])
    # One neighbour: the last row is wrong. All three, nearly equal weights: rows 0 and 1 lose to two of class 1.
    assert knn_accuracy(neighbors, similarity, labels, k=1) == 0.75
    assert knn_accuracy(neighbors, similarity, labels, k=3, temperature=1e6) == 0.0
    assert knn_accuracy(neighbors, similarity, labels, k=3, temperature=0.01) == 0.75
    assert knn_accuracy(neighbors[:1], similarity[:1], labels, labels[:1], k=1) == 1.0
    assert knn_accuracy(neighbors, similarity, np.array(list("xxyy")), k=1) == 0.75


def test_only_k_neighbours_vote():
    labels = np.array([0, 0, 1, 1])
    neighbors = np.array([[1, 2, 3], [0, 2, 3], [3, 0, 1], [2, 0, 1]])
    similarity = np.tile([0.5, 0.49, 0.49], (4, 1))  # the nearest is right, but the other two together outvote it
    found = [knn_accuracy(neighbors, similarity, labels, k=k) for k in (1, 2, 3, 20)]
    assert found == [1.0, 1.0, 0.0, 0.0]


def test_knn_vote_without_all_neighbours():
    labels = np.array([0, 1, 1])
    neighbors = np.array([[1, -1], [2, -1], [-1, -1]])
    similarity = np.array([[0.5, -np.inf], [0.5, -np.inf], [-np.inf, -np.inf]], dtype=np.float16)
    with np.errstate(all="raise"):
        assert knn_accuracy(neighbors, similarity, labels) == pytest.approx(1 / 3), "no neighbour is no right answer"


def test_a_row_is_right_if_its_class_is_among_the_top_ones_that_have_votes():
    labels = np.array([0, 1, 2, 3])
    neighbors = np.array([[1, 2, 0], [0, 2, 1], [3, 0, 1], [-1, 0, 1]])
    similarity = np.array([[0.9, 0.8, 0.7], [0.9, 0.8, 0.7], [0.9, 0.8, 0.7], [0.9, 0.8, 0.7]])
    found = [knn_accuracy(neighbors, similarity, labels, top=top) for top in (1, 2, 3, 9)]
    assert found == [0.0, 0.0, 0.5, 0.5]


def test_votes_weigh_as_in_the_published_probe():
    labels = np.array([0, 0, 0, 1])
    neighbors = np.array([[3, 1, 2]])  # the nearest against two: by exp(cos / 0.02) it wins from 0.0139 = 0.02 ln 2 on
    for gap, right in ((0.013, 1.0), (0.015, 0.0)):
        similarity = np.array([[0.5 + gap, 0.5, 0.5]])
        assert knn_accuracy(neighbors, similarity, labels, labels[:1]) == right


def test_knn_probe_of_real_features(shared_data):
    features = np.load(shared_data / "imagenette_val3k" / "features_mnv2a_f16.npy")
    labels = np.load(shared_data / "imagenette_val3k" / "labels.npy")
    transform = FeatureTransform.fitted(features, center=True, standardize=False, normalize=True)
    x = torch.from_numpy(transform(features))
    ids, similarity = top_k(x, x, 20, query_ids=torch.arange(len(x)))
    assert knn_accuracy(ids.numpy(), similarity.numpy(), labels, temperature=0.07) == pytest.approx(0.973, abs=0.004)


def _planted(spread: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    labels = np.array(["a", "b", "c"])[rng.integers(3, size=300)]
    return np.eye(3, 8)[np.searchsorted(["a", "b", "c"], labels)] + spread * rng.normal(size=(300, 8)), labels


def slow_probe(x: np.ndarray, codes: np.ndarray, classes: int, epochs: int) -> tuple[np.ndarray, np.ndarray]:
    """Weights and biases by Adam written out in float64, from the same draws."""
    generator = torch.Generator().manual_seed(0)
    parameters = [0.01 * torch.randn(classes, x.shape[1], generator=generator).double().numpy(), np.zeros(classes)]
    first, second, step = [0.0, 0.0], [0.0, 0.0], 0
    for epoch in range(epochs):
        rate = 0.005 * (1 + np.cos(np.pi * epoch / epochs)) / 2
        for batch in torch.randperm(len(x), generator=generator).split(256):
            rows, step = x[batch.numpy()], step + 1
            scores = np.exp(rows @ parameters[0].T + parameters[1])
            errors = (scores / scores.sum(1, keepdims=True) - np.eye(classes)[codes[batch.numpy()]]) / len(rows)
            for i, gradient in enumerate([errors.T @ rows, errors.sum(0)]):
                decayed = gradient + 0.01 * parameters[i]
                first[i] = 0.9 * first[i] + 0.1 * decayed
                second[i] = 0.999 * second[i] + 0.001 * decayed**2
                mean, scale = first[i] / (1 - 0.9**step), np.sqrt(second[i] / (1 - 0.999**step)) + 1e-8
                parameters[i] = parameters[i] - rate * mean / scale
    return parameters[0], parameters[1]


def test_the_probe_is_adam_with_weight_decay_and_a_cosine_written_out():
    rng = np.random.default_rng(5)
    codes = rng.integers(3, size=600)
    x = (np.eye(3, 6)[codes] + rng.normal(size=(600, 6))).astype(np.float32)
    x[:, 5] = 0  # nothing but weight decay moves this column's weights
    weights, biases = slow_probe(x.astype(np.float64), codes, 3, epochs=40)
    other = (rng.normal(size=(4000, 6)) * [0.5, 0.5, 0.5, 0.5, 0.5, 20]).astype(np.float32)
    told = (other @ weights.T + biases).argmax(1)
    assert linear_probe_accuracy(x, codes, other, told, epochs=40) >= 0.999


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


def test_votes_need_one_row_for_each_label():
    with pytest.raises(ShapeError, match="one row for each label"):
        knn_accuracy(np.zeros((2, 3), int), np.zeros((2, 3)), np.zeros(5))


def test_class_means_worked_by_hand():
    # Means 1 and 11, halves part at 6; "c" has no mean.
    x, labels = np.array([[0.0], [2.0], [10.0], [12.0]]), np.array(list("aabb"))
    others, truth = np.array([[5.0], [7.0], [5.0], [11.0]]), np.array(list("abbc"))
    assert class_mean_accuracy(x, labels, others, truth) == 0.5
    assert class_mean_accuracy(x + 1e4, labels, x + 1e4, labels) == 1.0
    with pytest.raises(ShapeError, match="one for each of 4 and 4 rows"):
        class_mean_accuracy(x, labels[:3], others, truth)


def test_the_linear_evaluation_learns_from_views():
    (x, labels), (other, truth) = _planted(0.1, 0), _planted(0.1, 1)
    rows, steps = torch.from_numpy(x).float(), list[int]()

    def view(batch: torch.Tensor, step: int) -> torch.Tensor:
        steps.append(step)
        return rows[batch] * (1 + 0.01 * (step % 3))

    assert linear_evaluation(view, labels, other, truth, epochs=10) == {1: 1.0, 5: 1.0}
    assert steps == list(range(10 * -(-len(x) // 256)))
    strange = np.where(truth == truth[0], "none", truth)  # a class that it was not shown
    assert linear_evaluation(view, labels, other, strange, epochs=5)[1] == pytest.approx((truth != truth[0]).mean())


def test_the_rate_of_the_linear_evaluation_falls_twice(monkeypatch: pytest.MonkeyPatch):
    rates, step = list[float](), torch.optim.SGD.step
    monkeypatch.setattr(torch.optim.SGD, "step", lambda s: (rates.append(s.param_groups[0]["lr"]), step(s))[1])
    linear_evaluation(lambda batch, _: torch.eye(2)[batch], [0, 1], np.eye(2), [0, 1], epochs=10)
    assert rates == pytest.approx([30] * 6 + [3] * 2 + [0.3] * 2)
