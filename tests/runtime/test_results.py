"""A finished run in Python: tables, images, search and new images."""

from __future__ import annotations

import logging
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from rayclust.errors import ArtefactError, ConfigError, DataError, ShapeError
from rayclust.runtime import log
from rayclust.runtime.results import load
from rayclust.store import storage
from tests.sealed import VECTORS, Sealed
from tests.stages.runs import tree


def test_it_shows_what_it_holds(pictures_run: Sealed, tmp_path: Path):
    found = load(Path(pictures_run.config.run))
    assert found.counts == {"embeddings": 24, "rejects": 1, "neighbors": 24, "assignments": 24, "clusters": 3}
    first, *lines = repr(found).splitlines()
    assert first == f"rayclust run {pictures_run.config.run}: kmeans, 3 clusters"
    assert [line.split() for line in lines] == [[name, str(count), "rows"] for name, count in found.counts.items()]
    storage.write_json(str(tmp_path / "config.json"), tree(str(tmp_path), "/photos"))
    assert (load(tmp_path).counts, "no table yet" in repr(load(tmp_path))) == ({}, True)


def test_tables_are_frames(pictures_run: Sealed):
    found = load(pictures_run.folder)
    frame = found.frame()
    assert list(frame) == ["row", "key", "uri", "label", "cluster", "confidence", "name"]
    assert frame["row"].tolist() == list(range(24))
    assert frame["cluster"].tolist() == found.table("assignments")["cluster"].to_pylist()
    assert list(found.frame(columns=["key", "cluster"])) == ["key", "cluster"]
    assert found.frame("clusters", ["size"])["size"].tolist() == [8, 8, 8]
    assert len(found.frame("rejects")) == 1
    with pytest.raises(ArtefactError, match=r"nothing: no parts there; the run has .*assignments"):
        found.frame("nothing")


def test_images_of_rows_in_the_order_asked_for(pictures_run: Sealed, vectors_run: Sealed):
    found = load(pictures_run.folder)
    with pytest.raises(DataError, match="row 99999: the run has rows 0 to "):
        found.images([0, 99999])
    pictures = found.images([20, 3, 20])
    assert [type(picture).__mro__[-2] for picture in pictures] == [Image.Image] * 3
    assert pictures[0].tobytes() == pictures[2].tobytes() != pictures[1].tobytes()
    with pytest.raises(DataError, match="ready embeddings"):
        load(vectors_run.folder).images([0])


def test_new_images_by_folder_by_path_and_by_embedding(pictures_run: Sealed, tmp_path: Path, in_process: None):
    found = load(pictures_run.folder)
    rows = [0, 9, 23]
    (tmp_path / "new").mkdir()
    for row, picture in zip(rows, found.images(rows), strict=True):
        picture.save(tmp_path / "new" / f"{row:02d}.png")
    (tmp_path / "new" / "text.png").write_bytes(b"no image")
    wanted = found.frame()["cluster"].to_numpy()[rows].tolist()
    # 1. Single paths, encoded here; what cannot be read keeps its place.
    paths = [tmp_path / "new" / "00.png", tmp_path / "new" / "text.png", tmp_path / "gone.png"]
    frame = found.predict([*paths, tmp_path / "new" / "09.png", str(tmp_path / "new" / "23.png")])
    assert frame["key"].tolist() == ["00.png", "text.png", "gone.png", "09.png", "23.png"]
    assert frame["cluster"].dropna().astype(int).tolist() == wanted
    assert frame["reason"].notna().tolist() == [False, True, True, False, False]
    # 2. A folder, by the stage that the command runs.
    frame = found.predict(tmp_path / "new").sort_values("key")
    assert frame["cluster"].dropna().astype(int).tolist() == wanted
    # 3. Embeddings.
    embeddings = np.stack(found.frame("embeddings", ["embedding"])["embedding"].to_list())
    frame = found.predict(embeddings[rows])
    assert (list(frame), frame["cluster"].tolist()) == (["cluster", "name", "confidence"], wanted)
    assert len(found.predict(embeddings[:0])) == 0
    for value in (0.0, np.nan):
        with pytest.raises(DataError, match="row 1 is zero or not finite"):
            found.predict(np.stack([embeddings[0], np.full_like(embeddings[0], value)]))
    with pytest.raises(ShapeError, match="width 2"):
        found.predict(VECTORS)


def turned(image: Image.Image) -> Image.Image:
    """The image on its side, with the orientation that sets it upright."""
    image = image.transpose(Image.Transpose.ROTATE_90)
    image.getexif()[0x0112] = 6
    return image


def test_a_search_is_a_frame(pictures_run: Sealed, tmp_path: Path):
    found = load(pictures_run.folder)
    found.images([9])[0].save(tmp_path / "query.png")
    frame = found.search(image=tmp_path / "query.png", top=3)
    assert list(frame) == ["row", "similarity", "key", "uri", "cluster", "name"]
    assert frame["similarity"].is_monotonic_decreasing
    assert frame["cluster"].tolist() == [found.frame()["cluster"][9]] * 3
    # The same image in memory, in any mode and lying on its side as a camera writes it.
    image = found.images([9])[0]
    for query in (image, image.convert("RGBA"), turned(image)):
        assert found.search(image=query, top=3).equals(frame)
    with pytest.raises(ConfigError, match="has no text tower"):
        found.search("a dog")
    with pytest.raises(ConfigError, match="must be 'encoder' or 'z'"):
        found.search("a dog", space="both")


@contextmanager
def as_in_a_program_without_logging():
    """Pytest has handlers of its own."""
    root, package = logging.getLogger(), logging.getLogger("rayclust")
    kept, root.handlers, package.handlers = (root.handlers, package.handlers), [], []
    try:
        yield package
    finally:
        root.handlers, package.handlers = kept


def test_progress_is_shown_where_nothing_else_shows_it(capfd: pytest.CaptureFixture[str]):
    with as_in_a_program_without_logging() as package:
        level = package.level
        with log.shown():
            package.info("encode: 3 images")
        with log.shown(False):
            package.info("not wanted")
        assert (package.handlers, package.level) == ([], level)
        package.addHandler(logging.NullHandler())
        with log.shown():
            package.info("shown by others")
    out, err = capfd.readouterr()
    assert (out, [line.split(" ", 2)[2] for line in err.splitlines()]) == ("", ["encode: 3 images"])
