"""Dispatch on the format of an input: detect it, cut it into shards, read these, fetch single images again."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import lru_cache
from itertools import islice

from rayclust.errors import ConfigError, DataError
from rayclust.store import storage
from rayclust.store.sources import embeddings, folder, parquet, webdataset
from rayclust.store.sources.base import MAX_RECORD_BYTES, Record, Rows, Shard, prefetch
from rayclust.store.sources.embeddings import LoadTensors
from rayclust.store.storage import FileStat, UnreadableError

log = logging.getLogger(__name__)

FORMATS = ("folder", "webdataset", "parquet", "embeddings")

_SAMPLE = 2000
"""Files that `detect_format` looks at: the listing of millions need not end before work begins."""
_CONCURRENT_READS = 16
_CONTAINER = re.compile(r"(?P<file>.+?\.(?:tar|tar\.gz|tgz|parquet|npy|pt))#(?P<inside>.*)", re.IGNORECASE | re.DOTALL)
_WORDNET_LINE = re.compile(r"n\d{8}\b")
_READERS: dict[str, Callable[[Shard, int], Iterator[Record]]] = {
    "folder": folder.read,
    "webdataset": webdataset.read,
    "parquet": parquet.read,
}


def detect_format(uri: str) -> str:
    """Detect the format of an input from the names of its first files and the columns of its first table.

    Tar shards, Parquet with images, Parquet or arrays with embeddings, or image files. Tables without images or
    embeddings beside any of them are taken for metadata, and arrays beside images for what was computed from them.

    Args:
        uri: a folder or a file.

    Returns:
        One of `FORMATS`.

    Raises:
        DataError: nothing there can be read, or several of these lie side by side.
    """
    root = storage.absolute(uri)
    first: dict[str, FileStat] = {}
    tables = []
    for file in islice(storage.walk(root), _SAMPLE):
        kind = _file_kind(file.key)
        if kind == "table":
            tables.append(file)
        elif kind is not None:
            first.setdefault(kind, file)
    # Of the tables only the columns decide; those beside other formats may be metadata.
    first |= _table_format(tables, is_alone=not first)
    if len(first) == 2 and "embeddings" in first:
        arrays_beside = first.pop("embeddings")
        log.info("%s: takes the images; images.format: embeddings takes %s instead", root, arrays_beside.key)
    if len(first) > 1:
        found = " and ".join(f"{kind} ({file.key})" for kind, file in first.items())
        raise DataError(f"{root}: holds {found}; set images.format to one of {', '.join(FORMATS)}, or name one of them")
    if not first:
        raise DataError(f"{root}: holds no images, tar shards, Parquet files or embeddings; check images.uri")
    return next(iter(first))


def _file_kind(key: str) -> str | None:
    """Return the format of a file by its name; `table` for Parquet, whose columns decide; None for other files."""
    name = key.lower()
    if name.endswith(webdataset.TAR_SUFFIXES):
        return "webdataset"
    if name.endswith(".parquet"):
        return "table"
    if embeddings.is_array_file(key):
        return "embeddings"
    return "folder" if folder.is_image(key) else None


def _table_format(tables: list[FileStat], *, is_alone: bool) -> dict[str, FileStat]:
    """Return the format of the first readable table with its file; a table of neither is an error if it is alone."""
    footers = ((file, footer) for file in tables if (footer := parquet.read_footer(file)) is not None)
    found = next(footers, None)
    if found is None:
        if tables and is_alone:
            raise DataError(f"{tables[0].uri}: cannot be read as Parquet, nor can any table beside it; check the files")
        return {}
    file, footer = found
    columns = parquet.Columns.find(footer.schema)
    if columns.embedding is not None:
        return {"embeddings": file}
    if columns.image is not None:
        return {"parquet": file}
    if is_alone:
        have = parquet.describe_columns(footer.schema)
        raise DataError(f"{file.uri}: has neither a column of images nor one of embeddings; it has {have}")
    return {}


def plan_shards(
    uri: str,
    format: str = "auto",  # noqa: A002 - the name of the setting
    labels: str = "auto",
    *,
    shard_size: int = 512,
    classes: Sequence[str] | str | None = None,
) -> Iterator[Shard]:
    """Cut an input into shards while it is being listed; memory does not grow with the listing.

    A folder tree is cut every `shard_size` images, a tar is one shard, Parquet is cut at row groups from `shard_size`
    rows on, and embeddings every 32 times as many. The shards are the same for the same input, wherever it lies.

    Args:
        uri: a folder or a file.
        format: auto, or one of `FORMATS`.
        labels: auto | none | folder | a column or tar suffix.
        shard_size: images per shard, at least 1.
        classes: keep only images of these classes, given by name or as the URI of a list, one a line; None keeps all.

    Raises:
        ConfigError: an argument is impossible.
        DataError: there is nothing to read, or it is not what `format` says.
    """
    if format not in ("auto", *FORMATS):
        raise ConfigError(f"images.format = {format}: must be one of auto, {', '.join(FORMATS)}")
    if shard_size < 1:
        raise ConfigError(f"images.shard_size = {shard_size}: must be at least 1")
    root = storage.absolute(uri)
    kept = read_classes(classes)
    format = detect_format(root) if format == "auto" else format  # noqa: A001
    template = Shard(0, "", root, "", "", labels=labels, classes=None if kept is None else tuple(sorted(kept)))
    files = storage.walk(root)
    if format == "folder":
        if labels not in ("auto", "none", "folder"):
            raise DataError(
                f"images.labels = {labels}: image files in folders have no columns; use auto, folder or none"
            )
        shards = folder.plan(files, template, shard_size)
    elif format == "webdataset":
        shards = webdataset.plan(files, template)
    elif format == "parquet":
        tables = (file for file in files if _file_kind(file.key) == "table")
        shards = parquet.plan(tables, template, shard_size)
    else:
        tables = (file for file in files if _file_kind(file.key) in ("table", "embeddings"))
        shards = embeddings.plan(tables, template, shard_size * embeddings.SHARD_FACTOR)
    # Number the shards, and their rows as far as the counts are known.
    index, first = -1, 0
    for index, shard in enumerate(shards):
        yield replace(shard, index=index, first=first)
        first += shard.count or 0
    if index < 0:
        among = "" if kept is None else f" in the {len(kept)} classes asked for (such as {min(kept)})"
        raise DataError(f"{root}: no images{among} there in the format {format}; check images.uri and images.format")


def read_classes(classes: Sequence[str] | str | None) -> frozenset[str] | None:
    """Return the classes to keep.

    Args:
        classes: names; or the URI of a text file with one a line, where `#` starts a comment line and what follows a
            WordNet id (n01440764) on its line is left out; None keeps all.

    Raises:
        DataError: the file cannot be read, or no class is named.
    """
    if classes is None:
        return None
    if isinstance(classes, str):
        text = storage.read_bytes(classes).decode("utf-8-sig", "backslashreplace")
        lines = [line.strip() for line in text.splitlines()]
        names = [line for line in lines if line and not line.startswith("#")]
        names = [name.split()[0].rstrip(",:") if _WORDNET_LINE.match(name) else name for name in names]
    else:
        names = [str(name) for name in classes]
    if not names:
        raise DataError(f"images.classes = {classes}: names no class; give at least one, or null for all")
    return frozenset(names)


def read_records(shard: Shard, max_bytes: int = MAX_RECORD_BYTES) -> Iterator[Record]:
    """Read the images of a shard in order of key, one at a time, with a reject for each that cannot be read.

    Args:
        shard: of a kind that holds images.
        max_bytes: bytes of one encoded image above which it is rejected without being read.

    Raises:
        DataError: the storage as a whole cannot be read (worth trying again), or a column is missing.
    """
    if shard.has_embeddings:
        raise DataError(f"{shard.uri}: holds ready embeddings, not images; read its rows")
    for record in _READERS[shard.kind](shard, max_bytes):
        is_of_unknown_class = record.reason is not None and record.label is None
        if is_of_unknown_class or shard.selects(record.key, record.label):
            hides_label = shard.labels == "none" and record.label is not None
            yield replace(record, label=None) if hides_label else record


def read_rows(shard: Shard, load_tensors: LoadTensors | None = None, width: int | None = None) -> Rows:
    """Read the usable rows of a shard of ready embeddings in order of key, and the rejects.

    Args:
        shard: of a kind that holds embeddings.
        load_tensors: reads a `.pt` file by its local path without running code in it; needed for those only.
        width: D that every row must have; None takes the width of most rows of this shard.

    Returns:
        Float16 embeddings, finite and not zero. Rows that are null, of another width, not finite, above the largest
        float16 or all zero are rejects, and a damaged file is one.

    Raises:
        DataError: the file is no table of embeddings, its labels do not fit, or the storage cannot be read.
    """
    if not shard.has_embeddings:
        raise DataError(f"{shard.uri}: holds images, not ready embeddings; read its records")
    return embeddings.read(shard, width, load_tensors)


def fetch_many(uris: Iterable[str]) -> Iterator[tuple[str, bytes | None]]:
    """Fetch encoded images by their URIs; every tar or table is opened once.

    Args:
        uris: of files, of tars' members (`shard.tar#name`) and of tables' rows (`part.parquet#12`).

    Yields:
        Each distinct URI with its image, grouped by file; None for what is not there or cannot be read.

    Raises:
        DataError: the storage as a whole cannot be read.
    """
    files, groups = list[str](), dict[str, dict[str, str]]()
    is_file = lru_cache(None)(lambda file: storage.stat(file) is not None)
    for uri in dict.fromkeys(uris):
        match = _CONTAINER.fullmatch(uri)
        if match and is_file(match["file"]):
            groups.setdefault(match["file"], {})[match["inside"]] = uri
        else:
            files.append(uri)

    def read_file(uri: str) -> bytes | None:
        try:
            return storage.read_bytes(uri)
        except UnreadableError:
            return None

    yield from prefetch(read_file, files, _CONCURRENT_READS)
    for file, names in groups.items():
        found: dict[str, bytes] = {}
        try:
            if file.lower().endswith(".parquet"):
                found = parquet.fetch(file, names)
            elif file.lower().endswith(webdataset.TAR_SUFFIXES):  # rows of arrays have no images
                found = webdataset.fetch(file, names)
        except (UnreadableError, *parquet.DAMAGE) as error:
            log.debug("%s: cannot be read: %s", file, error)
        yield from ((uri, found.get(name)) for name, uri in names.items())
