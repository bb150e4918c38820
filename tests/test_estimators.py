from __future__ import annotations

import inspect
import logging
import re
import subprocess
import sys
from contextlib import contextmanager

import numpy as np
import pandas as pd
import pytest
import sklearn.cluster
import torch
from sklearn.base import clone
from sklearn.datasets import load_digits
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import parametrize_with_checks

import rayclust as rc
from rayclust.errors import ConfigError, DataError, ShapeError
from rayclust.metrics.external import accuracy

TINY_TEMI = rc.TEMI(
    max_steps=30, n_heads=2, batch_size=64, learning_rate=1e-2, center=True,
    settings={"warm_start": "kmeans", "hidden": 16, "bottleneck": 8, "warmup_steps": 0},
)  # fmt: skip

TINY_CPP = rc.CPP(
    max_steps=16, batch_size=64, learning_rate=0.2, center=True,
    settings={"hidden": 32, "width": 8, "expansion_steps": 4, "patience": None},
)  # fmt: skip

TINY_TURTLE = rc.TURTLE(n_init=2, max_steps=60)

NOT_THE_SAME_DRAWS = "k-means++ draws other rows when rows are repeated or left out, as in scikit-learn's own KMeans"


def unmet(estimator):
    dense = "check_sample_weight_equivalence_on_dense_data"
    return {dense: NOT_THE_SAME_DRAWS} if isinstance(estimator, rc.KMeans) else {}


@parametrize_with_checks(
    [
        rc.KMeans(),
        rc.KMeans(metric="cosine"),
        rc.Auto(n_init=2),
        rc.Consensus(n_init=4),
        # The contract is the same after a few steps.
        clone(TINY_TEMI).set_params(max_steps=4),
        clone(TINY_CPP).set_params(max_steps=8),
        clone(TINY_TURTLE).set_params(n_init=1, max_steps=30),
    ],
    expected_failed_checks=unmet,
)
def test_scikit_learns_own_checks(estimator, check):
    check(estimator)


def planted(count: int = 300, clusters: int = 4, width: int = 8) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    labels = rng.integers(clusters, size=count)
    return rng.normal(size=(clusters, width))[labels] + 0.25 * rng.normal(size=(count, width)), labels


@pytest.mark.parametrize(
    "estimator",
    [rc.KMeans(4), rc.Auto(4), rc.Consensus(4), TINY_TEMI, TINY_CPP, TINY_TURTLE],
    ids=["KMeans", "Auto", "Consensus", "TEMI", "CPP", "TURTLE"],
)
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
        "n_clusters = '2': should be a whole number": rc.TEMI("2"),
        "n_clusters = None: should be a whole number": rc.Auto(None),
        "device = 'gpu': should be 'auto', 'cpu' or 'cuda'": rc.KMeans(2, device="gpu"),
        **({} if torch.cuda.is_available() else {"device = 'cuda': torch sees no GPU": rc.TEMI(2, device="cuda")}),
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
    assert signature.parameters["normalize"].default is True
    defaults = {"metric": "euclidean", "n_init": 10, "max_iter": 300, "tol": 1e-4, "normalize": False}
    assert rc.KMeans(5).get_params().items() >= (defaults | {"n_clusters": 5}).items()
    with pytest.raises(TypeError, match="n_heads"):
        rc.KMeans(n_heads=3)
    with pytest.raises(TypeError, match="positional"):
        rc.CPP(3, "auto")
    with pytest.raises(ConfigError, match=r"^n_init"):
        rc.KMeans(2, n_init=None).fit(planted(5)[0])


def test_kmeans_is_that_of_the_rows_as_they_are_like_scikit_learns():
    x, _ = planted()
    ours = rc.KMeans(4, random_state=0).fit(x)
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
    with pytest.raises(ValueError, match="too far above those of the fitted rows"):
        found.predict(x * 1e200)


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


