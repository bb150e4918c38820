"""Chunks come in any order and more than once; the shard is written once, with each record in its place."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np
import pytest

from rayclust.runtime.tasks import read_mark
from rayclust.stages.encode import ShardWriter
from rayclust.store import filesystem, tables
from rayclust.store.layout import Run


def unit(index: int, digest: str = "digest", row_start: int = 0) -> str:
    return json.dumps({"index": index, "digest": digest, "row_start": row_start})


def chunk(number: int, last: bool, rows: int = 2, rejects: int = 0) -> tuple:
    """Arguments of `add` after the unit: records named by chunk and place, and embeddings that say the same."""
    records = [{"key": f"{number}-{i}", "uri": f"/{number}/{i}", "label": None} for i in range(rows)]
    lost = [{"key": f"{number}-r{i}", "uri": "/r", "reason": "empty", "detail": ""} for i in range(rejects)]
    embeddings = np.array([[number + 1, i + 1] for i in range(rows)], np.float16).reshape(rows, 2)
    return number, last, records, lost, embeddings


CHUNKS = [chunk(0, False), chunk(1, False, rejects=1), chunk(2, True, rows=1)]


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_every_order_of_chunks_gives_the_same_part(order: tuple[int, ...], tmp_path: Path):
    run = Run(str(tmp_path))
    writer = ShardWriter(run.uri, 2)
    for place, number in enumerate(order):
        assert read_mark(run.shard_manifest(0)) is None, place
        writer.add(unit(0, row_start=30), *CHUNKS[number])
    part = tables.read_table(run.embeddings(0))
    assert part["key"].to_pylist() == ["0-0", "0-1", "1-0", "1-1", "2-0"]
    assert part["row"].to_pylist() == [30, 31, 32, 33, 34]
    assert tables.matrix(part["embedding"]).tolist() == [[1, 1], [1, 2], [2, 1], [2, 2], [3, 1]]
    digest, result = read_mark(run.shard_manifest(0)) or ("", None)
    assert digest == "digest"
    assert result is not None
    assert result.counts == {"rows": 5, "rejects": 1, "labelled": 0}


def test_a_chunk_that_comes_twice_is_taken_once(tmp_path: Path):
    run = Run(str(tmp_path))
    writer = ShardWriter(run.uri, 2)
    for number in (0, 0, 2, 1, 1, 0, 2):
        writer.add(unit(0), *CHUNKS[number])
    assert tables.read_table(run.embeddings(0)).num_rows == 5
    before = filesystem.read_bytes(run.embeddings(0))
    filesystem.remove(run.embeddings(0))
    writer.add(unit(0), *CHUNKS[2])
    assert not filesystem.exists(run.embeddings(0)), "a late copy of a chunk wrote a whole shard again"
    assert before


def test_shards_do_not_mix(tmp_path: Path):
    run = Run(str(tmp_path))
    writer = ShardWriter(run.uri, 2)
    writer.add(unit(0), *CHUNKS[0])
    writer.add(unit(1), *chunk(0, True))
    assert read_mark(run.shard_manifest(0)) is None
    assert tables.read_table(run.embeddings(1)).num_rows == 2
    writer.add(unit(0), *CHUNKS[2])
    writer.add(unit(0), *CHUNKS[1])
    assert tables.read_table(run.embeddings(0)).num_rows == 5


def test_a_shard_of_rejects_alone_and_one_of_nothing_are_written(tmp_path: Path):
    run = Run(str(tmp_path))
    writer = ShardWriter(run.uri, 2)
    writer.add(unit(0), *chunk(0, True, rows=0, rejects=2))
    writer.add(unit(1), *chunk(0, True, rows=0))
    assert tables.read_table(run.rejects(0)).num_rows == 2
    assert tables.read_table(run.embeddings(1)).schema.equals(tables.EMBEDDINGS(2))
    assert read_mark(run.shard_manifest(1)) is not None


def test_an_older_marker_is_gone_while_its_part_is_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    run = Run(str(tmp_path))
    ShardWriter(run.uri, 2).add(unit(0, "old"), *chunk(0, True))

    def killed(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("rayclust.stages.encode.write_shard", killed)
    with pytest.raises(KeyboardInterrupt):
        ShardWriter(run.uri, 2).add(unit(0, "new"), *chunk(0, True))
    assert read_mark(run.shard_manifest(0)) is None
