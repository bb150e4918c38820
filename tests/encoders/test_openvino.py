"""OpenVINO beside torch: the same rows to rounding, the same bytes from any thread, and which of both a run takes."""

from __future__ import annotations

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError
from safetensors.torch import save_file
from torch import nn

from rayclust.config import RunConfig, validate
from rayclust.encoders import openvino
from rayclust.encoders.base import Encoder
from rayclust.encoders.decode import Preprocess
from rayclust.encoders.network import TorchEncoder
from rayclust.encoders.openvino import Graph, GraphEncoder
from rayclust.encoders.settings import EncoderConfig
from rayclust.errors import ConfigError, DataError
from rayclust.runtime import encoder as run_encoder
from rayclust.runtime.encoder import RunEncoders, load_run_encoder, with_engines, with_run_engines
from rayclust.runtime.pipeline import settings_of
from rayclust.store.run import Run
from tests.encoders.networks import noise, tiny_clip, tiny_timm
from tests.stages.runs import tree

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.5)
needs_openvino = pytest.mark.skipif(not openvino.is_installed(), reason="the extra cpu is not installed")


def encoder(network: nn.Module, side: int = 32, **options: Any) -> TorchEncoder:
    config = EncoderConfig(name="timm/x", **options)
    return TorchEncoder(network, config, Preprocess(side), mean=MEAN, std=STD, device="cpu")


@needs_openvino
@pytest.mark.parametrize(("network", "batch_size"), [("test_efficientnet", None), ("test_vit", 4), ("clip", None)])
def test_rows_are_those_of_torch_to_rounding_and_the_same_bytes_from_any_thread(
    network: str, batch_size: int | None, tmp_path: Path
):
    built = tiny_clip() if network == "clip" else tiny_timm(network, **{"img_size": 32} if "vit" in network else {})
    images, plain = noise(10, 32), encoder(built, batch_size=batch_size)
    graph, config = plain.to_graph(), EncoderConfig(name="timm/x", batch_size=batch_size)
    alone = GraphEncoder(graph, config, lambda: plain)
    rows = alone.encode_images(images)
    assert (rows * plain.encode_images(images)).sum(1).min() >= openvino.COSINE["f32"]
    assert rows.tobytes() != plain.encode_images(images).tobytes(), "torch computed them"
    # As it was kept on disk, and from threads.
    graph.write(tmp_path / "graph")
    kept = Graph.read(tmp_path / "graph")
    assert kept is not None
    assert vars(kept) | {"model": None} == vars(graph) | {"model": None}
    shared = GraphEncoder(kept, config, lambda: plain)
    shared.callers = 3
    cuts = [images[i : i + 4] for i in range(0, 10, 4)]
    with ThreadPoolExecutor(3) as threads:
        assert np.concatenate(list(threads.map(shared.encode_images, cuts))).tobytes() == rows.tobytes()
    assert sys.modules["openvino_telemetry"] is None
    (tmp_path / "graph" / "graph.xml").write_text("<net")
    assert Graph.read(tmp_path / "graph") is None
    assert not (tmp_path / "graph").exists(), "it is damaged: the next one may be kept there"


@needs_openvino
def test_a_network_is_converted_once_and_then_computed_without_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("RAYCLUST_SCRATCH", str(tmp_path / "scratch"))
    save_file(tiny_timm("test_vit").state_dict(), tmp_path / "w.safetensors")
    settings = {"name": "timm/test_vit", "pretrained": str(tmp_path / "w.safetensors"), "engine": "openvino"}
    config = validate(tree(str(tmp_path / "run"), "/images", encoder=settings | {"image_size": None}))
    images = noise(2, 160)
    np.save(tmp_path / "rows.npy", load_run_encoder(config).encode_images(images))
    np.save(tmp_path / "images.npy", images)
    code = (
        "import sys, numpy as np; from rayclust.config import validate; from rayclust.runtime import encoder;"
        "folder = sys.argv[1] + '/'; config = validate(eval(sys.argv[2]));"
        "rows = encoder.RunEncoders(config).encode([np.load(folder + 'images.npy')]);"
        "sys.exit('torch' in sys.modules or rows.tobytes() != np.load(folder + 'rows.npy').tobytes())"
    )
    given = repr(config.model_dump(mode="json", exclude_unset=True))
    subprocess.run([sys.executable, "-c", code, str(tmp_path), given], check=True)
    (tmp_path / "w.safetensors").write_bytes(b"other weights")
    with pytest.raises(DataError, match="neither a safetensors"):
        load_run_encoder(config)


