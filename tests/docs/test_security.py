"""docs/security.md names tests that exist, and what it says of the whole code is so."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
MODULES = sorted((ROOT / "rayclust").rglob("*.py"))
CATCHES_REFUSALS = {"rayclust/encoders/tensors.py", "rayclust/store/sources/embeddings.py"}


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def test_every_test_that_is_named_is_there():
    text = (ROOT / "docs" / "security.md").read_text()
    named = re.findall(r"`(tests/\S+\.py)::(test_\w+)`", text)
    assert len(named) > 15
    missing = [f"{path}::{test}" for path, test in named if f"def {test}(" not in (ROOT / path).read_text()]
    assert missing == []


def test_pickles_are_named_only_where_they_are_refused():
    brings = re.compile(r"^(import|from) (pickle|dill|cloudpickle|joblib|shelve)\b", re.MULTILINE)
    assert {name(path) for path in MODULES if brings.search(path.read_text())} == CATCHES_REFUSALS
    forbidden = re.compile(r"allow_pickle=True|torch\.jit\.load|(Tuner|Trainer)\.restore|os\.system|shell=True")
    reads = re.compile(r"pickle\.(loads?|Unpickler)\b")
    torch_load = re.compile(r"(?<!safetensors\.)torch\.load\([^)]*\)")
    for path in MODULES:
        text = path.read_text()
        assert not forbidden.search(text), path
        assert not reads.search(text), path
        assert all("weights_only=True" in call for call in torch_load.findall(text)), path


def test_archives_are_never_unpacked():
    unpacks = re.compile(r"\.extractall\(|\.extract\(")
    assert [name(path) for path in MODULES if unpacks.search(path.read_text())] == []
