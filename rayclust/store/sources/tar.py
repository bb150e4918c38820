"""The members of a tar archive, damaged ones too: an index by headers that goes on after what it cannot read.

The standard reader stops without a word at a header whose checksum is wrong, and everything after it is lost. Members
are only read where they lie; names, links and devices never touch the disk.
"""

from __future__ import annotations

import tarfile
import tempfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO, cast

BLOCK = 512
_ZEROS = bytes(BLOCK)
_CHUNK = 1 << 20
_EXTENSION_LIMIT = 1 << 20
"""Bytes of a long name or extended header above which it is not believed."""
_UNPACK_FACTOR, _UNPACK_FLOOR = 200, 1 << 30
"""A compressed archive may grow by this factor, or to this many bytes: above lies a decompression bomb."""
_GZIP = b"\x1f\x8b"


@dataclass(frozen=True)
class TarMember:
    """A regular file in an archive."""

    name: str
    offset: int
    """Of its first byte in the archive."""
    size: int
    """Bytes."""


@dataclass(frozen=True)
class Damage:
    """A place in an archive that cannot be read."""

    reason: str
    """tar_truncated | bad_header | empty | unreadable_file."""
    detail: str


def members(archive: BinaryIO) -> Iterator[TarMember | Damage]:
    """Regular files and damages of an archive, in order.

    Args:
        archive: seekable, not compressed.
    """
    size = archive.seek(0, 2)
    if size == 0:
        yield Damage("empty", "the file has no bytes")
        return
    yield from _Index(archive, size).scan()


