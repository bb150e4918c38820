from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from botocore import exceptions as aws

from rayclust.errors import DataError
from rayclust.store import connection, filesystem, multipart
from rayclust.store.s3 import S3Storage, client, split, translate
from rayclust.store.storage import MissingError, UnreadableError


def put(bucket: str, keys: list[str]) -> None:
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(lambda key: client().call_s3("put_object", Bucket=split(bucket)[0], Key=key, Body=b""), keys))


def test_thousands_of_keys_come_page_by_page_in_the_local_order(
    s3_bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = [f"{folder}/{i:04d}.jpg" for folder in ("a", "a-b", "a/c", "ä b") for i in range(510)]
    for key in keys:
        (tmp_path / key).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / key).touch()
    put(s3_bucket, keys)
    calls = []
    call = client().call_s3
    monkeypatch.setattr(client(), "call_s3", lambda name, **kwargs: (calls.append(name), call(name, **kwargs))[1])
    listing = filesystem.walk(s3_bucket)
    assert len(list(islice(listing, 10))) == 10
    assert calls == ["list_objects_v2"]
    remote = [found.key for found in filesystem.walk(s3_bucket)]
    assert remote == [found.key for found in filesystem.walk(str(tmp_path))]
    assert len(remote) == len(keys)
    assert calls.count("list_objects_v2") == 1 + 3


def test_objects_that_stand_for_folders_are_left_out(s3_bucket: str) -> None:
    put(s3_bucket, ["photos/", "photos/cats/", "photos/cats/1.jpg", "photos"])
    assert [found.key for found in filesystem.walk(f"{s3_bucket}/photos")] == ["cats/1.jpg"]
    assert next(iter(filesystem.walk(f"{s3_bucket}/photos/cats/"))).uri == f"{s3_bucket}/photos/cats/1.jpg"


@pytest.mark.parametrize("key", ["../outside", "a/../../outside", "/outside"])
def test_no_key_leads_out_of_the_folder_that_is_copied_to(s3_bucket: str, tmp_path: Path, key: str) -> None:
    client().call_s3("put_object", Bucket=split(s3_bucket)[0], Key=f"model/{key}", Body=b"hostile")
    with pytest.raises(DataError, match="leads out of the folder"):
        filesystem.download_tree(f"{s3_bucket}/model", tmp_path / "a" / "b")
    assert not list(tmp_path.rglob("outside"))


def test_more_than_a_thousand_objects_are_removed(s3_bucket: str) -> None:
    put(s3_bucket, [f"run/{i}" for i in range(1005)] + ["running"])
    filesystem.remove_tree(f"{s3_bucket}/run")
    assert [found.key for found in filesystem.walk(s3_bucket)] == ["running"]
    with pytest.raises(DataError, match="whole bucket"):
        filesystem.remove_tree(s3_bucket)


def test_an_empty_bucket_has_nothing_and_a_missing_one_is_an_error(s3_bucket: str) -> None:
    assert list(filesystem.walk(s3_bucket)) == []
    for action in (
        lambda uri: list(filesystem.walk(uri)),
        filesystem.read_bytes,
        filesystem.check_writable,
        filesystem.exists,
        lambda uri: filesystem.write_bytes(uri, b""),
    ):
        if action is filesystem.exists:
            with pytest.raises(DataError):
                action("s3://no-such-bucket-here/x")
            continue
        with pytest.raises(MissingError, match="no-such-bucket-here"):
            action("s3://no-such-bucket-here/x")


def test_no_listing_is_cached(s3_bucket: str) -> None:
    uri = f"{s3_bucket}/x/y"
    assert not filesystem.exists(uri)
    put(s3_bucket, ["x/y"])  # as another worker would
    assert filesystem.exists(uri)
    client().call_s3("delete_object", Bucket=split(s3_bucket)[0], Key="x/y")
    assert not filesystem.exists(uri)


