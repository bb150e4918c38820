"""Runs whose method reads words: nouns, counterparts, their neighbours, and what is fitted to them."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torch.nn import functional

from rayclust.config import RunConfig, validate
from rayclust.errors import ConfigError, DataError
from rayclust.language import nouns
from rayclust.metrics.external import accuracy
from rayclust.runtime import encoder as run_encoder
from rayclust.runtime import vocabularies
from rayclust.runtime.pipeline import run_all, run_stage, stages_of
from rayclust.runtime.tensors import StoredRows
from rayclust.runtime.vocabularies import WordBank, noun_lists
from rayclust.search.knn import nearest_others
from rayclust.stages.predict import predict
from rayclust.store.run import Run
from tests.stages.conftest import Sealed, sealed_run
from tests.stages.runs import files, tree

CLUSTERS, WIDTH = 3, 8


def around(directions: np.ndarray, noise: float, seed: int) -> np.ndarray:
    """Unit rows around axes, given by their numbers."""
    x = np.eye(WIDTH)[directions] + noise * np.random.default_rng(seed).normal(size=(len(directions), WIDTH))
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)


def settings(folder: Path, **groups: Any) -> RunConfig:
    """Config of a run on 60 rows of three kinds in two parts, every fifth kept aside, and 40 words of eight kinds."""
    (folder / "table").mkdir(exist_ok=True)
    for part in range(2):
        kinds = np.arange(30) % CLUSTERS
        names = ["test" if row % 5 == 4 else "train" for row in range(30)]
        columns = {
            "embedding": pa.array(list(around(kinds, 0.15, part)), pa.list_(pa.float32())),
            "label": [f"kind {kind}" for kind in kinds],
            "key": [f"{name}/{part}-{row}" for row, name in enumerate(names)],
        }
        pq.write_table(pa.table(columns), folder / "table" / f"{part}.parquet")
    words = {"word": [f"word {i}" for i in range(40)], "embedding": list(around(np.arange(40) % WIDTH, 0.1, 7))}
    pq.write_table(pa.table(words), folder / "words.parquet")
    base: dict[str, Any] = {
        "images": {"split": "test/*"},
        "features": {"center": False},
        "method": {"name": "tac", "clusters": CLUSTERS, "steps": 40, "neighbors": 6, "learning_rate": 0.1},
        "label": {"vocabulary": str(folder / "words.parquet")},
    }
    for name, group in groups.items():
        base[name] = {**base.get(name, {}), **group}
    return validate(tree(str(folder / "run"), str(folder / "table"), **base))


@pytest.fixture(scope="module")
def worded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sealed]:
    yield from sealed_run(settings(tmp_path_factory.mktemp("worded")))


def column(uri: str, name: str) -> np.ndarray:
    return np.array(pq.read_table(uri)[name].to_pylist())


def over_parts(run: Run, uri_of: str, name: str) -> np.ndarray:
    """A column of both parts."""
    return np.concatenate([column(getattr(run, uri_of)(part), name) for part in range(2)])


def test_each_row_has_the_counterpart_that_the_chosen_nouns_give(worded: Sealed):
    table = pq.read_table(worded.run.nouns)
    assert table.num_rows == len(set(table["word"].to_pylist()))
    assert {int(word.split()[1]) % WIDTH for word in table["word"].to_pylist()} >= set(range(CLUSTERS))
    assert (table["confidence"].to_numpy() > 1 / 9).all()
    chosen = torch.from_numpy(column(worded.run.nouns, "embedding")).float()
    for part in range(2):
        x = functional.normalize(torch.from_numpy(column(worded.run.embeddings(part), "embedding")).float(), dim=1)
        found = torch.from_numpy(column(worded.run.counterparts(part), "embedding")).float()
        torch.testing.assert_close(found, nouns.counterparts(x, chosen), rtol=0, atol=2e-3)
    assert worded.manifest("counterparts").extra == {"words": 40, "centers": 9, "nouns": table.num_rows}


def test_neighbours_in_text_are_fitted_rows_and_training_numbers_them_among_these(worded: Sealed, tmp_path: Path):
    rows = StoredRows(worded.run, worded.manifest("encode"), worded.config.features, tmp_path)
    texts = rows.counterparts()
    assert (rows.count, texts.count) == (48, 48)
    assert [len(block) for block in texts.blocks()] == [len(block) for block in rows.blocks()]
    unit = functional.normalize(texts.tensor(), dim=1)
    own = (unit @ unit.T).fill_diagonal_(-1)
    near = texts.neighbors()
    assert near.shape == (48, 6)
    # Counterparts of one kind may be the same to the last bit of a half: ties are no failure.
    torch.testing.assert_close(own.gather(1, near), own.gather(1, nearest_others(unit, 6)), rtol=0, atol=1e-6)
    stored, split = over_parts(worded.run, "text_neighbors", "neighbors"), over_parts(worded.run, "embeddings", "split")
    assert len(stored) == 60
    assert set(split[stored].ravel()) == {"train"}, "a row that is kept aside is somebody's neighbour"


def test_inverted_lists_find_the_neighbours_in_text_of_many_rows(tmp_path: Path, in_process: None):
    config = settings(tmp_path, images={"split": None}, neighbors={"exact_rows": 5, "min_recall": 0.9})
    for stage in ("encode", "counterparts"):
        manifest = run_stage(stage, config)
    run = Run(config.run)
    unit = functional.normalize(torch.from_numpy(over_parts(run, "counterparts", "embedding")).float(), dim=1)
    own = (unit @ unit.T).fill_diagonal_(-1)
    near = torch.from_numpy(over_parts(run, "text_neighbors", "neighbors"))
    assert near.shape == (60, 6)
    reached = own.gather(1, near)[:, -1] >= own.topk(6).values[:, -1] - 1e-3
    assert reached.float().mean() > 0.9
    assert not (tmp_path / "run" / "counterparts" / "scratch").exists()
    assert run_stage("counterparts", config).digest == manifest.digest


def test_the_clusters_are_found_and_new_images_need_no_words(worded: Sealed, tmp_path: Path, in_process: None):
    found, labels = over_parts(worded.run, "assignments", "cluster"), over_parts(worded.run, "embeddings", "label")
    assert accuracy(labels, found) == 1.0
    np.save(tmp_path / "new.npy", around(np.array([2, 0]), 0.05, 3))
    predict(worded.config, str(tmp_path / "new.npy"), str(tmp_path / "out.parquet"))
    assert column(str(tmp_path / "out.parquet"), "cluster").tolist() == [
        found[labels == f"kind {kind}"][0] for kind in (2, 0)
    ]


def test_a_finished_run_is_not_done_again(worded: Sealed, in_process: None, caplog: pytest.LogCaptureFixture):
    with caplog.at_level(logging.INFO):
        run_all(worded.config)
    assert sum("done before, skipped" in line for line in caplog.messages) == len(stages_of(worded.config))


def test_without_training_there_are_no_neighbours_in_text(tmp_path: Path, in_process: None):
    config = settings(tmp_path, method={"train": False, "steps": None})
    for stage in ("encode", "neighbors", "counterparts", "train", "assign"):
        run_stage(stage, config)
    run = Run(config.run)
    assert not (tmp_path / "run" / "counterparts" / "neighbors").exists()
    assert accuracy(over_parts(run, "embeddings", "label"), over_parts(run, "assignments", "cluster")) == 1.0


def test_words_of_a_list_are_encoded_block_by_block_once(
    tmp_path: Path, in_process: None, monkeypatch: pytest.MonkeyPatch
):
    asked = list[str]()

    class Reader:
        @staticmethod
        def encode_texts(texts: list[str]) -> np.ndarray:
            asked.extend(texts)
            return around(np.array([int(text.split()[-1].rstrip(".")) % WIDTH for text in texts]), 0.0, 0)

    monkeypatch.setattr(run_encoder, "load_run_encoder", lambda config, settings: Reader())
    monkeypatch.setattr(vocabularies, "weights_stamp", lambda config, settings: "stamp")
    monkeypatch.setattr(vocabularies, "WORDS_PER_BLOCK", 16)
    vocabularies._kept_encoder.cache_clear()
    (tmp_path / "words.txt").write_text("\n".join(f"word {i}" for i in range(40)))
    config = settings(tmp_path, method={"vocabulary": str(tmp_path / "words.txt"), "templates": ["a {}", "the {}."]})
    config = config.model_copy(update={"encoder": config.encoder.model_copy(update={"name": "open_clip/ViT-B-32"})})
    lists = noun_lists(config)
    assert lists == (str(tmp_path / "words.txt"),)
    bank = WordBank(config, tuple(f"word {i}" for i in range(40)), ("a {}", "the {}."), False)
    assert bank.blocks == 3
    for block in (0, 1, 2, 1):
        bank.encode(block)
    assert len(asked) == 80
    assert bank.read().argmax(1).tolist() == [i % WIDTH for i in range(40)]
    assert WordBank(config, bank.words, ("a {}",), False).digest != bank.digest
    vocabularies._kept_encoder.cache_clear()


@pytest.mark.parametrize(
    ("groups", "kind", "wanted"),
    [
        ({"label": {"vocabulary": "none"}}, ConfigError, "needs words; name a list of nouns"),
        ({"method": {"vocabulary": "classes"}}, ConfigError, "the classes' names may not enter a fit"),
        ({"label": {"vocabulary": "classes"}}, ConfigError, "needs words"),
        ({"method": {"vocabulary": "WIDE"}}, DataError, "words have 5 values, the rows 8"),
    ],
)
def test_words_that_cannot_be_used_are_one_line(
    groups: dict[str, Any], kind: type[Exception], wanted: str, tmp_path: Path, in_process: None
):
    wide = tmp_path / "wide.parquet"
    pq.write_table(pa.table({"word": ["a"], "embedding": [[1.0] * 5]}), wide)
    groups = {k: {n: str(wide) if v == "WIDE" else v for n, v in group.items()} for k, group in groups.items()}
    config = settings(tmp_path, **groups)
    run_stage("encode", config)
    with pytest.raises(kind, match=wanted):
        run_stage("counterparts", config)


def test_other_methods_have_no_such_stage(tmp_path: Path):
    config = settings(tmp_path)
    assert "counterparts" in stages_of(config)
    other = validate(tree(str(tmp_path / "run"), str(tmp_path / "table")))
    assert "counterparts" not in stages_of(other)


def test_one_choice_of_nouns_serves_all_numbers_of_clusters(tmp_path: Path, in_process: None):
    config = settings(tmp_path, method={"clusters": [2, 3], "steps": 20}, select_k={"seeds": 1, "rule": "silhouette"})
    for stage in ("encode", "neighbors", "counterparts", "select-k", "train"):
        run_stage(stage, config)
    assert pq.read_table(Run(config.run).nouns).num_rows > 0
    assert (tmp_path / "run" / "model" / "weights.safetensors").exists()


@pytest.mark.ray
def test_on_a_cluster_the_tables_have_the_same_bytes(ray_session: None, worded: Sealed, tmp_path: Path):
    config = settings(tmp_path)
    for stage in ("encode", "counterparts"):
        run_stage(stage, config)
    found, wanted = (files(folder, "counterparts/**/*.parquet") for folder in (Path(config.run), worded.folder))
    assert len(wanted) == 5
    assert found == wanted
