"""Runs a notebook cell by cell in the test's process: a kernel of its own would load torch once more."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import nbformat
import pytest
from matplotlib.figure import Figure

NOTEBOOKS = Path(__file__).resolve().parents[2] / "docs" / "notebooks"


def execute(notebook: Path, monkeypatch: pytest.MonkeyPatch, **parameters: Any) -> tuple[list[Figure], list[Any]]:
    """Return the figures that are shown, and the values of cells that end with an expression.

    `parameters` stand for the cell that is tagged so.
    """
    drawn, shown = list[Figure](), list[Any]()
    names: dict[str, Any] = dict(parameters)
    monkeypatch.setattr(plt, "show", lambda: drawn.append(plt.gcf()))
    for cell in nbformat.read(notebook, as_version=4).cells:
        if cell.cell_type != "code" or (parameters and "parameters" in cell.metadata.get("tags", ())):
            continue
        *lines, last = ast.parse(cell.source).body
        is_shown = isinstance(last, ast.Expr)  # the value of a cell that ends with an expression
        exec(compile(ast.Module(lines if is_shown else [*lines, last], []), "cell", "exec"), names)  # noqa: S102 - our own notebook
        if is_shown:
            shown.append(eval(compile(ast.Expression(last.value), "cell", "eval"), names))  # noqa: S307
    plt.close("all")
    return drawn, shown
