"""Failures of storage: which pass by themselves and are tried again, and the line that a user reads of the others."""

from __future__ import annotations

import asyncio
import errno
import functools
import logging
import os
import random
import re
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Any, ParamSpec, TypeVar

from rayclust.errors import DataError

logger = logging.getLogger(__name__)

P = ParamSpec("P")
Result = TypeVar("Result")

ATTEMPTS = 12
"""Tries of one request to S3; other stores' clients have retries of their own."""
FIRST_PAUSE, LONGEST_PAUSE = 0.1, 10.0
"""Seconds; the bound on a pause doubles from the one to the other: 40 s in all on average, and 53 at most."""
DEADLINE = 180.0
"""Seconds after which a request that still fails is not made again, whatever its tries were spent on."""
FIRST_CONTACT = 5.0
"""The same for an endpoint that has never answered: its address may be wrong."""

_TRANSIENT = frozenset(
    {
        *("408", "429", "500", "502", "503", "504"),
        *("SlowDown", "InternalError", "ServiceUnavailable", "RequestTimeout", "OperationAborted"),
        *("Throttling", "ThrottlingException", "TooManyRequests", "RequestLimitExceeded"),
        *("BadDigest", "IncompleteBody", "XAmzContentSHA256Mismatch"),  # what was sent did not arrive as it was
        *("ConnectionError", "TimeoutError", "HTTPClientError", "ClientConnectionError"),
        *("ClientPayloadError", "IncompleteReadError", "ResponseStreamingError"),  # the body broke off
        *("ChecksumError", "FlexibleChecksumError"),
    }
)
"""Codes, statuses and classes of failures that may pass by themselves."""
_LASTING = frozenset({"ProxyConnectionError", "SSLError"})
"""Classes of failures that do not, though their base class is in `_TRANSIENT`."""
_UNREACHABLE = frozenset({"ConnectionError", "HTTPClientError", "TimeoutError", "ClientConnectionError"})
_CREDENTIALS = frozenset({"NoCredentialsError", "PartialCredentialsError", "CredentialRetrievalError"})
_CLIENTS = ("botocore", "aiobotocore", "aiohttp", "gcsfs", "google", "azure", "adlfs", "huggingface_hub", "httpx")
"""Packages whose exceptions are failures of a store."""
_SECRETS = ("AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_SECURITY_TOKEN", "AWS_ACCESS_KEY_ID")
_LOGIN = re.compile(r"//[^/@\s]*@")


class UnreadableError(DataError):
    """One file cannot be read, while others beside it may be: listings of images go on without it."""


class MissingError(UnreadableError):
    """A file, object, folder or bucket is not there."""


class ExhaustedError(Exception):
    """A request failed at every try; its text is how often, its cause the last failure."""


def names(error: BaseException) -> set[str]:
    """Return the names of an error's classes and S3's codes and statuses, whatever the error was wrapped in."""
    found, chain = set[str](), [error]
    for each in chain:
        found |= {kind.__name__ for kind in type(each).__mro__}
        response: Any = getattr(each, "response", None)
        if isinstance(response, dict):
            found.add(str(response.get("Error", {}).get("Code", "")))
            found.add(str(response.get("ResponseMetadata", {}).get("HTTPStatusCode", "")))
        chain += [each.__cause__] if each.__cause__ else []
    return found


def retry(request: Callable[P, Awaitable[Result]]) -> Callable[P, Awaitable[Result]]:
    """Repeat an asynchronous request until it succeeds, fails for good, or has failed for too long.

    The pause before try i + 1 is drawn between half of its bound and the bound, so that many workers that failed
    together do not come back together.

    Raises:
        ExhaustedError: every try failed in a way that might have passed.
        Exception: whatever the request raises that will not pass.
    """
    has_answered = False

    @functools.wraps(request)
    async def repeated(*args: P.args, **kwargs: P.kwargs) -> Result:
        nonlocal has_answered
        started, bound = time.monotonic(), FIRST_PAUSE
        for attempt in range(1, ATTEMPTS + 1):
            try:
                answer = await request(*args, **kwargs)
            except Exception as error:
                found = names(error)
                has_answered = has_answered or any(name.isdigit() for name in found)
                if not found & _TRANSIENT or found & _LASTING:
                    raise
                seconds = time.monotonic() - started
                if attempt == ATTEMPTS or seconds + bound > (DEADLINE if has_answered else FIRST_CONTACT):
                    times = "once" if attempt == 1 else f"{attempt} times"
                    raise ExhaustedError(f"tried {times} in {seconds:.0f} s") from error
                logger.debug("try %d of %d failed: %s: %s", attempt, ATTEMPTS, type(error).__name__, error)
            else:
                has_answered = True
                return answer
            await asyncio.sleep(random.uniform(bound / 2, bound))
            bound = min(2 * bound, LONGEST_PAUSE)
        raise AssertionError("unreachable")

    return repeated


