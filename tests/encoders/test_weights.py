from __future__ import annotations

import argparse
import logging
import os
import socket
import time
import warnings
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread
from types import SimpleNamespace

import huggingface_hub
import numpy as np
import pytest
import torch
from huggingface_hub import constants
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors.torch import save_file
from torch import nn

from rayclust.encoders import weights
from rayclust.encoders.tensors import load_tensors
from rayclust.encoders.weights import HubFile, hub_answers, load_into, load_state, without_prefix
from rayclust.errors import ConfigError, DataError

TENSORS = {"a.weight": torch.arange(6.0).view(2, 3), "a.bias": torch.tensor([1.0, 2.0])}


class Evil:
    """Makes a file when it is unpickled as pickles are."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.path),)


def same(state: dict[str, torch.Tensor]) -> bool:
    return state.keys() == TENSORS.keys() and all(torch.equal(state[key], TENSORS[key]) for key in TENSORS)


def test_safetensors(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "no_suffix")
    assert same(load_state(tmp_path / "no_suffix"))


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize(
    "wrapped",
    [
        TENSORS,
        {"state_dict": TENSORS, "epoch": 3},
        {"model": TENSORS, "args": argparse.Namespace(lr=0.1)},
        {"student": {}, "teacher": TENSORS},
        {"encoder": {}, "target_encoder": {f"module.{key}": value for key, value in TENSORS.items()}},
        {"state_dict": {f"module.{key}": value for key, value in TENSORS.items()}, "optimizer": {"state": {}}},
        {"state_dict_ema": TENSORS, "state_dict": {"x": torch.ones(1)}},
        {"model": {"state_dict": TENSORS}},
        TENSORS | {"step": 4},
    ],
)
def test_torch_files_of_training_scripts(tmp_path: Path, wrapped: dict[str, object], old: bool) -> None:
    torch.save(wrapped, tmp_path / "w.pt", _use_new_zipfile_serialization=not old)
    assert same(load_state(tmp_path / "w.pt"))


def test_tables_of_tensors(tmp_path: Path) -> None:
    torch.save(torch.eye(3), tmp_path / "x.pt")
    assert torch.equal(load_tensors(tmp_path / "x.pt"), torch.eye(3))
    torch.save({"embeddings": torch.eye(2), "labels": [1, 0]}, tmp_path / "y.pt")
    assert load_tensors(tmp_path / "y.pt")["labels"] == [1, 0]
    with pytest.raises(DataError, match="holds no weights by name, but Tensor"):
        load_state(tmp_path / "x.pt")
    torch.save({"a": 1}, tmp_path / "z.pt")
    with pytest.raises(DataError, match="holds no weights by name, but dict"):
        load_state(tmp_path / "z.pt")


@pytest.mark.parametrize("old", [False, True])
def test_code_in_a_file_is_not_run(tmp_path: Path, old: bool) -> None:
    made = tmp_path / "made"
    torch.save({"w": torch.ones(1), "evil": Evil(made)}, tmp_path / "w.pt", _use_new_zipfile_serialization=not old)
    with pytest.raises(DataError, match="which are not read; save its tensors alone, as safetensors") as caught:
        load_tensors(tmp_path / "w.pt")
    assert not made.exists()
    assert "\n" not in str(caught.value)
    if not old:
        assert "objects of" in str(caught.value)
        assert "mkdir" in str(caught.value)


def test_arrays_of_numpy_are_objects_too(tmp_path: Path) -> None:
    torch.save({"mean": np.float64(1.0)}, tmp_path / "w.pt")
    with pytest.raises(DataError, match="save its tensors alone"):
        load_tensors(tmp_path / "w.pt")


def test_bad_files_give_one_clear_line(tmp_path: Path) -> None:
    torch.save(TENSORS, tmp_path / "whole.pt")
    whole = (tmp_path / "whole.pt").read_bytes()
    save_file(TENSORS, tmp_path / "whole.safetensors")
    safe = (tmp_path / "whole.safetensors").read_bytes()
    for data, message in (
        (b"", "is empty: neither a safetensors nor a torch file"),
        (b"<html>404</html>", "neither a safetensors nor a torch file"),
        (whole[: len(whole) // 2], "damaged torch file"),
        (whole[:6], "damaged torch file"),
        (b"\x80\x02garbage", "w"),
        (safe[:40], "damaged safetensors file"),
        (safe[:-3], "damaged safetensors file"),
    ):
        (tmp_path / "w").write_bytes(data)
        with pytest.raises(DataError, match=message) as caught:
            load_tensors(tmp_path / "w")
        assert "\n" not in str(caught.value)
    with pytest.raises(DataError, match="cannot be read"):
        load_tensors(tmp_path / "absent")
    with pytest.raises(DataError, match="cannot be read"):
        load_tensors(tmp_path)


def test_torchscript_archives_are_refused_with_what_to_take_instead(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.script(nn.Linear(2, 2)).save(str(tmp_path / "network.pt"))
    with pytest.raises(
        DataError, match=r"network\.pt: a TorchScript archive, which is a program and is not read"
    ) as caught:
        load_tensors(tmp_path / "network.pt")
    assert "encoder.name: open_clip/ViT-L-14.openai" in str(caught.value)
    assert "\n" not in str(caught.value)


WANTED = {"stem.weight": 0, "blocks.0.weight": 0, "norm.weight": 0}


@pytest.mark.parametrize(
    ("prefixes", "expected"),
    [
        (["", "x."], ""),
        (["backbone."], "backbone."),
        (["base_encoder.", "momentum_encoder."], "momentum_encoder."),
        (["student.backbone.", "teacher.backbone."], "teacher.backbone."),
        (["visual.trunk."], "visual.trunk."),
    ],
)
def test_one_network_of_a_checkpoint(prefixes: list[str], expected: str) -> None:
    state = {p + key: torch.tensor(i) for i, p in enumerate(prefixes) for key in WANTED}
    state |= {p + "head.weight": torch.tensor(9) for p in prefixes}
    found = without_prefix(state, WANTED)
    wanted = prefixes.index(expected)
    assert {key: int(found[key]) for key in WANTED} == dict.fromkeys(WANTED, wanted)
    assert int(found["head.weight"]) == 9


def test_names_that_fit_nothing_stay() -> None:
    assert without_prefix({"a": torch.ones(1)}, WANTED) == {"a": torch.ones(1)}


def test_weights_are_loaded() -> None:
    network = nn.ModuleDict({"a": nn.Linear(3, 2)})
    load_into(network, TENSORS, encoder="timm/x", source="w.pt")
    assert same(dict(network.state_dict()))


def test_counters_of_batches_may_be_absent() -> None:
    norm = nn.BatchNorm1d(2)
    state = {key: value for key, value in norm.state_dict().items() if key != "num_batches_tracked"}
    load_into(norm, state, encoder="timm/x", source="w.pt")


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"a.bias": TENSORS["a.bias"]}, "missing: a.weight"),
        (TENSORS | {"head.w": torch.ones(1)}, "not wanted: head.w"),
        (TENSORS | {"a.bias": torch.ones(5)}, r"of another shape: a.bias \(5,\) instead of \(2,\)"),
        ({}, "missing: a.weight, a.bias"),
        (TENSORS | {f"x{i}": torch.ones(1) for i in range(9)}, "not wanted: x0, x1, x2 and 6 more"),
    ],
)
def test_weights_that_do_not_fit_are_refused(state: dict[str, torch.Tensor], message: str) -> None:
    network = nn.ModuleDict({"a": nn.Linear(3, 2)})
    before = network["a"].weight.clone()
    with pytest.raises(ConfigError, match=f"encoder.pretrained = w.pt: does not fit timm/x: {message}") as caught:
        load_into(network, state, encoder="timm/x", source="w.pt")
    assert "\n" not in str(caught.value)
    assert torch.equal(network["a"].weight, before)


# The hub


FILE = HubFile("owner/name", ("model.safetensors", "model.bin"), "timm/net.tag")


@pytest.fixture
def _empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)


@pytest.fixture
def silent_server(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A hub that takes connections and says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.getsockname()[1]}")
        yield


class _Missing(BaseHTTPRequestHandler):
    def do_HEAD(self) -> None:
        self.send_error(404)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def answering_server(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with HTTPServer(("127.0.0.1", 0), _Missing) as server:
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        yield
        server.shutdown()


def cache(folder: Path, name: str) -> Path:
    """A file as the hub's client leaves it."""
    repository = folder / "models--owner--name"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("abc")
    path = repository / "snapshots" / "abc" / name
    path.parent.mkdir(parents=True)
    path.write_bytes(b"w")
    return path


