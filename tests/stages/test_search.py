from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from rayclust.config import RunConfig, validate
from rayclust.errors import ArtefactError, ConfigError, DataError
from rayclust.runtime.pipeline import run_stage
from rayclust.stages.search import Hit, as_lines, search
from rayclust.store import storage
from rayclust.store.run import Run
from rayclust.store.sources import fetch_many
from tests.stages.conftest import Sealed
from tests.stages.own_space import Flipped, use
from tests.stages.runs import tree


@pytest.fixture
def query(pictures_run: Sealed, tmp_path: Path) -> str:
    """The image of row 15: the fourth of the last tar."""
    path = tmp_path / "query.png"
    [(_, data)] = fetch_many([f"{pictures_run.config.images.uri}/shard-001.tar#00003.png"])
    path.write_bytes(data or b"")
    return str(path)


def find(config: RunConfig, **given: Any) -> list[Hit]:
    given = {"image": None, "text": None, "top": 10, "space": "encoder"} | given
    return search(config, **given)[given["space"]]


def test_the_image_itself_comes_first_then_its_like(pictures_run: Sealed, query: str):
    hits = find(pictures_run.config, image=query, top=8)
    assert (hits[0].row, hits[0].key) == (15, "shard-001/00003")
    assert hits[0].similarity == pytest.approx(1, abs=1e-3)
    similarities = [hit.similarity for hit in hits]
    assert similarities == sorted(similarities, reverse=True)
    assert {hit.row % 3 for hit in hits} == {0}, "images of another colour"
    assert len({hit.cluster for hit in hits}) == 1
    assert all(dict(fetch_many(hit.uri for hit in hits)).values())


def test_an_image_of_the_run_is_searched_with_by_its_key_and_left_out(pictures_run: Sealed, query: str):
    by_image = find(pictures_run.config, image=query, top=8)
    by_key = find(pictures_run.config, like="shard-001/00003", top=7)
    assert {hit.row for hit in by_key} == {hit.row for hit in by_image} - {15}
    assert [hit.similarity for hit in by_key] == pytest.approx([hit.similarity for hit in by_image[1:]], abs=2e-3)


def test_asking_for_more_than_there_are_gives_all(pictures_run: Sealed, query: str):
    hits = find(pictures_run.config, image=query, top=10_000)
    assert sorted(hit.row for hit in hits) == list(range(24))
    assert [len(find(pictures_run.config, image=query, top=top)) for top in (1, 24)] == [1, 24]


@pytest.mark.parametrize(
    ("given", "error", "wanted"),
    [
        ({}, ConfigError, "one of --image FILE, --text"),
        ({"image": "a.png", "like": "a"}, ConfigError, "one of --image FILE, --text"),
        ({"text": "a dog"}, ConfigError, "no text tower"),
        ({"image": "/nowhere/a.png"}, DataError, "/nowhere/a.png"),
        ({"like": "shard-009/00003"}, ConfigError, "no image of the run has this key"),
        ({"image": "/nowhere/a.png", "space": "z"}, ConfigError, "no space of its own"),
    ],
)
def test_a_query_that_does_not_suit_is_one_line(
    pictures_run: Sealed, given: dict[str, Any], error: type[Exception], wanted: str
):
    with pytest.raises(error, match=wanted):
        find(pictures_run.config, **given)


def test_a_query_that_is_no_image_is_one_line(pictures_run: Sealed, tmp_path: Path):
    (tmp_path / "q.png").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"q\.png: not_an_image"):
        find(pictures_run.config, image=str(tmp_path / "q.png"))


@pytest.fixture
def copied(pictures_run: Sealed, tmp_path: Path, in_process: None) -> RunConfig:
    shutil.copytree(pictures_run.folder, tmp_path / "run")
    return validate(tree(str(tmp_path / "run"), pictures_run.config.images.uri))


def test_without_assignments_hits_have_no_cluster(copied: RunConfig, query: str):
    storage.remove(Run(copied.run).manifest("assign"))
    storage.remove_tree(Run(copied.run).assignments_folder)
    assert {hit.cluster for hit in find(copied, image=query)} == {None}


def test_assignments_of_another_model_are_not_shown(copied: RunConfig, query: str):
    run_stage("train", copied.model_copy(update={"seed": 5}))
    assert {hit.cluster for hit in find(copied.model_copy(update={"seed": 5}), image=query)} == {None}
    run_stage("train", copied)
    assert None not in {hit.cluster for hit in find(copied, image=query)}, "the same model fits its assignments"


def test_an_index_over_other_rows_is_not_searched(copied: RunConfig, query: str):
    manifest = storage.read_json(Run(copied.run).manifest("index"))
    storage.write_json(Run(copied.run).manifest("index"), manifest | {"inputs": {"encode": "other rows"}})
    with pytest.raises(ArtefactError, match="is not indexed"):
        find(copied, image=query)
    storage.remove(Run(copied.run).manifest("index"))
    with pytest.raises(ArtefactError, match="is not indexed"):
        find(copied, image=query)


def test_ready_embeddings_of_another_encoder_are_refused(vectors_run: Sealed, query: str):
    with pytest.raises(ConfigError, match="the run's rows are ready embeddings; name the encoder that made them"):
        find(vectors_run.config, image=query)
    with pytest.raises(ConfigError, match="the run's rows are ready embeddings"):
        find(vectors_run.config, text="words")


@pytest.fixture
def own_space(copied: RunConfig, monkeypatch: pytest.MonkeyPatch) -> RunConfig:
    """The run, indexed by a method whose own space is the features turned round."""
    use(Flipped, monkeypatch)
    run_stage("index", copied)
    return copied


def test_both_spaces_are_searched_side_by_side(own_space: RunConfig, query: str):
    found = search(own_space, image=query, text=None, top=5, space="both")
    assert list(found) == ["encoder", "z"]
    assert {hits[0].row for hits in found.values()} == {15}
    assert found["z"][0].similarity == pytest.approx(1, abs=1e-3)
    assert found["z"] == find(own_space, image=query, top=5, space="z")
    liked = find(own_space, like="shard-001/00003", top=4, space="z")
    assert {hit.row for hit in liked} == {hit.row for hit in found["z"]} - {15}
    assert found["encoder"] == find(own_space, image=query, top=5)
    # Centred features tell colours apart further than the encoder's rows, which all are bright.
    assert found["z"][-1].similarity < found["encoder"][-1].similarity
    head, first, *_ = as_lines(found)
    assert head.split() == ["rank", "encoder", "z"]
    assert first.count("shard-001/00003") == 2
    assert all(len(line) <= 130 for line in as_lines(found))


def test_one_space_is_shown_with_uris(own_space: RunConfig, query: str):
    head, first, *rest = as_lines(search(own_space, image=query, text=None, top=3, space="z"))
    assert head.split() == ["similarity", "cluster", "name", "uri"]
    assert "shard-001.tar#00003.png" in first
    assert len(rest) == 2


@pytest.mark.parametrize("space", ["z", "both"])
def test_words_are_searched_in_the_encoders_space_alone(own_space: RunConfig, space: str):
    with pytest.raises(ConfigError, match="words live in the encoder's space alone"):
        search(own_space, image=None, text="a dog", top=5, space=space)


def test_a_space_of_another_model_is_not_searched(own_space: RunConfig, query: str):
    other = own_space.model_copy(update={"seed": 5})
    run_stage("train", other)
    with pytest.raises(ArtefactError, match="is not indexed"):
        find(other, image=query, space="z")
    assert find(other, image=query)[0].row == 15
