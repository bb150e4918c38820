from __future__ import annotations

import numpy as np
from sklearn.base import clone

import rayclust as rc
from tests.estimators.test_base import TINY_TEMI, planted


def test_probabilities_sum_to_one_and_lead_to_the_labels():
    x, _ = planted()
    found = clone(TINY_TEMI).set_params(n_clusters=7, random_state=0).fit(x)
    probabilities = found.predict_proba(x)
    assert probabilities.shape == (300, 7)
    assert np.allclose(probabilities.sum(axis=1), 1.0)
    assert np.array_equal(probabilities.argmax(axis=1), found.labels_)
    assert np.array_equal(np.unique(found.labels_), np.arange(found.labels_.max() + 1))
    assert found.n_steps_ == 30


def test_one_cluster_needs_no_training():
    x, _ = planted()
    found = rc.TEMI(n_clusters=1).fit(x)
    assert (found.predict_proba(x) == 1.0).all()
    assert (found.labels_ == 0).all()
