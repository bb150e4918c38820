from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from rayclust.config import RunConfig
from rayclust.runtime.api import load_run
from tests.sealed import Sealed


@pytest.fixture
def config(pictures_run: Sealed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunConfig:
    """A copy of the run, with scratch files of its own."""
    monkeypatch.setenv("RAYCLUST_SCRATCH", str(tmp_path / "scratch"))
    shutil.copytree(pictures_run.folder, tmp_path / "run")
    return load_run(str(tmp_path / "run"))
