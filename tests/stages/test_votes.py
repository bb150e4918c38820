from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rayclust.config import RunConfig
from rayclust.runtime.rows import row_starts, transform_of
from rayclust.runtime.tasks import Task
from rayclust.stages.label import FEW_WORDS, VOTERS, WITHOUT_CLASSES, Votes, sample_of_each
from tests.stages.conftest import Sealed


def test_each_cluster_has_a_seeded_sample() -> None:
    clusters = np.array([0] * 100 + [1] * 3 + [2] * 50)
    rows = sample_of_each(clusters, 10, seed=0)
    assert np.bincount(clusters[rows]).tolist() == [10, 3, 10]
    assert (np.diff(rows) > 0).all()
    np.testing.assert_array_equal(rows, sample_of_each(clusters, 10, seed=0))
    assert not np.array_equal(rows, sample_of_each(clusters, 10, seed=1))


def votes(sealed: Sealed, folder: Path, **label: object) -> Votes:
    config: RunConfig = sealed.config.model_copy(update={"label": sealed.config.label.model_copy(update=label)})
    encode = sealed.manifest("encode")
    return Votes(sealed.run, config, row_starts(encode), transform_of(encode, config.features), str(folder))


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


def test_who_votes_depends_on_the_number_of_words(vectors_run: Sealed, tmp_path: Path) -> None:
    auto = votes(vectors_run, tmp_path)
    assert auto._voters(FEW_WORDS) is None
    assert auto._voters(FEW_WORDS + 1).tolist() == list(range(7))  # type: ignore[union-attr]
    assert votes(vectors_run, tmp_path, voters="all")._voters(10**6) is None
    some = votes(vectors_run, tmp_path, voters=2)._voters(3)
    assert some is not None
    assert len(some) == 4
    assert VOTERS >= 100
