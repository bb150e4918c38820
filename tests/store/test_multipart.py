from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from botocore.exceptions import ClientError

from rayclust.errors import DataError
from rayclust.store import filesystem, multipart, patience
from rayclust.store.connection import call
from tests.chaos.proxy import control

PART = 5 << 20
DATA = os.urandom(2 * PART + 1234)


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(multipart, "PART_BYTES", PART)
    monkeypatch.setattr(patience, "FIRST_PAUSE", 0.002)
    monkeypatch.setattr(patience, "LONGEST_PAUSE", 0.02)


def uploads(bucket: str) -> list[str]:
    found = call("list_multipart_uploads", Bucket=bucket.removeprefix("s3://"))
    return [upload["Key"] for upload in found.get("Uploads", [])]


def test_bytes_and_files_in_parts_with_accidents(flaky: str, s3_bucket: str, tmp_path: Path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "file").write_bytes(DATA)
    control(flaky, {"seed": 3, "rate": 0.2})
    stamp = filesystem.write_bytes(f"{s3_bucket}/bytes", DATA)
    filesystem.upload_tree(f"{s3_bucket}/tree", tmp_path / "folder")
    assert filesystem.read_bytes(f"{s3_bucket}/bytes") == DATA
    assert filesystem.read_bytes(f"{s3_bucket}/tree/file") == DATA
    control(flaky, {})
    found = filesystem.stat(f"{s3_bucket}/bytes")
    assert found is not None
    assert found.stamp == stamp
    assert uploads(s3_bucket) == []


@pytest.mark.parametrize("error", [OSError("broke"), KeyboardInterrupt()])
def test_an_upload_that_fails_leaves_nothing(s3_bucket: str, error: BaseException):
    def read(start: int, end: int) -> bytes:
        if start:
            raise error
        return DATA[start:end]

    with pytest.raises(type(error)):
        multipart.put(s3_bucket.removeprefix("s3://"), "big", len(DATA), read)
    assert uploads(s3_bucket) == []
    assert not filesystem.exists(f"{s3_bucket}/big")


def test_a_store_that_goes_away_half_way(flaky: str, s3_bucket: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(patience, "ATTEMPTS", 2)
    filesystem.exists(f"{s3_bucket}/x")
    control(flaky, {"cut_at": 3, "cut_seconds": 0.3})
    with pytest.raises(DataError, match="tried 2 times"):
        filesystem.write_bytes(f"{s3_bucket}/big", DATA)
    control(flaky, {})
    assert not filesystem.exists(f"{s3_bucket}/big")


def test_what_a_killed_writer_left_is_called_off_by_the_next(s3_bucket: str):
    bucket = s3_bucket.removeprefix("s3://")
    for key in ("big", "bigger"):
        call("create_multipart_upload", Bucket=bucket, Key=key)
    filesystem.write_bytes(f"{s3_bucket}/big", DATA)
    assert uploads(s3_bucket) == ["bigger"]


def test_the_lost_answer_of_the_last_request(s3_bucket: str, monkeypatch: pytest.MonkeyPatch):
    bucket = s3_bucket.removeprefix("s3://")
    stamp = filesystem.write_bytes(f"{s3_bucket}/big", DATA)
    place = {"Bucket": bucket, "Key": "big", "UploadId": "gone"}

    def gone(operation: str, **request: Any) -> Any:
        if operation == "complete_multipart_upload":
            raise ClientError({"Error": {"Code": "NoSuchUpload", "Message": "no such upload"}}, operation)
        return call(operation, **request)

    monkeypatch.setattr(multipart, "call", gone)
    assert multipart._complete(place, ["a", "b", "c"], len(DATA)).strip('"') == stamp.partition("-")[2]
    for etags, size in ((["a", "b", "c"], len(DATA) - 1), (["a", "b"], len(DATA))):  # somebody else's object
        with pytest.raises(ClientError, match="no such upload"):
            multipart._complete(place, etags, size)