def test_weights_count_rows_as_often_as_they_say():
    x, _ = planted()
    counts = np.random.default_rng(1).integers(0, 4, len(x))
    weighted = rc.KMeans(4, center=True, random_state=0).fit(x, sample_weight=counts)
    repeated = rc.KMeans(4, center=True, random_state=0).fit(x.repeat(counts, axis=0))
    theirs = sklearn.cluster.KMeans(4, n_init=10, random_state=0).fit(x, sample_weight=counts)
    assert weighted.inertia_ == pytest.approx(repeated.inertia_, rel=1e-5)
    assert weighted.inertia_ == pytest.approx(theirs.inertia_, rel=1e-5)
    assert accuracy(repeated.predict(x), weighted.labels_) == 1.0
    assert weighted.score(x, sample_weight=counts) == pytest.approx(-weighted.inertia_, rel=1e-5)
    assert not np.array_equal(
        weighted.cluster_centers_, rc.KMeans(4, center=True, random_state=0).fit(x).cluster_centers_
    )
    plain, all_alike = (rc.KMeans(4, random_state=0).fit(x, sample_weight=w) for w in (None, np.full(len(x), 2.5)))
    assert all_alike.inertia_ == pytest.approx(2.5 * plain.inertia_, rel=1e-5)


def test_weights_that_cannot_be_are_refused():
    x, _ = planted(20)
    with pytest.raises(ConfigError, match="n_clusters = 4: at most the number of rows with a weight above 0, 3"):
        rc.KMeans(4).fit(x, sample_weight=[1, 1, 1] + [0] * 17)
    with pytest.raises(ValueError, match=r"[Nn]egative"):
        rc.KMeans(4).fit(x, sample_weight=-np.ones(20))
    with pytest.raises(ValueError, match="shape"):
        rc.KMeans(4).fit(x, sample_weight=np.ones(19))
    for estimator in (TINY_TEMI, TINY_CPP):
        with pytest.raises(ConfigError, match=r"sample_weight: \w+ counts all rows alike: leave it out"):
            clone(estimator).set_params(n_clusters=4).fit(x, sample_weight=np.ones(20))
        with pytest.raises(TypeError, match="weight"):
            clone(estimator).set_params(n_clusters=4).fit(x, weight=np.ones(20))


