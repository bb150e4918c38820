from __future__ import annotations

import numpy as np
import pytest
import sklearn.cluster
from sklearn.datasets import load_digits

import rayclust as rc
from rayclust.metrics.external import accuracy
from tests.estimators.test_base import planted


def test_euclidean_on_the_rows_themselves_is_scikit_learns_kmeans():
    x, _ = planted()
    ours = rc.KMeans(4, metric="euclidean", normalize=False, random_state=0).fit(x)
    theirs = sklearn.cluster.KMeans(4, n_init=10, random_state=0).fit(x)
    assert ours.inertia_ == pytest.approx(theirs.inertia_, rel=1e-5)
    assert accuracy(theirs.labels_, ours.labels_) == 1.0
    assert ours.score(x) == pytest.approx(-ours.inertia_, rel=1e-5)
    nearest = ours.transform(x).min(axis=1)
    assert np.square(nearest).sum() == pytest.approx(ours.inertia_, rel=1e-5)


def test_features_are_those_of_the_fitted_rows():
    x, labels = planted()
    found = rc.KMeans(4, center=True, standardize=True, random_state=0).fit(x * 10 ** np.arange(8) + 5)
    assert accuracy(labels, found.labels_) > 0.97
    assert np.array_equal(found.predict((x * 10 ** np.arange(8) + 5)[:1]), found.labels_[:1])


@pytest.mark.slow
def test_digits():
    x, y = load_digits(return_X_y=True)
    found = rc.KMeans(10, center=True, random_state=0).fit(x)
    assert accuracy(y, found.labels_) > 0.75
