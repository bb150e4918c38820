"""Compare and swap of one small file: whoever writes must have read what is there now.

A local folder is locked for the moment between looking and replacing. An object store is asked to compare for itself
(`If-None-Match`, `If-Match`). One that ignores the question is found out by asking what it must refuse; there, a write
counts if it is still there after a while.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from botocore import exceptions as aws

from rayclust.store import filesystem, local, s3
from rayclust.store.connection import call, get
from rayclust.store.patience import codes
from rayclust.store.storage import MissingError

SETTLE_SECONDS = 2.0
"""Where the store cannot compare: how long another's write may still be under way. Longer than a slow request."""

_REFUSED = frozenset({"PreconditionFailed", "ConditionalRequestConflict", "412", "409"})
_NOT_KNOWN = frozenset({"NotImplemented", "501"})
_CHANGED = ""
"""What a refused write gives instead of a stamp."""

_comparing: set[tuple[str, str]] = set()
"""Endpoints and buckets that have been seen to refuse what they must refuse."""


def read(uri: str) -> tuple[bytes, str] | None:
    """The content of a file and its stamp, which `swap` wants to see; None where there is no file.

    Raises:
        DataError: it cannot be read.
    """
    try:
        if not filesystem.is_remote(uri):
            data = filesystem.read_bytes(uri)
            return data, _digest(data)
        with s3.translated(uri, "read"):
            return get(*s3.split(uri))
    except MissingError as error:
        if "NoSuchBucket" in codes(error):
            raise
        return None


def swap(uri: str, stamp: str | None, data: bytes) -> str | None:
    """Replaces the file that carries `stamp`; with None, makes one where there is none.

    Returns:
        The new stamp; None where somebody else was first, and nothing was written.

    Raises:
        DataError: it cannot be written.
    """
    if filesystem.is_remote(uri):
        return _swap_object(uri, stamp, data)
    with _locked(uri):
        if _stamp(uri) != stamp:
            return None
        filesystem.write_bytes(uri, data)
        return _digest(data)


@contextmanager
def _locked(uri: str) -> Iterator[None]:
    """Locks the file's folder against other processes; no lock file is left behind."""
    folder = local.to_path(uri).parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(folder, os.O_RDONLY)
    except OSError as error:
        raise local.translate(error, uri, "write") from error
    try:
        with suppress(OSError):  # some network drives lock no folders: there the moment is only short
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)  # lets go of the lock too


def _swap_object(uri: str, stamp: str | None, data: bytes) -> str | None:
    place = (str(s3.client().s3.meta.endpoint_url), s3.split(uri)[0])
    is_fresh = stamp is None and place in _comparing  # then one request is enough; some stores compare no ETags
    if not is_fresh and _stamp(uri) != stamp:
        return None
    written = _put(uri, data, {"IfNoneMatch": "*"} if stamp is None else {"IfMatch": stamp})
    if written == _CHANGED:
        return _stamp_of(uri, data)  # a request that was sent again is refused because of itself
    if place in _comparing:
        return written
    if written is not None and _put(uri, data, {"IfNoneMatch": "*"}) == _CHANGED:
        _comparing.add(place)
        return written
    if written is None:
        _put(uri, data, {})
    time.sleep(SETTLE_SECONDS)
    return _stamp_of(uri, data)


def _put(uri: str, data: bytes, condition: dict[str, str]) -> str | None:
    """Writes an object under a condition: its stamp, `_CHANGED` where refused, None where conditions are not known."""
    bucket, key = s3.split(uri)
    with s3.translated(uri, "write"):
        try:
            answer = call("put_object", Bucket=bucket, Key=key, Body=data, **condition)
        except (OSError, aws.ClientError) as error:
            found = codes(error)
            if found & _REFUSED or ("NoSuchKey" in found and condition):
                return _CHANGED
            if found & _NOT_KNOWN and condition:
                return None
            raise
    return str(answer["ETag"])


def _stamp(uri: str) -> str | None:
    found = read(uri)
    return found[1] if found else None


def _stamp_of(uri: str, data: bytes) -> str | None:
    """The stamp of the file if it holds `data`."""
    found = read(uri)
    return found[1] if found and found[0] == data else None


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
