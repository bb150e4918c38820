"""Object storage by fsspec: the filesystem behind a URI, what it knows of an object, listings, reading ahead."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from datetime import datetime
from typing import Any, TypeVar, cast

from rayclust.errors import DataError
from rayclust.store.failures import names, translated

Item = TypeVar("Item")
Result = TypeVar("Result")

SCHEMES = ("s3", "gs", "abfs", "hf", "memory")
"""Schemes of remote storage. The extras of rayclust that bring `gs`, `abfs` and `hf` are named after them."""


@dataclass(frozen=True)
class FileStat:
    """One file or object as a listing shows it."""

    key: str
    """Path relative to the folder that was listed, with `/` between its parts."""
    uri: str
    """Where to read it."""
    size: int
    """Bytes; `storage.CLOSED_FOLDER` for a folder that may not be listed."""
    stamp: str
    """Changes whenever the content does: size with the ETag, or with the time of change in nanoseconds."""


def check_scheme(uri: str) -> None:
    """Refuse a remote URI of another scheme, or with a login in it.

    Raises:
        DataError: it is one.
    """
    scheme, _, path = uri.partition("://")
    bucket = path.partition("/")[0]
    if scheme not in SCHEMES:
        raise DataError(
            f"{uri}: {scheme}:// is not supported; only local paths, file://, s3://, gs://, abfs:// and hf:// are"
        )
    if scheme == "s3" and ("@" in bucket or ":" in bucket):  # not repeated in the message: it may hold a secret
        raise DataError("s3://…@…: a bucket's name holds no login; credentials come from the AWS variables and files")


def filesystem(uri: str) -> tuple[Any, str]:
    """Return the fsspec filesystem of a remote URI and the path in it.

    Raises:
        DataError: it names no bucket, or its scheme's extra is not installed.
    """
    check_scheme(uri)
    scheme, _, path = uri.partition("://")
    if not path.partition("/")[0]:
        raise DataError(f"{uri}: names no bucket; write {scheme}://bucket/path")
    if scheme == "s3":
        from rayclust.store import s3  # takes every process half a second, so only where there is S3

        variables = {name: value for name, value in os.environ.items() if name.startswith("AWS_")}
        return s3.connect(os.getpid(), tuple(sorted(variables.items()))), path
    import fsspec

    try:
        fs = fsspec.filesystem(scheme, use_listings_cache=False)  # another worker may have written since
    except ImportError as error:
        raise DataError(f"{uri}: install rayclust[{scheme}] to use {scheme}://") from error
    return fs, fs._strip_protocol(uri)


def info_of(uri: str) -> dict[str, Any] | None:
    """Return fsspec's properties of a remote file or folder; None where there is neither."""
    with translated(uri, "read"):
        fs, path = filesystem(uri)
        try:
            return cast(dict[str, Any], fs.info(path))
        except FileNotFoundError as error:
            if "NoSuchBucket" in names(error):
                raise
            return None


def remote_stat(key: str, uri: str, info: dict[str, Any]) -> FileStat:
    """Return the entry of a listing for fsspec's properties of an object."""
    version = next((info[name] for name in ("ETag", "etag", "blob_id", "created") if info.get(name)), "")
    version = version.timestamp() if isinstance(version, datetime) else str(version).strip('"')
    return FileStat(key, uri, int(info["size"]), f"{info['size']}-{version}")


def list_objects(uri: str) -> Iterator[FileStat]:
    """Yield every object below a remote folder in order of the keys' UTF-8 bytes, as S3 lists them."""
    base = uri.rstrip("/")
    with translated(uri, "list"):
        fs, folder = filesystem(base)
        if base.startswith("s3://"):
            found = fs.list_objects(folder)
        else:
            found = iter(sorted(fs.find(folder, detail=True).items(), key=lambda item: item[0].encode()))
        for path, info in found:
            if path.startswith(f"{folder}/"):
                key = path[len(folder) + 1 :]
                yield remote_stat(key, f"{base}/{key}", info)


def prefetch(
    function: Callable[[Item], Result], items: Iterable[Item], ahead: int, *, threads: int | None = None
) -> Iterator[tuple[Item, Result]]:
    """Yield `(item, function(item))` in order of `items`, computed ahead in threads to hide the latency of storage.

    Args:
        function: may be called from several threads at once; its errors are raised at the place of their item.
        items: taken lazily.
        ahead: bound on calls under way and results held, together; 1 calls in the caller's thread, one by one.
        threads: that call; as many as `ahead` if absent.
    """
    if ahead <= 1:
        for item in items:
            yield item, function(item)
        return
    pool = ThreadPoolExecutor(threads or ahead, thread_name_prefix="prefetch")
    running: deque[tuple[Item, Future[Result]]] = deque()
    try:
        for item in items:
            running.append((item, pool.submit(function, item)))
            if len(running) == ahead:
                first, result = running.popleft()
                yield first, result.result()
        while running:
            first, result = running.popleft()
            yield first, result.result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