@pytest.mark.parametrize("factor", [1e-300, 1e-35, 1e-25, 1e25, 1e30, 1e38, 1e300])
def test_rows_of_any_size_have_the_same_clusters(factor: float):
    x, labels = planted()
    for estimator in (rc.KMeans(4), rc.KMeans(4, metric="cosine"), rc.KMeans(4, center=True, standardize=True)):
        found = clone(estimator).set_params(random_state=0).fit(x * factor)
        assert accuracy(labels, found.labels_) > 0.97
        assert np.array_equal(found.predict(x * factor), found.labels_)
    found, near_one = (rc.KMeans(4, random_state=0).fit(rows) for rows in (x * factor, x))
    np.testing.assert_allclose(found.cluster_centers_ / factor, near_one.cluster_centers_, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(found.transform(x * factor) / factor, near_one.transform(x), rtol=1e-3, atol=1e-4)
    if 1e-100 < factor < 1e100:  # a square that float64 can hold
        assert -found.score(x * factor) == pytest.approx(found.inertia_, rel=1e-5)
        assert found.inertia_ / factor / factor == pytest.approx(near_one.inertia_, rel=1e-4)


@pytest.mark.parametrize("estimator", [TINY_TEMI, TINY_CPP], ids=["TEMI", "CPP"])
def test_huge_rows_do_not_fall_together(estimator):
    x, labels = planted()
    found = clone(estimator).set_params(n_clusters=4, random_state=1).fit(x * 1e30)
    assert accuracy(labels, found.labels_) > 0.97


@pytest.mark.parametrize("estimator", [rc.KMeans(), TINY_TEMI, TINY_CPP], ids=["KMeans", "TEMI", "CPP"])
def test_a_grid_search_over_a_pipeline(estimator):
    x, _ = planted()
    pipeline = make_pipeline(StandardScaler(), clone(estimator).set_params(random_state=0))
    name = type(estimator).__name__.lower()
    search = GridSearchCV(pipeline, {f"{name}__n_clusters": [2, 4]}, cv=2, error_score="raise").fit(x)
    assert search.best_params_ == {f"{name}__n_clusters": 4}
    assert len(np.unique(search.predict(x))) == 4


def test_scores_of_single_rows_and_clusters():
    x, _ = planted()
    assert clone(TINY_CPP).set_params(n_clusters=1).fit(x).score(x) == 0
    assert clone(TINY_CPP).set_params(n_clusters=4).fit(x).score(x[:1]) == 0


def test_verbose_shows_progress_on_standard_error_and_leaves_logging_as_it_was(capfd):
    x, _ = planted()
    package = logging.getLogger("rayclust")
    before = package.level, [*package.handlers], package.propagate
    for estimator, line in (
        (rc.KMeans(4), "k-means: pass 1, inertia"),
        (TINY_TEMI, "epoch 0, step"),
        (
            clone(TINY_CPP).set_params(settings=TINY_CPP.settings | {"final_start": "kmeans"}),
            "loss",
        ),  # without a warning
    ):
        quiet, told = clone(estimator), clone(estimator).set_params(verbose=1)
        with without_handlers():
            quiet.fit(x)
            assert capfd.readouterr() == ("", "")
            told.fit(x)
        out, err = capfd.readouterr()
        assert (out, line in err) == ("", True)
    assert (package.level, package.handlers, package.propagate) == before


@contextmanager
def without_handlers():
    """As in a program that has set up no logging: pytest has, and so have tests of commands."""
    loggers = [logging.getLogger(), logging.getLogger("rayclust")]
    kept = [logger.handlers for logger in loggers]
    for logger in loggers:
        logger.handlers = []
    try:
        yield
    finally:
        for logger, handlers in zip(loggers, kept, strict=True):
            logger.handlers = handlers


def test_auto_says_what_it_chose_and_why():
    x, _ = planted()
    found = rc.Auto(4, random_state=0).fit(x)
    assert [row["candidate"] for row in found.candidates_][:3] == ["k-means", "refined k-means", "consensus"]
    assert sum(row["chosen"] for row in found.candidates_) == 1
    assert found.choice_ is None
    assert found.method_.seed == 0  # whole numbers are the seed itself, so that the floor is scikit-learn's


def test_a_consensus_takes_labels_and_probabilities_of_others():
    x, labels = planted()
    temi, kmeans = clone(TINY_TEMI).set_params(n_clusters=4).fit(x), rc.KMeans(7, random_state=0).fit(x)
    members = [temi.predict_proba(x), temi.labels_, kmeans.labels_, np.where(labels == 0, -1, labels)]
    found = rc.Consensus(4, random_state=0).fit(x, members=members)
    assert [row["candidate"] for row in found.members_[:4]] == [f"member {place}" for place in range(4)]
    assert [row["clusters"] for row in found.members_[:4]] == [4, 4, 7, 4]
    assert accuracy(labels, found.labels_) > 0.9
    # Labels of any kind: names, missing ones, numbers far above the rows.
    names = np.where(labels == 0, None, labels.astype(str))
    kinds = [names, np.where(labels == 0, np.nan, labels), labels * 500_000_007, labels]
    found = rc.Consensus(4, random_state=0).fit(x, members=kinds)
    assert [row["clusters"] for row in found.members_[:4]] == [3, 3, 4, 4]
    assert accuracy(labels, found.labels_) > 0.9
    with pytest.raises(DataError, match="no probabilities"):
        rc.Consensus(4).fit(x, members=[np.full((300, 4), np.nan)])
    with pytest.raises(ShapeError, match=r"members\.0 has shape"):
        rc.Consensus(4).fit(x, members=[labels[1:]])
    with pytest.raises(TypeError, match="partitions"):
        rc.Consensus(4).fit(x, partitions=members)


def test_auto_finds_the_number_of_clusters():
    x, labels = planted(clusters=6, width=16)
    found = rc.Auto("auto", random_state=0).fit(x)
    assert 5 <= found.n_clusters_ <= 7
    assert str(found.n_clusters_) in found.choice_.reason
    assert accuracy(labels, found.labels_) > 0.8
    for estimator in (rc.TEMI, rc.KMeans, rc.CPP, rc.TURTLE, rc.Consensus):
        with pytest.raises(ConfigError, match=f"{estimator.__name__} takes a number"):
            estimator("auto").fit(x)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_tensors_are_rows_whatever_their_type_and_gradient(dtype: torch.dtype):
    x, labels = planted(clusters=3, width=8)
    rows = torch.as_tensor(x).to(dtype).requires_grad_()
    found = rc.KMeans(3, random_state=0).fit(rows)
    assert accuracy(labels, found.predict(rows)) == 1
    both = rc.TURTLE(3, random_state=0, max_steps=2).fit([rows, rows])
    assert len(both.predict([rows, rows])) == len(x)


@pytest.mark.parametrize("train", [True, False])
def test_tac_takes_words_beside_rows_and_needs_none_for_new_rows(train: bool):
    x, labels = planted()
    centers = np.stack([x[labels == k].mean(0) for k in range(4)])
    rng = np.random.default_rng(1)
    words = np.concatenate([centers.repeat(5, axis=0), rng.normal(size=(60, 8))]) + 0.1 * rng.normal(size=(80, 8))
    tiny = rc.TAC(4, words=words, train=train, max_steps=60, learning_rate=0.05, n_neighbors=10, random_state=0)
    found = clone(tiny).fit(x)
    assert accuracy(labels, found.labels_) > 0.95
    assert (found.n_steps_ > 0) == train
    assert len(set(found.nouns_)) == len(found.nouns_) <= 5 * found.method_.config.centers
    assert (found.predict(x[:7]) == found.labels_[:7]).all()
    assert (clone(tiny).fit(x).labels_ == found.labels_).all()


def test_tac_without_words_or_with_others_is_one_line():
    x, _ = planted(count=40)
    with pytest.raises(ConfigError, match="words = None: TAC needs embeddings of nouns"):
        rc.TAC(4).fit(x)
    with pytest.raises(ValueError, match="words has width 5: 8 is needed"):
        rc.TAC(4, words=np.ones((3, 5))).fit(x)


def test_turtle_takes_the_same_rows_in_several_spaces():
    x, labels = planted()
    spaces = [x[:, :3], 100 * x[:, 3:]]
    found = rc.TURTLE(4, random_state=0).fit([space[:200] for space in spaces])
    assert found.method_.dimension == {"0": 3, "1": 5}
    assert accuracy(labels, found.predict(spaces)) > 0.95
    assert found.score(spaces) > 0.3
    assert np.array_equal(found.predict([space[:1] for space in spaces]), found.labels_[:1])
    assert [one["chosen"] for one in found.candidates_] == [0, 0, 0, 0, 1]
    with pytest.raises(ShapeError, match=r"X has spaces of \[9, 10\] rows"):
        rc.TURTLE(2).fit([x[:9], x[:10]])
    with pytest.raises(ValueError, match="features"):
        found.predict(x[:, :4])
    assert rc.TURTLE(1).fit(spaces).labels_.sum() == 0
    frame = pd.DataFrame(x, columns=list("abcdefgh"))
    assert "".join(rc.TURTLE(1).fit([frame]).feature_names_in_) == "abcdefgh", "one space is rows as they are"
