"""Real processes of the command line: two on one run, secrets in the environment; and files that may not grow."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from rayclust.config import parse
from rayclust.errors import RayclustError
from rayclust.runtime.pipeline import run_all
from rayclust.store import storage
from tests.chaos.faults import artefacts
from tests.chaos.trial import LAST
from tests.stages.in_process import without_ray
from tests.stages.runs import tree, write_folder, write_yaml

DRIVER = (
    "import logging, sys, pytest; from rayclust.config import parse; from rayclust.errors import RayclustError; "
    "from rayclust.runtime.pipeline import run_all; from tests.stages.in_process import without_ray; "
    "logging.basicConfig(level=logging.DEBUG); logging.getLogger('botocore').setLevel(logging.INFO); "
    "without_ray(pytest.MonkeyPatch())\n"
    f"try: run_all(parse(open(sys.argv[1]).read()), stop_after='{LAST}')\n"
    "except RayclustError as error: print(error); sys.exit(error.exit_code)"
)
"""The first stages of `rayclust run`, without a cluster, with every line that it can log."""


def start(config: Path, **env: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", DRIVER, str(config)],
        env={**os.environ, **env},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def config(folder: Path, run: str, **groups: object) -> Path:
    if not (folder / "images").exists():
        write_folder(folder / "images", 20, size=10)
    return write_yaml(folder / "run.yaml", tree(run, str(folder / "images"), **groups))


def undisturbed(line: Path, run: Path) -> dict[str, bytes]:
    with pytest.MonkeyPatch.context() as patch:
        without_ray(patch)
        settings = parse(line.read_text()).model_copy(update={"run": str(run)})
        run_all(settings, stop_after=LAST)
    return artefacts(str(run))


def test_of_two_at_once_one_works_and_the_other_says_who(tmp_path: Path):
    method = {"name": "temi", "clusters": 3, "preset": "none", "heads": 2, "steps": 300, "batch_size": 16}
    line = config(tmp_path, str(tmp_path / "run"), method=method)
    both = [start(line), start(line)]
    outputs = [process.communicate(timeout=200)[0] for process in both]
    codes = [process.returncode for process in both]
    # The slower to start may come when the first has ended; then it finds everything done.
    assert sorted(codes) in ([0, 0], [0, 2]), outputs
    if 2 in codes:
        assert "is worked on by process" in outputs[codes.index(2)]
    else:
        assert any("assign: done before, skipped" in output for output in outputs)
    assert artefacts(str(tmp_path / "run")) == undisturbed(line, tmp_path / "alone")


def test_no_secret_is_logged_or_written(s3_bucket: str, s3_endpoint: str, tmp_path: Path):
    marker = "hunter2"
    secrets = {"AWS_ACCESS_KEY_ID": f"AKIA{marker}0000", "AWS_SECRET_ACCESS_KEY": f"{marker}secret00"}
    secrets |= {"AWS_SESSION_TOKEN": f"{marker}token000"}
    line = config(tmp_path, f"{s3_bucket}/run")
    done = start(line, **secrets)
    output = done.communicate(timeout=200)[0]
    assert done.returncode == 0, output
    assert "assign: done" in output
    assert marker not in output
    for file in storage.walk(f"{s3_bucket}/run"):
        assert marker.encode() not in storage.read_bytes(file.uri), file.key
    lost = start(line, **secrets, AWS_ENDPOINT_URL=s3_endpoint.replace("//", f"//me:{marker}password@") + "9999")
    output = lost.communicate(timeout=200)[0]
    assert lost.returncode == 2, output
    assert marker not in output


@pytest.mark.usefixtures("in_process")
def test_files_that_may_not_grow_are_a_full_disk(tmp_path: Path):
    line = config(tmp_path, str(tmp_path / "run"), images={"shard_size": 60})
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    for size in (1, 3000, 9000):
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))  # a write beyond is EFBIG, as Python ignores the signal
        try:
            with pytest.raises(RayclustError, match="no space left") as caught:
                run_all(parse(line.read_text()), stop_after=LAST)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert caught.value.exit_code == 2
    run_all(parse(line.read_text()), stop_after=LAST)
    assert artefacts(str(tmp_path / "run")) == undisturbed(line, tmp_path / "alone")
