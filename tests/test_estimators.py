from __future__ import annotations

import inspect
import re
import subprocess
import sys

import numpy as np
import pytest
import sklearn.cluster
from sklearn.base import clone
from sklearn.datasets import load_digits
from sklearn.utils.estimator_checks import parametrize_with_checks

import rayclust as rc
from rayclust.errors import ConfigError
from rayclust.metrics.external import accuracy

TINY_TEMI = rc.TEMI(
    max_steps=30, n_heads=2, batch_size=64, learning_rate=1e-2, center=True,
    settings={"warm_start": "kmeans", "hidden": 16, "bottleneck": 8, "warmup_steps": 0},
)  # fmt: skip

TINY_CPP = rc.CPP(
    max_steps=16, batch_size=64, learning_rate=0.2, center=True,
    settings={"hidden": 32, "width": 8, "expansion_steps": 4, "patience": None},
)  # fmt: skip


@parametrize_with_checks([rc.KMeans(), rc.KMeans(metric="euclidean", normalize=False), TINY_TEMI, TINY_CPP])
def test_scikit_learns_own_checks(estimator, check):
    check(estimator)


def planted(count: int = 300, clusters: int = 4, width: int = 8) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    labels = rng.integers(clusters, size=count)
    return rng.normal(size=(clusters, width))[labels] + 0.25 * rng.normal(size=(count, width)), labels


@pytest.mark.parametrize("estimator", [rc.KMeans(4), TINY_TEMI, TINY_CPP], ids=["KMeans", "TEMI", "CPP"])
def test_finds_planted_clusters_and_new_rows_of_them(estimator):
    x, labels = planted()
    found = clone(estimator).set_params(n_clusters=4, random_state=1).fit(x[:200])
    assert accuracy(labels[:200], found.labels_) > 0.97
    assert accuracy(labels[200:], found.predict(x[200:])) > 0.97
    assert np.array_equal(found.predict(x[:200]), found.labels_)


def test_seeds():
    x, _ = planted()
    for estimator in (
        rc.KMeans(12, n_init=1),
        clone(TINY_TEMI).set_params(n_clusters=12),
        clone(TINY_CPP).set_params(n_clusters=12),
    ):
        runs = [clone(estimator).set_params(random_state=seed).fit_predict(x) for seed in (0, 0, 1)]
        assert np.array_equal(runs[0], runs[1])
        assert not np.array_equal(runs[0], runs[2])


def test_refuses_what_cannot_be():
    x, _ = planted(5)
    for estimator in (rc.KMeans(6), rc.TEMI(6)):
        with pytest.raises(ConfigError, match="n_clusters = 6: at most the number of rows, n_samples = 5"):
            estimator.fit(x)
    wrong = {
        "n_clusters = 0: should be": rc.KMeans(0),
        "metric = 'manhattan': should be 'cosine'": rc.KMeans(2, metric="manhattan"),
        "n_init = 0: should be": rc.KMeans(2, n_init=0),
        "n_heads = 0: should be": rc.TEMI(2, n_heads=0),
        "headz: unknown key; did you mean heads": rc.TEMI(2, settings={"headz": 3}),
    }
    for message, estimator in wrong.items():
        with pytest.raises(ConfigError, match=f"^{re.escape(message)}"):
            estimator.fit(x)


def test_importing_the_package_loads_neither_torch_nor_ray():
    code = "import sys, rayclust; dir(rayclust); print({'torch', 'ray', 'sklearn'} & set(sys.modules));"
    code += "rayclust.KMeans, rayclust.TEMI; print('ray' in sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert loaded.stdout.split() == ["set()", "False"]
    assert {"KMeans", "TEMI"} <= set(dir(rc))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        rc.nothing  # noqa: B018


def test_constructors_show_and_check_their_parameters():
    signature = inspect.signature(rc.TEMI)
    assert list(signature.parameters)[:4] == ["n_clusters", "preset", "n_heads", "n_neighbors"]
    assert signature.parameters["preset"].default == "auto"
    assert signature.parameters["n_heads"].default is None
    defaults = {"metric": "cosine", "n_init": 10, "max_iter": 300, "tol": 1e-4, "normalize": True}
    assert rc.KMeans(5).get_params().items() >= (defaults | {"n_clusters": 5}).items()
    with pytest.raises(TypeError, match="n_heads"):
        rc.KMeans(n_heads=3)
    with pytest.raises(TypeError, match="positional"):
        rc.CPP(3, "auto")
    with pytest.raises(ConfigError, match=r"^n_init"):
        rc.KMeans(2, n_init=None).fit(planted(5)[0])


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
