from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from types import SimpleNamespace

import pytest
from botocore import exceptions as aws

from rayclust.errors import DataError
from rayclust.store import failures
from rayclust.store.failures import (
    ExhaustedError,
    MissingError,
    UnreadableError,
    names,
    retry,
    translate,
    translated,
    without_secrets,
)


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """What would have been slept."""
    found: list[float] = []

    async def sleep(seconds: float) -> None:
        found.append(seconds)

    monkeypatch.setattr(failures, "asyncio", SimpleNamespace(sleep=sleep))
    return found


def failing(*errors: Exception) -> Callable[[], Awaitable[str]]:
    """A request that fails with one error after the other, then succeeds."""
    left = list(errors)

    async def request() -> str:
        if left:
            raise left.pop(0)
        return "done"

    return request


def run(request: Callable[[], Awaitable[str]]) -> str:
    async def once() -> str:
        return await request()

    return asyncio.run(once())


def client_error(code: str, status: int) -> aws.ClientError:
    return aws.ClientError({"Error": {"Code": code}, "ResponseMetadata": {"HTTPStatusCode": status}}, "GetObject")


def wrapped(error: Exception) -> OSError:
    """As s3fs hands errors on."""
    try:
        raise OSError(16, "Please reduce your request rate") from error
    except OSError as found:
        return found


@pytest.mark.parametrize(
    "error",
    [
        client_error("SlowDown", 503),
        client_error("InternalError", 500),
        client_error("", 502),
        wrapped(client_error("RequestTimeout", 400)),
        ConnectionResetError(),
        TimeoutError(),
        aws.ReadTimeoutError(endpoint_url="http://x"),
        aws.EndpointConnectionError(endpoint_url="http://x"),
        aws.ConnectionClosedError(endpoint_url="http://x"),
        aws.IncompleteReadError(actual_bytes=1, expected_bytes=2),
        aws.FlexibleChecksumError(error_msg="crc32"),
    ],
)
def test_a_failure_that_may_pass_is_tried_again(error: Exception, pauses: list[float]) -> None:
    assert run(retry(failing(error, error))) == "done"
    assert len(pauses) == 2


@pytest.mark.parametrize(
    "error",
    [
        client_error("AccessDenied", 403),
        client_error("NoSuchKey", 404),
        client_error("PreconditionFailed", 412),
        client_error("NotImplemented", 501),
        client_error("RequestTimeTooSkewed", 403),
        aws.NoCredentialsError(),
        aws.SSLError(endpoint_url="https://x", error="certificate"),
        FileNotFoundError(),
        PermissionError(),
        ValueError("anything else"),
    ],
)
def test_any_other_failure_is_raised_at_once(error: Exception, pauses: list[float]) -> None:
    with pytest.raises(type(error)):
        run(retry(failing(error)))
    assert pauses == []


def test_pauses_double_up_to_a_bound_and_tries_end(pauses: list[float]) -> None:
    request = retry(failing(*[client_error("SlowDown", 503)] * 99))
    with pytest.raises(ExhaustedError, match=f"tried {failures.ATTEMPTS} times") as caught:
        run(request)
    assert isinstance(caught.value.__cause__, aws.ClientError)
    assert len(pauses) == failures.ATTEMPTS - 1
    bounds = [min(failures.FIRST_PAUSE * 2**i, failures.LONGEST_PAUSE) for i in range(len(pauses))]
    assert all(bound / 2 <= pause <= bound for pause, bound in zip(pauses, bounds, strict=True))
    assert len(set(pauses)) == len(pauses)  # drawn, not fixed


def test_a_deadline_ends_tries_earlier_and_an_endpoint_that_never_answered_has_a_shorter_one(
    monkeypatch: pytest.MonkeyPatch, pauses: list[float]
) -> None:
    clock = iter(range(0, 10_000, 4))
    monkeypatch.setattr(failures, "time", SimpleNamespace(monotonic=lambda: float(next(clock))))
    with pytest.raises(ExhaustedError, match="tried 2 times in 8 s"):
        run(retry(failing(*[TimeoutError()] * 99)))
    monkeypatch.setattr(failures, "DEADLINE", 20.0)
    for answer in (failing(*[client_error("", 503)] * 99), failing(client_error("", 503), *[TimeoutError()] * 99)):
        with pytest.raises(ExhaustedError, match="tried 5 times in 20 s"):
            run(retry(answer))
    monkeypatch.setattr(failures, "FIRST_CONTACT", 1.0)
    with pytest.raises(ExhaustedError, match="tried once in 4 s"):
        run(retry(failing(*[TimeoutError()] * 99)))


