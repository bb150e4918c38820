from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rayclust.config import RunConfig, validate
from rayclust.errors import ConfigError, DataError
from rayclust.stages import label
from rayclust.stages.pipeline import run_stage
from rayclust.store import filesystem
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


def test_outliers_are_no_exemplars_where_there_are_others():
    assert label._apart([1, 2, 3], [2]) == [1, 3]
    assert label._apart([1, 2], [2, 1, 0]) == [1]
    assert label._apart([], [0]) == []


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
    remove_tree = filesystem.remove_tree

    def killed(uri: str) -> None:
        if uri.endswith(dies_in):
            raise KeyboardInterrupt
        remove_tree(uri)

    with monkeypatch.context() as patch:
        patch.setattr(filesystem, "remove_tree", killed)
        with pytest.raises(KeyboardInterrupt):
            run_stage("label", named)
    assert run_stage("label", named).counts["named"] == 2


def test_votes_that_are_lost_are_cast_again(named: RunConfig, monkeypatch: pytest.MonkeyPatch):
    def killed(*arguments: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(label._Votes, "count", killed)
        with pytest.raises(KeyboardInterrupt):
            run_stage("label", named)
    [votes, *_] = sorted((Path(named.run) / "label").glob("*/votes-*.parquet"))
    votes.unlink()
    assert run_stage("label", named).counts["named"] == 2


def test_words_that_cannot_be_used_are_one_line(named: RunConfig, tmp_path: Path):
    def vocabulary(uri: str) -> RunConfig:
        return named.model_copy(update={"label": named.label.model_copy(update={"vocabulary": uri})})

    with pytest.raises(ConfigError, match="reads no text"):
        run_stage("label", vocabulary("imagenet"))
    with pytest.raises(DataError, match=r"none\.parquet"):
        run_stage("label", vocabulary(str(tmp_path / "none.parquet")))
    with pytest.raises(ConfigError, match="wordnet"):
        run_stage("label", vocabulary("wordnet"))
