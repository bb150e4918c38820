from __future__ import annotations

import numpy as np
import pytest
from sklearn.base import clone

import rayclust as rc
from rayclust.errors import ConfigError
from tests.estimators.test_base import TINY_CPP, planted


def test_transform_gives_unit_rows_of_the_learned_width():
    x, _ = planted()
    found = clone(TINY_CPP).set_params(n_clusters=4, random_state=0).fit(x)
    assert found.transform(x).shape == (300, 8)
    assert np.allclose(np.linalg.norm(found.transform(x), axis=1), 1.0)
    assert len(found.get_feature_names_out()) == 8
    assert found.n_steps_ == 16


def test_features_are_learned_for_one_cluster_as_well():
    x, _ = planted()
    found = clone(TINY_CPP).set_params(n_clusters=1).fit(x)
    assert (found.labels_ == 0).all()
    assert found.transform(x).shape == (300, 8)
    with pytest.raises(ConfigError, match="n_samples = 1: at least 2"):
        clone(TINY_CPP).set_params(n_clusters=1).fit(x[:1]).transform(x)


def test_settings_are_named_as_the_estimator_names_them():
    x, _ = planted()
    with pytest.raises(ConfigError, match=r"^max_steps = 0: should be"):
        rc.CPP(2, max_steps=0).fit(x)