@pytest.mark.parametrize("name", FILE.names)
@pytest.mark.usefixtures("_empty_cache")
def test_cached_files_are_found_without_a_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(weights, "hub_answers", lambda: pytest.fail("asked the network"))
    path = cache(tmp_path, name)
    assert FILE.path() == path


def refusal() -> str:
    start = time.monotonic()
    with pytest.raises(ConfigError) as caught:
        FILE.path()
    assert time.monotonic() - start < 3
    assert "\n" not in str(caught.value)
    return str(caught.value)


MESSAGE = (
    "encoder.pretrained: the weights of timm/net.tag are not on this machine and the hub cannot be reached: fetch "
    "model.safetensors from the Hugging Face repository owner/name on a machine that can, then set "
    "encoder.name: timm/net.tag and encoder.pretrained: <its path or s3:// URI>"
)


@pytest.mark.usefixtures("_empty_cache")
def test_without_a_network_one_line_says_what_to_fetch(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{port}")
    assert refusal() == MESSAGE


@pytest.mark.usefixtures("_empty_cache")
def test_offline_mode_asks_nobody(monkeypatch: pytest.MonkeyPatch, answering_server: None) -> None:
    assert hub_answers()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert refusal() == MESSAGE


@pytest.mark.usefixtures("_empty_cache")
def test_a_silent_hub_is_given_up_soon(monkeypatch: pytest.MonkeyPatch, silent_server: None) -> None:
    monkeypatch.setattr(weights, "HUB_TIMEOUT", 0.3)
    assert refusal() == MESSAGE


@pytest.mark.usefixtures("_empty_cache")
def test_the_first_file_that_is_there_is_fetched(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    asked: list[str] = []

    def download(repository: str, name: str) -> str:
        asked.append(f"{repository}/{name}")
        if name == "model.safetensors":
            raise LocalEntryNotFoundError("no such file")
        return "/w/model.bin"

    monkeypatch.setattr(weights, "hub_answers", lambda: True)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", lambda url, timeout: SimpleNamespace(size=605_000_000))
    monkeypatch.setattr(logging.getLogger("rayclust"), "propagate", True)
    caplog.set_level("INFO", "rayclust")
    assert FILE.path() == Path("/w/model.bin")
    assert "downloading 605 MB of weights, once" in caplog.text
    assert asked == ["owner/name/model.safetensors", "owner/name/model.bin"]


@pytest.mark.usefixtures("_empty_cache")
def test_other_troubles_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def download(*_: str) -> str:
        raise OSError("No space left\non device")

    monkeypatch.setattr(weights, "hub_answers", lambda: True)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    assert "are not on this machine and No space left on device: fetch model.safetensors" in refusal()
