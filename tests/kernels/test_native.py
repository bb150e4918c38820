from __future__ import annotations

from pathlib import Path

import pytest

from rayclust.kernels import native


@pytest.fixture
def forgotten():
    """The library is looked for again, during the test and after it."""
    native.library.cache_clear()
    yield
    native.library.cache_clear()


@pytest.mark.usefixtures("forgotten")
def test_the_switch_keeps_to_torch(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(native.SWITCH, "0")
    assert native.library() is None
    with pytest.raises(RuntimeError, match="could not be compiled"):
        native.call("allow_tiles")


@pytest.mark.usefixtures("forgotten")
def test_without_a_compiler_there_is_no_library(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(native, "COMPILERS", ("no-such-compiler",))
    assert native.library() is None


@pytest.mark.usefixtures("forgotten")
def test_a_compiler_that_fails_is_no_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(native, "FLAGS", ("--no-such-flag",))
    assert native.library() is None
    assert not list(tmp_path.rglob("*.so"))


@pytest.mark.usefixtures("forgotten")
def test_a_built_library_is_found_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    if native.library() is None:
        pytest.skip("no compiler, or a processor that the sources are not for")
    (built,) = tmp_path.rglob("*.so")
    stamp = built.stat().st_mtime_ns
    native.library.cache_clear()
    assert native.library() is not None
    assert built.stat().st_mtime_ns == stamp


def test_a_cache_that_cannot_be_made_is_replaced(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    blocker = tmp_path / "file"
    blocker.write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(blocker))
    assert native._cache().is_dir()
