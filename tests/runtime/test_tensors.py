from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rayclust.config import RunConfig, validate
from rayclust.errors import ArtefactError, ConfigError
from rayclust.methods import build
from rayclust.methods.settings import KMeansConfig
from rayclust.runtime.encoder import encoder_shape, load_run_encoder, worker_device
from rayclust.runtime.inputs import weights_stamp
from rayclust.runtime.tensors import load_method, save_method
from rayclust.store.manifest import Manifest, Output, write_manifest
from rayclust.store.run import Run
from tests.stages.runs import tree


def config(**groups: Any) -> RunConfig:
    return validate(tree("/run", "/images", **groups))


def test_the_encoder_has_the_limits_of_the_run():
    settings = config(images={"max_bytes": 123, "max_pixels": 456})
    preprocess, dimension, seconds = encoder_shape(settings)
    assert seconds > 0
    assert (preprocess.max_bytes, preprocess.max_pixels, dimension) == (123, 456, 192)
    assert load_run_encoder(settings).preprocess == preprocess


def test_half_precision_for_far_gpus_is_single_precision_here(tmp_path: Path):
    import timm
    from safetensors.torch import save_file

    torch.manual_seed(0)
    save_file(timm.create_model("test_vit", num_classes=0).state_dict(), tmp_path / "w.safetensors")
    encoder = {"name": "timm/test_vit", "pretrained": str(tmp_path / "w.safetensors"), "precision": "fp16"}
    encoder |= {"image_size": None, "mean": [0.5] * 3, "std": [0.5] * 3}
    pixels = np.random.default_rng(0).integers(0, 255, (1, 160, 160, 3), np.uint8)
    far = load_run_encoder(config(encoder=encoder, resources={"gpus_per_worker": 1}), device="cpu")
    here = load_run_encoder(config(encoder=encoder | {"precision": "fp32"}))
    np.testing.assert_array_equal(far.encode_images(pixels), here.encode_images(pixels))
    with pytest.raises(ConfigError, match="precision = fp16"):
        load_run_encoder(config(encoder=encoder, resources={"gpus_per_worker": 0}))
    assert encoder_shape(config(encoder=encoder, resources={"gpus_per_worker": 1}))[1] == here.dimension


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_worker_computes_where_it_was_told_or_says_why_not():
    assert worker_device(config()) == "cpu"
    with pytest.raises(ConfigError, match="sees no CUDA device"):
        worker_device(config(resources={"gpus_per_worker": 0.5}))


def test_a_stamp_is_the_tag_or_what_the_file_is(tmp_path: Path):
    path = tmp_path / "w.safetensors"
    assert weights_stamp(config(encoder={"name": "open_clip/ViT-B-32", "pretrained": "openai"})) == "openai"
    of_file = config(encoder={"name": "timm/resnet18", "pretrained": str(path)})
    with pytest.raises(ConfigError, match="no such file"):
        weights_stamp(of_file)
    path.write_bytes(b"1")
    first = weights_stamp(of_file)
    path.write_bytes(b"12")
    assert weights_stamp(of_file) != first


def kmeans(value: float) -> Any:
    method = build(KMeansConfig(clusters=2), 3, 10, 0)
    method.centers.copy_(torch.arange(6).reshape(2, 3) + value)
    return method


def test_a_method_reads_back_as_saved_and_anew_when_its_digest_changes(tmp_path: Path):
    run = Run(str(tmp_path))
    first = save_method(run, kmeans(0).state(), run.model_folder)
    assert set(first) == {"model/weights.safetensors", "model/config.json"}
    again = save_method(run, kmeans(0).state(), run.model_folder)
    assert {path: file["digest"] for path, file in again.items()} == {p: file["digest"] for p, file in first.items()}
    x = torch.randn(5, 3)
    loaded = load_method(run.uri, "one")
    torch.testing.assert_close(loaded.predict_proba(x), kmeans(0).predict_proba(x), rtol=0, atol=0)
    assert not loaded.training
    save_method(run, kmeans(1).state(), run.model_folder)
    assert load_method(run.uri, "one") is loaded
    torch.testing.assert_close(load_method(run.uri, "two").predict_proba(x), kmeans(1).predict_proba(x), rtol=0, atol=0)


@pytest.mark.parametrize("damage", [lambda data: data[:-3], lambda data: b"", lambda data: b"x" * len(data)])
def test_a_damaged_model_is_one_line(tmp_path: Path, damage: Any):
    run = Run(str(tmp_path))
    save_method(run, kmeans(0).state(), run.model_folder)
    path = tmp_path / "model" / "weights.safetensors"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ArtefactError, match="the model is damaged"):
        load_method(run.uri, "d")


def test_a_model_that_lacks_a_tensor_or_has_one_too_many_is_one_line(tmp_path: Path):
    run, state = Run(str(tmp_path)), kmeans(0).state()
    for tensors in ({}, state.tensors | {"more": torch.zeros(1)}):
        save_method(run, replace(state, tensors=tensors), run.model_folder)
        with pytest.raises(ArtefactError, match="the model is damaged"):
            load_method(run.uri, str(len(tensors)))


@pytest.mark.parametrize("name", ["weights.safetensors", "config.json"])
def test_a_model_in_which_a_bit_has_turned_is_not_taken(tmp_path: Path, name: str):
    run = Run(str(tmp_path))
    outputs = save_method(run, kmeans(0).state(), run.model_folder)
    write_manifest(
        run, Manifest(stage="train", digest="d", outputs={path: Output(**file) for path, file in outputs.items()})
    )
    assert load_method(run.uri, "whole")
    path = tmp_path / "model" / name
    data = path.read_bytes()
    path.write_bytes(data[:-8] + bytes([data[-8] ^ 1]) + data[-7:])
    with pytest.raises(ArtefactError, match=rf"{name}: is damaged .* run `rayclust train RUN.yaml`"):
        load_method(run.uri, "turned")
