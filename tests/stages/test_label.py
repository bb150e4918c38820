""""""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rayclust.config import RunConfig, validate
from rayclust.errors import ConfigError, DataError
from rayclust.runtime.pipeline import run_stage
from rayclust.runtime.rows import part_clusters, row_starts, transform_of
from rayclust.runtime.tasks import Task
from rayclust.stages import label
from rayclust.stages.label import VOTERS, WITHOUT_CLASSES, Labeling
from rayclust.store import storage
from tests.stages.conftest import VECTORS, Sealed
from tests.stages.runs import tree


def clusters(sealed: Sealed) -> list[dict]:
    return pq.read_table(sealed.folder / "clusters.parquet").to_pylist()


def test_exemplars_lie_along_the_mean_and_outliers_are_the_least_certain(vectors_run: Sealed):
    assigned = pa.concat_tables([pq.read_table(vectors_run.run.assignments(part)) for part in range(2)])
    number, confidence = assigned["cluster"].to_numpy(), assigned["confidence"].to_numpy()
    x = VECTORS / np.linalg.norm(VECTORS, axis=1, keepdims=True)
    for cluster in clusters(vectors_run):
        own = np.flatnonzero(number == cluster["cluster"])
        assert cluster["size"] == len(own)
        mean = x[own].sum(0)
        cosines = x[own] @ mean
        assert cluster["exemplars"] == own[np.argsort(-cosines, kind="stable")].tolist()
        # A cluster so small is all exemplars: one outlier is kept, the least certain.
        assert cluster["outliers"] == [own[confidence[own].argmin()]]
        assert cluster["name"] is None
        assert cluster["runners_up"] == []


def test_confidence_is_counted_in_bins_and_averaged_by_cluster(vectors_run: Sealed):
    extra = vectors_run.manifest("label").extra
    assigned = pa.concat_tables([pq.read_table(vectors_run.run.assignments(part)) for part in range(2)])
    number, confidence = assigned["cluster"].to_numpy(), assigned["confidence"].to_numpy()
    assert sum(extra["confidence"]) == 7
    assert extra["confidence"] == np.histogram(confidence, 20, (0, 1))[0].tolist()
    for cluster in range(2):
        assert extra["mean_confidence"][cluster] == pytest.approx(confidence[number == cluster].mean())


def test_outliers_are_no_exemplars_where_there_are_others(vectors_run: Sealed, tmp_path: Path):
    work = votes(vectors_run, tmp_path, exemplars=1, outliers=7)
    found = replace(work, config=work.config.with_clusters(3)).extremes()
    number = np.concatenate([part_clusters(vectors_run.run, part) for part in range(2)])
    for cluster in range(2):
        [exemplar], outliers = found["exemplars"][cluster], found["outliers"][cluster]
        assert sorted([exemplar, *outliers]) == np.flatnonzero(number == cluster).tolist()
    assert (found["exemplars"][2], found["outliers"][2]) == ([], []), "an empty cluster has neither"


WORDS = {"word": ["right", "up", "down"], "embedding": [[1.0, 0.0], [0.0, 1.0], [0.0, -1.0]]}


@pytest.fixture
def named(vectors_run: Sealed, tmp_path: Path, in_process: None) -> RunConfig:
    """A copy of the run, to be named by words that come with embeddings."""
    shutil.copytree(vectors_run.folder, tmp_path / "run")
    pq.write_table(pa.table(WORDS), tmp_path / "words.parquet")
    groups = {"method": {"clusters": 2}, "features": {"center": False}, "neighbors": {"k": 2}}
    words = {"vocabulary": str(tmp_path / "words.parquet")}
    return validate(tree(str(tmp_path / "run"), vectors_run.config.images.uri, **groups, label=words))


def test_each_cluster_is_named_by_the_votes_of_its_images(named: RunConfig):
    manifest = run_stage("label", named)
    found = pq.read_table(Path(named.run) / "clusters.parquet").to_pylist()
    sizes = {row["name"]: row["size"] for row in found}
    assert sizes == {"right": 4, "up": 3}
    assert all(0 < row["score"] <= 1 for row in found)
    assert manifest.counts == {"clusters": 2, "named": 2}
    assert not (Path(named.run) / "label").exists(), "votes are scratch"


def test_one_word_names_every_cluster(named: RunConfig):
    pq.write_table(pa.table({"word": ["thing"], "embedding": [[1.0, 1.0]]}), named.label.vocabulary)
    run_stage("label", named)
    found = pq.read_table(Path(named.run) / "clusters.parquet")
    assert found["name"].to_pylist() == ["thing", "thing"]
    assert found["runners_up"].to_pylist() == [[], []]


@pytest.mark.parametrize("dies_in", ["manifests/label", "label"])
def test_killed_while_the_votes_are_swept_away_it_names_again(
    named: RunConfig, monkeypatch: pytest.MonkeyPatch, dies_in: str
):
    remove_tree = storage.remove_tree

    def killed(uri: str) -> None:
        if uri.endswith(dies_in):
            raise KeyboardInterrupt
        remove_tree(uri)

    with monkeypatch.context() as patch:
        patch.setattr(storage, "remove_tree", killed)
        with pytest.raises(KeyboardInterrupt):
            run_stage("label", named)
    assert run_stage("label", named).counts["named"] == 2


