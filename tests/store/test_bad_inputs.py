from __future__ import annotations

import random
from dataclasses import asdict
from pathlib import Path

import pytest

from rayclust.encoders.tensors import load_tensors
from rayclust.errors import ConfigError, DataError
from rayclust.store.sources import Shard, plan_shards, read_records, read_rows
from tests.store.bad_inputs import BadInput, all_cases
from tests.store.inputs import gz, image, npy, parquet, samples, tar, vectors, write

CASES = all_cases()
FETCHED_WHOLE = ("tar/", "targz/", "tensor/", "settings/")
"""Kinds that are read from a local copy, or not at all: storage makes no difference to them."""
PLACES = [("local", case) for case in CASES]
PLACES += [("s3", case) for case in CASES if not case.name.startswith(FETCHED_WHOLE)]


def outcome(uri: str, case: BadInput) -> tuple[list[str], list[tuple[str, str]]]:
    """Keys of rows in order, and the rejects, as a run sees them: every shard travels as JSON.

    Of what is lost with a file only the first reject is given: the others are counted by the files beside it.
    """
    keys: list[str] = []
    rejects: list[tuple[str, str]] = []
    width = None
    for planned in plan_shards(uri, **case.settings):
        shard = Shard.from_json(asdict(planned))
        if shard.has_embeddings:
            rows = read_rows(shard, load_tensors=load_tensors, width=width)
            width = width or (rows.embeddings.shape[1] if rows.keys else None)
            keys += rows.keys
            rejects += [(each["key"], each["reason"]) for each in rows.rejects if "/lost-" not in each["key"]]
            continue
        for record in read_records(shard):
            assert (record.data is None) == (record.reason is not None)
            "".join([record.key, record.uri, record.detail, record.label or ""]).encode()
            if record.reason is None:
                keys.append(record.key)
            elif "/lost-" not in record.key:
                rejects.append((record.key, record.reason))
    return keys, sorted(rejects)


@pytest.mark.timeout(60)
@pytest.mark.parametrize(("place", "case"), PLACES, indirect=["place"], ids=lambda value: getattr(value, "name", value))
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


def damaged(data: bytes, number: int) -> bytes:
    """`data` with a few bytes flipped, overwritten, dropped or added, the same for the same number."""
    draw, result = random.Random(number), bytearray(data)
    for _ in range(draw.choice([1, 1, 3, 20])):
        at, length = draw.randrange(len(result)), draw.randrange(1, 64)
        how = draw.randrange(3)
        if how == 0:
            result[at] ^= 1 << draw.randrange(8)
        elif how == 1:
            result[at : at + length] = draw.randbytes(length)
        else:
            result[at : at + draw.randrange(200)] = bytes(length)
    return bytes(result)


FUZZED = {
    "x.tar": tar(samples(5)),
    "y.tgz": gz(tar(samples(5))),
    "i.parquet": parquet({"image": [image(i) for i in range(9)], "key": list("abcdefghi")}, groups=4),
    "e.parquet": parquet({"embedding": vectors(20, 8).tolist(), "label": ["a"] * 20}, groups=9),
    "n.npy": npy(vectors(9)),
}


@pytest.mark.parametrize("name", FUZZED)
def test_any_damage_gives_rows_and_rejects_or_one_clear_line(tmp_path: Path, name: str) -> None:
    messages = []
    for number in range(60):
        write(str(tmp_path), {name: damaged(FUZZED[name], number)})
        try:
            outcome(f"{tmp_path}/{name}", BadInput(name, dict))
        except DataError as error:
            messages.append(str(error))
    assert not any("\n" in message for message in messages)


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
    assert outcome(str(tmp_path), case) == (["a/good.png", "\\xff.png"], [("b.png", "missing")])
