"""This process's connection to S3, by the standard AWS variables and files; requests that are tried again."""

from __future__ import annotations

import functools
import hashlib
import os
import re
import socket
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from botocore import exceptions as aws

from rayclust.store.patience import BrokenBodyError, patiently

if TYPE_CHECKING:
    from s3fs import S3FileSystem

PATIENCE_SECONDS = 5.0
"""How long the first contact with an endpoint may fail before a user is told; later requests are tried for longer."""

_SETTINGS: dict[str, Any] = {
    "connect_timeout": 10,
    "read_timeout": 30,
    "max_pool_connections": 64,
    # Requests are tried again in one place, `patience`: layers of retries multiply into hours of a hang.
    "retries": {"mode": "standard", "total_max_attempts": 1},
}
_YES = frozenset({"1", "true", "yes"})
_MD5 = re.compile(r'"([0-9a-f]{32})"')

_other_etags: set[tuple[str, str]] = set()
"""Endpoints and buckets whose ETags look like MD5 and are something else."""


def client() -> S3FileSystem:
    """This process's connection, made anew when an AWS variable changes; credentials come from the AWS chain."""
    settings = tuple(sorted((name, value) for name, value in os.environ.items() if name.startswith("AWS_")))
    return _connect(os.getpid(), settings)


def call(operation: str, **request: Any) -> Any:
    """One request of S3's by its name, such as `head_object`; tried again where that may help."""
    connection = client()  # whose first contact has a patience of its own
    return patiently(lambda: connection.call_s3(operation, **request))


def get(bucket: str, key: str, **request: Any) -> tuple[bytes, str]:
    """The body and ETag of an object, by one request, so that they belong together.

    A body that breaks off, or whose MD5 is not its ETag where that is one, is fetched again.

    Args:
        bucket: its name.
        key: of the object.
        **request: further parameters of `get_object`, such as Range or IfMatch.
    """
    from fsspec.asyn import sync

    seen, connection = set[bytes](), client()

    def fetch() -> tuple[bytes, str]:
        body, answer = sync(connection.loop, _get, connection, bucket, key, request)
        _check_body(bucket, body, answer, seen)
        return body, str(answer.get("ETag", ""))

    return patiently(fetch)


async def _get(connection: S3FileSystem, bucket: str, key: str, request: dict[str, Any]) -> tuple[bytes, Any]:
    answer = await connection._call_s3("get_object", Bucket=bucket, Key=key, **request)
    try:
        return await answer["Body"].read(), answer
    finally:
        answer["Body"].close()


def _check_body(bucket: str, body: bytes, answer: Mapping[str, Any], seen: set[bytes]) -> None:
    """Compares a body with what the store says of it.

    An ETag is the MD5 of the object where it was put at once and not encrypted by a key of one's own. Some stores' only
    look so: the same wrong sum twice means that the object is as it is.
    """
    if len(body) != answer["ContentLength"]:
        raise BrokenBodyError(f"the body broke off after {len(body)} of {answer['ContentLength']} bytes")
    wanted = _MD5.fullmatch(str(answer.get("ETag", "")))
    place = (str(client().s3.meta.endpoint_url), bucket)
    is_whole = "ContentRange" not in answer and answer.get("ServerSideEncryption") in (None, "AES256")
    if wanted is None or not is_whole or "SSECustomerAlgorithm" in answer or place in _other_etags:
        return
    digest = hashlib.md5(body, usedforsecurity=False)
    if digest.hexdigest() == wanted[1]:
        return
    if digest.digest() in seen:
        _other_etags.add(place)
        return
    seen.add(digest.digest())
    raise BrokenBodyError("the body is not the one that its ETag names")


@functools.lru_cache(maxsize=4)
def _connect(pid: int, settings: tuple[tuple[str, str], ...]) -> S3FileSystem:
    # Imported when there is an object store to talk to: it takes every process half a second.
    from s3fs import S3FileSystem

    variables = dict(settings)
    # Listings are never cached: another worker may have written since.
    connection = S3FileSystem(
        anon=variables.get("AWS_NO_SIGN_REQUEST", "").lower() in _YES,
        requester_pays=variables.get("AWS_REQUEST_PAYER", "").lower() == "requester",
        config_kwargs=_SETTINGS,
        use_listings_cache=False,
        skip_instance_cache=True,
    )
    connection.retries = 1
    connection.connect()
    _reach(connection.s3.meta.endpoint_url)
    return connection


def _reach(endpoint: str) -> None:
    """Fails early on an endpoint that nobody answers at, which the retries of a request would take a minute to say."""
    if any(name.lower() in {"http_proxy", "https_proxy", "all_proxy"} for name in os.environ):
        return
    address = urlsplit(endpoint)
    port = address.port or (443 if address.scheme == "https" else 80)
    deadline, pause = time.monotonic() + PATIENCE_SECONDS, 0.1
    while True:
        try:
            with socket.create_connection((address.hostname or "", port), timeout=max(PATIENCE_SECONDS, 1.0)):
                return
        except OSError as error:
            if time.monotonic() + pause > deadline:
                raise aws.EndpointConnectionError(endpoint_url=endpoint, error=error) from error
        time.sleep(pause)
        pause *= 2
