"""Dispatch on the format of an input: detect it, cut it into shards, read these, fetch single images again."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa

from rayclust.errors import ConfigError, DataError
from rayclust.store import storage
from rayclust.store.sources import embeddings, folder, parquet, webdataset
from rayclust.store.sources.base import IMAGE_SUFFIXES, MAX_RECORD_BYTES, RAW_SUFFIXES, Record, Rows, Shard, log_once
from rayclust.store.sources.embeddings import LoadTensors
from rayclust.store.storage import FileStat, UnreadableError, prefetch

log = logging.getLogger(__name__)

FORMATS = ("folder", "webdataset", "parquet", "embeddings")

_SAMPLE = 2000
"""Files of known kinds that `detect_format` looks at: the listing of millions need not end before work begins."""
_MANY_NUMBERS = 8
"""Columns of fractions that are taken for the dimensions of embeddings."""
_CONCURRENT_READS = 16
_LOST = frozenset({"unreadable_file", "tar_truncated", "empty", "unsupported"})
"""Reasons of the one reject of a file with which all that it held is lost, or all behind some place in it."""
_LOST_DETAIL = "lost with its file, whose images are counted by a file beside it"
_RAW = "a camera's raw file; develop it to JPEG or PNG"
_MOST_LOST = 100_000
_FAR_SMALLER = 20
_LISTED, _TRIED = 10_000, 20
"""Files of a folder among which one that can be read is looked for, and those that are opened for it."""
_CONTAINER = re.compile(
    r"(?P<file>.+?\.(?:tar(?:\.\w+)?|t[gbx]z2?|parquet|pq|parq|npy|pt))#(?P<inside>.*)", re.IGNORECASE | re.DOTALL
)
_ROW = re.compile(r"(?P<file>.+)#(?P<inside>\d+)", re.DOTALL)
"""Of a table that is not named as one."""
_SUBSETS = Path(__file__).with_name("imagenet_subsets.txt")
_WORDNET_LINE = re.compile(r"n\d{8}\b")
_UNREAD = {
    (".arrow", ".feather", ".ipc"): "Arrow tables are not read; write them as Parquet",
    (".npz", ".h5", ".hdf5", ".mat", ".pkl", ".pickle", ".zarr"): "write the array of N rows × D columns as .npy",
    (".zip", ".7z", ".rar"): "archives of this kind are not read; unpack them, or pack their files into tars",
    (".tfrecord", ".mdb", ".lmdb", ".beton", ".rec"): "write the images as files, tars or Parquet",
    (".csv", ".tsv", ".jsonl"): "lists of images are not followed; name the folder that holds them",
}
"""What to do with files of these names where there is nothing else."""
_READERS: dict[str, Callable[[Shard, int], Iterator[Record]]] = {
    "folder": folder.read,
    "webdataset": webdataset.read,
    "parquet": parquet.read,
}


def detect_format(uri: str, columns: Mapping[Any, str] | None = None) -> str:
    """Detect the format of an input from the names of its first files and the columns of its first table.

    Tar shards, Parquet with images, Parquet or arrays with embeddings, or image files. Tables without images or
    embeddings beside any of them are taken for metadata, and arrays beside images for what was computed from them.

    Args:
        uri: a folder or a file.
        columns: `Shard.columns`.

    Returns:
        One of `FORMATS`.

    Raises:
        DataError: nothing there can be read, or several of these lie side by side.
    """
    root = storage.absolute(uri)
    first: dict[str, FileStat] = {}
    tables = []
    # 1. Formats by the names of the first files.
    unread, known = "", 0
    for file in storage.walk(root):
        kind = file_kind(file.key)
        if kind is None:
            unread = unread or _advice(file.key)
            continue
        if kind == "table":
            tables.append(file)
        else:
            first.setdefault(kind, file)
        known += 1
        if known == _SAMPLE:
            break
    # 2. Of the tables only the columns of the first that can be read decide; beside other formats it may be metadata.
    footer = None
    for table in tables:
        footer = parquet.read_footer(table)
        if footer is not None:
            break
    if footer is not None:
        holds = parquet.Columns.find(footer.schema, where=table.uri, named=columns)
        if holds.embedding is not None and "image" not in (columns or {}):
            first["embeddings"] = table
        elif holds.image is not None:
            first["parquet"] = table
        elif not first:
            have = parquet.describe_columns(footer.schema)
            mend = "images.columns names them where they are called otherwise"
            if sum(pa.types.is_floating(field.type) for field in footer.schema) >= _MANY_NUMBERS:
                mend = "a row of numbers is read from one column of lists, or as .npy: put these columns together"
            raise DataError(f"{table.uri}: has neither a column of images nor one of embeddings; it has {have}; {mend}")
    elif tables and not first:
        raise DataError(f"{tables[0].uri}: cannot be read as Parquet, nor can any table beside it; check the files")
    # 3. One format; arrays beside images were computed from them.
    if len(first) == 2 and "embeddings" in first:
        arrays_beside = first.pop("embeddings")
        log.info("%s: takes the images; images.format: embeddings takes %s instead", root, arrays_beside.key)
    if len(first) > 1:
        found = " and ".join(f"{kind} ({file.key})" for kind, file in first.items())
        raise DataError(f"{root}: holds {found}; set images.format to one of {', '.join(FORMATS)}, or name one of them")
    if not first:
        what = unread or "check images.uri"
        raise DataError(f"{root}: holds no images, tar shards, Parquet files or embeddings; {what}")
    return next(iter(first))


def _advice(key: str) -> str:
    """Return what to do with a file that is not read, by its name; nothing for other names."""
    return next((f"{key}: {advice}" for endings, advice in _UNREAD.items() if key.lower().endswith(endings)), "")


def file_kind(key: str) -> str | None:
    """Return the format of a file by its name; `table` for Parquet, whose columns decide; None for other files."""
    place, _, name = key.lower().rpartition("/")
    if name.endswith(webdataset.TAR_SUFFIXES):
        return "webdataset"
    if name.endswith(parquet.TABLE_SUFFIXES):
        return "table"
    # Arrays of labels, of names of rows and of rows for texts are not what is clustered.
    is_text = name.startswith("text_emb") or "text_emb" in place.split("/")
    if name.endswith((".npy", ".pt")) and not is_text and not embeddings.LABELS_OR_NAMES.fullmatch(name):
        return "embeddings"
    _, dot, suffix = name.rpartition(".")
    return "folder" if dot and suffix in IMAGE_SUFFIXES else None


def plan_shards(
    uri: str,
    format: str = "auto",  # noqa: A002 - the name of the setting
    labels: str = "auto",
    *,
    shard_size: int = 512,
    classes: Sequence[str] | str | None = None,
    columns: Mapping[Any, str] | None = None,
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
        columns: names of the columns of tables by what they hold: image, embedding, key, label.

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
    named = dict(columns or {})
    label_column = named.pop("label", "auto")
    labels = label_column if labels == "auto" else labels
    format = detect_format(root, named) if format == "auto" else format  # noqa: A001
    kept_classes = None if kept is None else tuple(sorted(kept))
    template = Shard(0, "", root, "", "", labels=labels, columns=named, classes=kept_classes)
    files = _files_of(root, format)
    if format == "folder":
        if labels not in ("auto", "none", "folder"):
            raise DataError(
                f"images.labels = {labels}: image files in folders have no columns; use auto, folder or none"
            )
        shards = folder.plan(files, template, shard_size)
    elif format == "webdataset":
        shards = webdataset.plan(files, template)
    elif format == "parquet":
        shards = parquet.prefixed(parquet.plan(files, template, shard_size))
    else:
        shards = parquet.prefixed(embeddings.plan(files, template, shard_size * embeddings.SHARD_FACTOR))
    # Number the shards, and their rows as far as the counts are known.
    index, first, names = -1, 0, dict[str, str]()
    for index, shard in enumerate(shards):
        # Files whose names differ in the ending alone (x.tar and x.tgz) keep it, or their keys would be the same.
        is_second = shard.kind != "folder" and names.setdefault(shard.name, shard.uri) != shard.uri
        name = shard.uri.removeprefix(root).lstrip("/") if is_second else shard.name
        yield replace(shard, index=index, first=first, name=name)
        first += shard.count or 0
    if index < 0:
        among = "" if kept is None else f" in the {len(kept)} classes asked for (such as {min(kept)})"
        raise DataError(f"{root}: no images{among} there in the format {format}; check images.uri and images.format")


def _files_of(root: str, format: str) -> Iterator[FileStat]:  # noqa: A002
    """Yield the files of a format in a listing, and folders that may not be listed; say what is left out."""
    kinds = {"parquet": ("table",), "embeddings": ("table", "embeddings")}.get(format, (format,))
    others, example = 0, ""
    for file in storage.walk(root):
        # A file that is named by itself is what `format` says, whatever it is called.
        if file_kind(file.key) in kinds or file.size == storage.CLOSED_FOLDER or file.uri == root:
            if file.uri == root and (advice := _advice(file.key)) and parquet.read_footer(file) is None:
                raise DataError(f"{root}: {advice}")
            yield file
        elif format != "embeddings" or not embeddings.LABELS_BESIDE.fullmatch(file.key.lower().rpartition("/")[2]):
            others, example = others + 1, example or file.key
    if others:
        what = {"folder": "images", "webdataset": "tars", "parquet": "tables"}.get(format, "tables or arrays")
        log_once(logging.INFO, f"{root}: files left out that are no {what} by name: {others:,}, such as {example}")


def read_classes(classes: Sequence[str] | str | None) -> frozenset[str] | None:
    """Return the classes to keep.

    Args:
        classes: names; or that of a published subset of ImageNet, such as imagenet-50; or the URI of a text file with
            one a line, where `#` starts a comment line and what follows a WordNet id (n01440764) on its line is left
            out; None keeps all.

    Raises:
        DataError: the file cannot be read, there is no such subset, or no class is named.
    """
    if classes is None:
        return None
    if isinstance(classes, str):
        if re.fullmatch(r"imagenet-\w+", classes):
            # A line [name], or [name + base] with all of another subset, and then lines of WordNet ids.
            known, name, base = dict[str, frozenset[str]](), "", frozenset[str]()
            for line in _SUBSETS.read_text().splitlines():
                if line.startswith("["):
                    name, _, other = line.partition(" + ")
                    name, base = name.strip("[]"), known.get(other, frozenset())
                    known[name] = base
                elif name:
                    known[name] |= frozenset(line.split())
            if classes not in known:
                raise DataError(f"images.classes = {classes}: no such subset; known are {', '.join(known)}")
            return known[classes]
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
    found, lost = 0, None
    for record in _READERS[shard.kind](shard, max_bytes):
        found, is_whole = found + 1, record.key == shard.name and record.reason in _LOST
        if is_whole and record.detail != webdataset.NO_END_MARK:
            lost = record
        if record.data is not None and record.uri.lower().endswith(RAW_SUFFIXES):
            record = replace(record, data=None, reason="unsupported", detail=_RAW)
        is_of_unknown_class = record.reason is not None and record.label is None
        if is_of_unknown_class or shard.selects(record.key, record.label):
            hides_label = shard.labels == "none" and record.label is not None
            yield replace(record, label=None) if hides_label else record
    if lost is not None:
        for number in range(found, _images_expected(shard)):
            yield replace(lost, key=f"{shard.name}/lost-{number:08d}", detail=f"{_LOST_DETAIL}: {lost.detail}")


def _images_expected(shard: Shard) -> int:
    """Return how many images or rows a damaged file held: as listed, else by the bytes of a whole file beside it.

    A file far smaller than its neighbours, as pointers and failed downloads leave them, counts as one of their size.
    """
    if shard.count is not None:
        return min(shard.count, _MOST_LOST)
    per_byte, usual = _contents_of_folder(shard.uri.rpartition("/")[0], shard.kind)
    found = storage.stat(shard.uri)
    size = usual if found is None or found.size < usual / _FAR_SMALLER else found.size
    return min(round(per_byte * size), _MOST_LOST)


@lru_cache(maxsize=64)
def _contents_of_folder(folder: str, kind: str) -> tuple[float, int]:
    """Return images or rows per byte of a file of a kind of shard in a folder, and the bytes of a usual file.

    (0, 0) if none can be read.
    """
    wanted = {"webdataset": "webdataset", "embeddings_npy": "embeddings", "embeddings_pt": "embeddings"}.get(
        kind, "table"
    )
    listed = (file for file in storage.walk(folder, missing_ok=True) if file_kind(file.key) == wanted)
    files = sorted(islice(listed, _LISTED), key=lambda file: -file.size)
    files = [file for file in files if file.size * _FAR_SMALLER > files[0].size]
    for file in files[:_TRIED]:
        try:
            if wanted == "webdataset":
                count = webdataset.count_images(file.uri)
            elif wanted == "table":
                count = sum(footer.group_rows) if (footer := parquet.read_footer(file)) else 0
            elif file.key.lower().endswith(".npy"):
                header = embeddings.read_npy_header(file.uri)
                embeddings.check_matrix(file.uri, header.shape, header.dtype)
                count = header.rows_within(file.size)
            else:
                count = 0
        except DataError:
            continue
        if count:
            return count / file.size, files[len(files) // 2].size
    return 0.0, 0


def read_rows(shard: Shard, load_tensors: LoadTensors | None = None, width: int | None = None) -> Rows:
    """Read the usable rows of a shard of ready embeddings in order of key, and the rejects.

    Args:
        shard: of a kind that holds embeddings.
        load_tensors: reads a `.pt` file by its local path without running code in it; needed for those only.
        width: D that every row must have; None takes the width of most rows of this shard.

    Returns:
        Embeddings in float16, or float32 where halves would lose rows; finite and not zero. Rows that are null, of
        another width, not finite or all zero are rejects, and so is what is lost with a damaged file.

    Raises:
        DataError: the file is no table of embeddings, its labels do not fit, or the storage cannot be read.
    """
    if not shard.has_embeddings:
        raise DataError(f"{shard.uri}: holds images, not ready embeddings; read its records")
    rows = embeddings.read(shard, width, load_tensors)
    for lost in list(rows.rejects):
        if lost["key"] == shard.name and lost["reason"] in _LOST:
            detail = f"{_LOST_DETAIL}: {lost['detail']}"
            count = _images_expected(shard)
            rows.rejects.extend(lost | {"key": f"{shard.name}/lost-{i:08d}", "detail": detail} for i in range(1, count))
    return rows


def fetch_many(uris: Iterable[str], columns: Mapping[Any, str] | None = None) -> Iterator[tuple[str, bytes | None]]:
    """Fetch encoded images by their URIs; every tar or table is opened once.

    Args:
        uris: of files, of tars' members (`shard.tar#name`) and of tables' rows (`part.parquet#12`).
        columns: `Shard.columns`.

    Yields:
        Each distinct URI with its image, grouped by file; None for what is not there or cannot be read.

    Raises:
        DataError: the storage as a whole cannot be read.
    """
    files, groups = list[str](), dict[str, dict[str, str]]()
    is_file = lru_cache(None)(lambda file: storage.stat(file) is not None)
    for uri in dict.fromkeys(uris):
        match = _CONTAINER.fullmatch(uri) or _ROW.fullmatch(uri)
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
            if file.lower().endswith(webdataset.TAR_SUFFIXES):
                found = webdataset.fetch(file, names)
            elif not file.lower().endswith((".npy", ".pt")):  # rows of arrays have no images
                found = parquet.fetch(file, names, columns or {})
        except (UnreadableError, *parquet.DAMAGE) as error:
            log.debug("%s: cannot be read: %s", file, error)
        yield from ((uri, found.get(name)) for name, uri in names.items())
