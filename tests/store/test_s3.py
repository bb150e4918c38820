"""What only S3 has: the connection, listings by the page, uploads in parts, and accidents on the way to it."""

from __future__ import annotations

import multiprocessing
import os
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from botocore.exceptions import ClientError

from rayclust.errors import DataError
from rayclust.store import failures, s3, storage
from rayclust.store.storage import MissingError, UnreadableError
from tests.chaos.proxy import KINDS, control
from tests.store.inputs import s3_connection

PART = 5 << 20
DATA = os.urandom(2 * PART + 1234)


def put(bucket: str, keys: list[str], data: bytes = b"") -> None:
    connection, name = s3_connection(), bucket.removeprefix("s3://")
    with ThreadPoolExecutor(16) as threads:
        list(threads.map(lambda key: connection.call_s3("put_object", Bucket=name, Key=key, Body=data), keys))


@pytest.fixture
def calls(s3_endpoint: str, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the requests that are made from now on."""
    found: list[str] = []
    connection = s3_connection()
    real = connection._call_s3

    async def recorded(name: str, *arguments: Any, **request: Any) -> Any:
        found.append(name)
        return await real(name, *arguments, **request)

    monkeypatch.setattr(connection, "_call_s3", recorded)
    return found


# Listings.


def test_keys_come_page_by_page_in_the_local_order(
    s3_bucket: str, tmp_path: Path, calls: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(s3, "PAGE_KEYS", 100)
    keys = [f"{folder}/{i:04d}.jpg" for folder in ("a", "a-b", "a/c", "ä b") for i in range(55)]
    for key in keys:
        (tmp_path / key).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / key).touch()
    put(s3_bucket, keys)
    assert len(list(islice(storage.walk(s3_bucket), 10))) == 10
    assert calls == ["list_objects_v2"]
    remote = [found.key for found in storage.walk(s3_bucket)]
    assert remote == [found.key for found in storage.walk(str(tmp_path))]
    assert len(remote) == len(keys)
    assert calls.count("list_objects_v2") == 1 + 3
    storage.remove_tree(f"{s3_bucket}/a")
    assert sorted({found.key.partition("/")[0] for found in storage.walk(s3_bucket)}) == ["a-b", "ä b"]
    with pytest.raises(DataError, match="whole bucket"):
        storage.remove_tree(s3_bucket)


def test_of_a_million_keys_one_page_is_held(s3_endpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class Page(dict[str, Any]):
        held, most = 0, 0

        def __init__(self, first: int) -> None:
            keys = ({"Key": f"photos/{i:09d}.jpg", "Size": i, "ETag": '"e"'} for i in range(first, first + 1000))
            super().__init__(Contents=keys, IsTruncated=first < 99_000, NextContinuationToken=str(first + 1000))
            Page.held += 1
            Page.most = max(Page.most, Page.held)

        def __del__(self) -> None:
            Page.held -= 1

    async def page(name: str, **request: Any) -> Page:
        return Page(int(request.get("ContinuationToken", 0)))

    monkeypatch.setattr(s3_connection(), "_call_s3", page)
    assert sum(1 for _ in storage.walk("s3://bucket/photos")) == 100_000
    assert Page.most <= 2


def test_objects_that_stand_for_folders_are_left_out(s3_bucket: str) -> None:
    put(s3_bucket, ["photos/", "photos/cats/", "photos/cats/1.jpg", "photos"])
    assert [found.key for found in storage.walk(f"{s3_bucket}/photos")] == ["cats/1.jpg"]
    assert next(iter(storage.walk(f"{s3_bucket}/photos/cats/"))).uri == f"{s3_bucket}/photos/cats/1.jpg"
    assert storage.stat(f"{s3_bucket}/photos/cats/") is None
    assert storage.exists(f"{s3_bucket}/photos/cats/")


def test_an_empty_bucket_has_nothing_and_a_missing_one_is_an_error(s3_bucket: str) -> None:
    assert list(storage.walk(s3_bucket)) == []
    for action in (
        lambda uri: list(storage.walk(uri)),
        storage.read_bytes,
        storage.read_versioned,
        storage.check_writable,
        storage.exists,
        storage.remove,
        lambda uri: storage.write_bytes(uri, b""),
    ):
        with pytest.raises(MissingError, match="no-such-bucket-here"):
            action("s3://no-such-bucket-here/x")


def test_no_listing_is_cached(s3_bucket: str) -> None:
    uri = f"{s3_bucket}/x/y"
    assert not storage.exists(uri)
    put(s3_bucket, ["x/y"])  # as another worker would
    assert storage.exists(uri)
    s3_connection().call_s3("delete_object", Bucket=s3_bucket.removeprefix("s3://"), Key="x/y")
    assert not storage.exists(uri)


# The connection.


def test_one_connection_per_process_and_settings(s3_bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    first = s3_connection()
    assert s3_connection() is first
    monkeypatch.setenv("AWS_REGION", "eu-central-1")
    assert s3_connection() is not first


def _read_and_write(uri: str) -> None:
    """In a forked process, whose parent has a connection and a thread for it; exits with 0 where all is well."""
    with ThreadPoolExecutor(4) as threads:
        found = list(
            threads.map(lambda i: storage.read_bytes(uri) + storage.write_bytes(f"{uri}-{i}", b"").encode(), range(8))
        )
    os._exit(0 if all(each.startswith(b"data") for each in found) else 1)


def test_many_threads_and_a_forked_process_use_s3(s3_bucket: str) -> None:
    uri = f"{s3_bucket}/x"
    storage.write_bytes(uri, b"data")
    process = multiprocessing.get_context("fork").Process(target=_read_and_write, args=(uri,))
    process.start()
    with ThreadPoolExecutor(8) as threads:
        assert set(threads.map(storage.read_bytes, [uri] * 40)) == {b"data"}
    process.join(60)
    assert process.exitcode == 0


def test_nobody_at_the_endpoint(s3_endpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(failures, "FIRST_CONTACT", 0.3)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    with pytest.raises(DataError, match=r"cannot reach the endpoint http://127.0.0.1:9.*AWS_ENDPOINT_URL") as caught:
        storage.read_bytes("s3://bucket/x")
    assert "\n" not in str(caught.value)
    assert not isinstance(caught.value, UnreadableError)  # nothing about this one file


@pytest.mark.parametrize(
    ("variable", "value", "words"),
    [
        ("AWS_ENDPOINT_URL", "nonsense", "nonsense"),
        ("AWS_ENDPOINT_URL", "http://me:hunter2@127.0.0.1:9", "address holds a login"),
        ("AWS_PROFILE", "nobody", "AWS_PROFILE"),
    ],
)
def test_wrong_settings(
    s3_endpoint: str, monkeypatch: pytest.MonkeyPatch, variable: str, value: str, words: str
) -> None:
    monkeypatch.setenv(variable, value)
    with pytest.raises(DataError, match=words) as caught:
        storage.read_bytes("s3://bucket/x")
    assert "hunter2" not in str(caught.value)


def test_no_credentials(s3_bucket: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    with pytest.raises(DataError, match="no AWS credentials found"):
        storage.read_bytes(f"{s3_bucket}/x")
    monkeypatch.setenv("AWS_NO_SIGN_REQUEST", "1")
    with pytest.raises(MissingError):
        storage.read_bytes(f"{s3_bucket}/x")


def test_requester_pays_and_profiles_come_from_variables(
    s3_bucket: str, s3_endpoint: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    sent: list[bytes | str | None] = []
    monkeypatch.setenv("AWS_REQUEST_PAYER", "requester")
    (tmp_path / "config").write_text(f"[profile other]\nregion = eu-west-3\nendpoint_url = {s3_endpoint}\n")
    (tmp_path / "credentials").write_text("[other]\naws_access_key_id = theirs\naws_secret_access_key = secret\n")
    for name in ("AWS_ENDPOINT_URL", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_REGION", "AWS_DEFAULT_REGION"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    monkeypatch.setenv("AWS_PROFILE", "other")

    def record(request: Any, **_: Any) -> None:
        sent.append(request.headers.get("x-amz-request-payer"))
        assert b"/eu-west-3/" in request.headers["Authorization"]

    s3_connection().s3.meta.events.register("before-send.s3", record)
    storage.write_bytes(f"{s3_bucket}/a", b"a")
    assert storage.read_bytes(f"{s3_bucket}/a") == b"a"
    assert [found.key for found in storage.walk(s3_bucket)] == ["a"]
    assert [str(value) for value in sent] in (["requester"] * 3, ["b'requester'"] * 3)


@pytest.mark.parametrize("uri", ["s3://", "s3:///x", "s3://UPPER_case!/x", "s3://b/x"])
def test_impossible_buckets(s3_endpoint: str, uri: str) -> None:
    for action in (storage.read_bytes, lambda uri: list(storage.walk(uri)), storage.open_input):
        with pytest.raises(DataError) as caught:
            action(uri)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("uri", ["s3://key:hunter2secret@bucket/x", "s3://hunter2secret@bucket"])
def test_a_login_in_a_uri_is_refused_and_not_repeated(uri: str) -> None:
    with pytest.raises(DataError, match="holds no login") as caught:
        storage.read_bytes(uri)
    assert "hunter2" not in str(caught.value)


# Reads, writes and compare-and-swap.


def test_body_and_etag_come_together(s3_bucket: str) -> None:
    written = storage.write_bytes(f"{s3_bucket}/a", b"content")
    body, etag = s3_connection().get_object(f"{s3_bucket.removeprefix('s3://')}/a")
    assert body == b"content"
    assert written == f"7-{etag[1:-1]}"
    assert storage.read_versioned(f"{s3_bucket}/a") == (body, etag)
    found = storage.stat(f"{s3_bucket}/a")
    assert found is not None
    assert found.stamp == written


def test_an_object_that_is_replaced_while_it_is_read(s3_bucket: str) -> None:
    uri = f"{s3_bucket}/a"
    storage.write_bytes(uri, b"0123456789" * 300_000)
    with storage.open_input(uri) as file:
        file.read(10)
        storage.write_bytes(uri, b"9876543210" * 300_000)
        file.seek(2_500_000)
        with pytest.raises(UnreadableError, match="changed while it was read"):
            file.read(10)


def test_a_conditional_put_is_one_request_and_another_buckets_key_that_is_gone_is_refused(
    s3_bucket: str, calls: list[str]
) -> None:
    version = storage.put_if_match(f"{s3_bucket}/a", b"a", None)
    assert calls == ["put_object"]
    assert version is not None
    s3_connection().call_s3("delete_object", Bucket=s3_bucket.removeprefix("s3://"), Key="a")
    assert storage.put_if_match(f"{s3_bucket}/a", b"b", version) is None
    assert not storage.exists(f"{s3_bucket}/a")


def test_a_put_that_was_sent_twice_is_known_as_ones_own(s3_bucket: str) -> None:
    uri = f"{s3_bucket}/lease.json"
    put(s3_bucket, ["lease.json"], b"mine")  # its answer was lost
    assert storage.put_if_match(uri, b"mine", None) is not None
    assert storage.put_if_match(uri, b"theirs", None) is None


# Uploads in parts.


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch, hurried: None) -> None:
    monkeypatch.setattr(s3, "PART_BYTES", PART)


def uploads(bucket: str) -> list[str]:
    found = s3_connection().call_s3("list_multipart_uploads", Bucket=bucket.removeprefix("s3://"))
    return [upload["Key"] for upload in found.get("Uploads", [])]


def test_an_upload_in_parts_appears_whole_despite_accidents(flaky: str, s3_bucket: str, small_parts: None) -> None:
    control(flaky, {"seed": 3, "rate": 0.2})
    stamp = storage.write_bytes(f"{s3_bucket}/big", DATA)
    assert storage.read_bytes(f"{s3_bucket}/big") == DATA
    with storage.local_copy(f"{s3_bucket}/big") as path:
        assert path.read_bytes() == DATA
    assert not path.exists()
    control(flaky, {})
    found = storage.stat(f"{s3_bucket}/big")
    assert found is not None
    assert found.stamp == stamp
    assert stamp.endswith("-3")
    assert uploads(s3_bucket) == []


def test_a_store_that_goes_away_half_way(
    flaky: str, s3_bucket: str, monkeypatch: pytest.MonkeyPatch, small_parts: None
) -> None:
    monkeypatch.setattr(failures, "ATTEMPTS", 2)
    assert not storage.exists(f"{s3_bucket}/x")
    control(flaky, {"cut_at": 3, "cut_seconds": 0.3})
    with pytest.raises(DataError, match="tried 2 times"):
        storage.write_bytes(f"{s3_bucket}/big", DATA)
    time.sleep(0.3)
    control(flaky, {})
    assert not storage.exists(f"{s3_bucket}/big")


def test_what_a_killed_writer_left_is_aborted_by_the_next(s3_bucket: str, small_parts: None) -> None:
    for key in ("big", "bigger"):
        s3_connection().call_s3("create_multipart_upload", Bucket=s3_bucket.removeprefix("s3://"), Key=key)
    storage.write_bytes(f"{s3_bucket}/big", DATA)
    assert uploads(s3_bucket) == ["bigger"]


@pytest.mark.parametrize("is_there", [True, False])
def test_the_lost_answer_of_the_last_request(
    is_there: bool, s3_bucket: str, small_parts: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    connection = s3_connection()
    real = connection._call_s3
    if not is_there:
        put(s3_bucket, ["big"], DATA[::-1])  # somebody else's, of the same size

    async def lost(name: str, *arguments: Any, **request: Any) -> Any:
        if name == "complete_multipart_upload":
            if is_there:
                await real(name, *arguments, **request)
            error = ClientError({"Error": {"Code": "NoSuchUpload", "Message": "no such upload"}}, name)
            raise FileNotFoundError("no such upload") from error
        return await real(name, *arguments, **request)

    monkeypatch.setattr(connection, "_call_s3", lost)
    if is_there:
        storage.write_bytes(f"{s3_bucket}/big", DATA)
        assert storage.read_bytes(f"{s3_bucket}/big") == DATA
    else:
        with pytest.raises(DataError):
            storage.write_bytes(f"{s3_bucket}/big", DATA)


# Accidents on the way.


@pytest.mark.parametrize("kind", KINDS)
def test_every_accident_on_the_way_is_survived(kind: str, flaky: str, s3_bucket: str, hurried: None) -> None:
    uri, data = f"{s3_bucket}/folder/file", os.urandom(200_000)
    for number in range(2):
        storage.write_bytes(f"{uri}-{number}", data)
    control(flaky, {"seed": kind, "rate": 0.3, "kinds": [kind]})
    for number in range(2):
        name = f"{uri}-{number}"
        storage.write_bytes(name, data)
        assert storage.read_bytes(name) == data
        assert storage.read_bytes(name, 1000, 5000) == data[1000:5000]
        with storage.open_input(name) as file:
            file.seek(150_000)
            assert file.read() == data[150_000:]
        with storage.local_copy(name) as path:
            assert path.read_bytes() == data
        assert [found.size for found in storage.walk(f"{s3_bucket}/folder")] == [len(data)] * (2 - number)
        storage.remove(name)
        assert storage.stat(name) is None
        version = storage.put_if_match(name + "-lock", b"one", None)
        assert version is not None
        assert storage.put_if_match(name + "-lock", b"two", version) is not None
        storage.remove_tree(name + "-lock")
    if kind != "slow":
        assert sum(control(flaky)["happened"].values()) >= 3


def test_a_store_that_is_away_for_a_while(flaky: str, s3_bucket: str) -> None:
    storage.write_bytes(f"{s3_bucket}/a", b"a")
    control(flaky, {"cut_at": 0, "cut_seconds": 1.0})
    started = time.monotonic()
    assert storage.read_bytes(f"{s3_bucket}/a") == b"a"
    assert time.monotonic() - started >= 1.0


@pytest.mark.parametrize(("kind", "words"), [("503", "reduce your request rate"), ("reset_before", "cannot reach")])
def test_a_store_that_stays_away_is_one_line_after_one_layer_of_tries(
    kind: str, words: str, flaky: str, s3_bucket: str, hurried: None
) -> None:
    assert not storage.exists(f"{s3_bucket}/a")
    control(flaky, {"rate": 1.0, "kinds": [kind]})
    with pytest.raises(DataError, match=f"{words}.*tried {failures.ATTEMPTS} times") as caught:
        storage.read_bytes(f"{s3_bucket}/a")
    assert str(caught.value).startswith(f"{s3_bucket}/a: ")
    assert "\n" not in str(caught.value)
    # aiohttp sends a GET once more where a connection that was kept open breaks.
    assert control(flaky)["requests"] == failures.ATTEMPTS * (1 if kind == "503" else 2)
    with pytest.raises(DataError, match=f"tried {failures.ATTEMPTS} times"):
        storage.write_bytes(f"{s3_bucket}/a", b"")


def test_denied_while_reading_is_about_one_object(s3_bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def deny(*_: object) -> None:
        raise PermissionError("Access Denied")

    monkeypatch.setattr(s3_connection(), "get_object", deny)
    with pytest.raises(UnreadableError, match="access denied"):
        storage.read_bytes(f"{s3_bucket}/x")
