"""Objects of S3 and of what speaks like it, configured by the standard AWS variables and files."""

from __future__ import annotations

import io
import tempfile
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, cast

from botocore import exceptions as aws

from rayclust.errors import DataError
from rayclust.store import local, multipart
from rayclust.store.connection import call, client, get
from rayclust.store.patience import codes
from rayclust.store.s3_errors import SCHEME, split, translate, translated
from rayclust.store.storage import FileStat, MissingError, is_hidden

__all__ = ["SCHEME", "client", "split", "translate", "translated"]

_READ_AHEAD = 1 << 20
_DOWNLOAD_BLOCK = 32 << 20
_NO_RANGE = frozenset({"InvalidRange", "416"})


class S3Storage:
    """Objects below `s3://bucket/prefix`, where a folder is whatever comes before a `/`."""

    def stat(self, uri: str) -> FileStat | None:
        """The object at `uri`, or None."""
        bucket, key = split(uri)
        if not key or key.endswith("/"):
            return None
        with translated(uri, "read"):
            try:
                head = call("head_object", Bucket=bucket, Key=key)
            except FileNotFoundError:
                return None
        return _file_stat(key.rpartition("/")[2], uri, int(head["ContentLength"]), head.get("ETag", ""))

    def exists(self, uri: str) -> bool:
        """Whether there is an object, or any object below."""
        return self.stat(uri) is not None or next(_objects(uri, _folder(uri), page=1), None) is not None

    def read(self, uri: str, start: int = 0, end: int | None = None) -> bytes:
        """Bytes from `start` up to `end`, in one request."""
        return self._read(uri, start, end)

    def _read(self, uri: str, start: int, end: int | None, etag: str = "") -> bytes:
        bucket, key = split(uri)
        if end is not None and end <= start:
            return b""
        request = {"Range": f"bytes={start}-{'' if end is None else end - 1}"} if start or end is not None else {}
        if etag:
            request["IfMatch"] = etag
        with translated(uri, "read"):
            try:
                return get(bucket, key, **request)[0]
            except (OSError, aws.ClientError) as error:
                if codes(error) & _NO_RANGE:  # an empty object, or a start beyond the end, has no range
                    return b""
                raise

    def write(self, uri: str, data: bytes) -> str:
        """One put, or an upload in parts that appears when complete."""
        bucket, key = split(uri)
        with translated(uri, "write"):
            etag = multipart.put(bucket, key, len(data), lambda start, end: data[start:end])
        return _stamp(len(data), etag)

    def open(self, uri: str) -> BinaryIO:
        """A buffered file over ranged requests; long reads are one request each."""
        return cast(BinaryIO, io.BufferedReader(_RangeFile(self._known(uri), self._read), _READ_AHEAD))

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
            call("delete_object", Bucket=bucket, Key=key)

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
            answer = call("delete_objects", Bucket=bucket, Delete={"Objects": batch, "Quiet": True})
        for failed in answer.get("Errors", []):
            self.remove(f"{SCHEME}{bucket}/{failed['Key']}")  # again, alone, for as long as the error may pass

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
        """Fetches the object block by block."""
        found = self._known(uri)
        with local.translated(str(path), "write"):
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("wb") as file:
                for start in range(0, found.size, _DOWNLOAD_BLOCK):
                    file.write(self._read(uri, start, min(start + _DOWNLOAD_BLOCK, found.size), _etag(found)))

    def upload(self, path: Path, uri: str) -> None:
        """Puts `path`, a large one in parts."""
        bucket, key = split(uri)

        def block(start: int, end: int) -> bytes:
            with path.open("rb") as file:
                file.seek(start)
                return file.read(end - start)

        with translated(uri, "write"):
            multipart.put(bucket, key, path.stat().st_size, block)

    def _known(self, uri: str) -> FileStat:
        found = self.stat(uri)
        if found is None:
            raise MissingError(f"{uri}: no such object; check the bucket and path")
        return found


class _RangeFile(io.RawIOBase):
    """An object as a file whose errors are translated, whoever reads it; one that is replaced meanwhile is an error."""

    def __init__(self, found: FileStat, read: Callable[[str, int, int, str], bytes]) -> None:
        super().__init__()
        self._found, self._read, self._position = found, read, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._found.size}[whence]
        self._position = max(0, offset + base)
        return self._position

    def tell(self) -> int:
        return self._position

    def readinto(self, buffer: Any) -> int:
        end = min(self._position + len(buffer), self._found.size)
        data = self._read(self._found.uri, self._position, end, _etag(self._found))
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)


def _etag(found: FileStat) -> str:
    etag = found.stamp.partition("-")[2]
    return f'"{etag}"' if etag else ""


def _folder(uri: str) -> str:
    key = split(uri)[1].rstrip("/")
    return f"{key}/" if key else ""


def _objects(uri: str, prefix: str, page: int = 1000) -> Iterator[dict[str, Any]]:
    """What `list_objects_v2` says of every key that begins with `prefix`, page after page."""
    request = {"Bucket": split(uri)[0], "Prefix": prefix, "MaxKeys": page}
    while True:
        with translated(uri, "list"):
            answer = call("list_objects_v2", **request)
        yield from answer.get("Contents", [])
        if not answer.get("IsTruncated"):
            return
        request["ContinuationToken"] = answer["NextContinuationToken"]


def _file_stat(key: str, uri: str, size: int, etag: str) -> FileStat:
    return FileStat(key, uri, size, _stamp(size, etag))


def _stamp(size: int, etag: str) -> str:
    return f"{size}-{etag.strip(chr(34))}"
