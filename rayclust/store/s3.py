"""Objects of S3 and of what speaks like it, configured by the standard AWS variables and files."""

from __future__ import annotations

import functools
import io
import os
import socket
import tempfile
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, cast
from urllib.parse import urlsplit

from botocore import exceptions as aws
from s3fs import S3FileSystem

from rayclust.errors import DataError
from rayclust.store.storage import FileStat, MissingError, UnreadableError, is_hidden

SCHEME = "s3://"
_BLOCK = 8 << 20
_READ_AHEAD = 1 << 20
_SETTINGS: dict[str, Any] = {
    "connect_timeout": 10,
    "read_timeout": 30,
    "max_pool_connections": 64,
    "retries": {"mode": "standard", "total_max_attempts": 10},
}
PATIENCE_SECONDS = 5.0
"""How long the first contact with an endpoint may fail before a user is told; later calls retry for about a minute."""


def split(uri: str) -> tuple[str, str]:
    """Bucket and key of an `s3://` URI.

    Raises:
        DataError: there is no bucket in it.
    """
    bucket, _, key = uri.removeprefix(SCHEME).partition("/")
    if not bucket:
        raise DataError(f"{uri}: names no bucket; write s3://bucket/path")
    return bucket, key


def client() -> S3FileSystem:
    """This process's connection, made anew when an AWS variable changes; credentials come from the AWS chain."""
    settings = tuple(sorted((name, value) for name, value in os.environ.items() if name.startswith("AWS_")))
    return _connect(os.getpid(), settings)


@functools.lru_cache(maxsize=4)
def _connect(pid: int, settings: tuple[tuple[str, str], ...]) -> S3FileSystem:
    # Listings are never cached: another worker may have written since.
    connection = S3FileSystem(
        anon=dict(settings).get("AWS_NO_SIGN_REQUEST", "").lower() in {"1", "true", "yes"},
        config_kwargs=_SETTINGS,
        default_block_size=_BLOCK,
        use_listings_cache=False,
        skip_instance_cache=True,
    )
    connection.retries = 2  # on top of those above, for bodies that break off; its own five would make hours of a hang
    connection.connect()
    _reach(connection.s3.meta.endpoint_url)
    return connection


def _reach(endpoint: str) -> None:
    """Fails early on an endpoint that nobody answers at, which the retries of every call would take a minute to say."""
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


class S3Storage:
    """Objects below `s3://bucket/prefix`, where a folder is whatever comes before a `/`."""

    def stat(self, uri: str) -> FileStat | None:
        """The object at `uri`, or None."""
        bucket, key = split(uri)
        if not key or key.endswith("/"):
            return None
        with translated(uri, "read"):
            try:
                head = client().call_s3("head_object", Bucket=bucket, Key=key)
            except FileNotFoundError:
                return None
        return _file_stat(key.rpartition("/")[2], uri, int(head["ContentLength"]), head.get("ETag", ""))

    def exists(self, uri: str) -> bool:
        """Whether there is an object, or any object below."""
        return self.stat(uri) is not None or next(_objects(uri, _folder(uri), page=1), None) is not None

    def read(self, uri: str, start: int = 0, end: int | None = None) -> bytes:
        """Bytes from `start` up to `end`, in one request."""
        split(uri)
        with translated(uri, "read"):
            if start == 0 and end is None:
                # One GET, no HEAD before it: a folder of small images is bound by the number of requests.
                return cast(bytes, client().cat_file(uri, max_concurrency=1))
            if end is not None and end <= start:
                return b""
            try:
                return cast(bytes, client().cat_file(uri, start=start, end=end))
            except OSError as error:
                if "range" in str(error).lower():  # an empty object, or a start beyond the end, has no range
                    return b""
                raise

    def write(self, uri: str, data: bytes) -> None:
        """One put, or a multipart upload that appears when complete."""
        with translated(uri, "write"):
            client().pipe_file(uri, data)

    def open(self, uri: str) -> BinaryIO:
        """A buffered file over ranged requests; long reads are one request each."""
        found = self.stat(uri)
        if found is None:
            raise MissingError(f"{uri}: no such object; check the bucket and path")
        return cast(BinaryIO, io.BufferedReader(_RangeFile(uri, found.size, self), _READ_AHEAD))

    def walk(self, uri: str) -> Iterator[FileStat]:
        """One page of the listing in memory; S3 lists in order of keys."""
        prefix = _folder(uri)
        is_missing = bool(prefix)
        for found in _objects(uri, prefix):
            is_missing = False
            key = found["Key"][len(prefix) :]
            if key and not key.endswith("/") and not is_hidden(key):
                yield _file_stat(key, f"{uri.rstrip('/')}/{key}", int(found["Size"]), found.get("ETag", ""))
        if is_missing:
            single = self.stat(uri)
            if single is None:
                raise MissingError(f"{uri}: no such object or folder; check the bucket and path")
            yield single

    def remove(self, uri: str) -> None:
        """Deletes one object."""
        bucket, key = split(uri)
        with translated(uri, "remove"):
            client().call_s3("delete_object", Bucket=bucket, Key=key)

    def remove_tree(self, uri: str) -> None:
        """Deletes the object and all below it, a thousand in one request."""
        bucket, key = split(uri)
        if not key.strip("/"):
            raise DataError(f"{uri}: a whole bucket is not removed; name a folder in it")
        self.remove(uri.rstrip("/"))
        batch: list[dict[str, str]] = []
        for found in _objects(uri, _folder(uri)):
            batch.append({"Key": found["Key"]})
            if len(batch) == 1000:
                self._delete(uri, bucket, batch)
                batch = []
        self._delete(uri, bucket, batch)

    def _delete(self, uri: str, bucket: str, batch: list[dict[str, str]]) -> None:
        if not batch:
            return
        with translated(uri, "remove"):
            answer = client().call_s3("delete_objects", Bucket=bucket, Delete={"Objects": batch, "Quiet": True})
        for failed in answer.get("Errors", []):
            raise DataError(f"{SCHEME}{bucket}/{failed['Key']}: cannot remove: {failed.get('Message', failed['Code'])}")

    def check_writable(self, uri: str) -> None:
        """Puts an empty object below `uri` and deletes it."""
        probe = f"{uri.rstrip('/')}/.rayclust-{uuid.uuid4().hex}.tmp"
        self.write(probe, b"")
        self.remove(probe)

    @contextmanager
    def local_copy(self, uri: str) -> Iterator[Path]:
        """A temporary file, streamed from the object, removed at the end."""
        with tempfile.TemporaryDirectory(prefix="rayclust-") as folder:
            path = Path(folder) / (uri.rpartition("/")[2][-100:] or "object")
            self.download(uri, path)
            yield path

    def download(self, uri: str, path: Path) -> None:
        """Streams the object to `path`."""
        path.parent.mkdir(parents=True, exist_ok=True)
        with translated(uri, "read"):
            client().get_file(uri, str(path))

    def upload(self, path: Path, uri: str) -> None:
        """Streams `path` in parts."""
        with translated(uri, "write"):
            client().put_file(str(path), uri)


