"""Single images again, by the URIs of their records: for thumbnails and search results."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from functools import lru_cache

from rayclust.store import filesystem
from rayclust.store.filesystem import MissingError, UnreadableError
from rayclust.store.prefetch import prefetch
from rayclust.store.sources import columns, parquet, tar
from rayclust.store.sources.labels import clean

_CONTAINER = re.compile(r"(?P<file>.+?\.(?:tar|tar\.gz|tgz|parquet|npy|pt))#(?P<inside>.*)", re.IGNORECASE | re.DOTALL)
_AHEAD = 16


def fetch(uri: str) -> bytes:
    """The encoded image that a record's URI points to.

    Args:
        uri: of a file, of a tar's member (`shard.tar#name`) or of a table's row (`part.parquet#12`).

    Raises:
        DataError: it is not there, or cannot be read.
    """
    _, data = next(fetch_many([uri]))
    if data is None:
        raise MissingError(f"{uri}: no such image; the input has changed since it was read")
    return data


def fetch_many(uris: Iterable[str]) -> Iterator[tuple[str, bytes | None]]:
    """Encoded images by their URIs; every tar or table is opened once.

    Args:
        uris: as for `fetch`.

    Yields:
        Each distinct URI with its image, grouped by file; None for what is not there or cannot be read.

    Raises:
        DataError: the storage as a whole cannot be read.
    """
    files, groups = list[str](), dict[str, dict[str, str]]()
    is_container = lru_cache(None)(lambda file: filesystem.stat(file) is not None)
    for uri in dict.fromkeys(uris):
        match = _CONTAINER.fullmatch(uri)
        if match and is_container(match["file"]):
            groups.setdefault(match["file"], {})[match["inside"]] = uri
        else:
            files.append(uri)
    yield from prefetch(_file, files, _AHEAD)
    for file, inside in groups.items():
        try:
            found = _rows(file, inside) if file.lower().endswith(".parquet") else _members(file, inside)
            yield from ((uri, found.get(name)) for name, uri in inside.items())
        except (UnreadableError, *parquet.DAMAGE):
            yield from ((uri, None) for uri in inside.values())


def _file(uri: str) -> bytes | None:
    try:
        return filesystem.read_bytes(uri)
    except UnreadableError:
        return None


def _members(file: str, names: Iterable[str]) -> dict[str, bytes]:
    if file.lower().endswith((".npy", ".pt")):
        return {}
    wanted, found = set(names), dict[str, bytes]()
    with filesystem.open_whole(file) as archive, tar.unpacked(archive)[0] as plain:
        places = [member for member in tar.members(plain) if isinstance(member, tar.TarMember)]
        for member in places:
            name = clean(member.name)
            if name in wanted and name not in found:
                plain.seek(member.offset)
                found[name] = plain.read(member.size)
    return found


def _rows(file: str, rows: Iterable[str]) -> dict[str, bytes]:
    wanted = sorted(int(row) for row in rows if row.isdecimal())
    found: dict[str, bytes] = {}
    with parquet.opened(file) as table:
        column = columns.image_column(table.schema_arrow)
        if column is None:
            return found
        begin = 0
        for group in range(table.metadata.num_row_groups):
            end = begin + table.metadata.row_group(group).num_rows
            here = [row - begin for row in wanted if begin <= row < end]
            if here:
                values = table.read_row_group(group, columns=[column]).column(0).take(here).to_pylist()
                data = [value.get("bytes") if isinstance(value, dict) else value for value in values]
                found |= {str(begin + row): item for row, item in zip(here, data, strict=True) if item is not None}
            begin = end
    return found