def test_names_are_found_however_deep() -> None:
    assert {"NoSuchUpload", "404", "OSError", "ClientError"} <= names(wrapped(client_error("NoSuchUpload", 404)))
    assert names(ValueError()) == {"ValueError", "Exception", "BaseException", "object"}


LOCAL, REMOTE = "/data/x", "s3://bucket/key"


@pytest.mark.parametrize(
    ("error", "uri", "kind", "words"),
    [
        (FileNotFoundError(2, "No such file"), LOCAL, MissingError, "no such file or folder; check the path"),
        (PermissionError(13, "Permission denied"), LOCAL, UnreadableError, "permission denied to read"),
        (IsADirectoryError(21, "Is a directory"), LOCAL, UnreadableError, "is a folder"),
        (NotADirectoryError(20, "Not a directory"), LOCAL, DataError, "is a file"),
        (OSError(28, "No space left on device"), LOCAL, DataError, "no space left on the device; free some"),
        (OSError(5, "Input/output error"), LOCAL, UnreadableError, "cannot read: Input/output error"),
        (ValueError("embedded null byte"), LOCAL, UnreadableError, "embedded null byte"),
        (PermissionError("Access Denied"), REMOTE, UnreadableError, "access denied to read: Access Denied"),
        (FileNotFoundError("The bucket does not exist"), REMOTE, MissingError, "no such object or bucket"),
        (aws.NoCredentialsError(), REMOTE, DataError, "no AWS credentials"),
        (aws.ReadTimeoutError(endpoint_url="http://x"), REMOTE, DataError, "cannot reach the S3 endpoint"),
        (TimeoutError(), REMOTE, DataError, "cannot reach"),
        (TimeoutError(), "gs://bucket/key", DataError, "cannot reach the store: TimeoutError; check the network"),
        (OSError(16, "Please reduce your\nrequest rate"), REMOTE, DataError, "reduce your request rate"),
        (client_error("RequestTimeTooSkewed", 403), REMOTE, DataError, "clock"),
        (client_error("PreconditionFailed", 412), REMOTE, UnreadableError, "changed while it was read"),
        (client_error("InvalidObjectState", 403), REMOTE, DataError, "cannot read"),
    ],
)
def test_every_failure_is_one_line_with_the_uri(
    error: Exception, uri: str, kind: type[DataError], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("AWS_ENDPOINT_URL", raising=False)
    with pytest.raises(DataError) as caught, translated(uri, "read"):
        raise error
    assert type(caught.value) is kind
    assert str(caught.value).startswith(f"{uri}: ")
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_mistake_in_the_code_is_not_told_as_a_failure_of_the_store() -> None:
    with pytest.raises(TypeError), translated(REMOTE, "read"):
        raise TypeError("a bug")


def test_tries_that_ran_out_name_the_cause() -> None:
    error = ExhaustedError("tried 12 times in 41 s")
    error.__cause__ = OSError(16, "Please reduce your request rate")
    line = str(translate(error, "s3://b/k", "write"))
    assert line == "s3://b/k: cannot write: [Errno 16] Please reduce your request rate (tried 12 times in 41 s)"


def test_no_secret_in_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hunter2secret")
    monkeypatch.setenv("AWS_SESSION_TOKEN", "hunter2token")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://me:hunter2password@store:9000")
    text = "hunter2secret and hunter2token at http://me:hunter2password@store:9000/x"
    assert without_secrets(text) == "<AWS_SECRET_ACCESS_KEY> and <AWS_SESSION_TOKEN> at http://store:9000/x"
    found = translate(aws.EndpointConnectionError(endpoint_url=text), "s3://b/k", "read")
    assert "hunter2" not in str(found)
    assert "http://store:9000" in str(found)
