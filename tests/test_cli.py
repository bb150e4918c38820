"""Commands and exit codes that need neither Ray nor images."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from click.shell_completion import ShellComplete

from rayclust import cli
from rayclust.cli import commands, run_command
from rayclust.runtime.api import load_config
from rayclust.stages import NAMES
from tests.sealed import Sealed
from tests.stages.runs import picture

CONTRACT = {
    "quick", "run", "encode", "neighbors", "counterparts", "train", "select-k", "assign", "label", "curate", "index",
    "evaluate", "map", "figures", "report", "check", "status", "search", "predict", "demo", "schema",
    "submit", "compare", "export", "explore", "init",
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
        "must be one of auto, byol, cc, consensus, cpp",
    ),
    "unknown encoder": (["quick", ".", "--out", "x", "--encoder", "resnet"], "open_clip/"),
    "a stage that is none": (["dreams", "RUN.yaml"], "No such command 'dreams'"),
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


@pytest.mark.parametrize(("command", "hint"), [("status", ""), ("run", ": run the same line again to go on")])
def test_an_interrupt_is_130_and_says_what_goes_on(
    command: str, hint: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("rayclust.runtime.status.lines", interrupted)
    monkeypatch.setattr("rayclust.runtime.api.load_config", interrupted)
    assert run_command(["-v", command, "anything"]) == 130
    assert capsys.readouterr().err.lstrip() == f"rayclust: interrupted{hint}\n"


def test_help_lists_the_stages_in_their_order_with_a_word_each(capsys: pytest.CaptureFixture[str]):
    assert run_command(["--help"]) == 0
    first, stages = capsys.readouterr().out.split("Stages, in order:\n")
    shown = dict(line.split(maxsplit=1) for line in stages.splitlines())
    assert tuple(shown) == NAMES
    assert all(f"  {name} " in first for name in CONTRACT - set(NAMES))
    assert "..." not in first.partition("Commands:")[2], "a line that is cut"


@pytest.mark.parametrize("method", ["kmeans", "temi", "propos"])
def test_init_writes_a_config_in_which_every_key_can_be_set(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.chdir(tmp_path)
    assert run_command(["init", "--images", "photos", "--method", method, "--clusters", "[5, 8]"]) == 0
    text = (tmp_path / "RUN.yaml").read_text()
    assert json.loads((tmp_path / text.partition("$schema=")[2].partition("\n")[0]).read_text())["title"] == "RunConfig"
    config = load_config("RUN.yaml")
    assert (config.run, config.images.uri) == (str(tmp_path / "run"), str(tmp_path / "photos"))
    assert config.select_k.candidates == (5, 8)
    # With every # before a key removed it is the same, but for keys that exclude each other: several encoders.
    whole = re.sub(r"(?m)^#((?:  )*[a-z_]+:)", r"\1", text)
    (tmp_path / "all.yaml").write_text(re.sub(r"(?m)^encoders: .*$", "", whole))
    assert load_config("all.yaml").model_dump() == config.model_dump()
    assert run_command(["init", "--images", "photos"]) == 2
    assert "is there already" in capsys.readouterr().err
    for clusters in ("[", "many"):
        assert run_command(["init", "other.yaml", "--images", "photos", "--clusters", clusters]) == 2
    assert not (tmp_path / "other.yaml").exists()
    assert run_command(["init", "RUN.yaml/below.yaml", "--images", "photos"]) == 2


def test_methods_and_encoders_are_completed():
    def completed(*line: str) -> list[str]:
        found = ShellComplete(commands, {}, "rayclust", "_RAYCLUST_COMPLETE").get_completions(list(line[:-1]), line[-1])
        return [item.value for item in found]

    assert completed("quick", "photos", "--method", "k") == ["kmeans"]
    assert completed("quick", "photos", "--encoder", "p") == ["pixels"]
    assert "open_clip/ViT-L-14" in completed("quick", "photos", "--encoder", "open_clip/ViT-L")
    assert completed("sta") == ["status"]


def test_facts_are_printed_as_json(pictures_run: Sealed, capsys: pytest.CaptureFixture[str]):
    run = pictures_run.config.run
    assert run_command(["status", run, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["stages"][0]["stage"] == "encode"
    image = pictures_run.folder.parent / "query.png"
    image.write_bytes(picture((30, 60, 220), 1))
    assert run_command(["search", run, "--image", str(image), "--top", "2", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [set(hit) for hit in found["encoder"]] == [{"row", "similarity", "key", "uri", "cluster", "name"}] * 2
    (pictures_run.folder.parent / "RUN.yaml").write_text(
        f"run: {run}\nimages: {{uri: /nowhere}}\nmethod: {{name: kmeans, clusters: 3}}\n"
    )
    assert run_command(["check", str(pictures_run.folder.parent / "RUN.yaml"), "encoder.name=pixels", "--json"]) == 2
    found = json.loads(capsys.readouterr().out)
    assert {"subject": "images", "good": False} in [
        {name: finding[name] for name in ("subject", "good")} for finding in found
    ]


def test_long_lines_go_on_below_on_a_terminal_and_are_left_whole_elsewhere(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr("rayclust.runtime.status.lines", lambda uri: ["RUN: kmeans", f"  encode     {'word ' * 30}end"])
    assert run_command(["status", "anything"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 2
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    monkeypatch.setenv("COLUMNS", "80")
    assert run_command(["status", "anything"]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert len(shown) == 4
    assert max(map(len, shown)) <= 80
    assert all(line.startswith(" " * 13) for line in shown[2:])


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
    # Said at once here: a fast machine has loaded what this mistake needs before the time is up.
    code = "import sys; from rayclust import cli; cli.FIRST_WORD_SECONDS = 0; sys.exit(cli.run_command(sys.argv[1:]))"
    line = ["-c", code, "quick", str(tmp_path), "--out", str(tmp_path / "run"), "--clusters", "1"]
    watched = [sys.executable, "-X", "importtime", *line]
    shown = subprocess.run(watched, capture_output=True, text=True, check=False).stderr
    before, word, after = shown.partition("quick: loading libraries\n")  # among lines of modules
    heavy = ("torch", "ray", "scipy", "sklearn", "timm")
    assert word
    assert not [name for name in heavy if re.search(rf"\| +{re.escape(name)}$", before, re.MULTILINE)]
    assert "\nrayclust: method.clusters = 1" in after


def test_the_last_line_says_how_many_clusters_have_images(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    for sizes, line in (([30, 0], "30 images in 1 of 2 clusters\n"), ([10, 20], "in 2 clusters: nmi 0.500\n")):
        scores = {"nmi": 0.5} if all(sizes) else {}
        (tmp_path / "metrics.json").write_text(json.dumps({"rows": 30, "clusters": 2, "sizes": sizes} | scores))
        cli._show_result(str(tmp_path), as_json=False)
        assert line in capsys.readouterr().out


def test_without_a_command_the_help_is_shown_as_it_is(capsys: pytest.CaptureFixture[str]):
    assert run_command([]) == 0
    assert "\n  quick " in capsys.readouterr().out


def test_many_files_are_told_that_one_folder_is_read(capsys: pytest.CaptureFixture[str]):
    assert run_command(["quick", "a.jpg", "b.jpg", "--out", "run"]) == 2
    assert "one folder" in capsys.readouterr().err
