"""Webdataset tars: members that share a path up to the first dot of their name are one sample.

The tar reader is our own because the standard one stops silently at a header whose checksum is wrong, and everything
after it is lost. Members are only read where they lie; names, links and devices never touch the disk.
"""

from __future__ import annotations

import bz2
import io
import json
import lzma
import tarfile
import tempfile
import zlib
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, BinaryIO, cast

from rayclust.store import storage
from rayclust.store.sources.base import (
    IMAGE_SUFFIXES,
    LABEL_NAMES,
    TOO_LARGE,
    Record,
    Shard,
    escape_invalid,
    folder_label,
    label_text,
)
from rayclust.store.storage import FileStat, UnreadableError, is_hidden

TAR_SUFFIXES = (
    ".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tbz", ".tar.xz", ".txz", ".tar.zst", ".tzst", ".tar.lz4",
    ".tar.z",
)  # fmt: skip
NO_END_MARK = "the archive ends without its end mark"
"""Detail of a `tar_truncated` reject of an archive in which nothing else is amiss."""
_SIDECAR_SUFFIXES = frozenset({"json", "txt", "cls"})
"""A sample with one of these and without an image is a reject; other samples without images are left out."""
_INNER_SUFFIXES = (*TAR_SUFFIXES, ".zip", ".7z", ".rar")
"""Archives in an archive, as ImageNet's tar of a tar for each class: each is a reject."""
_SIDECAR_LIMIT = 1 << 20
"""Bytes read of a member that may hold a label."""
_BLOCK = 512
_CHUNK = 1 << 20
_EXTENSION_LIMIT = 1 << 20
"""Bytes read of a long name or extended header."""
_UNPACK_FACTOR, _UNPACK_FLOOR = 200, 1 << 30
"""A compressed archive may grow by this factor, or to this many bytes: above lies a decompression bomb."""
_GZIP = b"\x1f\x8b"
_COMPRESSIONS: dict[bytes, Callable[[], Any] | str] = {
    _GZIP: partial(zlib.decompressobj, wbits=16 + zlib.MAX_WBITS),
    b"BZh": bz2.BZ2Decompressor,
    b"\xfd7zXZ": lzma.LZMADecompressor,
    b"\x28\xb5\x2f\xfd": "zstd",
    b"\x04\x22\x4d\x18": "lz4",
    b"\x1f\x9d": "compress",
}
"""By the first bytes of a compressed file: what decompresses it, or the name of what is not read."""


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
    """tar_truncated | bad_header | empty | unreadable_file | too_large."""
    detail: str


@dataclass(frozen=True)
class _Entry:
    """A row or reject before its bytes are read."""

    key: str
    uri: str
    image: TarMember | None
    """None for a reject."""
    sidecars: dict[str, TarMember]
    """Members of the same sample that are no images, by suffix."""
    reason: str | None = None
    detail: str = ""


def plan(files: Iterable[FileStat], template: Shard) -> Iterator[Shard]:
    """Make one shard per tar of a listing by order of key, as the listing comes; `template` carries what all share."""
    for file in files:
        suffix = next((suffix for suffix in TAR_SUFFIXES if file.key.lower().endswith(suffix)), "")
        name = file.key[: len(file.key) - len(suffix)]
        yield replace(template, kind="webdataset", uri=file.uri, name=name, stamp=file.stamp)


def read(shard: Shard, max_bytes: int) -> Iterator[Record]:
    """Read the images of a tar as `sources.read_records`; damages, duplicates and samples without one are rejects.

    A remote tar is fetched whole first.
    """
    try:
        archive = storage.open_input(shard.uri, whole=True)
    except UnreadableError as error:
        yield Record(shard.name, shard.uri, reason="unreadable_file", detail=str(error))
        return
    with archive:
        plain, damage = decompress(archive)
        with plain:
            for entry in sorted(_entries(shard, plain, damage), key=lambda entry: (entry.key, entry.uri)):
                data, reason, detail = None, entry.reason, escape_invalid(entry.detail)
                if entry.image is not None and entry.image.size > max_bytes:
                    reason, detail = "too_large", TOO_LARGE.format(entry.image.size, max_bytes)
                elif entry.image is not None:
                    data = _read_at(plain, entry.image.offset, entry.image.size)
                label = None if shard.label_source is None else _label(shard, shard.label_source, plain, entry)
                yield Record(entry.key, entry.uri, data, label, reason, detail)


