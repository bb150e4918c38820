from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import pytest

from rayclust.errors import DataError
from rayclust.store import connection, filesystem, patience
from rayclust.store.connection import call, client, get
from tests.chaos.proxy import KINDS, control


@pytest.fixture
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pauses of milliseconds."""
    monkeypatch.setattr(patience, "FIRST_PAUSE", 0.002)
    monkeypatch.setattr(patience, "LONGEST_PAUSE", 0.02)


@pytest.mark.parametrize("kind", KINDS)
def test_every_accident_on_the_way_is_survived(kind: str, flaky: str, s3_bucket: str, hurried: None):
    uri, data = f"{s3_bucket}/folder/file", os.urandom(200_000)
    for number in range(3):
        filesystem.write_bytes(f"{uri}-{number}", data)
    control(flaky, {"seed": kind, "rate": 0.3, "kinds": [kind]})
    for number in range(3):
        name = f"{uri}-{number}"
        filesystem.write_bytes(name, data)
        assert filesystem.read_bytes(name) == data
        assert filesystem.read_range(name, 1000, 5000) == data[1000:5000]
        with filesystem.open_input(name) as file:
            file.seek(150_000)
            assert file.read() == data[150_000:]
        with filesystem.local_copy(name) as path:
            assert path.read_bytes() == data
        assert [found.size for found in filesystem.walk(f"{s3_bucket}/folder")] == [len(data)] * (3 - number)
        filesystem.remove(name)
        assert filesystem.stat(name) is None
    if kind != "slow":
        assert sum(control(flaky)["happened"].values()) >= 3


def test_a_store_that_is_away_for_a_while(flaky: str, s3_bucket: str):
    filesystem.write_bytes(f"{s3_bucket}/a", b"a")
    control(flaky, {"cut_at": 0, "cut_seconds": 1.5})
    started = time.monotonic()
    assert filesystem.read_bytes(f"{s3_bucket}/a") == b"a"
    assert time.monotonic() - started >= 1.5


@pytest.mark.parametrize(("kind", "words"), [("503", "reduce your request rate"), ("reset_before", "cannot reach")])
def test_a_store_that_stays_away_is_one_line(kind: str, words: str, flaky: str, s3_bucket: str, hurried: None):
    control(flaky, {"rate": 1.0, "kinds": [kind]})
    with pytest.raises(DataError, match=f"{words}.*tried {patience.ATTEMPTS} times") as caught:
        filesystem.read_bytes(f"{s3_bucket}/a")
    assert str(caught.value).startswith(f"{s3_bucket}/a: ")
    assert "\n" not in str(caught.value)


def test_a_store_whose_etags_only_look_like_sums_is_believed_the_second_time(
    s3_bucket: str, monkeypatch: pytest.MonkeyPatch, hurried: None
):
    filesystem.write_bytes(f"{s3_bucket}/a", b"content")
    fetched: list[str] = []
    real = connection._get

    async def strange(*arguments: Any) -> Any:
        body, answer = await real(*arguments)
        fetched.append("a")
        return body, {**answer, "ETag": '"' + 32 * "0" + '"'}

    monkeypatch.setattr(connection, "_get", strange)
    monkeypatch.setattr(connection, "_other_etags", set())
    assert filesystem.read_bytes(f"{s3_bucket}/a") == b"content"
    assert len(fetched) == 2
    assert filesystem.read_bytes(f"{s3_bucket}/a") == b"content"
    assert len(fetched) == 3


def test_body_and_etag_come_together(s3_bucket: str):
    written = filesystem.write_bytes(f"{s3_bucket}/a", b"content")
    body, etag = get(s3_bucket.removeprefix("s3://"), "a")
    assert body == b"content"
    assert written == f"7-{etag[1:-1]}"
    found = filesystem.stat(f"{s3_bucket}/a")
    assert found is not None
    assert found.stamp == written


def test_one_layer_of_retries(s3_bucket: str, flaky: str, monkeypatch: pytest.MonkeyPatch, hurried: None):
    client()
    control(flaky, {"rate": 1.0, "kinds": ["500"]})
    with pytest.raises(patience.ExhaustedError):
        call("head_object", Bucket=s3_bucket.removeprefix("s3://"), Key="a")
    assert control(flaky)["requests"] == patience.ATTEMPTS


def test_requester_pays_and_profiles_come_from_variables(
    s3_bucket: str, s3_endpoint: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
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

    client().s3.meta.events.register("before-send.s3", record)
    filesystem.write_bytes(f"{s3_bucket}/a", b"a")
    assert filesystem.read_bytes(f"{s3_bucket}/a") == b"a"
    assert [found.key for found in filesystem.walk(s3_bucket)] == ["a"]
    assert [str(value) for value in sent] in (["requester"] * 3, ["b'requester'"] * 3)