def test_an_upload_in_parts_appears_whole(s3_bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(multipart, "PART_BYTES", 5 << 20)
    data = os.urandom(11 << 20)
    filesystem.write_bytes(f"{s3_bucket}/big", data)
    assert filesystem.read_bytes(f"{s3_bucket}/big") == data
    with filesystem.local_copy(f"{s3_bucket}/big") as path:
        assert path.read_bytes() == data
    assert not path.exists()


def test_one_connection_per_process_and_settings(s3_bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert client() is client()
    first = client()
    monkeypatch.setenv("AWS_REGION", "eu-central-1")
    assert client() is not first


def test_nobody_at_the_endpoint(s3_endpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "PATIENCE_SECONDS", 0.2)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    with pytest.raises(DataError, match=r"cannot reach the endpoint http://127.0.0.1:9.*AWS_ENDPOINT_URL") as caught:
        filesystem.read_bytes("s3://bucket/x")
    assert "\n" not in str(caught.value)
    assert not isinstance(caught.value, UnreadableError)  # nothing about this one file


@pytest.mark.parametrize(
    ("variable", "value", "words"),
    [("AWS_ENDPOINT_URL", "nonsense", "nonsense"), ("AWS_PROFILE", "nobody", "AWS_PROFILE")],
)
def test_wrong_settings(
    s3_endpoint: str, monkeypatch: pytest.MonkeyPatch, variable: str, value: str, words: str
) -> None:
    monkeypatch.setenv(variable, value)
    with pytest.raises(DataError, match=words):
        filesystem.read_bytes("s3://bucket/x")


def test_no_credentials(s3_bucket: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    with pytest.raises(DataError, match="no AWS credentials found"):
        filesystem.read_bytes(f"{s3_bucket}/x")
    monkeypatch.setenv("AWS_NO_SIGN_REQUEST", "1")
    with pytest.raises(MissingError):
        filesystem.read_bytes(f"{s3_bucket}/x")


@pytest.mark.parametrize("uri", ["s3://", "s3:///x", "s3://UPPER_case!/x", "s3://b/x"])
def test_impossible_buckets(s3_endpoint: str, uri: str) -> None:
    for action in (filesystem.read_bytes, lambda uri: list(filesystem.walk(uri)), filesystem.open_input):
        with pytest.raises(DataError) as caught:
            action(uri)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("error", "kind", "words"),
    [
        (PermissionError("Access Denied"), UnreadableError, "access denied to read: Access Denied"),
        (FileNotFoundError("The specified bucket does not exist"), MissingError, "no such object or bucket"),
        (aws.NoCredentialsError(), DataError, "no AWS credentials"),
        (aws.ReadTimeoutError(endpoint_url="http://x"), DataError, "cannot reach"),
        (TimeoutError(), DataError, "cannot reach"),
        (OSError(16, "Please reduce your\nrequest rate"), DataError, "reduce your request rate"),
    ],
)
def test_every_error_is_one_line(error: Exception, kind: type[DataError], words: str) -> None:
    found = translate(error, "s3://bucket/key", "read")
    assert type(found) is kind
    assert str(found).startswith("s3://bucket/key: ")
    assert words in str(found)
    assert "\n" not in str(found)


def test_denied_while_reading_is_about_one_object(s3_bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def deny(*_: object, **__: object) -> None:
        raise PermissionError("Access Denied")

    monkeypatch.setattr("rayclust.store.s3.get", deny)
    with pytest.raises(UnreadableError, match="access denied"):
        S3Storage().read(f"{s3_bucket}/x")


def test_of_a_million_keys_one_page_is_held(s3_endpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class Page(dict[str, Any]):
        held, most = 0, 0

        def __init__(self, first: int) -> None:
            keys = ({"Key": f"photos/{i:09d}.jpg", "Size": i, "ETag": '"e"'} for i in range(first, first + 1000))
            super().__init__(Contents=keys, IsTruncated=first < 999_000, NextContinuationToken=str(first + 1000))
            Page.held += 1
            Page.most = max(Page.most, Page.held)

        def __del__(self) -> None:
            Page.held -= 1

    monkeypatch.setattr("rayclust.store.s3.call", lambda _, **request: Page(int(request.get("ContinuationToken", 0))))
    assert sum(1 for _ in filesystem.walk("s3://bucket/photos")) == 1_000_000
    assert Page.most <= 2