def fetch(uri: str, names: Collection[str]) -> dict[str, bytes]:
    """Return members of a tar by name, the first of each name, without those that are not there.

    Args:
        uri: of the tar.
        names: as they stand behind the `#` of the records' URIs.

    Raises:
        UnreadableError: the tar cannot be read.
    """
    found = dict[str, bytes]()
    with storage.open_input(uri, whole=True) as archive, decompress(archive)[0] as plain:
        for member in scan_tar(plain):
            if isinstance(member, TarMember) and (name := escape_invalid(member.name)) in names and name not in found:
                found[name] = _read_at(plain, member.offset, member.size)
    return found


def count_images(uri: str) -> int:
    """Return the images in a tar by its headers; 0 where it is damaged.

    Raises:
        UnreadableError: it cannot be read.
    """
    with storage.open_input(uri, whole=True) as archive:
        plain, damage = decompress(archive)
        with plain:
            entries = _entries(Shard(0, "webdataset", uri, "", ""), plain, damage)
    is_whole = all(entry.reason not in ("unreadable_file", "empty", "unsupported") for entry in entries)
    return sum(entry.image is not None for entry in entries) if is_whole else 0


def _entries(shard: Shard, archive: BinaryIO, damage: Damage | None) -> list[_Entry]:
    """Group the members of an archive into samples, and these into rows and rejects."""
    samples: dict[str, list[tuple[str, TarMember]]] = {}
    damages = []
    for member in scan_tar(archive):
        if isinstance(member, Damage):
            damages.append(member)
        elif not is_hidden(member.name):
            # The key is the path up to the first dot of its last part, the suffix follows.
            name = member.name
            while name.startswith("./"):
                name = name[2:]
            folder, slash, base = name.rpartition("/")
            stem, _, suffix = base.partition(".")
            samples.setdefault(folder + slash + stem, []).append((suffix.lower(), member))
    if damage is not None:
        # Decompression ended early, so the scan found a cut archive too: keep the better of the two reasons.
        damages = [other for other in damages if other.reason not in ("tar_truncated", "empty")] + [damage]
    entries = [_Entry(shard.name, shard.uri, None, {}, found.reason, found.detail) for found in damages]
    for key, sample in samples.items():
        entries += _sample_entries(shard, escape_invalid(f"{shard.name}/{key}"), sample)
    return entries


def _sample_entries(shard: Shard, key: str, sample: list[tuple[str, TarMember]]) -> Iterator[_Entry]:
    """Make the rows and rejects of one sample from its (suffix, member) pairs."""
    for suffix, member in sample:
        if f".{suffix}".endswith(_INNER_SUFFIXES):
            uri = f"{shard.uri}#{escape_invalid(member.name)}"
            yield _Entry(f"{key}.{suffix}", uri, None, {}, "nested_archive", "an archive in the archive; unpack it")
    images = [(suffix, member) for suffix, member in sample if suffix.rpartition(".")[2] in IMAGE_SUFFIXES]
    sidecars = {suffix: member for suffix, member in reversed(sample) if suffix not in IMAGE_SUFFIXES}
    plain = [(suffix, member) for suffix, member in images if "." not in suffix]
    if not images and not _SIDECAR_SUFFIXES.isdisjoint(sidecars):
        uri = f"{shard.uri}#{escape_invalid(next(iter(sidecars.values())).name)}"
        yield _Entry(key, uri, None, sidecars, "no_image", f"only {', '.join(sorted(sidecars))} beside no image")

    # One row per sample: the preferred suffix, of equals the first member. Suffixes with dots, such as scan.v2.jpg: one
    # alone has its sample's key, several keep what tells them apart.
    rows = dict(reversed(images))
    if plain:
        _, best = min(plain, key=lambda image: IMAGE_SUFFIXES.index(image[0]))
        rows = dict.fromkeys(rows, best)
    for suffix, member in plain or images:
        name = key if plain or len(images) == 1 else f"{key}.{suffix.rpartition('.')[0]}"
        uri = f"{shard.uri}#{escape_invalid(member.name)}"
        if rows[suffix] is member:
            yield _Entry(name, uri, member, sidecars)
        else:
            double = f"another image in the archive has this {'key' if plain else 'name'}"
            yield _Entry(name, uri, None, sidecars, "duplicate_key", double)


