from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from rayclust.stages import NAMES
from rayclust.store import storage, tables
from rayclust.store.manifest import (
    FileListing,
    Manifest,
    Output,
    drop_stale_parts,
    put_bytes,
    put_json,
    put_table,
    remove_damaged,
    write_manifest,
)
from rayclust.store.run import Run


@pytest.mark.parametrize("ending", ["", "/"])
def test_what_was_written_is_named_relative_to_the_run(tmp_path: Path, ending: str):
    run = Run(str(tmp_path / "run") + ending)
    written = put_bytes(run, run.at("a", "b ü.bin"), b"abc")
    stamp = storage.stat(run.at("a", "b ü.bin")).stamp
    assert written == {"a/b ü.bin": {"digest": hashlib.sha256(b"abc").hexdigest(), "size": 3, "stamp": stamp}}
    assert (tmp_path / "run" / "a" / "b ü.bin").read_bytes() == b"abc"


def test_tables_and_json_say_the_digest_of_their_bytes(tmp_path: Path):
    run = Run(str(tmp_path))
    table = pa.table({"x": [1, 2]})
    written = put_table(run, run.at("t.parquet"), table) | put_json(run, run.at("v.json"), {"b": 1, "a": float("nan")})
    for path, output in written.items():
        data = (tmp_path / path).read_bytes()
        assert output["digest"] == hashlib.sha256(data).hexdigest()
        assert output["size"] == len(data)
    assert tables.read_table(run.at("t.parquet")).equals(table)
    assert storage.read_json(run.at("v.json")) == {"a": None, "b": 1}


def test_only_parts_beyond_the_count_are_dropped(tmp_path: Path):
    for name in ("part-00000.parquet", "part-00001.parquet", "part-00002.parquet", "part-12345.parquet", "ivf.faiss"):
        (tmp_path / name).touch()
    drop_stale_parts(str(tmp_path), 2)
    assert {path.name for path in tmp_path.iterdir()} == {"part-00000.parquet", "part-00001.parquet", "ivf.faiss"}
    drop_stale_parts(str(tmp_path / "nowhere"), 2)


def written(data: bytes, stamp: str = "") -> dict[str, Any]:
    return {"digest": hashlib.sha256(data).hexdigest(), "size": len(data), "stamp": stamp}


def test_a_listing_knows_files_by_path_and_size(tmp_path: Path):
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "x").write_bytes(b"12")
    (tmp_path / "a" / "b" / "y").write_bytes(b"123")
    (tmp_path / "z").write_bytes(b"1")
    listing = FileListing(Run(str(tmp_path)))
    assert listing.has("a/x", written(b"12"))
    assert listing.has("a/b/y", written(b"123"))
    assert listing.has("z", written(b"1"))
    assert not listing.has("a/x", written(b"123"))
    for path in ("a/none", "none/x", "none", "a"):  # a folder is no file
        assert not listing.has(path, written(b"")), path


@pytest.mark.parametrize("where", ["folder/part", "file"])
@pytest.mark.parametrize("kind", ["local", "s3"])
def test_a_file_of_the_same_size_with_other_content_is_found(
    kind: str, where: str, tmp_path: Path, request: pytest.FixtureRequest, caplog: pytest.LogCaptureFixture
):
    run = Run(str(tmp_path) if kind == "local" else request.getfixturevalue("s3_bucket"))
    outputs = put_bytes(run, run.at(where), b"content")
    assert FileListing(run).has(where, outputs[where])
    storage.write_bytes(run.at(where), b"c0ntent")
    assert not FileListing(run).has(where, outputs[where])
    assert f"{run.at(where)}: is damaged, its checksum is another than was written: made again" in caplog.text
    storage.write_bytes(run.at(where), b"content")  # as a copy: other stamp, same bytes
    assert FileListing(run).has(where, outputs[where])


def test_a_file_with_its_stamp_is_not_read(tmp_path: Path):
    (tmp_path / "a").write_bytes(b"12")
    found = storage.stat(str(tmp_path / "a"))
    assert found is not None
    assert FileListing(Run(str(tmp_path))).has("a", {"digest": "never looked at", "size": 2, "stamp": found.stamp})


def test_what_an_error_names_is_removed_only_where_a_manifest_says_that_it_was_another(tmp_path: Path):
    run = Run(str(tmp_path))
    outputs = put_bytes(run, run.at("model", "a"), b"12") | put_bytes(run, run.at("model", "b"), b"34")
    (tmp_path / "model" / "c").write_bytes(b"of nobody")
    write_manifest(
        run, Manifest(stage="train", digest="d", outputs={path: Output(**file) for path, file in outputs.items()})
    )
    (tmp_path / "model" / "b").write_bytes(b"35")
    assert remove_damaged(run, NAMES, f"{run.at('model', 'a')}: is said to be damaged") == ("", "")
    assert remove_damaged(run, NAMES, f"{run.at('model', 'c')}: is said to be damaged") == ("", "")
    assert remove_damaged(run, NAMES, "no file is named") == ("", "")
    assert remove_damaged(run, NAMES, f"{run.at('model', 'b')}: is damaged") == (run.at("model", "b"), "train")
    assert sorted(path.name for path in (tmp_path / "model").iterdir()) == ["a", "c"]
