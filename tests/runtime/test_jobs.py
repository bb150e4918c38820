"""A run as a job: what is sent, what is followed, and the whole way through a cluster of the test's own."""

from __future__ import annotations

import json
import logging
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

from rayclust.cli import run_command
from rayclust.config import RunConfig, parse, validate
from rayclust.errors import ConfigError, DataError
from rayclust.runtime import jobs as module
from rayclust.runtime.api import with_absolute_paths
from rayclust.runtime.jobs import (
    JobServer,
    Submission,
    address_of,
    follow,
    is_here,
    newest,
    submit,
    submit_run,
)
from tests.stages.runs import descendants, kill, tree, wait_until

ROOT = Path(__file__).resolve().parents[2]
FAR = tree("s3://bucket/runs/My photos ü", "s3://bucket/photos")


class Status(str):
    """A status as Ray gives it."""

    def is_terminal(self) -> bool:
        return self in ("SUCCEEDED", "FAILED", "STOPPED")


@dataclass
class Details:
    status: Status
    entrypoint: str = "true"
    driver_exit_code: int | None = None
    message: str | None = None
    start_time: int = 0
    submission_id: str = ""


@dataclass
class Server(JobServer):
    """A cluster's job server, and Ray's client of it, in a few lines: logs come in pieces, and end in between."""

    address: str = "http://head:8265"
    known: dict[str, Details] = field(default_factory=dict)
    pieces: list[Any] = field(default_factory=list)
    taken: set[str] = field(default_factory=set)

    @property
    def client(self) -> Any:  # type: ignore[override]
        return self

    def list_jobs(self) -> list[Details]:
        return [replace(details, submission_id=name) for name, details in self.known.items()]

    def get_job_info(self, submission: str) -> Details:
        return self.known[submission]

    def submit_job(self, *, submission_id: str, entrypoint: str, metadata: dict[str, str]) -> None:
        if submission_id in self.taken:
            self.known[submission_id] = Details(Status("RUNNING"))
            raise RuntimeError(f"Job with submission_id {submission_id} already exists.")
        self.known[submission_id] = Details(Status("PENDING"), entrypoint)

    def stop_job(self, submission: str) -> None:
        self.known[submission].status = Status("STOPPED")

    async def tail_job_logs(self, submission: str) -> AsyncIterator[str]:
        for piece in self.pieces.pop(0):
            if isinstance(piece, BaseException):
                raise piece
            yield piece


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "POLL_SECONDS", 0.01)


def submission(**groups: Any) -> Submission:
    return Submission(with_absolute_paths(validate(FAR | groups)))


def test_the_same_config_has_the_same_name_wherever_it_comes_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    one = submission()
    assert one.name.startswith("rayclust-run-my-photos-")
    assert submission(seed=1).name != one.name
    assert Submission(one.config, "encode").name.startswith("rayclust-encode-my-photos-")
    monkeypatch.chdir("/")
    assert submission().name == one.name


def test_attempts_of_this_run_are_told_from_others():
    one = submission()
    others = (one.name, f"{one.name}-2-x", f"x{one.name}-3", f"{one.name}-0")
    known = {name: Details(Status("FAILED")) for name in (f"{one.name}-10", f"{one.name}-2", *others)}
    assert list(one.attempts(Server(known=known))) == [f"{one.name}-2", f"{one.name}-10"]


def test_the_shell_hands_the_config_on_as_it_is(tmp_path: Path):
    hostile = ["a 'photo' of a $HOME {} `x` \\n", "{}\nEND_OF_RUN_YAML\nexit 9\n", "END_OF_RUN_YAML_ {}"]
    one = submission(label={"templates": hostile, "vocabulary": "none"})
    shown = "import os, sys; print(sys.argv[1:], os.environ['RAYCLUST_SUBMISSION'], sys.stdin.read()); sys.exit(3)"
    (tmp_path / "python").write_text(f'#!/bin/sh\nshift 2\nexec {sys.executable} -c "{shown}" "$@"\n')
    (tmp_path / "python").chmod(0o755)
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    line = one.entrypoint(f"{one.name}-2")
    done = subprocess.run(line, shell=True, capture_output=True, text=True, env=environment, check=False)  # noqa: S602
    head = f"['run', '-'] {one.name}-2 "
    assert done.stdout.startswith(head)
    text = done.stdout.removeprefix(head)
    assert parse(text) == one.config
    assert done.returncode == 3