def _label(shard: Shard, source: str, archive: BinaryIO, entry: _Entry) -> str | None:
    """Read the label of a sample.

    `auto` takes .cls, else a field of .json; a .txt is mostly a caption, so it is read only on request.
    """
    if source == "folder":
        return folder_label(entry.uri[len(shard.uri) + 1 :]) or shard.folder
    suffix = "cls" if source == "auto" else source
    member = entry.sidecars.get(suffix, entry.sidecars.get("json"))
    if member is None:
        return None
    data = _read_at(archive, member.offset, min(member.size, _SIDECAR_LIMIT))
    if suffix != "json" and suffix in entry.sidecars:
        return label_text(data)
    # A field of a JSON object: the one that is named, with `.` between levels, else the first of `LABEL_NAMES`.
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        return None
    if source not in ("auto", "json"):
        for name in source.split("."):
            value = value.get(name) if isinstance(value, dict) else None
    elif isinstance(value, dict):
        fields = {str(name).lower(): item for name, item in reversed(value.items())}
        value = next((fields[name] for name in LABEL_NAMES if name in fields), None)
    return label_text(value)


def scan_tar(archive: BinaryIO) -> Iterator[TarMember | Damage]:
    """Walk over the headers of an archive, resuming behind damaged ones.

    Args:
        archive: seekable, not compressed.

    Yields:
        Regular files and damages, in order. Links, devices, folders and sparse files are left out.
    """
    size = archive.seek(0, 2)
    offset, has_ended = 0, False
    extension: dict[str, str] = {}  # long names and pax records, for the member that follows them
    while offset + _BLOCK <= size:
        block = _read_at(archive, offset, _BLOCK)
        start = offset + _BLOCK
        if not block.strip(b"\0"):
            has_ended, offset = True, start
            continue
        info = _parse_header(block)
        if info is None and has_ended:  # garbage behind the end mark
            return
        has_ended = False

        # 1. A damaged header, or a size beyond the end: resume at the next intact header.
        length = -1 if info is None else _data_size(info, extension)
        if info is None or not 0 <= length <= size - start:
            claim = "" if info is None else f"{extension.get('path', info.name)} claims {length} bytes"
            detail = f"{claim}, and {size - start} are left" if claim else f"the header at byte {offset} is damaged"
            found = _next_header(archive, start, size)
            if found is None:
                is_tar = offset > 0 or info is not None
                yield Damage("tar_truncated", detail) if is_tar else Damage("unreadable_file", "not a tar archive")
                return
            yield Damage("bad_header", detail)
            offset, extension = found, {}
            continue
        offset = start + -(-length // _BLOCK) * _BLOCK

        # 2. Keep an extension for the member that follows; yield a regular file.
        if info.type in (tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE):
            extension |= _parse_extension(info, _read_at(archive, start, min(length, _EXTENSION_LIMIT)))
        elif info.type not in (tarfile.GNUTYPE_LONGLINK, tarfile.XGLTYPE):
            is_sparse = any(name.startswith("GNU.sparse") for name in extension)
            if info.isreg() and info.type != tarfile.GNUTYPE_SPARSE and not is_sparse:
                yield TarMember(extension.get("path", info.name), start, length)
            extension = {}
    if not has_ended:
        is_empty = size == 0
        detail = "the file has no bytes" if is_empty else NO_END_MARK if offset else f"{size} bytes, less than a header"
        yield Damage("empty" if is_empty else "tar_truncated", detail)


def _read_at(archive: BinaryIO, offset: int, size: int) -> bytes:
    archive.seek(offset)
    return archive.read(size)


def _parse_header(block: bytes) -> tarfile.TarInfo | None:
    try:
        return tarfile.TarInfo.frombuf(block, "utf-8", "backslashreplace")
    except (tarfile.HeaderError, ValueError):
        return None


def _data_size(info: tarfile.TarInfo, extension: dict[str, str]) -> int:
    """Return the bytes of data behind a header, as claimed by it or by the pax record of a regular file."""
    if info.type in (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE, tarfile.XGLTYPE):
        return info.size
    if not info.isreg() and info.type in tarfile.SUPPORTED_TYPES and info.type not in tarfile.GNU_TYPES:
        return 0
    claimed = extension.get("size", "")
    return int(claimed) if claimed.isdecimal() and info.isreg() else info.size


def _next_header(archive: BinaryIO, start: int, size: int) -> int | None:
    """Return the offset of the first intact header from `start` on.

    Only headers with the magic word of POSIX and GNU archives are found.
    """
    for base in range(start, size, _CHUNK):
        chunk = _read_at(archive, base, _CHUNK)
        at = chunk.find(b"ustar")
        while at >= 0:
            header = at - 257
            if header >= 0 and header % _BLOCK == 0 and _parse_header(chunk[header : header + _BLOCK]) is not None:
                return base + header
            at = chunk.find(b"ustar", at + 1)
    return None


def _parse_extension(info: tarfile.TarInfo, data: bytes) -> dict[str, str]:
    """Parse a GNU long name, or the records `length keyword=value` of a pax header as far as they can be read."""
    if info.type == tarfile.GNUTYPE_LONGNAME:
        return {"path": data.split(b"\0", 1)[0].decode("utf-8", "backslashreplace")}
    records: dict[str, str] = {}
    while data:
        length, _, rest = data.partition(b" ")
        if not length.isdigit() or not len(length) + 1 < int(length) <= len(data):
            break
        keyword, _, value = rest[: int(length) - len(length) - 2].partition(b"=")
        records[keyword.decode("utf-8", "replace")] = value.decode("utf-8", "backslashreplace")
        data = data[int(length) :]
    return records


def decompress(archive: BinaryIO) -> tuple[BinaryIO, Damage | None]:
    """Decompress an archive that is compressed with gzip, bzip2 or xz, whatever its name.

    The standard readers drop up to a buffer before a damage; this one keeps all that can be read.

    Args:
        archive: seekable.

    Returns:
        The archive itself, or a temporary file that is gone when closed, with as much as could be decompressed; and
        the damage that ended it early, or its compression where it is another.
    """
    archive.seek(0)
    start = archive.read(8)
    magic = next((magic for magic in _COMPRESSIONS if start.startswith(magic)), b"")
    opener = _COMPRESSIONS.get(magic)
    if opener is None:
        return archive, None
    if isinstance(opener, str):
        detail = f"compressed with {opener}, which is not read; unpack it, or use gzip, bzip2 or xz"
        return io.BytesIO(), Damage("unsupported", detail)
    limit = max(_UNPACK_FLOOR, _UNPACK_FACTOR * archive.seek(0, 2))
    archive.seek(0)
    plain = cast(BinaryIO, tempfile.TemporaryFile(prefix="rayclust-"))  # noqa: SIM115 - the caller closes it
    stream, chunk = opener(), archive.read(_CHUNK)
    while chunk or not getattr(stream, "needs_input", True):
        try:
            plain.write(stream.decompress(chunk, _CHUNK))
        except (zlib.error, lzma.LZMAError, OSError) as error:
            return plain, Damage("tar_truncated", f"the compressed archive is damaged: {error}")
        if plain.tell() > limit:
            return plain, Damage("too_large", f"the archive unpacks to more than {limit} bytes")
        # Of what the bound on the output left, zlib returns the input and the others keep it.
        chunk = getattr(stream, "unconsumed_tail", b"")
        if stream.eof:  # a compressed file may consist of several streams
            chunk = stream.unused_data or archive.read(_CHUNK)
            if not chunk.startswith(magic):  # padding
                return plain, None
            stream = opener()
        elif not chunk and getattr(stream, "needs_input", True):
            chunk = archive.read(_CHUNK)
    if magic == _GZIP:
        plain.write(stream.flush())
    return plain, None if stream.eof else Damage("tar_truncated", "the compressed archive ends early")
