"""Trying again: which errors of a store pass by themselves, how long to wait between tries, and when to give up."""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from botocore import exceptions as aws

logger = logging.getLogger(__name__)

Result = TypeVar("Result")

ATTEMPTS = 12
"""Tries of one request."""
FIRST_PAUSE, LONGEST_PAUSE = 0.1, 10.0
"""Seconds; the bound on a pause doubles from the one to the other: 40 s in all on average, and 53 at most."""
DEADLINE = 180.0
"""Seconds after which a request that still fails is not tried again, whatever its tries were spent on."""

_PASSING_CODES = frozenset(
    {
        *("408", "429", "500", "502", "503", "504"),
        *("SlowDown", "InternalError", "ServiceUnavailable", "RequestTimeout", "OperationAborted"),
        *("Throttling", "ThrottlingException", "TooManyRequests", "RequestLimitExceeded"),
        *("BadDigest", "IncompleteBody", "XAmzContentSHA256Mismatch"),  # what was sent did not arrive as it was
    }
)
_PASSING_ERRORS = (
    ConnectionError,
    TimeoutError,
    aws.ConnectionError,
    aws.HTTPClientError,
    aws.ResponseStreamingError,
    aws.IncompleteReadError,
    aws.FlexibleChecksumError,
    aws.ChecksumError,
)
_NETWORK_PACKAGES = ("aiohttp.",)
_LASTING_ERRORS = (aws.ProxyConnectionError, aws.SSLError)


class BrokenBodyError(ConnectionError):
    """What arrived is not what the store said it would send."""


class ExhaustedError(Exception):
    """A request failed until patience ran out; its cause is the last failure."""

    def __init__(self, attempts: int, seconds: float) -> None:
        super().__init__(f"tried {attempts} times in {seconds:.0f} s")


def patiently(request: Callable[[], Result]) -> Result:
    """Calls `request` until it succeeds, fails for good, or has failed for too long.

    The pause before try i + 1 is drawn between half of its bound and the bound, so that many workers that failed
    together do not come back together.

    Raises:
        ExhaustedError: every try failed in a way that might have passed.
        Exception: whatever the request raises that will not pass.
    """
    started, bound = time.monotonic(), FIRST_PAUSE
    for attempt in range(1, ATTEMPTS + 1):
        try:
            return request()
        except Exception as error:
            if not is_passing(error):
                raise
            seconds = time.monotonic() - started
            if attempt == ATTEMPTS or seconds + bound > DEADLINE:
                raise ExhaustedError(attempt, seconds) from error
            logger.debug("try %d of %d failed: %s: %s", attempt, ATTEMPTS, type(error).__name__, error)
        time.sleep(random.uniform(bound / 2, bound))
        bound = min(2 * bound, LONGEST_PAUSE)
    raise AssertionError("unreachable")


def is_passing(error: BaseException) -> bool:
    """Whether the same request may succeed a moment later: the store is busy, or the network broke."""
    chain = list(_causes(error))
    if any(isinstance(each, _LASTING_ERRORS) for each in chain):
        return False
    return bool(codes(error) & _PASSING_CODES) or any(
        isinstance(each, _PASSING_ERRORS) or type(each).__module__.startswith(_NETWORK_PACKAGES) for each in chain
    )


def codes(error: BaseException) -> set[str]:
    """S3's names and numbers for what went wrong, whatever it was wrapped in."""
    found = set[str]()
    for each in _causes(error):
        response: Any = getattr(each, "response", None)
        if isinstance(response, dict):
            found.add(str(response.get("Error", {}).get("Code", "")))
            found.add(str(response.get("ResponseMetadata", {}).get("HTTPStatusCode", "")))
    return found


def _causes(error: BaseException) -> Iterator[BaseException]:
    current: BaseException | None = error
    while current is not None:
        yield current
        current = current.__cause__
