from __future__ import annotations

from pathlib import Path

import pytest

from rayclust.encoders.weights import load_tensors
from rayclust.errors import ConfigError, DataError
from rayclust.store.sources import Shard, plan_shards, read_records, read_rows
from tests.store.bad_inputs import BadInput, all_cases
from tests.store.inputs import write

CASES = all_cases()


def outcome(uri: str, case: BadInput) -> tuple[list[str], list[tuple[str, str]]]:
    """Keys of rows in order, and the rejects, as a run sees them: every shard travels as JSON."""
    keys: list[str] = []
    rejects: list[tuple[str, str]] = []
    width = None
    for planned in plan_shards(uri, **case.settings):
        shard = Shard.from_json(planned.to_json())
        if shard.has_embeddings:
            rows = read_rows(shard, load_tensors=load_tensors, width=width)
            width = width or (rows.embeddings.shape[1] if rows.keys else None)
            keys += rows.keys
            rejects += [(reject["key"], reject["reason"]) for reject in rows.rejects]
            continue
        for record in read_records(shard):
            assert (record.data is None) == (record.reason is not None)
            "".join([record.key, record.uri, record.detail, record.label or ""]).encode()
            if record.reason is None:
                keys.append(record.key)
            else:
                rejects.append((record.key, record.reason))
    return keys, sorted(rejects)


@pytest.mark.timeout(60)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_every_bad_input_gives_its_rows_and_rejects_or_one_clear_line(place: str, case: BadInput) -> None:
    write(place, case.files())
    if not case.error:
        assert outcome(place, case) == (list(case.rows), list(case.rejects))
        return
    with pytest.raises((DataError, ConfigError), match=case.error) as caught:
        outcome(place, case)
    assert "\n" not in str(caught.value)


def test_the_table_is_large_and_its_names_are_distinct() -> None:
    assert len({case.name for case in CASES}) == len(CASES) >= 80


def test_a_good_file_beside_a_bad_one_is_never_lost_on_a_real_folder(tmp_path: Path) -> None:
    """What only a local folder can hold: links, pipes and names that are no text."""
    import os

    write(str(tmp_path), {"a/good.png": b"1"})
    (tmp_path / "a/loop").symlink_to(tmp_path)
    (tmp_path / "b.png").symlink_to(tmp_path / "gone")
    os.mkfifo(tmp_path / "c.png")
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff.png")).touch()
    (tmp_path / "d.png").mkdir()
    case = BadInput("local", dict)
    assert outcome(str(tmp_path), case) == (["a/good.png"], [("\\xff.png", "missing"), ("b.png", "missing")])
