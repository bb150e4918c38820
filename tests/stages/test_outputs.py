from __future__ import annotations

import hashlib
from pathlib import Path

import pyarrow as pa
import pytest

from rayclust.stages.outputs import Listing, drop_stale_parts, put_bytes, put_json, put_table
from rayclust.store import filesystem, tables
from rayclust.store.layout import Run


@pytest.mark.parametrize("ending", ["", "/"])
def test_what_was_written_is_named_relative_to_the_run(tmp_path: Path, ending: str):
    run = Run(str(tmp_path / "run") + ending)
    written = put_bytes(run, run.at("a", "b ü.bin"), b"abc")
    assert written == {"a/b ü.bin": {"digest": hashlib.sha256(b"abc").hexdigest(), "size": 3}}
    assert (tmp_path / "run" / "a" / "b ü.bin").read_bytes() == b"abc"


def test_tables_and_json_say_the_digest_of_their_bytes(tmp_path: Path):
    run = Run(str(tmp_path))
    table = pa.table({"x": [1, 2]})
    written = put_table(run, run.at("t.parquet"), table) | put_json(run, run.at("v.json"), {"b": 1, "a": float("nan")})
    for path, output in written.items():
        data = (tmp_path / path).read_bytes()
        assert output == {"digest": hashlib.sha256(data).hexdigest(), "size": len(data)}
    assert tables.read_table(run.at("t.parquet")).equals(table)
    assert filesystem.read_json(run.at("v.json")) == {"a": None, "b": 1}


def test_only_parts_beyond_the_count_are_dropped(tmp_path: Path):
    for name in ("part-00000.parquet", "part-00001.parquet", "part-00002.parquet", "part-12345.parquet", "ivf.faiss"):
        (tmp_path / name).touch()
    drop_stale_parts(str(tmp_path), 2)
    assert {path.name for path in tmp_path.iterdir()} == {"part-00000.parquet", "part-00001.parquet", "ivf.faiss"}
    drop_stale_parts(str(tmp_path / "nowhere"), 2)


def test_a_listing_knows_files_by_path_and_size(tmp_path: Path):
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "x").write_bytes(b"12")
    (tmp_path / "a" / "b" / "y").write_bytes(b"123")
    (tmp_path / "z").write_bytes(b"1")
    listing = Listing(Run(str(tmp_path)))
    assert listing.has("a/x", 2)
    assert listing.has("a/b/y", 3)
    assert listing.has("z", 1)
    assert not listing.has("a/x", 3)
    assert not listing.has("a/none", 0)
    assert not listing.has("none/x", 0)
    assert not listing.has("none", 0)
    assert not listing.has("a", 0), "a folder is no file"