@contextmanager
def translated(uri: str, action: str) -> Iterator[None]:
    """Make every failure of the operating system or of a store inside one of rayclust's errors; see `translate`."""
    try:
        yield
    except DataError:
        raise
    except Exception as error:
        package = type(error).__module__.partition(".")[0]
        if isinstance(error, OSError | ValueError | ExhaustedError) or package in _CLIENTS:
            raise translate(error, uri, action) from error
        raise


def translate(error: Exception, uri: str, action: str) -> DataError:
    """Return the error for users, one line without secrets, of a file or bucket that could not be used.

    Args:
        error: raised by the operating system, a store's client or `retry`.
        uri: the file, object or folder.
        action: the verb that failed: read, write, list, remove.
    """
    if isinstance(error, ExhaustedError) and isinstance(error.__cause__, Exception):
        found = translate(error.__cause__, uri, action)
        return type(found)(f"{found} ({error})")
    scheme, separator, path = uri.partition("://")
    if separator and "/" not in scheme and scheme != "file":
        return _translate_remote(error, uri, action, path.partition("/")[0])
    if isinstance(error, FileNotFoundError):
        return MissingError(f"{uri}: no such file or folder; check the path")
    if isinstance(error, IsADirectoryError):
        return UnreadableError(f"{uri}: is a folder where a file is needed")
    if isinstance(error, NotADirectoryError | FileExistsError):
        return DataError(f"{uri}: a part of the path is a file where a folder is needed")
    if isinstance(error, PermissionError):
        advice = "check the owner and mode of the file and its folder"
        return UnreadableError(f"{uri}: permission denied to {action}; {advice}")
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return DataError(f"{uri}: no space left on the device; free some, or choose another folder")
    reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return UnreadableError(f"{uri}: cannot {action}: {reason}")


def _translate_remote(error: Exception, uri: str, action: str, bucket: str) -> DataError:
    found, line = names(error), without_secrets(" ".join(str(error).split())) or type(error).__name__
    if isinstance(error, FileNotFoundError):
        return MissingError(f"{uri}: no such object or bucket; check the path, the region and that {bucket} exists")
    if "RequestTimeTooSkewed" in found:
        return DataError(f"{uri}: cannot {action}: this machine's clock and the store's differ too much; set the clock")
    if "412" in found:
        return UnreadableError(f"{uri}: changed while it was read; run again when it is at rest")
    if isinstance(error, PermissionError):
        return UnreadableError(f"{uri}: access denied to {action}: {line}; check the credentials and bucket policy")
    if found & _CREDENTIALS:
        credentials = "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE"
        return DataError(f"{uri}: no AWS credentials found; {credentials} (AWS_NO_SIGN_REQUEST=1 reads public buckets)")
    if "ProfileNotFound" in found:
        return DataError(f"{uri}: {line}; check AWS_PROFILE and the AWS config file")
    if found & _UNREACHABLE and uri.startswith("s3://"):
        endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
        where = f"the endpoint {without_secrets(endpoint)}" if endpoint else "the S3 endpoint"
        return DataError(f"{uri}: cannot reach {where}: {line}; check AWS_ENDPOINT_URL, AWS_REGION and the network")
    if found & _UNREACHABLE:
        return DataError(f"{uri}: cannot reach the store: {line}; check the network")
    return DataError(f"{uri}: cannot {action}: {line}")


def without_secrets(text: str) -> str:
    """Return `text` without the values of the AWS variables that are secret, and without logins in URLs."""
    for name in _SECRETS:
        value = os.environ.get(name, "")
        if len(value) >= 8:  # a shorter one, of a mock, is part of other words
            text = text.replace(value, f"<{name}>")
    return _LOGIN.sub("//", text)
