"""docs/python.md names what a run has, and README leads there."""

from __future__ import annotations

import re
from pathlib import Path

from rayclust.runtime.results import RunTables

ROOT = Path(__file__).resolve().parents[2]


def test_every_name_of_a_run_on_the_page_is_there_and_every_one_that_is_there_is_on_the_page():
    named = set(re.findall(r"\brun\.(\w+)", (ROOT / "docs" / "python.md").read_text()))
    public = {name for name in dir(RunTables) if not name.startswith("_")} | {"config", "report"}
    assert named == public
    assert "docs/python.md" in (ROOT / "README.md").read_text()
