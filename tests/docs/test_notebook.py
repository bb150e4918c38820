"""The notebook runs as it stands, without Ray, and is kept with its pictures."""

from __future__ import annotations

import re
import tempfile
from pathlib import Path

import nbformat
import pytest

from tests.docs.notebooks import NOTEBOOKS, execute

NOTEBOOK = NOTEBOOKS / "quick.ipynb"


def _outputs(notebook: nbformat.NotebookNode, kind: str) -> list[str]:
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    return [output["data"][kind] for output in outputs if kind in output.get("data", {})]


def test_it_is_kept_as_it_ran():
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert len(_outputs(notebook, "image/png")) >= 2
    assert NOTEBOOK.stat().st_size < 500_000
    assert not re.search(r"/rayclust-\w+", NOTEBOOK.read_text()), "no path of the machine that it ran on"


def test_it_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setenv("RAYCLUST_SCRATCH", str(tmp_path / "scratch"))
    drawn, shown = execute(NOTEBOOK, monkeypatch)
    assert len(drawn) == len(_outputs(nbformat.read(NOTEBOOK, as_version=4), "image/png"))
    [scores] = [value for value in shown if isinstance(value, dict) and "accuracy" in value]
    assert scores["accuracy"] > 0.7
