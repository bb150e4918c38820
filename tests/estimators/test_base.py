from __future__ import annotations

import re
import subprocess
import sys

import numpy as np
import pytest
from sklearn.base import clone
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