def test_local_paths_are_refused_by_a_cluster_elsewhere_and_warned_of_here(
    monkeypatch: pytest.MonkeyPatch, caplog: Any
):
    caplog.set_level("WARNING", "rayclust")
    monkeypatch.setattr(module, "JobServer", lambda address: Server(address))
    local = validate(tree("/runs/one", "/photos", label={"vocabulary": "/words.txt"}))

    def sent(config: RunConfig, address: str, *, shared_paths: bool = False) -> int:
        one = Submission(with_absolute_paths(config))
        return submit_run(one, address, lambda text: None, action="no-wait", shared_paths=shared_paths)

    with pytest.raises(
        ConfigError, match=r"^run = /runs/one: is local, like images.uri, label.vocabulary, and"
    ) as caught:
        sent(local, "http://head:8265")
    assert "--shared-paths" in str(caught.value)
    assert caplog.text == ""
    assert sent(local, "http://127.0.0.1:8265") == 0
    assert "no tunnel" in caplog.text
    caplog.clear()
    assert sent(local, "http://head:8265", shared_paths=True) == 0
    assert sent(validate(FAR), "http://head:8265") == 0
    assert sent(validate(tree("s3://b/run", "dataset:digits")), "http://head:8265") == 0
    assert caplog.text == ""


def test_one_attempt_at_a_time_and_the_next_after_it_has_ended():
    server: Any = Server()
    one = submission()
    assert submit(server, one) == f"{one.name}-1"
    assert submit(server, one) == f"{one.name}-1"  # it waits
    server.known[f"{one.name}-1"].status = Status("RUNNING")
    assert submit(server, one) == f"{one.name}-1"
    assert newest(server, one) == f"{one.name}-1"
    server.known[f"{one.name}-1"].status = Status("FAILED")
    assert submit(server, one) == f"{one.name}-2"
    assert submit(server, submission(seed=1)) != f"{one.name}-1"
    server.known[f"{one.name}-2"].status = Status("SUCCEEDED")
    assert submit(server, one) == f"{one.name}-3"  # the images may have changed


def test_of_two_who_submit_at_once_one_follows_the_other():
    one = submission()
    server: Any = Server(taken={f"{one.name}-1"})
    assert submit(server, one) == f"{one.name}-1"


def test_stop_ends_what_is_under_way_and_says_where_nothing_is(monkeypatch: pytest.MonkeyPatch, caplog: Any):
    caplog.set_level("INFO")
    one, server = submission(), Server()
    monkeypatch.setattr(module, "JobServer", lambda address: server)
    stop = partial(submit_run, one, server.address, lambda text: None, action="stop")
    with pytest.raises(ConfigError, match="no job with this config was submitted"):
        stop()
    assert submit_run(one, server.address, lambda text: None, action="no-wait") == 0
    assert list(server.known) == [f"{one.name}-1"]
    assert stop() == 0
    assert server.known[f"{one.name}-1"].status == "STOPPED"
    assert f"job {one.name}-1 stopped" in caplog.text
    assert stop() == 0
    assert "no job of this config is under way" in caplog.text


def followed(details: Details, *pieces: list[Any]) -> tuple[int, str]:
    server: Any = Server(known={"job-1": details}, pieces=list(pieces))
    shown: list[str] = []
    return follow(server, "job-1", shown.append), "".join(shown)


