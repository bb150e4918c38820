from __future__ import annotations

import itertools

import numpy as np
import pytest

from rayclust.errors import ShapeError
from rayclust.features import FeatureTransform, SpaceTransforms

X = np.random.default_rng(0).normal(2, [1, 3, 0.1], (40, 3)).astype(np.float16)
ALL = [
    dict(zip(("center", "standardize", "normalize"), values, strict=True))
    for values in itertools.product([False, True], repeat=3)
]


def plain(x: np.ndarray, rows: np.ndarray, center: bool, standardize: bool, normalize: bool) -> np.ndarray:
    """In float64, one row at a time."""
    x, rows, found = x.astype(np.float64), rows.astype(np.float64), []
    for row in rows:
        value = row - x.mean(0) if center or standardize else row
        value = value / x.std(0) if standardize else value
        found.append(value / np.linalg.norm(value) if normalize else value)
    return np.array(found)


@pytest.mark.parametrize("settings", ALL, ids=str)
def test_rows_new_and_old_go_through_the_map_of_the_rows_that_were_fitted(settings: dict[str, bool]):
    transform = FeatureTransform.fitted(X, **settings)
    new = np.random.default_rng(1).normal(size=(5, 3)).astype(np.float16)
    for rows in (X, new, new[:1]):
        found = transform(rows)
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, plain(X, rows, **settings), atol=2e-5)


@pytest.mark.parametrize("settings", ALL, ids=str)
def test_sums_of_parts_give_the_map_of_the_whole(settings: dict[str, bool]):
    parts = [part.astype(np.float64) for part in (X[:7], X[7:7], X[7:])]
    moments = sum(part.sum(0) for part in parts), sum((part**2).sum(0) for part in parts)
    by_sums, by_rows = FeatureTransform.from_moments(40, *moments, **settings), FeatureTransform.fitted(X, **settings)
    np.testing.assert_allclose(by_sums(X), by_rows(X), atol=1e-6)


def test_by_hand():
    x = np.array([[3, 4], [0, 2], [0, 0]], np.float32)
    assert FeatureTransform()(x).round(6).tolist() == np.array([[0.6, 0.8], [0, 1], [0, 0]], np.float32).tolist()
    centred = FeatureTransform.fitted(x, center=True, standardize=False, normalize=False)
    np.testing.assert_allclose(centred(x), [[2, 2], [-1, 0], [-1, -2]])
    scored = FeatureTransform.fitted(x, center=False, standardize=True, normalize=False)
    np.testing.assert_allclose(scored(x).std(0), [1, 1], rtol=1e-6)


def test_a_constant_dimension_is_left_at_zero_not_divided_by_it():
    x = np.array([[5, 1], [5, 3]], np.float32)
    found = FeatureTransform.fitted(x, center=True, standardize=True, normalize=False)(x)
    assert found.tolist() == [[0, -1], [0, 1]]


def test_the_input_is_left_as_it_was_and_may_be_empty():
    x = np.ones((2, 3), np.float32)
    FeatureTransform.fitted(X, center=True, standardize=True, normalize=True)(x)
    assert (x == 1).all()
    assert FeatureTransform()(x[:0]).shape == (0, 3)


def test_another_width_or_shape_is_refused():
    transform = FeatureTransform.fitted(X, center=True, standardize=False, normalize=True)
    with pytest.raises(ShapeError, match="width 4: 3 is needed"):
        transform(np.ones((2, 4), np.float32))
    with pytest.raises(ShapeError, match="two axes"):
        transform(np.ones(3, np.float32))


def test_spaces_side_by_side_by_hand():
    halved = FeatureTransform(scale=np.array([2, 2], np.float32), normalize=False)
    both = SpaceTransforms({"a": FeatureTransform(), "b": halved}, (3, 2))
    x = np.array([[3, 4, 0, 6, 8], [0, 0, 2, 0, 0]], np.float16)
    found = both.split(x)
    np.testing.assert_allclose(found["a"], [[0.6, 0.8, 0], [0, 0, 1]], rtol=1e-6)
    np.testing.assert_allclose(found["b"], [[3, 4], [0, 0]])
    half = 1 / np.sqrt(2)
    np.testing.assert_allclose(
        both(x), [[0.6 * half, 0.8 * half, 0, 0.6 * half, 0.8 * half], [0, 0, half, 0, 0]], rtol=1e-6
    )
    np.testing.assert_array_equal(both.only("b")(x[:, 3:]), found["b"])  # of one space alone its features as they are
    with pytest.raises(ShapeError, match="5"):
        both(x[:, :4])