@needs_openvino
def test_a_graph_whose_rows_differ_is_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(openvino.COSINE, "f32", 1.1)
    with pytest.raises(ConfigError, match=r"engine = openvino: rows of timm/x have a cosine of 1\.0.* less than 1\.1"):
        encoder(tiny_timm("test_vit", img_size=32)).to_graph()


def test_a_machine_without_it_is_told_what_to_install(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(openvino, "find_spec", lambda name: None)
    config = validate(tree("/run", "/images", encoder={"name": "timm/x", "image_size": None, "engine": "openvino"}))
    with pytest.raises(ConfigError, match=r"is not installed; pip install 'rayclust\[cpu\]', or set .*: torch"):
        load_run_encoder(config)


def test_two_compilers_contradict_each_other():
    with pytest.raises(ValidationError, match="leave it out with engine = openvino"):
        EncoderConfig(name="timm/x", engine="openvino", compile=True)


class Choice:
    """A run over a network whose times are given."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.run, self.measured, self.seconds = Run(str(folder / "run")), 0, {"torch": 3.0, "openvino": 1.0}
        plain = encoder(tiny_timm("test_vit", img_size=32))
        model = SimpleNamespace(output=lambda _: SimpleNamespace(shape=(1, plain.dimension)))
        graph = Graph(model, plain.preprocess, MEAN, STD, has_text=False)
        monkeypatch.setattr(run_encoder, "load_run_encoder", lambda *_: plain)
        monkeypatch.setattr(
            run_encoder, "_graph_encoder", lambda _, given, __: GraphEncoder(graph, given, lambda: plain)
        )
        monkeypatch.setattr(run_encoder, "seconds_per_image", self.measure)
        monkeypatch.setattr(openvino, "find_spec", lambda name: object())

    def measure(self, encoder: Encoder, clock: Any) -> float:
        self.measured += 1
        return self.seconds["openvino" if isinstance(encoder, GraphEncoder) else "torch"]

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
    assert choice.measured == 2
    assert list(json.loads(Path(choice.run.at("manifests", "encode", "engines.json")).read_text()).values()) == [
        "openvino"
    ]
    assert choice.of(image_size=64) == "torch", "another preprocessing"
    assert choice.measured == 4


def test_an_encoder_that_was_measured_is_not_loaded_again(choice: Choice):
    loaded = dict[str, Any]()
    found = with_engines(choice.config(), choice.run, 1000, is_begun=False, callers=2, loaded=loaded)
    [encoder] = loaded.values()
    assert (type(encoder), encoder.callers) == (GraphEncoder, 2)
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


def test_queries_and_new_images_take_the_engine_of_the_rows(choice: Choice, monkeypatch: pytest.MonkeyPatch):
    assert with_run_engines(choice.config()).encoder.engine == "auto", "torch, unless there are many new images"
    choice.of()
    assert with_run_engines(choice.config()).encoder.engine == "openvino"
    monkeypatch.setattr(openvino, "find_spec", lambda name: None)
    assert with_run_engines(choice.config()).encoder.engine == "auto", "another machine, which has none"


def test_a_machine_without_openvino_stays_with_torch(choice: Choice, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(openvino, "find_spec", lambda name: None)
    assert choice.of() == "torch"
    assert choice.measured == 0


def test_a_choice_that_is_left_open_is_in_no_digest(choice: Choice):
    assert "engine" not in settings_of(choice.config().encoder)
    assert settings_of(choice.config(engine="openvino").encoder)["engine"] == "openvino"
