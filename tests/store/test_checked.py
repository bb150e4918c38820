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
    content = {"digest": "ab", "moments": "AAAA", "rows": 10}
    checked.write(uri, content)
    whole = filesystem.read_bytes(uri)
    for i, byte in enumerate(whole):
        for other in (byte ^ 1, ord("7")):
            damaged = whole[:i] + bytes([other]) + whole[i + 1 :]
            if damaged == whole or damaged.split() == whole.split():
                continue  # another blank means the same
            filesystem.write_bytes(uri, damaged)
            try:
                found = checked.read(uri)
            except ArtefactError:
                continue
            assert {key: found[key] for key in content} == content  # it hit the name of the checksum


@pytest.mark.parametrize("content", ["[]", "3", "{", '{"a": 1, "checksum": "x"}', '{"checksum": 3}'])
def test_what_is_no_checked_json_is_refused(content: str, tmp_path: Path):
    (tmp_path / "x.json").write_text(content)
    with pytest.raises(ArtefactError):
        checked.read(str(tmp_path / "x.json"))


def test_json_of_before_there_were_checksums_is_taken(tmp_path: Path):
    (tmp_path / "x.json").write_text('{"a": 1}')
    assert checked.read(str(tmp_path / "x.json")) == {"a": 1}
