from __future__ import annotations

from pathlib import Path

import pytest

from rayclust.errors import ArtefactError
from rayclust.store import checked, filesystem


def test_it_comes_back_as_it_was_given(place: str):
    content = {"a": [1, 2.5, None, "ü"], "b": {"c": True}}
    checked.write(f"{place}/x.json", content)
    assert checked.read(f"{place}/x.json") == content


def test_every_changed_character_is_found(tmp_path: Path):
    uri = str(tmp_path / "x.json")
    checked.write(uri, {"digest": "ab", "moments": "AAAA", "rows": 10})
    whole = filesystem.read_bytes(uri)
    for i, byte in enumerate(whole):
        for other in (byte ^ 1, ord("7")):
            damaged = whole[:i] + bytes([other]) + whole[i + 1 :]
            if damaged == whole or damaged.split() == whole.split():
                continue  # another blank means the same
            filesystem.write_bytes(uri, damaged)
            with pytest.raises(ArtefactError):
                checked.read(uri)


@pytest.mark.parametrize("content", ["[]", "3", "{}", '{"a": 1}', "{"])
def test_json_without_a_checksum_is_refused(content: str, tmp_path: Path):
    (tmp_path / "x.json").write_text(content)
    with pytest.raises(ArtefactError):
        checked.read(str(tmp_path / "x.json"))
