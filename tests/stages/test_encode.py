"""Encode without a cluster: rows dense over rejects, counts and moments of the whole, ready embeddings."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from rayclust.config import RunConfig, validate
from rayclust.errors import ArtefactError, ConfigError, DataError
from rayclust.methods.settings import EMBEDDINGS
from rayclust.runtime.pipeline import run_stage
from rayclust.runtime.rows import transform_of
from rayclust.stages import encode
from rayclust.store.manifest import Manifest
from tests.stages.conftest import VECTORS, Sealed
from tests.stages.runs import embeddings, picture, tree, write_tars

pytestmark = pytest.mark.usefixtures("in_process")


def config(folder: Path, **groups: Any) -> RunConfig:
    return validate(tree(str(folder / "run"), str(folder / "images"), **groups))


def write_files(folder: Path, good: str, *, per_shard: int = 3) -> dict[str, Any]:
    """A file per letter: g is an image, anything else is none. Gives the settings that cut so many to a shard."""
    (folder / "images").mkdir()
    for number, letter in enumerate(good):
        data = picture((10 * number, 90, 200), number) if letter == "g" else b"none"
        (folder / "images" / f"{number:03d}.png").write_bytes(data)
    return {"images": {"shard_size": per_shard, "max_reject_share": 1.0}}


@pytest.mark.parametrize("good", ["gggggggg", "xggggggg", "gxgxxxgg", "xxxgggxg", "ggggggxx", "g", "xxxxxxg"])
def test_rows_are_dense_in_order_of_keys_whatever_is_rejected(tmp_path: Path, good: str):
    settings = config(tmp_path, **write_files(tmp_path, good))
    manifest = run_stage("encode", settings)
    table = embeddings(tmp_path / "run")
    wanted = [f"{number:03d}.png" for number, letter in enumerate(good) if letter == "g"]
    assert table["key"].to_pylist() == wanted
    assert table["row"].to_pylist() == list(range(len(wanted)))
    assert manifest.counts == {"rows": len(wanted), "rejects": good.count("x"), "labelled": 0}
    assert manifest.extra["parts"] == [good[i : i + 3].count("g") for i in range(0, len(good), 3)]
    assert manifest.extra["reasons"] == ({"not_an_image": good.count("x")} if "x" in good else {})


def test_a_guess_of_rows_that_was_mended_gives_the_bytes_of_a_right_one(tmp_path: Path):
    settings = config(tmp_path, **write_files(tmp_path, "xgggggg"))
    first = run_stage("encode", settings)
    again = run_stage("encode", settings, force=True)
    assert {path: output.digest for path, output in first.outputs.items()} == {
        path: output.digest for path, output in again.outputs.items()
    }


def test_moments_of_the_run_are_those_of_all_its_rows(pictures_run: Sealed):
    x = np.stack(embeddings(pictures_run.folder)["embedding"].to_numpy(zero_copy_only=False)).astype(np.float64)
    moments = pictures_run.manifest("encode").extra["moments"]
    total, squares = (np.frombuffer(base64.b64decode(moments[name]), "<f8") for name in ("total", "squares"))
    assert moments["count"] == len(x) == 24
    np.testing.assert_allclose(total, x.sum(0), rtol=1e-12)
    np.testing.assert_allclose(squares, (x**2).sum(0), rtol=1e-12)


def test_too_many_rejects_stop_the_stage_and_a_higher_bound_goes_on_from_there(tmp_path: Path):
    groups = write_files(tmp_path, "gggxxxgg", per_shard=2)
    low = config(tmp_path, images=groups["images"] | {"max_reject_share": 0.2})
    with pytest.raises(DataError, match=r"3 of 8 images rejected, 37\.5%, above images\.max_reject_share = 0\.2"):
        run_stage("encode", low)
    assert not (tmp_path / "run" / "manifests" / "encode.json").exists()
    exact = config(tmp_path, images=groups["images"] | {"max_reject_share": 0.375})
    assert run_stage("encode", exact).counts["rejects"] == 3


def test_no_usable_image_at_all_is_one_line_even_if_all_may_be_rejected(tmp_path: Path):
    settings = config(tmp_path, **write_files(tmp_path, "xxxx"))
    with pytest.raises(DataError, match="no image there can be used: 4 not_an_image"):
        run_stage("encode", settings)


def test_a_shard_that_never_finishes_ends_the_stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    write_tars(tmp_path / "images", shards=2, per_shard=2)
    passes = []

    def loses_the_second(worker: Any, context: Any, todo: list[Any]) -> Any:
        passes.append([unit.index for unit in todo])
        yield from chunks(worker, context, [unit for unit in todo if unit.index == 0])

    chunks = encode.chunks_in_driver
    monkeypatch.setattr(encode, "chunks_in_driver", loses_the_second)
    with pytest.raises(ArtefactError, match=r"1 shard\(s\) do not finish, the first is shard-001"):
        run_stage("encode", config(tmp_path, encoder={"name": "pixels"}))
    assert passes == [[0, 1], *[[1]] * encode.MAX_STALLED_PASSES]


def test_ready_embeddings_become_the_same_rows(vectors_run: Sealed):
    table = embeddings(vectors_run.folder)
    np.testing.assert_array_equal(np.stack(table["embedding"].to_numpy(zero_copy_only=False)), VECTORS)
    assert table["row"].to_pylist() == list(range(7))
    assert vectors_run.manifest("encode").counts == {"rows": 7, "rejects": 0, "labelled": 6}
    assert vectors_run.manifest("encode").extra["dimension"] == 2


def test_tables_of_another_width_than_the_first_are_rejects(tmp_path: Path):
    (tmp_path / "images").mkdir()
    np.save(tmp_path / "images" / "a.npy", np.ones((3, 4), np.float32))
    np.save(tmp_path / "images" / "b.npy", np.ones((2, 5), np.float32))
    manifest = run_stage("encode", config(tmp_path, images={"max_reject_share": 0.5}))
    assert (manifest.counts["rows"], manifest.extra["reasons"]) == (3, {"wrong_width": 2})
    with pytest.raises(
        ConfigError, match=r"encoder\.name = pixels: has 192 values an image, .* have 4; name the encoder"
    ):
        run_stage("encode", config(tmp_path, encoder={"name": "pixels"}))


def test_unicode_keys_and_labels_come_through(tmp_path: Path):
    folder = tmp_path / "images" / "Kätzchen 小猫"
    folder.mkdir(parents=True)
    (folder / "ein Bild, mit ✓.png").write_bytes(picture((9, 9, 200), 0))
    run_stage("encode", config(tmp_path))
    [row] = pq.read_table(tmp_path / "run" / "embeddings" / "part-00000.parquet", columns=["key", "label"]).to_pylist()
    assert row == {"key": "Kätzchen 小猫/ein Bild, mit ✓.png", "label": "Kätzchen 小猫"}


def test_features_of_an_earlier_manifest_are_read_as_they_were_sealed(pictures_run: Sealed):
    encode_manifest = pictures_run.manifest("encode")
    again = Manifest.model_validate(encode_manifest.model_dump(mode="json"))
    transforms = (transform_of(m, pictures_run.config.features) for m in (encode_manifest, again))
    left, right = (transform.transforms[EMBEDDINGS].mean for transform in transforms)
    assert left is not None
    assert right is not None
    assert left.tobytes() == right.tobytes()


def test_the_driver_keeps_no_moments_of_single_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    settings = config(tmp_path, **write_files(tmp_path, "xggxgggg"))
    kept, number = [], encode._number_rows

    def note(run: Any, results: Any) -> Any:
        kept.extend(numbered := number(run, results))
        return numbered

    monkeypatch.setattr(encode, "_number_rows", note)
    first = run_stage("encode", settings)
    (tmp_path / "run" / "manifests" / "encode.json").unlink()
    again = run_stage("encode", settings)  # from the markers
    assert [set(result.extra) for result in kept] == 6 * [{"row_start", "reasons"}]
    assert again.extra == first.extra