ENDINGS = {
    "done": (Details(Status("SUCCEEDED"), driver_exit_code=0), 0, ""),
    "a mistake": (Details(Status("FAILED"), driver_exit_code=2), 2, "goes on"),
    "killed": (Details(Status("FAILED"), driver_exit_code=-9), 137, "exit code -9"),
    "lost": (Details(Status("FAILED"), message="The head node died.\nmore"), 1, "failed: The head node died."),
    "stopped": (Details(Status("STOPPED")), 1, "stopped"),
}


@pytest.mark.parametrize("name", ENDINGS)
def test_the_drivers_exit_code_is_handed_through(name: str, caplog: Any):
    caplog.set_level("INFO")
    details, code, words = ENDINGS[name]
    assert followed(details, ["a\n", "b\n"]) == (code, "a\nb\n")
    assert words in caplog.text


def test_the_log_is_shown_without_the_config_that_ray_writes_first():
    details = Details(Status("SUCCEEDED"), entrypoint="exec python <<'X'\nrun: a\nX\n")
    preamble = f"Running entrypoint for job job-1: {details.entrypoint}\n"
    log = f"Runtime env is setting up.\n{preamble}encode: started\nencode: done\n"
    for size in (1, 7, 40, 1000):
        pieces = [log[i : i + size] for i in range(0, len(log), size)]
        assert followed(details, pieces) == (0, "Runtime env is setting up.\nencode: started\nencode: done\n")
    assert followed(details, ["short\n"]) == (0, "short\n")
    long = "x" * 5000
    assert followed(details, [long, "y"]) == (0, long + "y")


def test_a_lost_connection_is_taken_up_where_it_broke():
    lost = ConnectionError("nobody is there")
    done = Details(Status("SUCCEEDED"))
    assert followed(done, ["one\n", "two\n", lost], [lost], ["one\ntwo\nth", "ree\n"]) == (0, "one\ntwo\nthree\n")


def test_a_server_that_stays_away_is_an_error(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "AWAY_SECONDS", 0.1)
    lost = ConnectionError("nobody is there")
    with pytest.raises(DataError, match="does not answer"):
        followed(Details(Status("SUCCEEDED")), *[[lost]] * 100)


def test_a_job_that_waits_for_the_cluster_is_waited_for(monkeypatch: pytest.MonkeyPatch, caplog: Any):
    caplog.set_level("INFO")
    monkeypatch.setattr(module, "LOG_INTERVAL", 0.05)
    details = Details(Status("PENDING"), message="Waiting for a node.")
    looks = 0

    def job(self: Server, name: str) -> Details:
        nonlocal looks
        looks += 1
        details.status = Status("PENDING" if looks < 20 else "SUCCEEDED")
        return details

    monkeypatch.setattr(Server, "get_job_info", job)
    assert followed(details, ["done\n"]) == (0, "done\n")
    assert "Waiting for a node." in caplog.text


def test_an_interrupted_follower_leaves_the_job_alone(monkeypatch: pytest.MonkeyPatch, caplog: Any):
    caplog.set_level("INFO")
    one, server = submission(), Server(pieces=[["a\n", KeyboardInterrupt()]])
    server.known[f"{one.name}-1"] = Details(Status("RUNNING"))
    monkeypatch.setattr(module, "JobServer", lambda address: server)
    assert submit_run(one, server.address, lambda text: None) == 1
    assert f"job {one.name}-1 goes on" in caplog.text
    assert server.known[f"{one.name}-1"].status == "RUNNING"


TOKEN = "a-token-for-this-cluster-alone-0123456789"  # noqa: S105


