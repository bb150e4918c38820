from __future__ import annotations

import pytest

from rayclust.store.storage import is_hidden


@pytest.mark.parametrize("key", [".a", "a/.b/c", "__MACOSX/a.jpg", "x/Thumbs.db", "._a.jpg"])
def test_hidden(key: str) -> None:
    assert is_hidden(key)


@pytest.mark.parametrize("key", ["a", "a.b/c.jpg", "../a.jpg", "./a.jpg", "Thumbs.dbx"])
def test_visible(key: str) -> None:
    assert not is_hidden(key)
