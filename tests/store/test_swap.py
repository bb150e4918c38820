from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from rayclust.errors import DataError
from rayclust.store import filesystem, s3, swap
from rayclust.store.storage import MissingError

WRITER = """
import sys
from rayclust.store import swap
uri, name, rounds = sys.argv[1:]
won = 0
while won < int(rounds):
    data, stamp = swap.read(uri)
    won += swap.swap(uri, stamp, str(int(data) + 1).encode()) is not None
"""


def test_a_file_is_made_once_and_replaced_by_who_has_seen_it(place: str):
    uri = f"{place}/lease.json"
    assert swap.read(uri) is None
    first = swap.swap(uri, None, b"one")
    assert first is not None
    assert swap.read(uri) == (b"one", first)
    assert swap.swap(uri, None, b"two") is None
    second = swap.swap(uri, first, b"two")
    assert second not in (None, first)
    assert swap.swap(uri, first, b"three") is None
    assert swap.read(uri) == (b"two", second)
    filesystem.remove(uri)
    assert swap.swap(uri, second, b"four") is None
    assert swap.read(uri) is None


def test_of_many_at_once_one_is_first(place: str):
    uri = f"{place}/lease.json"
    with ThreadPoolExecutor(8) as threads:
        stamps = list(threads.map(lambda name: swap.swap(uri, None, f"{name}".encode()), range(8)))
    won = [name for name, stamp in enumerate(stamps) if stamp is not None]
    assert len(won) == 1
    found = swap.read(uri)
    assert found == (f"{won[0]}".encode(), stamps[won[0]])


def test_no_count_is_lost_between_processes(tmp_path: Path):
    uri = str(tmp_path / "count")
    filesystem.write_bytes(uri, b"0")
    line = [sys.executable, "-c", WRITER, uri]
    writers = [subprocess.Popen([*line, name, "25"]) for name in ("a", "b")]
    assert [writer.wait(timeout=60) for writer in writers] == [0, 0]
    assert filesystem.read_bytes(uri) == b"50"
    assert [path.name for path in tmp_path.iterdir()] == ["count"]


def test_a_place_that_is_not_there_or_not_writable(tmp_path: Path, s3_bucket: str):
    with pytest.raises(MissingError):
        swap.read("s3://no-such-bucket-here/lease.json")
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="a part of the path is a file"):
        swap.swap(str(tmp_path / "file" / "lease.json"), None, b"")


def ignoring(call: Any) -> Any:
    """A store that knows nothing of conditions."""
    return lambda name, **kwargs: call(name, **{k: v for k, v in kwargs.items() if not k.startswith("If")})


def refusing(call: Any) -> Any:
    """A store that says that it knows nothing of conditions."""
    from botocore.exceptions import ClientError

    def answer(name: str, **kwargs: Any) -> Any:
        if any(key.startswith("If") for key in kwargs):
            raise OSError("not implemented") from ClientError({"Error": {"Code": "NotImplemented"}}, "PutObject")
        return call(name, **kwargs)

    return answer


@pytest.mark.parametrize("store", [ignoring, refusing])
def test_where_the_store_cannot_compare_the_last_write_counts_when_it_has_settled(
    s3_bucket: str, monkeypatch: pytest.MonkeyPatch, store: Any
):
    monkeypatch.setattr(s3.client(), "call_s3", store(s3.client().call_s3))
    monkeypatch.setattr(swap, "SETTLE_SECONDS", 0.5)
    uri = f"{s3_bucket}/lease.json"
    with ThreadPoolExecutor(4) as threads:
        stamps = list(threads.map(lambda name: swap.swap(uri, None, f"{name}".encode()), range(4)))
    won = [name for name, stamp in enumerate(stamps) if stamp is not None]
    assert len(won) == 1
    found = swap.read(uri)
    assert found == (f"{won[0]}".encode(), stamps[won[0]])
    assert swap.swap(uri, None, b"late") is None
    assert swap.swap(uri, "another", b"late") is None
    assert swap.swap(uri, found[1], b"renewed") is not None


def test_a_store_that_compares_is_asked_twice_once(s3_bucket: str, monkeypatch: pytest.MonkeyPatch):
    calls: list[str] = []
    call = s3.client().call_s3
    monkeypatch.setattr(s3.client(), "call_s3", lambda name, **kwargs: (calls.append(name), call(name, **kwargs))[1])
    swap.swap(f"{s3_bucket}/a", None, b"a")
    assert calls == ["put_object", "put_object"]
    swap.swap(f"{s3_bucket}/b", None, b"b")
    assert calls == ["put_object"] * 3


def test_a_write_that_was_sent_twice_is_known_as_ones_own(s3_bucket: str):
    uri = f"{s3_bucket}/lease.json"
    swap.swap(f"{s3_bucket}/known", None, b"")
    s3.client().call_s3("put_object", Bucket=s3.split(uri)[0], Key="lease.json", Body=b"mine")  # its answer was lost
    assert swap.swap(uri, None, b"mine") is not None
    assert swap.swap(uri, None, b"theirs") is None
