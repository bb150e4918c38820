"""Recognises what an input is, and cuts it into shards while it is being listed."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import chain, islice

from rayclust.errors import ConfigError, DataError
from rayclust.store import filesystem
from rayclust.store.filesystem import FileStat
from rayclust.store.sources import columns, embeddings, folder, parquet, webdataset
from rayclust.store.sources.arrays import is_array_file
from rayclust.store.sources.labels import read_classes
from rayclust.store.sources.shard import Shard

log = logging.getLogger(__name__)

FORMATS = ("folder", "webdataset", "parquet", "embeddings")

_SAMPLE = 2000
"""Files that `detect_format` looks at: the listing of millions need not end before work begins."""


def detect_format(uri: str) -> str:
    """What an input is, from the names of its first files and the columns of its first table.

    Tar shards, Parquet with images, Parquet or arrays with embeddings, or image files. Tables without images or
    embeddings beside any of them are taken for metadata, and arrays beside images for what was computed from them.

    Args:
        uri: a folder or a file.

    Returns:
        One of `FORMATS`.

    Raises:
        DataError: nothing there can be read, or several of these lie side by side.
    """
    root = filesystem.absolute(uri)
    first: dict[str, FileStat] = {}
    tables = []
    for file in islice(filesystem.walk(root), _SAMPLE):
        kind = _kind(file.key)
        if kind == "table":
            tables.append(file)
        elif kind is not None:
            first.setdefault(kind, file)
    first |= _table_kind(tables, is_alone=not first)
    if len(first) == 2 and "embeddings" in first:
        arrays_beside = first.pop("embeddings")
        log.info("%s: takes the images; images.format: embeddings takes %s instead", root, arrays_beside.key)
    if len(first) > 1:
        found = " and ".join(f"{kind} ({file.key})" for kind, file in first.items())
        raise DataError(f"{root}: holds {found}; set images.format to one of {', '.join(FORMATS)}, or name one of them")
    if not first:
        raise DataError(f"{root}: holds no images, tar shards, Parquet files or embeddings; check images.uri")
    return next(iter(first))


def _kind(key: str) -> str | None:
    name = key.lower()
    if name.endswith(webdataset.TAR_SUFFIXES):
        return "webdataset"
    if name.endswith(".parquet"):
        return "table"
    if is_array_file(key):
        return "embeddings"
    return "folder" if folder.is_image(key) else None


def _table_kind(tables: list[FileStat], *, is_alone: bool) -> dict[str, FileStat]:
    """What the first readable table holds; without either column, it is an error only where there is nothing else."""
    found = next(((file, found) for file in tables if (found := parquet.footer(file)) is not None), None)
    if found is None:
        if tables and is_alone:
            raise DataError(f"{tables[0].uri}: cannot be read as Parquet, nor can any table beside it; check the files")
        return {}
    file, footer = found
    if columns.embedding_column(footer.schema) is not None:
        return {"embeddings": file}
    if columns.image_column(footer.schema) is not None:
        return {"parquet": file}
    if is_alone:
        have = columns.described(footer.schema)
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
    """Cuts an input into shards; they come while it is being listed, and memory does not grow with it.

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
    root = filesystem.absolute(uri)
    kept = read_classes(classes)
    format = detect_format(root) if format == "auto" else format  # noqa: A001
    shards = _numbered(_plan(root, format, labels, shard_size, None if kept is None else tuple(sorted(kept))))
    found = next(shards, None)
    if found is None:
        among = "" if kept is None else f" in the {len(kept)} classes asked for (such as {min(kept)})"
        raise DataError(f"{root}: no images{among} there in the format {format}; check images.uri and images.format")
    yield from chain([found], shards)


def _plan(root: str, form: str, labels: str, size: int, classes: tuple[str, ...] | None) -> Iterator[Shard]:
    files = filesystem.walk(root)
    template = Shard(0, "", root, "", "", labels=labels, classes=classes)
    if form == "folder":
        if labels not in ("auto", "none", "folder"):
            raise DataError(
                f"images.labels = {labels}: image files in folders have no columns; use auto, folder or none"
            )
        yield from folder.plan(files, template, size)
    elif form == "webdataset":
        yield from webdataset.plan(files, template)
    elif form == "parquet":
        tables = (file for file in files if _kind(file.key) == "table")
        yield from parquet.plan(tables, template, size)
    else:
        tables = (file for file in files if _kind(file.key) in ("table", "embeddings"))
        yield from embeddings.plan(tables, template, size * embeddings.SHARD_FACTOR)


def _numbered(shards: Iterator[Shard]) -> Iterator[Shard]:
    first = 0
    for index, shard in enumerate(shards):
        yield replace(shard, index=index, first=first)
        first += shard.count or 0
