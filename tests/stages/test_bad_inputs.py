"""Odd and bad inputs through the whole encode stage: each gives its row or its reject, and no good row is lost.

Odd images go through a cluster, bad files are read in this process.
"""

from __future__ import annotations

import io
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rayclust.cli import run_command
from rayclust.config import validate
from rayclust.runtime.pipeline import run_stage
from tests.encoders.odd_images import odd_images
from tests.stages.runs import COLOURS, embeddings, picture, tree, write_yaml


def rejects(run: Path) -> dict[str, str]:
    """Key to reason."""
    found = [pq.read_table(path) for path in sorted((run / "rejects").glob("*.parquet"))]
    return {row["key"]: row["reason"] for table in found for row in table.to_pylist()}


def test_every_odd_image_file_gives_a_row_or_its_reason(in_process: None, tmp_path: Path):
    wanted_rows, wanted_rejects = set(), {}
    for number, odd in enumerate(odd_images()):
        key = f"{number:04d}-{Path(odd.name).stem}.jpg"  # a wrong ending is no mistake
        (tmp_path / "images").mkdir(exist_ok=True)
        (tmp_path / "images" / key).write_bytes(odd.data)
        if odd.decodes:
            wanted_rows.add(key)
        else:
            wanted_rejects[key] = odd.expected
    assert len(wanted_rejects) >= 100
    images = {"max_reject_share": 1.0, "shard_size": 64, "max_pixels": 100_000_000, "max_bytes": 100_000_000}
    config = tree(str(tmp_path / "run"), str(tmp_path / "images"), images=images)
    assert run_command(["encode", str(write_yaml(tmp_path / "RUN.yaml", config))]) == 0
    table = embeddings(tmp_path / "run")
    assert set(table["key"].to_pylist()) == wanted_rows
    assert table["row"].to_pylist() == list(range(len(wanted_rows)))
    assert rejects(tmp_path / "run") == wanted_rejects


def good(number: int) -> bytes:
    return picture(list(COLOURS.values())[number % 3], number)


