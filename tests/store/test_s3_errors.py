from __future__ import annotations

import pytest
from botocore import exceptions as aws

from rayclust.errors import DataError
from rayclust.store import filesystem
from rayclust.store.patience import ExhaustedError
from rayclust.store.s3_errors import split, translate, without_secrets
from rayclust.store.storage import UnreadableError


def test_bucket_and_key():
    assert split("s3://bucket/a/b") == ("bucket", "a/b")
    assert split("s3://bucket") == ("bucket", "")


@pytest.mark.parametrize("uri", ["s3://key:hunter2secret@bucket/x", "s3://hunter2secret@bucket"])
def test_a_login_in_a_uri_is_refused_and_not_repeated(uri: str):
    with pytest.raises(DataError, match="holds no login") as caught:
        filesystem.read_bytes(uri)
    assert "hunter2" not in str(caught.value)


def test_no_secret_in_a_line(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hunter2secret")
    monkeypatch.setenv("AWS_SESSION_TOKEN", "hunter2token")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://me:hunter2password@store:9000")
    text = "hunter2secret and hunter2token at http://me:hunter2password@store:9000/x"
    assert without_secrets(text) == "<AWS_SECRET_ACCESS_KEY> and <AWS_SESSION_TOKEN> at //store:9000/x".replace(
        "//", "http://"
    )
    found = translate(aws.EndpointConnectionError(endpoint_url=text), "s3://b/k", "read")
    assert "hunter2" not in str(found)
    assert "http://store:9000" in str(found)


def test_patience_that_ran_out_names_the_cause():
    error = ExhaustedError(12, 41.2)
    error.__cause__ = OSError(16, "Please reduce your request rate")
    line = str(translate(error, "s3://b/k", "write"))
    assert line == "s3://b/k: cannot write: [Errno 16] Please reduce your request rate (tried 12 times in 41 s)"


@pytest.mark.parametrize(
    ("code", "status", "kind", "words"),
    [
        ("RequestTimeTooSkewed", 403, DataError, "clock"),
        ("PreconditionFailed", 412, UnreadableError, "changed while it was read"),
        ("InvalidObjectState", 403, DataError, "cannot read"),
    ],
)
def test_answers_that_need_words_of_their_own(code: str, status: int, kind: type[DataError], words: str):
    answer = {"Error": {"Code": code, "Message": code}, "ResponseMetadata": {"HTTPStatusCode": status}}
    found = translate(aws.ClientError(answer, "GetObject"), "s3://b/k", "read")
    assert type(found) is kind
    assert words in str(found)


def test_an_object_that_is_replaced_while_it_is_read(s3_bucket: str):
    uri = f"{s3_bucket}/a"
    filesystem.write_bytes(uri, b"0123456789" * 300_000)
    with filesystem.open_input(uri) as file:
        file.read(10)
        filesystem.write_bytes(uri, b"9876543210" * 300_000)
        file.seek(2_500_000)
        with pytest.raises(UnreadableError, match="changed while it was read"):
            file.read(10)