class _RangeFile(io.RawIOBase):
    """An object as a file whose errors are translated, whoever reads it."""

    def __init__(self, uri: str, size: int, storage: S3Storage) -> None:
        super().__init__()
        self._uri, self._size, self._storage, self._position = uri, size, storage, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._position = max(0, offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence])
        return self._position

    def tell(self) -> int:
        return self._position

    def readinto(self, buffer: Any) -> int:
        end = min(self._position + len(buffer), self._size)
        data = self._storage.read(self._uri, self._position, end)
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)


def _folder(uri: str) -> str:
    key = split(uri)[1].rstrip("/")
    return f"{key}/" if key else ""


def _objects(uri: str, prefix: str, page: int = 1000) -> Iterator[dict[str, Any]]:
    """What `list_objects_v2` says of every key that begins with `prefix`, page after page."""
    request = {"Bucket": split(uri)[0], "Prefix": prefix, "MaxKeys": page}
    while True:
        with translated(uri, "list"):
            answer = client().call_s3("list_objects_v2", **request)
        yield from answer.get("Contents", [])
        if not answer.get("IsTruncated"):
            return
        request["ContinuationToken"] = answer["NextContinuationToken"]


def _file_stat(key: str, uri: str, size: int, etag: str) -> FileStat:
    return FileStat(key, uri, size, f"{size}-{etag.strip(chr(34))}")


@contextmanager
def translated(uri: str, action: str) -> Iterator[None]:
    """Makes every error inside one of rayclust's; see `translate`."""
    try:
        yield
    except (DataError, GeneratorExit):
        raise
    except (OSError, aws.BotoCoreError, aws.ClientError, ValueError) as error:
        raise translate(error, uri, action) from error


def translate(error: Exception, uri: str, action: str) -> DataError:
    """The one line that tells a user why a bucket could not be used.

    Args:
        error: what s3fs, botocore or the network raised.
        uri: the object or folder.
        action: the verb that failed: read, write, list, remove.
    """
    bucket = split(uri)[0]
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    credentials = "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE"
    if isinstance(error, FileNotFoundError):
        return MissingError(f"{uri}: no such object or bucket; check the path, the region and that {bucket} exists")
    if isinstance(error, PermissionError):
        return UnreadableError(
            f"{uri}: access denied to {action}: {_line(error)}; check the credentials and bucket policy"
        )
    if isinstance(error, aws.NoCredentialsError | aws.PartialCredentialsError | aws.CredentialRetrievalError):
        return DataError(f"{uri}: no AWS credentials found; {credentials} (AWS_NO_SIGN_REQUEST=1 reads public buckets)")
    if isinstance(error, aws.ProfileNotFound):
        return DataError(f"{uri}: {_line(error)}; check AWS_PROFILE and the AWS config file")
    if isinstance(error, aws.ConnectionError | aws.HTTPClientError | ConnectionError | TimeoutError):
        where = f"the endpoint {endpoint}" if endpoint else "the S3 endpoint"
        return DataError(
            f"{uri}: cannot reach {where}: {_line(error)}; check AWS_ENDPOINT_URL, AWS_REGION and the network"
        )
    return DataError(f"{uri}: cannot {action}: {_line(error)}")


def _line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