def tar_of(*members: tuple[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def cut_in_second() -> bytes:
    data = tar_of(("a.png", good(0)), ("b.png", good(1)))
    return data[: data.index(b"b.png") + 512 + 100]


def broken_header() -> bytes:
    data = bytearray(tar_of(("a.png", good(0)), ("b.png", good(1))))
    second = data.index(b"b.png")
    data[second + 148 : second + 156] = b"9999999\0"
    return bytes(data)


BAD_TARS: dict[str, tuple[bytes, int, set[str]]] = {
    "empty file": (b"", 0, {"unreadable_file", "tar_truncated", "empty"}),
    "text": (b"this is no tar file at all\n" * 40, 0, {"unreadable_file", "tar_truncated", "not_a_tar", "bad_tar"}),
    "cut in a member": (cut_in_second(), 1, {"tar_truncated"}),
    "broken header": (broken_header(), 1, {"tar_truncated", "bad_tar", "tar_damaged"}),
    "image twice": (tar_of(("a.png", good(0)), ("a.png", good(1)), ("b.png", good(2))), 2, {"duplicate_key"}),
    "key not in one run": (tar_of(("a.png", good(0)), ("b.png", good(1)), ("a.cls", b"x")), 2, set()),
    "no image": (tar_of(("a.json", b"{}"), ("b.png", good(1))), 1, {"no_image"}),
    "bad json": (tar_of(("a.png", good(0)), ("a.json", b"{not json")), 1, set()),
    "names that climb": (tar_of(("../../climb.png", good(0)), ("/absolute.png", good(1))), 2, set()),
    "image that is none": (tar_of(("a.png", b"nothing"), ("b.png", good(1))), 1, {"not_an_image"}),
    "empty image": (tar_of(("a.png", b""), ("b.png", good(1))), 1, {"empty"}),
    "empty tar": (tar_of(), 0, set()),
}


def test_every_bad_tar_keeps_its_good_images(in_process: None, tmp_path: Path):
    folder = tmp_path / "images"
    folder.mkdir()
    for number, (data, _, _) in enumerate(BAD_TARS.values()):
        (folder / f"{number:02d}.tar").write_bytes(data)
    config = tree(str(tmp_path / "run"), str(folder), images={"max_reject_share": 1.0})
    assert run_command(["encode", str(write_yaml(tmp_path / "RUN.yaml", config))]) == 0
    for number, (name, (_, rows, reasons)) in enumerate(BAD_TARS.items()):
        table = pq.read_table(tmp_path / "run" / "embeddings" / f"part-{number:05d}.parquet")
        assert table.num_rows == rows, name
        path = tmp_path / "run" / "rejects" / f"part-{number:05d}.parquet"
        found = set(pq.read_table(path)["reason"].to_pylist()) if path.exists() else set()
        assert found <= reasons, name
        assert bool(found) == bool(reasons), name
    assert not (tmp_path / "climb.png").exists()
    assert not Path("/absolute.png").exists()


def parquet(path: Path, **columns: object) -> None:
    pq.write_table(pa.table(columns), path)


def write(path: Path, data: bytes) -> None:
    path.write_bytes(data)


X = np.random.default_rng(0).normal(size=(30, 4)).astype(np.float32)

REFUSED: dict[str, tuple[Callable[[Path], object], str]] = {
    "nothing": (lambda f: None, "holds no images"),
    "only text files": (lambda f: write(f / "notes.txt", b"hello"), "holds no images"),
    "no image column": (lambda f: parquet(f / "a.parquet", text=["x"], number=[1]), "text (string), number (int64)"),
    "a column for each dimension": (
        lambda f: parquet(f / "a.parquet", **{f"f{i}": X[:, i % 4] for i in range(9)}),
        "put these columns together",
    ),
    "truncated parquet": (lambda f: write(f / "a.parquet", b"PAR1" + bytes(40)), "cannot be read as Parquet"),
    "empty parquet file": (lambda f: write(f / "a.parquet", b""), "cannot be read as Parquet"),
    "tars beside images": (lambda f: (write(f / "a.png", good(0)), write(f / "b.tar", tar_of())), "images.format"),
    "every image bad": (lambda f: write(f / "a.png", b"x"), "rejected"),
    "embeddings of text": (lambda f: parquet(f / "a.parquet", embedding=["x", "y"]), "embedding"),
    "npy of objects": (lambda f: np.save(f / "a.npy", np.array([{}, 1], object), allow_pickle=True), "a.npy"),
    "npy of one axis": (lambda f: np.save(f / "a.npy", np.zeros(5, np.float32)), "a.npy"),
    "npy and too few labels": (
        lambda f: (np.save(f / "a.npy", X), np.save(f / "a_labels.npy", np.zeros(3, int))),
        "30",
    ),
    "truncated npy": (
        lambda f: (np.save(f / "a.npy", X), write(f / "a.npy", (f / "a.npy").read_bytes()[:200])),
        "1 truncated",
    ),
    "all not finite": (lambda f: np.save(f / "a.npy", np.full((5, 4), np.nan, np.float32)), "infinite or undefined"),
    "tar of other files": (lambda f: write(f / "a.tar", tar_of(("notes.md", b"x"))), "no images are in its files"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_an_input_that_cannot_be_used_is_one_clear_line(
    name: str, in_process: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    folder = tmp_path / "images"
    folder.mkdir()
    build, wanted = REFUSED[name]
    build(folder)
    config = write_yaml(tmp_path / "RUN.yaml", tree(str(tmp_path / "run"), str(folder)))
    assert run_command(["encode", str(config)]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("rayclust: ")]
    assert len(lines) == 1
    assert wanted in lines[0]
    assert not (tmp_path / "run" / "manifests" / "encode.json").exists()


def test_labels_that_are_asked_for_and_are_none_are_said(in_process: None, tmp_path: Path, caplog: Any):
    (tmp_path / "images").mkdir()
    parquet(tmp_path / "images" / "a.parquet", embedding=list(map(list, X)), share=[0.5] * 30)
    config = tree(str(tmp_path / "run"), str(tmp_path / "images"), images={"labels": "share"})
    run_stage("encode", validate(config))
    assert "images.labels = share: gives no row a label" in caplog.text


BAD_ROWS: dict[str, tuple[Callable[[Path], object], int, set[str]]] = {
    "nan": (lambda f: np.save(f / "a.npy", np.where(np.arange(30)[:, None] == 7, np.nan, X)), 29, {"not_finite"}),
    "infinite": (lambda f: np.save(f / "a.npy", np.where(np.arange(30)[:, None] == 7, np.inf, X)), 29, {"not_finite"}),
    "beyond float32": (
        lambda f: np.save(f / "a.npy", np.where(np.arange(30)[:, None] < 2, np.float64(1e39), X)),
        28,
        {"overflow"},
    ),
    "zero": (lambda f: np.save(f / "a.npy", np.where(np.arange(30)[:, None] == 3, 0, X)), 29, {"zero_vector"}),
    "mixed widths": (lambda f: parquet(f / "a.parquet", embedding=[*map(list, X), [1.0]]), 30, {"wrong_width"}),
    "nulls": (lambda f: parquet(f / "a.parquet", embedding=[*map(list, X), None]), 30, {"null_embedding"}),
    "files of two widths": (
        lambda f: (np.save(f / "a.npy", X), np.save(f / "b.npy", X[:2, :3])),
        30,
        {"wrong_width"},
    ),
    "labels of a wrong type": (
        lambda f: parquet(f / "a.parquet", embedding=list(map(list, X)), label=[{"a": 1}] * 30),
        30,
        set(),
    ),
    "null images": (
        lambda f: parquet(f / "a.parquet", image=[good(0), None, good(1)]),
        2,
        {"null_image", "empty", "no_image"},
    ),
    "structs without bytes": (
        lambda f: parquet(f / "a.parquet", image=[{"bytes": good(0), "path": "a"}, {"bytes": None, "path": "b"}]),
        1,
        {"null_image", "empty", "no_image"},
    ),
    "a bad table beside a good one": (
        lambda f: (parquet(f / "a.parquet", image=[good(0), good(1)]), write(f / "b.parquet", b"PAR1")),
        2,
        {"unreadable_file"},
    ),
}


@pytest.mark.parametrize("name", BAD_ROWS)
def test_bad_rows_are_rejects_and_good_rows_stay(name: str, in_process: None, tmp_path: Path):
    folder = tmp_path / "images"
    folder.mkdir()
    build, rows, reasons = BAD_ROWS[name]
    build(folder)
    config = tree(str(tmp_path / "run"), str(folder), images={"max_reject_share": 0.9})
    assert run_command(["encode", str(write_yaml(tmp_path / "RUN.yaml", config))]) == 0
    assert embeddings(tmp_path / "run").num_rows == rows
    found = set(rejects(tmp_path / "run").values())
    assert found <= reasons
    assert bool(found) == bool(reasons)
