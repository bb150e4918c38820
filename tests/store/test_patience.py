from __future__ import annotations

import pytest
from botocore import exceptions as aws

from rayclust.store import patience
from rayclust.store.patience import BrokenBodyError, ExhaustedError, codes, is_passing, patiently


@pytest.fixture(autouse=True)
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """What would have been slept."""
    found: list[float] = []
    monkeypatch.setattr(patience.time, "sleep", found.append)
    return found


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
        BrokenBodyError("half"),
        aws.ReadTimeoutError(endpoint_url="http://x"),
        aws.EndpointConnectionError(endpoint_url="http://x"),
        aws.ConnectionClosedError(endpoint_url="http://x"),
        aws.IncompleteReadError(actual_bytes=1, expected_bytes=2),
        aws.FlexibleChecksumError(error_msg="crc32"),
    ],
)
def test_what_passes_by_itself_is_tried_again(error: Exception, pauses: list[float]):
    assert is_passing(error)
    errors = [error, error]

    def request() -> str:
        if errors:
            raise errors.pop()
        return "done"

    assert patiently(request) == "done"
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
def test_what_does_not_pass_is_said_at_once(error: Exception, pauses: list[float]):
    assert not is_passing(error)
    with pytest.raises(type(error)):
        patiently(lambda: (_ for _ in ()).throw(error))
    assert pauses == []


def test_pauses_double_up_to_a_bound_and_patience_ends(pauses: list[float]):
    def request() -> None:
        raise TimeoutError("never")

    with pytest.raises(ExhaustedError, match=f"tried {patience.ATTEMPTS} times") as caught:
        patiently(request)
    assert isinstance(caught.value.__cause__, TimeoutError)
    assert len(pauses) == patience.ATTEMPTS - 1
    bounds = [min(patience.FIRST_PAUSE * 2**i, patience.LONGEST_PAUSE) for i in range(len(pauses))]
    assert all(bound / 2 <= pause <= bound for pause, bound in zip(pauses, bounds, strict=True))
    assert len(set(pauses)) == len(pauses)  # drawn, not fixed


def test_a_deadline_ends_it_earlier(monkeypatch: pytest.MonkeyPatch, pauses: list[float]):
    clock = iter(range(0, 10_000, 100))
    monkeypatch.setattr(patience.time, "monotonic", lambda: float(next(clock)))
    with pytest.raises(ExhaustedError, match=r"tried 2 times in 200 s"):
        patiently(lambda: (_ for _ in ()).throw(TimeoutError()))


def test_codes_are_found_however_deep():
    assert codes(wrapped(client_error("NoSuchUpload", 404))) == {"NoSuchUpload", "404"}
    assert codes(ValueError()) == set()
