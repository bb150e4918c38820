from __future__ import annotations

import json
import logging
import os
import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

from rayclust.errors import ConfigError, DataError
from rayclust.runtime import jobs
from rayclust.runtime.jobs import JobServer, address_of, is_here

TOKEN = "token-of-the-test-0123456789"  # noqa: S105


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(
    ("given", "address"),
    [
        ("http://head:8265", "http://head:8265"), ("head", "http://head:8265"), ("head:99/", "http://head:99"),
        ("https://ray.example.org/", "https://ray.example.org"), ("[::1]:8265", "http://[::1]:8265"),
        ("http://head/ray/", "http://head:8265/ray"),
    ],
)  # fmt: skip
def test_an_address_is_completed(given: str, address: str):
    assert address_of(given) == address


def test_what_is_given_wins_over_the_environment(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("RAY_ADDRESS", "http://old:1")
    assert address_of(None) == "http://old:1"
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "http://new:1")
    assert address_of(None) == "http://new:1"
    assert address_of("given:1") == "http://given:1"


@pytest.mark.parametrize("given", [None, "ray://head:10001", "auto://", "http://", "http://head:port", "s3://bucket"])
def test_what_is_no_job_server_is_one_line(given: str | None):
    with pytest.raises(ConfigError, match="http://HOST:8265") as caught:
        address_of(given)
    assert "\n" not in str(caught.value)


def test_which_machine_is_here():
    assert all(map(is_here, ("http://127.0.0.1:1", "http://localhost:1", f"http://{socket.gethostname()}:1")))
    assert is_here("http://[::1]:8265")
    assert not any(map(is_here, ("http://10.0.0.1:1", "http://head:1")))


class Dashboard(BaseHTTPRequestHandler):
    """As much of a cluster as there is without one: a version, a list of jobs, and whom it lets in."""

    mode = "open"
    starting: list[int]
    seen: list[str]

    def do_GET(self) -> None:
        self.seen.append(self.headers.get("Authorization", ""))
        if self.mode == "token" and not self.seen[-1]:
            self.answer(401, "Unauthorized: Missing authentication token")
        elif self.mode == "token" and self.seen[-1] != f"Bearer {TOKEN}":
            self.answer(403, "Forbidden: Invalid authentication token")
        elif self.mode == "other":
            self.answer(200, "<html>a web page</html>")
        elif self.mode == "broken":
            self.answer(500, "no head\nat the moment")
        elif self.path == "/api/version":
            self.answer(200, json.dumps({"ray_version": "2.60.0", "version": "4", "ray_commit": "x"}))
        else:
            self.answer(200, json.dumps([JOB, JOB | {"submission_id": None, "type": "DRIVER"}]))

    def do_POST(self) -> None:
        if self.starting:
            self.starting.pop()
            self.answer(500, "No available agent to submit job, please try again later.")
            return
        self.answer(500, "ValueError: Job with submission_id a-1 already exists. Please use another.")

    def answer(self, code: int, text: str) -> None:
        self.send_response(code)
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *_: Any) -> None:
        pass


JOB = {"type": "SUBMISSION", "submission_id": "a-1", "status": "FAILED", "entrypoint": "true", "driver_exit_code": 3}


@pytest.fixture
def dashboard() -> Iterator[tuple[str, type[Dashboard]]]:
    handler = type("Handler", (Dashboard,), {"seen": [], "starting": []})
    server = HTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", handler
    server.shutdown()
    thread.join()
    server.server_close()


def test_jobs_of_an_open_cluster(dashboard: tuple[str, type[Dashboard]], monkeypatch: pytest.MonkeyPatch):
    address, handler = dashboard
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "http://another:1")
    server = JobServer(address)
    assert os.environ["RAY_API_SERVER_ADDRESS"] == "http://another:1"
    assert {name: job.driver_exit_code for name, job in server.jobs().items()} == {"a-1": 3}
    assert server.submit("a-1", "true", {}) is False
    assert set(handler.seen) == {""}


def test_a_cluster_that_has_just_started_is_given_a_while(
    dashboard: tuple[str, type[Dashboard]], monkeypatch: pytest.MonkeyPatch
):
    address, handler = dashboard
    handler.starting.append(1)
    assert JobServer(address).submit("a-1", "true", {}) is False
    monkeypatch.setattr(jobs, "STARTING_SECONDS", 0.0)
    handler.starting.append(1)
    with pytest.raises(DataError, match="try again later"):
        JobServer(address).submit("a-1", "true", {})


def test_the_token_is_sent_where_it_is_asked_for_and_never_said(
    dashboard: tuple[str, type[Dashboard]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: Any
):
    address, handler = dashboard
    handler.mode = "token"
    caplog.set_level(logging.DEBUG)
    with pytest.raises(
        ConfigError, match=f"{address}: the cluster asks for a token; set RAY_AUTH_MODE=token"
    ) as caught:
        JobServer(address)
    assert "\n" not in str(caught.value)
    monkeypatch.setenv("RAY_AUTH_TOKEN", "wrong" + TOKEN)
    monkeypatch.delenv("RAY_AUTH_MODE")
    with pytest.raises(ConfigError, match="has another token") as caught:
        JobServer(address)
    assert TOKEN not in str(caught.value) + caplog.text
    monkeypatch.setenv("RAY_AUTH_TOKEN", TOKEN)
    assert set(JobServer(address).jobs()) == {"a-1"}
    monkeypatch.delenv("RAY_AUTH_TOKEN")
    (tmp_path / "token").write_text(TOKEN + "\n")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "token"))
    assert set(JobServer(address).jobs()) == {"a-1"}
    assert TOKEN not in caplog.text


def test_a_token_that_is_asked_for_and_missing_is_said_before_anything_is_sent(
    dashboard: tuple[str, type[Dashboard]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    address, handler = dashboard
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    with pytest.raises(ConfigError, match="no token is found"):
        JobServer(address)
    assert handler.seen == []
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").write_text(TOKEN)
    handler.mode = "token"
    assert set(JobServer(address).jobs()) == {"a-1"}


def test_a_token_over_an_open_line_is_warned_of(monkeypatch: pytest.MonkeyPatch, caplog: Any):
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN", TOKEN)
    jobs._auth_headers("https://head")
    jobs._auth_headers("http://127.0.0.1:1")
    assert caplog.text == ""
    jobs._auth_headers("http://head:8265")
    assert "travels unencrypted" in caplog.text
    assert TOKEN not in caplog.text


def test_where_nobody_answers(monkeypatch: pytest.MonkeyPatch):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        with pytest.raises(ConfigError, match="nobody answers there"):
            JobServer(f"http://127.0.0.1:{probe.getsockname()[1]}")


@pytest.mark.parametrize(("mode", "words"), [("other", "not what a Ray job server says"), ("broken", "500")])
def test_another_servers_answers_are_one_line(dashboard: tuple[str, type[Dashboard]], mode: str, words: str):
    address, handler = dashboard
    handler.mode = mode
    with pytest.raises(DataError, match=words) as caught:
        JobServer(address)
    assert str(caught.value).startswith(address)
    assert "\n" not in str(caught.value)
