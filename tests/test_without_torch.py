"""Commands that compute nothing do without torch, whose import takes seconds and hundreds of megabytes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

from rayclust.runtime.api import as_yaml
from tests.sealed import Sealed

CODE = """
import json, multiprocessing, sys, time
from pathlib import Path

from rayclust.cli import run_command
from rayclust.runtime.api import load_run
from rayclust.stages import encode  # which actors of Ray load
from rayclust.store import storage
from rayclust.store.sources import fetch_many
from rayclust.web.explorer import Explorer

folder, heavy = Path(sys.argv[1]), ("torch", "ray", "scipy", "sklearn", "matplotlib")
run, codes = str(folder / "run"), {}
for command in (
    ["run", str(folder / "RUN.yaml")],
    ["status", run],
    ["export", run, "--to", "table", "--out", str(folder / "table.csv")],
    ["export", run, "--to", "keys", "--out", str(folder / "keys")],
    ["init", str(folder / "new.yaml"), "--images", run, "--method", "temi"],
    ["schema"],
    ["check", str(folder / "RUN.yaml"), "method.clusters=1"],
    ["search", run, "--like", "shard-001/00003", "--top", "3"],
):
    codes[" ".join(command[:1])] = run_command(command)
explorer = Explorer(load_run(run))
number = explorer.clusters()["clusters"][0]["number"]
images = explorer.images(number)["images"]
picture = explorer.picture(images[0]["row"], 160)
before = [name for name in heavy if name in sys.modules]
[(_, data)] = fetch_many([explorer.image(15)["uri"]])
explorer._encoder.idle = 0.1
hits = explorer.search(data=data, top=2)
started = time.monotonic()
while multiprocessing.active_children() and time.monotonic() < started + 30:
    time.sleep(0.05)
after = [name for name in heavy if name in sys.modules]
left = len(multiprocessing.active_children())
found = {"left": left, "codes": codes, "images": len(images), "picture": len(picture), "hit": hits[0]["row"]}
(folder / "found.json").write_text(json.dumps(found | {"before": before, "after": after}))
"""


def test_commands_that_print_facts_and_the_explorer_do_without_torch(pictures_run: Sealed, tmp_path: Path):
    shutil.copytree(pictures_run.folder, tmp_path / "run")
    config = pictures_run.config.model_copy(update={"run": str(tmp_path / "run")})
    (tmp_path / "RUN.yaml").write_text(as_yaml(config))
    (tmp_path / "code.py").write_text("if __name__ == '__main__':\n" + "\n".join(f"    {x}" for x in CODE.splitlines()))
    environment = os.environ | {"RAYCLUST_SCRATCH": str(tmp_path / "scratch"), "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, str(tmp_path / "code.py"), str(tmp_path)]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr[-2000:]
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["codes"] == {"check": 2} | dict.fromkeys(("run", "status", "export", "init", "schema", "search"), 0)
    assert (found["before"], found["after"]) == ([], []), "the encoder is in a process of its own"
    assert found["left"] == 0, "which has ended"
    assert found["images"] > 3
    assert found["picture"] > 100
    assert found["hit"] == 15
    assert "report: done before, skipped" in ended.stderr
    similarities = [float(line.split()[0]) for line in ended.stdout.splitlines() if "#00" in line and line[:1] == " "]
    assert len(similarities) == 3
