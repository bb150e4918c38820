from __future__ import annotations

import json
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rayclust.config import RunConfig, validate
from rayclust.errors import ConfigError, DataError
from rayclust.runtime.encoder import load_run_encoder
from rayclust.runtime.inputs import InputPlan, with_encoder
from rayclust.runtime.pipeline import STAGES, save_config
from tests.stages.runs import tree, write_folder, write_tars


def plan_inputs(settings: RunConfig) -> InputPlan:
    plan = STAGES["encode"].plan
    assert plan is not None
    found: InputPlan = plan(settings)
    return found


def config(source: Path, run: str = "/runs/one", /, **groups: Any) -> RunConfig:
    return validate(tree(run, str(source), **groups))


def test_a_plan_names_shards_and_forgets_their_images(tmp_path: Path):
    images = write_folder(tmp_path / "images", per_class=12)
    found = plan_inputs(config(images))
    assert [(shard.index, shard.first, shard.count) for shard in found.shards] == [(0, 0, 16), (1, 16, 16), (2, 32, 4)]
    assert all(shard.members == () for shard in found.shards)
    assert len(set(found.digests)) == 3
    assert plan_inputs(config(images)) == found
    assert [len(json.loads(zlib.decompress(found.packed[index]))["members"]) for index in range(3)] == [16, 16, 4]


def test_a_grown_input_keeps_the_digests_of_what_is_done(tmp_path: Path):
    images = write_tars(tmp_path / "images", shards=2, per_shard=3)
    before = plan_inputs(config(images))
    (images / "shard-999.tar").write_bytes((images / "shard-000.tar").read_bytes())
    after = plan_inputs(config(images))
    assert after.digests[:2] == before.digests
    assert after.digest != before.digest


def test_a_shard_that_moves_up_keeps_its_digest(tmp_path: Path):
    images = write_tars(tmp_path / "images", shards=2, per_shard=3)
    before = plan_inputs(config(images))
    (images / "shard-000.tar").unlink()
    assert plan_inputs(config(images)).digests == before.digests[1:]


@pytest.mark.parametrize(
    "groups",
    [{"encoder": {"image_size": 9}}, {"images": {"labels": "none"}}, {"images": {"max_bytes": 9}}],
    ids=["encoder", "labels", "limit"],
)
def test_settings_that_change_embeddings_change_every_digest(tmp_path: Path, groups: dict[str, Any]):
    images = write_tars(tmp_path / "images", shards=2, per_shard=3)
    before, after = plan_inputs(config(images)).digests, plan_inputs(config(images, **groups)).digests
    assert not set(before) & set(after)


def test_other_weights_under_the_same_name_change_every_digest(tmp_path: Path):
    images = write_tars(tmp_path / "images", shards=1, per_shard=2)
    weights = tmp_path / "w.safetensors"
    settings = config(images, encoder={"name": "timm/resnet18", "pretrained": str(weights)})
    with pytest.raises(ConfigError, match=r"w\.safetensors: no such file"):
        plan_inputs(settings)
    weights.write_bytes(b"one")
    before = plan_inputs(settings).digests
    weights.write_bytes(b"other")
    assert plan_inputs(settings).digests != before


def test_a_list_of_classes_counts_by_its_content(tmp_path: Path):
    images = write_folder(tmp_path / "images", per_class=3)
    names = tmp_path / "classes.txt"
    names.write_text("amber\nblue\n")
    settings = config(images, images={"classes": str(names)})
    before = plan_inputs(settings)
    assert plan_inputs(settings) == before
    names.write_text("amber\ngreen\n")
    assert plan_inputs(settings).digest != before.digest


def test_a_run_within_its_own_tables_is_refused(tmp_path: Path):
    np.save(tmp_path / "a.npy", np.ones((4, 2), np.float32))
    with pytest.raises(ConfigError, match=r"lies within images\.uri"):
        plan_inputs(config(tmp_path, str(tmp_path / "run")))
    assert len(plan_inputs(config(tmp_path, str(tmp_path) + "-run")).shards) == 1
    (tmp_path / "link").symlink_to(tmp_path)
    for same in (tmp_path, f"{tmp_path}/", f"{tmp_path}/x/..", tmp_path / "link", f"file://{tmp_path}"):
        with pytest.raises(ConfigError, match=r"lies within images\.uri"):
            plan_inputs(config(tmp_path, str(same)))


def test_a_run_does_not_read_what_it_writes(tmp_path: Path):
    (tmp_path / "run" / "embeddings").mkdir(parents=True)
    np.save(tmp_path / "run" / "embeddings" / "a.npy", np.ones((4, 2), np.float32))
    with pytest.raises(ConfigError, match=r"images\.uri = .* is written by run = "):
        plan_inputs(config(tmp_path / "run" / "embeddings", str(tmp_path / "run")))


@pytest.mark.parametrize("write", [write_folder, lambda path: write_tars(path, 1, 2)], ids=["folder", "tars"])
def test_a_run_among_images_or_tars_is_no_harm(tmp_path: Path, write: Any):
    images = write(tmp_path / "images", 2) if write is write_folder else write(tmp_path / "images")
    settings = config(images, str(images / "run"))
    before = plan_inputs(settings)
    (images / "run").mkdir()
    np.save(images / "run" / "part.npy", np.ones((4, 2), np.float32))
    (images / "run" / "part-00000.parquet").write_bytes(b"PAR1")
    assert plan_inputs(settings) == before


def test_nothing_to_read_is_one_line(tmp_path: Path):
    with pytest.raises(DataError, match="nowhere"):
        plan_inputs(config(tmp_path / "nowhere"))


@pytest.mark.parametrize(("has_gpus", "name"), [(True, "open_clip/ViT-L-14"), (False, "open_clip/ViT-B-32")])
def test_images_get_an_encoder_that_fits_the_machine_and_keep_it(tmp_path: Path, has_gpus: bool, name: str):
    images = write_folder(tmp_path / "images", per_class=1)
    content = {
        "run": str(tmp_path / "run"),
        "images": {"uri": str(images)},
        "method": {"name": "kmeans", "clusters": 2},
    }
    settings = with_encoder(validate(content), lambda: has_gpus)
    assert settings.encoder.name == name
    save_config(settings)
    again = with_encoder(validate(content | {"encoder": {"name": "auto", "threads": 2}}), pytest.fail)
    assert (again.encoder.name, again.encoder.pretrained) == (name, settings.encoder.pretrained)
    assert again.encoder.threads == 2
    assert with_encoder(validate(content | {"encoder": "pixels"}), pytest.fail).encoder.name == "pixels"
    other = write_folder(tmp_path / "other", per_class=1)
    elsewhere = with_encoder(validate(content | {"images": {"uri": str(other)}}), lambda: not has_gpus)
    assert elsewhere.encoder.name != name, "of other images"


def test_ready_embeddings_are_of_an_unknown_encoder(tmp_path: Path):
    np.save(tmp_path / "a.npy", np.ones((4, 2), np.float32))
    settings = with_encoder(config(tmp_path, "/runs/one"), pytest.fail)
    assert settings.encoder.name == "unknown"
    with pytest.raises(ConfigError, match="ready embeddings; name the encoder"):
        load_run_encoder(settings)
