"""Commands and exit codes that need neither Ray nor images."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from rayclust.cli import commands, run_command

CONTRACT = {
    "quick", "run", "encode", "neighbors", "train", "select-k", "assign", "label", "index", "evaluate",
    "figures", "report", "check", "status", "search", "predict", "demo", "schema",
    "submit", "compare",
}  # fmt: skip


def test_every_command_of_the_contract_is_there():
    assert set(commands.commands) == CONTRACT


@pytest.mark.parametrize("command", sorted(CONTRACT))
def test_every_command_explains_itself(command: str, capsys: pytest.CaptureFixture[str]):
    assert run_command([command, "--help"]) == 0
    assert "Usage:" in capsys.readouterr().out


BAD_LINES = {
    "figures of no run": (["figures", "/nonexistent/run"], "/nonexistent/run: no run there"),
    "no such file": (["run", "/nonexistent/RUN.yaml"], "/nonexistent/RUN.yaml"),
    "unknown command": (["cluster"], "No such command"),
    "missing option": (["quick", "photos"], "--out"),
    "clusters that are no number": (["quick", ".", "--out", "x", "--clusters", "many"], "method.clusters = 'many'"),
    "one cluster": (["quick", ".", "--out", "x", "--clusters", "1"], "greater than or equal to 2"),
    "candidates twice": (["quick", ".", "--out", "x", "--clusters", "5,5"], "method.clusters = [5, 5]"),
    "unknown method": (
        ["quick", ".", "--out", "x", "--method", "dbscan"],
        "must be one of auto, cpp, kmeans, spectral, temi",
    ),
    "unknown encoder": (["quick", ".", "--out", "x", "--encoder", "resnet"], "open_clip/"),
    "a stage that is none": (["counterparts", "RUN.yaml"], "No such command 'counterparts'"),
    "status of nothing": (["status", "/nonexistent"], "no run there"),
    "search of nothing": (["search", "/nonexistent", "--text", "a dog"], "no run there"),
    "predict of nothing": (["predict", "/nonexistent", ".", "--out", "t.csv"], "no run there"),
    "schema of nothing": (["schema", "--method", "dbscan"], "must be one of"),
    "override without value": (["run", "RUN.yaml", "seed"], "KEY=VALUE"),
}


@pytest.mark.parametrize("name", BAD_LINES)
def test_a_mistake_is_one_line_and_exit_code_2(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "RUN.yaml").write_text("run: r\nimages: {uri: .}\nmethod: {name: kmeans, clusters: 2}\n")
    line, wanted = BAD_LINES[name]
    assert run_command(line) == 2
    error = capsys.readouterr().err
    assert error.startswith("rayclust: ")
    assert error.count("\n") == 1
    assert wanted in error


def test_an_unexpected_error_is_exit_code_1_and_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    def broken(uri: str) -> None:
        raise RuntimeError("first line\nsecond line")

    monkeypatch.setattr("rayclust.runtime.status.lines", broken)
    assert run_command(["status", "anything"]) == 1
    error = capsys.readouterr().err
    assert error == "rayclust: unexpected RuntimeError: second line (-v shows the traceback)\n"
    assert run_command(["-v", "status", "anything"]) == 1
    assert "Traceback" in capsys.readouterr().err


def test_what_is_printed_steers_no_terminal(capsys: pytest.CaptureFixture[str]):
    assert run_command(["run", "/nowhere/\x1b]0;hostile\x07.yaml"]) == 2
    error = capsys.readouterr().err
    assert "hostile" in error
    assert not set("\x1b\x07") & set(error)


def test_the_schema_is_json_with_every_group(capsys: pytest.CaptureFixture[str]):
    assert run_command(["schema"]) == 0
    schema = json.loads(capsys.readouterr().out)
    assert {"run", "images", "encoder", "method", "resources"} <= set(schema["properties"])


def test_importing_the_package_is_light():
    code = "import sys, rayclust; print([m for m in ('torch', 'ray', 'pyarrow', 'sklearn') if m in sys.modules])"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert shown.strip() == "[]"


def test_the_first_word_comes_while_libraries_load(tmp_path: Path):
    line = [sys.executable, "-m", "rayclust", "quick", str(tmp_path), "--out", str(tmp_path / "run"), "--clusters", "1"]
    started = time.monotonic()
    with subprocess.Popen(line, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        first, waited = process.stderr.readline(), time.monotonic() - started
        rest, total = process.stderr.read(), time.monotonic() - started
    assert first.endswith("quick: loading libraries\n")
    assert waited < total / 2
    assert rest.startswith("rayclust: method.clusters = 1")
