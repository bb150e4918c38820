from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread

import huggingface_hub
import pytest
from huggingface_hub import constants
from huggingface_hub.errors import LocalEntryNotFoundError

from rayclust.encoders import hub
from rayclust.encoders.hub import HubFile, hub_answers
from rayclust.errors import ConfigError

FILE = HubFile("owner/name", ("model.safetensors", "model.bin"), "timm/net.tag")


@pytest.fixture(autouse=True)
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
        Thread(target=server.serve_forever, daemon=True).start()
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
def test_cached_files_are_found_without_a_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(hub, "hub_answers", lambda: pytest.fail("asked the network"))
    path = cache(tmp_path, name)
    assert FILE.cached() == path
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


def test_without_a_network_one_line_says_what_to_fetch(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{port}")
    assert refusal() == MESSAGE


def test_offline_mode_asks_nobody(monkeypatch: pytest.MonkeyPatch, answering_server: None) -> None:
    assert hub_answers()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert refusal() == MESSAGE


def test_a_silent_hub_is_given_up_soon(monkeypatch: pytest.MonkeyPatch, silent_server: None) -> None:
    monkeypatch.setattr(hub, "PATIENCE", 0.3)
    assert refusal() == MESSAGE


def test_the_first_file_that_is_there_is_fetched(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def download(repository: str, name: str) -> str:
        asked.append(f"{repository}/{name}")
        if name == "model.safetensors":
            raise LocalEntryNotFoundError("no such file")
        return "/w/model.bin"

    monkeypatch.setattr(hub, "hub_answers", lambda: True)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    assert FILE.path() == Path("/w/model.bin")
    assert asked == ["owner/name/model.safetensors", "owner/name/model.bin"]


def test_other_troubles_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def download(*_: str) -> str:
        raise OSError("No space left\non device")

    monkeypatch.setattr(hub, "hub_answers", lambda: True)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    assert "are not on this machine and No space left on device: fetch model.safetensors" in refusal()