class _Index:
    """A walk over headers; extensions (long names, pax) wait for the member that they belong to."""

    def __init__(self, archive: BinaryIO, size: int) -> None:
        self._archive, self._size = archive, size
        self._offset = 0
        self._is_told = False  # that the archive ends in a damage
        self._extension: dict[str, str] = {}

    def scan(self) -> Iterator[TarMember | Damage]:
        ended = False
        while self._offset + BLOCK <= self._size:
            block = self._read(self._offset, BLOCK)
            if block == _ZEROS:
                ended, self._offset = True, self._offset + BLOCK
                continue
            info = _parse(block)
            if info is None:
                if ended:  # whatever follows the end mark was not meant
                    return
                yield self._recover(self._offset + BLOCK, f"the header at byte {self._offset} is damaged")
                continue
            ended = False
            yield from self._member(info)
        if not ended and not self._is_told:
            yield Damage("tar_truncated", "the archive ends without its end mark")

    def _member(self, info: tarfile.TarInfo) -> Iterator[TarMember | Damage]:
        start = self._offset + BLOCK
        size = self._claimed_size(info)
        if size < 0 or start + size > self._size:
            name = self._extension.get("path", info.name)
            yield self._recover(start, f"{name} claims {size} bytes, and {self._size - start} are left")
            return
        self._offset = start + -(-size // BLOCK) * BLOCK
        if info.type in (tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE):
            data = self._read(start, min(size, _EXTENSION_LIMIT))
            self._extension |= _long_name(data) if info.type == tarfile.GNUTYPE_LONGNAME else _pax(data)
        elif info.type not in (tarfile.GNUTYPE_LONGLINK, tarfile.XGLTYPE):
            is_sparse = any(name.startswith("GNU.sparse") for name in self._extension)
            if info.isreg() and info.type != tarfile.GNUTYPE_SPARSE and not is_sparse:
                yield TarMember(self._extension.get("path", info.name), start, size)
            self._extension = {}

    def _claimed_size(self, info: tarfile.TarInfo) -> int:
        has_data = info.isreg() or info.type not in tarfile.SUPPORTED_TYPES or info.type in tarfile.GNU_TYPES
        is_extension = info.type in (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE, tarfile.XGLTYPE)
        if is_extension or not has_data:
            return info.size if is_extension else 0
        claimed = self._extension.get("size", "")
        return int(claimed) if claimed.isdecimal() and info.isreg() else info.size

    def _recover(self, start: int, detail: str) -> Damage:
        """Goes on at the next header that is whole, or ends."""
        was_first, self._extension = self._offset == 0, {}
        found = _next_header(self._archive, start, self._size)
        self._offset = self._size if found is None else found
        if found is not None:
            return Damage("bad_header", detail)
        self._is_told = True
        if was_first and _parse(self._read(0, BLOCK)) is None:
            return Damage("unreadable_file", "not a tar archive")
        return Damage("tar_truncated", detail)

    def _read(self, offset: int, size: int) -> bytes:
        self._archive.seek(offset)
        return self._archive.read(size)


def _parse(block: bytes) -> tarfile.TarInfo | None:
    try:
        return tarfile.TarInfo.frombuf(block, "utf-8", "backslashreplace")
    except (tarfile.HeaderError, ValueError):
        return None


def _next_header(archive: BinaryIO, start: int, size: int) -> int | None:
    """Offset of the first whole header from `start` on, among those with the magic word of POSIX and GNU archives."""
    for base in range(start, size, _CHUNK):
        archive.seek(base)
        chunk = archive.read(_CHUNK)
        at = chunk.find(b"ustar")
        while at >= 0:
            header = at - 257
            if header >= 0 and header % BLOCK == 0 and _parse(chunk[header : header + BLOCK]) is not None:
                return base + header
            at = chunk.find(b"ustar", at + 1)
    return None


def _long_name(data: bytes) -> dict[str, str]:
    return {"path": data.split(b"\0", 1)[0].decode("utf-8", "backslashreplace")}


def _pax(data: bytes) -> dict[str, str]:
    """The records `length keyword=value` of a pax header, as far as they can be read."""
    found: dict[str, str] = {}
    while data:
        length, _, rest = data.partition(b" ")
        if not length.isdigit() or not len(length) + 1 < int(length) <= len(data):
            break
        keyword, _, value = rest[: int(length) - len(length) - 2].partition(b"=")
        found[keyword.decode("utf-8", "replace")] = value.decode("utf-8", "backslashreplace")
        data = data[int(length) :]
    return found


def unpacked(archive: BinaryIO) -> tuple[BinaryIO, Damage | None]:
    """An archive that may be compressed with gzip, as one that is not.

    Args:
        archive: seekable.

    Returns:
        The archive itself, or a temporary file that is gone when closed, with as much as could be unpacked; and the
        damage that ended unpacking early.
    """
    archive.seek(0)
    if archive.read(2) != _GZIP:
        return archive, None
    limit = max(_UNPACK_FLOOR, _UNPACK_FACTOR * archive.seek(0, 2))
    archive.seek(0)
    plain = cast(BinaryIO, tempfile.TemporaryFile(prefix="rayclust-"))  # noqa: SIM115 - the caller closes it
    return plain, _unpack(archive, plain, limit)


def _unpack(archive: BinaryIO, plain: BinaryIO, limit: int) -> Damage | None:
    """Writes what can be unpacked. The standard reader of gzip files drops up to a buffer before a damage."""
    stream = _gunzip()
    while chunk := archive.read(_CHUNK):
        while chunk:
            try:
                plain.write(stream.decompress(chunk, _CHUNK))
            except zlib.error as error:
                return Damage("tar_truncated", f"the compressed archive is damaged: {error}")
            if plain.tell() > limit:
                return Damage("too_large", f"the archive unpacks to more than {limit} bytes")
            chunk = stream.unconsumed_tail
            if stream.eof:
                chunk = stream.unused_data
                if not chunk.startswith(_GZIP):  # padding
                    return None
                stream = _gunzip()
    plain.write(stream.flush())
    return None if stream.eof else Damage("tar_truncated", "the compressed archive ends early")


def _gunzip() -> zlib._Decompress:
    return zlib.decompressobj(wbits=16 + zlib.MAX_WBITS)
