from __future__ import annotations

import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from rayclust.encoders.decode import Preprocess, decode
from rayclust.stages.encode import CHUNK, ReadAndDecode
from rayclust.store import filesystem
from rayclust.store.sources import plan_shards
from tests.stages.runs import picture, write_folder

PREPROCESS = Preprocess(8, max_bytes=100_000)


def chunks(source: Path, rows: int, shard_size: int = 512) -> list[dict[str, Any]]:
    """What the worker makes of all shards of an input."""
    found = []
    for shard in plan_shards(str(source), shard_size=shard_size):
        uri = str(source.parent / f"{shard.index}.json")
        filesystem.write_json(uri, shard.to_json())
        batch = pa.table({"unit": [json.dumps(shard.index)], "shard": [uri]})
        for table in ReadAndDecode(rows, PREPROCESS)(batch):
            assert table.schema.equals(CHUNK)
            found += table.to_pylist()
    return found


@pytest.mark.parametrize("rows", [1, 2, 5, 9, 10])
def test_every_cut_gives_the_same_images_and_says_which_chunk_is_the_last(tmp_path: Path, rows: int):
    images = write_folder(tmp_path / "images", per_class=3)
    (images / "blue" / "0001.png").write_bytes(b"")
    found = chunks(images, rows)
    assert [chunk["chunk"] for chunk in found] == list(range(-(-9 // rows)))
    assert [chunk["last"] for chunk in found] == [False] * (len(found) - 1) + [True]
    records = [record for chunk in found for record in chunk["records"]]
    assert [record["key"] for record in records] == [
        f"{label}/{number:04d}.png"
        for label in ("amber", "blue", "green")
        for number in range(3)
        if (label, number) != ("blue", 1)
    ]
    assert [record["label"] for record in records] == ["amber"] * 3 + ["blue"] * 2 + ["green"] * 3
    assert [reject["reason"] for chunk in found for reject in chunk["rejects"]] == ["empty"]
    pixels = np.concatenate(
        [np.frombuffer(chunk["pixels"], np.uint8).reshape(len(chunk["records"]), 8, 8, 3) for chunk in found]
    )
    for record, shown in zip(records, pixels, strict=True):
        np.testing.assert_array_equal(shown, decode(Path(record["uri"]).read_bytes(), PREPROCESS))


def test_a_shard_without_images_is_one_empty_chunk(tmp_path: Path):
    tarfile.open(tmp_path / "none.tar", "w").close()
    [chunk] = chunks(tmp_path / "none.tar", 4)
    assert (chunk["chunk"], chunk["last"], chunk["records"], chunk["pixels"]) == (0, True, [], b"")


def test_an_image_that_vanished_or_grew_since_it_was_listed_is_a_reject(tmp_path: Path):
    images = tmp_path / "images"
    images.mkdir()
    for name in ("a", "b", "c"):
        (images / f"{name}.png").write_bytes(picture((200, 10, 10), 1))
    [shard] = plan_shards(str(images))
    (images / "a.png").unlink()
    (images / "c.png").write_bytes(bytes(100_001))
    filesystem.write_json(str(tmp_path / "s.json"), shard.to_json())
    batch = pa.table({"unit": ["u"], "shard": [str(tmp_path / "s.json")]})
    [chunk] = [row for table in ReadAndDecode(10, PREPROCESS)(batch) for row in table.to_pylist()]
    assert [record["key"] for record in chunk["records"]] == ["b.png"]
    assert {reject["key"] for reject in chunk["rejects"]} == {"a.png", "c.png"}
    assert all(reject["detail"] for reject in chunk["rejects"])


def test_several_shards_in_one_batch_stay_apart(tmp_path: Path):
    images = write_folder(tmp_path / "images", per_class=2)
    found = chunks(images, 2, shard_size=3)
    assert [(chunk["unit"], chunk["chunk"], chunk["last"]) for chunk in found] == [
        ("0", 0, False),
        ("0", 1, True),
        ("1", 0, False),
        ("1", 1, True),
    ]