def test_votes_that_are_lost_are_cast_again(named: RunConfig, monkeypatch: pytest.MonkeyPatch):
    def killed(*arguments: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(label.Labeling, "count", killed)
        with pytest.raises(KeyboardInterrupt):
            run_stage("label", named)
    [votes, *_] = sorted((Path(named.run) / "label").glob("*/all-*.parquet"))
    votes.unlink()
    assert run_stage("label", named).counts["named"] == 2


def test_words_that_cannot_be_used_are_one_line(named: RunConfig, tmp_path: Path):
    def vocabulary(uri: str) -> RunConfig:
        return named.model_copy(update={"label": named.label.model_copy(update={"vocabulary": uri})})

    with pytest.raises(ConfigError, match="reads no text"):
        run_stage("label", vocabulary("imagenet"))
    with pytest.raises(DataError, match=r"none\.parquet"):
        run_stage("label", vocabulary(str(tmp_path / "none.parquet")))
    pq.write_table(pa.table({"word": ["east"], "embedding": [[0.7, 0.7, 0.1]]}), tmp_path / "wide.parquet")
    with pytest.raises(DataError, match="words have 3 values, the rows 2"):
        run_stage("label", vocabulary(str(tmp_path / "wide.parquet")))


def test_true_class_names_say_so_and_names_without_them_stand_beside(named: RunConfig):
    """`up` is in the list of words, so it stays a candidate without the classes; `right` is a class alone."""
    pq.write_table(pa.table({"word": ["east", "up"], "embedding": [[0.7, 0.7], [0.0, 1.0]]}), named.label.vocabulary)
    classes = Path(named.run).parent / "classes.parquet"
    pq.write_table(pa.table({"word": ["Right"], "embedding": [[1.0, 0.0]]}), classes)
    lists = ("classes", str(named.label.vocabulary))
    with pytest.raises(ConfigError, match="'right' have no embedding"):
        run_stage("label", named.model_copy(update={"label": named.label.model_copy(update={"vocabulary": lists})}))
    lists += (str(classes),)
    settings = named.model_copy(update={"label": named.label.model_copy(update={"vocabulary": lists})})
    manifest = run_stage("label", settings)
    found = {row["size"]: row for row in pq.read_table(Path(named.run) / "clusters.parquet").to_pylist()}
    assert (found[4]["name"], found[3]["name"]) == ("right", "up")
    assert manifest.extra["true_names"] is True
    assert manifest.extra["name_accuracy"] == 1
    assert manifest.extra["zero_shot_accuracy"] == 1
    assert (manifest.extra["words"], manifest.extra["voters"]) == (3, 7)
    assert found[3]["name_without_classes"] == "up"
    run_stage("report", settings)
    page = (Path(named.run) / "report" / "index.html").read_text()
    assert "hold the data set&#39;s own class names" in page
    assert '"blind":["up",' in page
    assert "Names, blind" in page
    assert "Zero-shot" in page
    # Rows by their angles alone: the name of the other class is nearer to none of them, until the two are exchanged.
    pq.write_table(pa.table({"word": ["Right", "up"], "embedding": [[0.0, 1.0], [1.0, 0.0]]}), classes)
    lists = ("classes", str(classes))
    settings = named.model_copy(update={"label": named.label.model_copy(update={"vocabulary": lists})})
    assert run_stage("label", settings).extra["zero_shot_accuracy"] == 0


def test_without_labels_or_true_names_nothing_is_claimed(named: RunConfig):
    extra = run_stage("label", named).extra
    assert extra["true_names"] is False
    assert extra["name_accuracy"] == 1
    assert "name_accuracy_without_classes" not in extra
    assert "zero_shot_accuracy" not in extra
    run_stage("report", named)
    page = (Path(named.run) / "report" / "index.html").read_text()
    assert "own class names" not in page
    assert pq.read_table(Path(named.run) / "clusters.parquet")["name_without_classes"].null_count == 2


def test_few_images_vote_where_asked_and_scores_are_means_over_them(named: RunConfig):
    settings = named.model_copy(update={"label": named.label.model_copy(update={"voters": 1})})
    manifest = run_stage("label", settings)
    assert manifest.extra["voters"] == 2
    found = pq.read_table(Path(named.run) / "clusters.parquet").to_pylist()
    assert {row["name"] for row in found} == {"right", "up"}
    assert all(0.9 < row["score"] <= 1 for row in found)


def votes(sealed: Sealed, folder: Path, **label: object) -> Labeling:
    config: RunConfig = sealed.config.model_copy(update={"label": sealed.config.label.model_copy(update=label)})
    encode = sealed.manifest("encode")
    return Labeling(sealed.run, config, row_starts(encode), transform_of(encode, config.features), str(folder))


@pytest.fixture
def lists(tmp_path: Path) -> tuple[str, ...]:
    pq.write_table(pa.table({"word": ["East", "up"], "embedding": [[0.8, 0.6], [0.0, 1.0]]}), tmp_path / "a.parquet")
    pq.write_table(pa.table({"word": ["UP", "right"], "embedding": [[0.3, 1.0], [1.0, 0.0]]}), tmp_path / "b.parquet")
    return str(tmp_path / "a.parquet"), str(tmp_path / "b.parquet")


def test_equal_names_of_two_lists_are_one_candidate(
    vectors_run: Sealed, tmp_path: Path, lists: tuple[str, ...]
) -> None:
    one = votes(vectors_run, tmp_path / "v", vocabulary=lists)
    assert one.namings == ("all",)
    assert one.prepare() == 3
    assert pq.read_table(tmp_path / "v" / "words.parquet")["word"].to_pylist() == ["East", "up", "right"]


def test_classes_beside_other_lists_make_two_namings(
    vectors_run: Sealed, tmp_path: Path, lists: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The class `right` comes by its own list alone here: its row is lent by a list that is left out of the config."""
    both = votes(vectors_run, tmp_path / "v", vocabulary=("classes", lists[0]))
    assert both.namings == ("all", WITHOUT_CLASSES)
    rows = np.array([[0.8, 0.6], [0.0, 1.0], [1.0, 0.0]], np.float32)
    order = {"east": 0, "up": 1, "right": 2}
    monkeypatch.setattr(
        "rayclust.stages.label.word_embeddings",
        lambda config, words: rows[[order[w.casefold()] for w in words.words]],
    )
    assert both.prepare() == 3
    for part in range(2):
        both.vote(Task(part, "d"))
    names, voters = both.count()
    assert voters == 7
    assert {name.name for name in names["all"]} == {"right", "up"}
    assert {name.name for name in names[WITHOUT_CLASSES]} == {"East", "up"}
    assert both.named_as_classes([name.name for name in names["all"]]) == 1
    # Row 1 has no label; three of the other six are `up`.
    assert both.named_as_classes([name.name for name in names[WITHOUT_CLASSES]]) == 0.5
    assert both.named_as_classes([None, None]) == 0


@pytest.mark.parametrize(("voters", "few", "count"), [("auto", 3, None), ("auto", 2, 7), ("all", 2, None), (2, 3, 4)])
def test_who_votes_depends_on_the_number_of_words(
    voters: object,
    few: int,
    count: int | None,
    vectors_run: Sealed,
    tmp_path: Path,
    lists: tuple[str, ...],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(label, "FEW_WORDS", few)
    assert votes(vectors_run, tmp_path / "v", vocabulary=lists, voters=voters).prepare() == 3
    file = tmp_path / "v" / "voters.parquet"
    assert (pq.read_table(file).num_rows if file.exists() else None) == count
    assert VOTERS >= 100


def test_each_cluster_has_a_seeded_sample(
    vectors_run: Sealed, tmp_path: Path, lists: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    clusters = np.array([0] * 100 + [1] * 3 + [2] * 50)
    monkeypatch.setattr(label, "all_clusters", lambda run, starts: clusters)

    def drawn(seed: int) -> np.ndarray:
        work = votes(vectors_run, tmp_path / "v", vocabulary=lists, voters=10)
        replace(work, config=work.config.model_copy(update={"seed": seed})).prepare()
        return pq.read_table(tmp_path / "v" / "voters.parquet")["row"].to_numpy()

    rows = drawn(0)
    assert np.bincount(clusters[rows]).tolist() == [10, 3, 10]
    assert (np.diff(rows) > 0).all()
    np.testing.assert_array_equal(rows, drawn(0))
    assert not np.array_equal(rows, drawn(1))


def test_distinct_names_are_refused_where_shuffled_images_would_have_them(named: RunConfig):
    """Seven images are too few to say more than chance: both clusters stay without a name, and the table says why."""
    config = named.model_copy(update={"label": named.label.model_copy(update={"distinct": True})})
    manifest = run_stage("label", config)
    rows = pq.read_table(Path(named.run) / "clusters.parquet").to_pylist()
    assert manifest.counts["named"] == sum(row["name"] is not None for row in rows)
    assert {row["runners_up"][0]["name"] if row["name"] is None else row["name"] for row in rows} == {"right", "up"}
    assert all(row["changed"] == (row["name"] is None) for row in rows)


def test_images_that_are_shuffled_vote_by_themselves(
    vectors_run: Sealed, tmp_path: Path, lists: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    work = votes(vectors_run, tmp_path / "v", vocabulary=lists, distinct=True, voters=3)
    assert work.prepare() == 3
    for part in range(2):
        work.vote(Task(part, "d"))
    shuffled, null = [], label.shuffled_null

    def note(images: Any, clusters: np.ndarray, *others: Any, **options: Any) -> Any:
        shuffled.append((images, clusters))
        return null(images, clusters, *others, **options)

    monkeypatch.setattr(label, "shuffled_null", note)
    names, voters = work.count()
    [(images, clusters)] = shuffled
    assert images.shape == (6, 3)
    assert np.bincount(clusters).tolist() == [3, 3]
    np.testing.assert_allclose(images.sum(axis=1), 1, atol=1e-6)
    assert voters == 6
    assert len(names["all"]) == 2
