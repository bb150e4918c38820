"""OpenVINO beside torch: the same rows to rounding, the same bytes from any thread, and which of both a run takes."""

from __future__ import annotations

import json
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError
from torch import nn

from rayclust.config import RunConfig, validate
from rayclust.encoders import openvino
from rayclust.encoders.base import TorchEncoder
from rayclust.encoders.decode import Preprocess
from rayclust.encoders.settings import EncoderConfig
from rayclust.errors import ConfigError
from rayclust.runtime import encoder as run_encoder
from rayclust.runtime.encoder import RunEncoders, with_engines
from rayclust.runtime.pipeline import settings_of
from rayclust.store.run import Run
from tests.encoders.networks import noise, tiny_clip, tiny_timm
from tests.stages.runs import tree

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.5)
needs_openvino = pytest.mark.skipif(not openvino.is_installed(), reason="the extra cpu is not installed")


def encoder(network: nn.Module, side: int = 32, **options: Any) -> TorchEncoder:
    config = EncoderConfig(name="timm/x", **{"engine": "openvino"} | options)
    return TorchEncoder(network, config, Preprocess(side), mean=MEAN, std=STD, device="cpu")


@needs_openvino
@pytest.mark.parametrize(("network", "batch_size"), [("test_efficientnet", None), ("test_vit", 4), ("clip", None)])
def test_rows_are_those_of_torch_to_rounding_and_the_same_bytes_from_any_thread(network: str, batch_size: int | None):
    built = tiny_clip() if network == "clip" else tiny_timm(network, **{"img_size": 32} if "vit" in network else {})
    images = noise(10, 32)
    plain = encoder(built, engine="torch", batch_size=batch_size).encode_images(images)
    alone = encoder(built, batch_size=batch_size)
    rows = alone.encode_images(images)
    assert (rows * plain).sum(1).min() >= openvino.COSINE["f32"]
    assert rows.tobytes() != plain.tobytes(), "torch computed them"
    shared = encoder(built, batch_size=batch_size)
    shared.callers = 3
    cuts = [images[i : i + 4] for i in range(0, 10, 4)]
    with ThreadPoolExecutor(3) as threads:
        assert np.concatenate(list(threads.map(shared.encode_images, cuts))).tobytes() == rows.tobytes()
    assert sys.modules["openvino_telemetry"] is None


@needs_openvino
def test_a_graph_whose_rows_differ_is_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(openvino.COSINE, "f32", 1.1)
    with pytest.raises(ConfigError, match=r"engine = openvino: rows of timm/x have a cosine of 1\.0.* less than 1\.1"):
        encoder(tiny_timm("test_vit", img_size=32)).encode_images(noise(1, 32))


def test_a_machine_without_it_is_told_what_to_install(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(openvino, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"is not installed; pip install 'rayclust\[cpu\]', or set .*: torch"):
        encoder(tiny_timm("test_vit", img_size=32)).encode_images(noise(1, 32))


def test_two_compilers_contradict_each_other():
    with pytest.raises(ValidationError, match="leave it out with engine = openvino"):
        EncoderConfig(name="timm/x", engine="openvino", compile=True)


class Choice:
    """A run over a network whose times are given."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.run, self.measured, self.seconds = Run(str(folder / "run")), 0, {"torch": 3.0, "openvino": 1.0}
        monkeypatch.setattr(run_encoder, "load_run_encoder", lambda *_: encoder(tiny_timm("test_vit", img_size=32)))
        monkeypatch.setattr(TorchEncoder, "measure_engines", lambda _: self.measure())
        monkeypatch.setattr(openvino, "find_spec", lambda name: object())

    def measure(self) -> dict[str, float]:
        self.measured += 1
        return self.seconds

    def config(self, **settings: Any) -> RunConfig:
        return validate(tree(self.run.uri, "/images", encoder={"name": "timm/x", "image_size": None} | settings))

    def of(self, is_begun: bool = False, count: int = 1000, **settings: Any) -> str:
        return with_engines(self.config(**settings), self.run, count, is_begun=is_begun).encoder.engine


@pytest.fixture
def choice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Choice:
    return Choice(tmp_path, monkeypatch)


def test_the_fastest_engine_is_taken_once_and_kept_with_the_run(choice: Choice):
    assert choice.of() == "openvino"
    choice.seconds = {"torch": 1.0, "openvino": 3.0}
    assert [choice.of(), choice.of(is_begun=True)] == ["openvino"] * 2
    assert choice.measured == 1
    assert list(json.loads(Path(choice.run.at("manifests", "encode", "engines.json")).read_text()).values()) == [
        "openvino"
    ]
    assert choice.of(image_size=64) == "torch", "another preprocessing"
    assert choice.measured == 2


def test_an_encoder_that_was_measured_is_not_loaded_again(choice: Choice):
    loaded = dict[str, Any]()
    found = with_engines(choice.config(), choice.run, 1000, is_begun=False, callers=2, loaded=loaded)
    [encoder] = loaded.values()
    assert (encoder.engine, encoder.callers) == ("openvino", 2)
    assert RunEncoders(found, "cpu", loaded).encoders == (encoder,)
    assert RunEncoders(choice.config(engine="torch"), "cpu", loaded).encoders != (encoder,)


def test_rows_that_torch_has_begun_stay_its_own(choice: Choice):
    assert choice.of(is_begun=True) == choice.of(count=999) == "torch"
    assert [choice.of(engine="torch"), choice.of(engine="openvino"), choice.of(compile=True)] == [
        "torch",
        "openvino",
        "torch",
    ]
    assert choice.measured == 0


def test_a_machine_without_openvino_stays_with_torch(choice: Choice, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(openvino, "find_spec", lambda name: None)
    assert choice.of() == "torch"
    assert choice.measured == 0


def test_a_choice_that_is_left_open_is_in_no_digest(choice: Choice):
    assert "engine" not in settings_of(choice.config().encoder)
    assert settings_of(choice.config(engine="openvino").encoder)["engine"] == "openvino"