@dataclass
class Cluster:
    """A cluster with a job server that asks for a token, and the way to its command line."""

    address: str
    folder: Path
    process: subprocess.Popen[str]
    environment: dict[str, str]

    def line(self, *arguments: str) -> list[str]:
        overrides = [f"run={self.folder}/run", "method.clusters=10"]
        smoke = str(ROOT / "jobs" / "smoke.yaml")
        return [
            sys.executable,
            str(ROOT / "jobs" / "submit.py"),
            smoke,
            *overrides,
            "--address",
            self.address,
            *arguments,
        ]

    def submit(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """From a directory that has nothing to do with the run."""
        line, environment = self.line(*arguments), self.environment
        return subprocess.run(line, cwd="/", env=environment, capture_output=True, text=True, timeout=200, check=False)

    def driver(self) -> int:
        """The job's process."""
        [pid] = [pid for pid, title in descendants(self.process.pid).items() if "-m rayclust run -" in title]
        return pid


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    pytest.importorskip("aiohttp_cors", reason="ray[default], which brings the job server, is not installed")
    folder = Path(tempfile.mkdtemp(prefix="rc-"))  # short: Ray's sockets lie below it
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        "RAYCLUST_CACHE": str(folder / "cache"),
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": TOKEN,
    }
    for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS", "RAY_AUTH_TOKEN_PATH"):
        environment.pop(name, None)
    script = str(ROOT / "cluster_configs" / "local.py")
    line = [sys.executable, script, "--port", str(port), "--cpus", "2", "--folder", str(folder / "ray")]
    process = subprocess.Popen(line, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
    try:
        assert process.stdout is not None
        assert process.stdout.readline().startswith("export RAY_API_SERVER_ADDRESS=")
        yield Cluster(f"http://127.0.0.1:{port}", folder, process, environment)
    finally:
        left = list(descendants(process.pid))
        assert process.stdin is not None
        process.stdin.close()
        process.wait(timeout=60)
        kill(*[pid for pid in left if Path(f"/proc/{pid}/cmdline").exists()])
        shutil.rmtree(folder, ignore_errors=True)


@pytest.mark.ray
@pytest.mark.slow
def test_the_smoke_job_is_killed_submitted_again_goes_on_and_succeeds(cluster: Cluster):
    first = subprocess.Popen(
        cluster.line(), cwd="/", env=cluster.environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    wait_until((cluster.folder / "run" / "lease.json").exists, first)
    beside = cluster.submit("--no-wait")
    assert beside.returncode == 0, beside.stderr
    assert "is under way since" in beside.stderr
    markers = cluster.folder / "run" / "manifests" / "encode"
    wait_until(lambda: len(list(markers.glob("part-*.json"))) >= 2, first)
    kill(cluster.driver())
    output = first.communicate(timeout=60)[0]
    assert first.returncode == 137, output
    assert "encode: started" in output

    second = cluster.submit()
    assert second.returncode == 0, second.stderr + second.stdout
    assert "-2 submitted to" in second.stderr
    assert "-1 failed" in second.stderr
    assert "of 6 parts were finished before" in second.stdout
    assert "1,797 images in 10 clusters" in second.stdout
    assert "Running entrypoint" not in second.stdout
    assert (cluster.folder / "run" / "report" / "index.html").exists()
    assert not (cluster.folder / "run" / "lease.json").exists()

    assert TOKEN not in output + second.stdout + second.stderr


def test_a_config_that_is_refused_never_reaches_the_cluster(capsys: pytest.CaptureFixture[str]):
    smoke = str(ROOT / "jobs" / "smoke.yaml")
    assert run_command(["submit", smoke, "sead=1", "--address", "http://127.0.0.1:1"]) == 2
    assert "sead: unknown key" in capsys.readouterr().err
    assert run_command(["submit", smoke, "run=/here", "--address", "http://head"]) == 2
    assert "run = /here: is local" in capsys.readouterr().err


OPEN_TOKEN = "token-of-the-test-0123456789"  # noqa: S105


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
    known: list[str]

    def do_GET(self) -> None:
        self.seen.append(self.headers.get("Authorization", ""))
        if self.mode == "token" and not self.seen[-1]:
            self.answer(401, "Unauthorized: Missing authentication token")
        elif self.mode == "token" and self.seen[-1] != f"Bearer {OPEN_TOKEN}":
            self.answer(403, "Forbidden: Invalid authentication token")
        elif self.mode == "other":
            self.answer(200, "<html>a web page</html>")
        elif self.mode == "broken":
            self.answer(500, "no head\nat the moment")
        elif self.path == "/api/version":
            self.answer(200, json.dumps({"ray_version": "2.60.0", "version": "4", "ray_commit": "x"}))
        else:
            others = [JOB, JOB | {"submission_id": None, "type": "DRIVER"}]
            self.answer(
                200, json.dumps(others + [JOB | {"submission_id": name, "status": "PENDING"} for name in self.known])
            )

    def do_POST(self) -> None:
        if self.starting:
            self.starting.pop()
            self.answer(500, "No available agent to submit job, please try again later.")
            return
        self.known.append(json.loads(self.rfile.read(int(self.headers["Content-Length"])))["submission_id"])
        self.answer(500, "ValueError: Job with this submission_id already exists. Please use another.")  # by another

    def answer(self, code: int, text: str) -> None:
        self.send_response(code)
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *_: Any) -> None:
        pass


JOB = {"type": "SUBMISSION", "submission_id": "a-1", "status": "FAILED", "entrypoint": "true", "driver_exit_code": 3}


@pytest.fixture
def dashboard(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[tuple[str, type[Dashboard]]]:
    monkeypatch.setenv("HOME", str(tmp_path))  # no token of this machine's user
    handler = type("Handler", (Dashboard,), {"seen": [], "starting": [], "known": []})
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
    assert {job.submission_id: job.driver_exit_code for job in server.client.list_jobs()} == {"a-1": 3, None: 3}
    assert submit(server, submission()) == handler.known[0] == f"{submission().name}-1"
    assert set(handler.seen) == {""}


def test_a_cluster_that_has_just_started_is_given_a_while(
    dashboard: tuple[str, type[Dashboard]], monkeypatch: pytest.MonkeyPatch
):
    address, handler = dashboard
    handler.starting.append(1)
    assert submit(JobServer(address), submission()) == f"{submission().name}-1"
    monkeypatch.setattr(module, "STARTING_SECONDS", 0.0)
    handler.starting.append(1)
    with pytest.raises(DataError, match="try again later"):
        submit(JobServer(address), submission(seed=1))


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
    monkeypatch.setenv("RAY_AUTH_TOKEN", "wrong" + OPEN_TOKEN)
    monkeypatch.delenv("RAY_AUTH_MODE")
    with pytest.raises(ConfigError, match="has another token") as caught:
        JobServer(address)
    assert OPEN_TOKEN not in str(caught.value) + caplog.text
    monkeypatch.setenv("RAY_AUTH_TOKEN", OPEN_TOKEN)
    assert "a-1" in {job.submission_id for job in JobServer(address).client.list_jobs()}
    monkeypatch.delenv("RAY_AUTH_TOKEN")
    (tmp_path / "token").write_text(OPEN_TOKEN + "\n")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "token"))
    assert "a-1" in {job.submission_id for job in JobServer(address).client.list_jobs()}
    assert OPEN_TOKEN not in caplog.text


def test_a_token_that_is_asked_for_and_missing_is_said_before_anything_is_sent(
    dashboard: tuple[str, type[Dashboard]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    address, handler = dashboard
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    with pytest.raises(ConfigError, match="no token is found"):
        JobServer(address)
    assert handler.seen == []
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").write_text(OPEN_TOKEN)
    handler.mode = "token"
    assert "a-1" in {job.submission_id for job in JobServer(address).client.list_jobs()}


def test_a_token_over_an_open_line_is_warned_of(monkeypatch: pytest.MonkeyPatch, caplog: Any):
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN", OPEN_TOKEN)
    monkeypatch.setattr(module, "unreachable", lambda host, port: OSError("nobody"))

    def asked(address: str) -> None:
        with pytest.raises(ConfigError, match="nobody answers there"):
            JobServer(address)

    asked("https://head")
    asked("http://127.0.0.1:1")
    assert caplog.text == ""
    asked("http://head:8265")
    assert "travels unencrypted" in caplog.text
    assert OPEN_TOKEN not in caplog.text


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
