"""Embeddings in `.npy` and `.pt` files of N×D, with labels or clip-retrieval's metadata beside."""

from __future__ import annotations

import re
import struct
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rayclust.errors import DataError
from rayclust.store import filesystem
from rayclust.store.filesystem import FileStat, UnreadableError
from rayclust.store.sources import columns, npy, parquet
from rayclust.store.sources.labels import label_text
from rayclust.store.sources.rows import RawRows, Vectors, checked, reject, unreadable
from rayclust.store.sources.shard import Rows, Shard

LoadTensors = Callable[[Path], Any]
"""Reads a `.pt` file without running code in it: a tensor, or dicts and lists of tensors and plain values."""

_EMBEDDING_KEYS = (*columns.EMBEDDING_NAMES, "feats", "x", "image_features")
_LABEL_KEYS = ("labels", "label", "ys", "y", "targets", "target")
_LABEL_FILE = re.compile(r"(.*[_-])?(labels|targets)\.(npy|pt)")
_DAMAGE = (
    ValueError,
    TypeError,
    AttributeError,
    LookupError,
    RuntimeError,
    OSError,
    EOFError,
    struct.error,
    zipfile.BadZipFile,
    UnpicklingError,
)
"""What readers of tensors let out when a file is damaged in a way that they did not think of."""
_CLIP_RETRIEVAL = re.compile(r"(?P<folder>.*/)?img_emb/img_emb_(?P<number>\d+)\.npy")


def is_array_file(key: str) -> bool:
    """Whether a file holds embeddings by its name: not labels, and not the text half of clip-retrieval's output."""
    folder, _, name = key.lower().rpartition("/")
    is_text = name.startswith("text_emb") or "text_emb" in folder.split("/")
    return name.endswith((".npy", ".pt")) and not _LABEL_FILE.fullmatch(name) and not is_text


@dataclass(frozen=True)
class ArrayFile:
    """What planning needs to know of a file."""

    stamp: str
    """Of the file and of what lies beside it."""
    beside: tuple[str, ...]
    """URIs of its labels and metadata."""
    rows: int | None
    """None where only reading tells."""


def look(file: FileStat) -> ArrayFile:
    """Finds labels and metadata of an array, and its rows.

    Raises:
        DataError: the array cannot be a table of embeddings.
    """
    labels = next((found for place in _label_places(file.uri) if (found := filesystem.stat(place))), None)
    match = _CLIP_RETRIEVAL.fullmatch(file.uri)
    metadata = match and filesystem.stat(f"{match['folder'] or ''}metadata/metadata_{match['number']}.parquet")
    beside = [found for found in (labels, metadata) if found is not None]
    stamp = "+".join([file.stamp, *(found.stamp for found in beside)])
    return ArrayFile(stamp, tuple(found.uri for found in beside), _rows_of(file))


def _label_places(uri: str) -> list[str]:
    """Where the labels of an array may lie, the nearest name first."""
    stem, _, ending = uri.rpartition(".")
    places = [f"{stem}_labels", f"{stem}-labels", f"{uri.rpartition('/')[0]}/labels"]
    return [f"{place}.{end}" for place in places for end in dict.fromkeys(["npy", ending.lower()])]


def _rows_of(file: FileStat) -> int | None:
    """Rows that are really there: a damaged header may claim any number."""
    if file.key.lower().endswith(".pt"):
        return None
    try:
        header = npy.read_header(file.uri)
    except (npy.DamagedError, UnreadableError):
        return None
    _check_shape(file.uri, header.shape, header.dtype)
    return header.rows_within(file.size) or (None if header.shape[0] else 0)


def _check_shape(where: str, shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
    if len(shape) != 2 or shape[1] == 0:
        raise DataError(f"{where}: has shape {shape}; embeddings are an array of N rows × D columns")
    if dtype.kind not in "fiu":
        raise DataError(f"{where}: holds {dtype}; embeddings are real numbers")


def cut(file: FileStat, found: ArrayFile, template: Shard, shard_rows: int) -> Iterator[Shard]:
    """Ranges of `shard_rows` rows of a `.npy` file; a `.pt` file, or one that cannot be read, is one shard."""
    stem, _, ending = file.key.rpartition(".")
    kind = "embeddings_pt" if ending.lower() == "pt" else "embeddings_npy"
    template = replace(template, kind=kind, uri=file.uri, name=stem, beside=found.beside)
    if found.rows is None:
        yield replace(template, stamp=found.stamp)
        return
    for start in range(0, found.rows, shard_rows):
        count = min(shard_rows, found.rows - start)
        yield replace(template, stamp=f"{found.stamp}:{start}+{count}", start=start, count=count)


def read_npy(shard: Shard, width: int | None) -> Rows:
    """Rows of an array, with labels or metadata beside; see `read_rows`. Rows that a cut file lacks are one reject."""
    try:
        header, size = npy.read_header(shard.uri), getattr(filesystem.stat(shard.uri), "size", 0)
        values = npy.read_rows(shard.uri, shard.start, shard.count)
    except (npy.DamagedError, UnreadableError) as error:
        return unreadable(shard, str(error), width)
    raw = _raw_rows(shard, values, header.shape[0])
    there = header.rows_within(size)
    if there < header.shape[0] and shard.start + len(values) == there:  # in the last shard, or the only one
        detail = f"the file ends early: rows {there} to {header.shape[0] - 1} are missing"
        raw.rejects.append(reject(shard.name, shard.uri, "truncated", detail))
    return checked(shard, raw, width)


def read_pt(shard: Shard, width: int | None, load_tensors: LoadTensors | None) -> Rows:
    """Rows of a file of tensors; see `read_rows`."""
    if load_tensors is None:
        raise DataError(f"{shard.uri}: reading .pt files needs load_tensors; pass one, or save the tensor as .npy")
    try:
        values, labels = _pick(shard.uri, _load(shard.uri, load_tensors))
        beside = [place for place in shard.beside if place.lower().endswith(".pt")]
        if labels is None and beside:
            labels = next(iter(_load(beside[0], load_tensors).values()), None)
    except UnreadableError as error:
        return unreadable(shard, str(error), width)
    return checked(shard, _raw_rows(shard, values, len(values), labels), width)


def _load(uri: str, load_tensors: LoadTensors) -> dict[str, NDArray[Any]]:
    with filesystem.local_copy(uri) as path:
        try:
            return dict(_named(load_tensors(path)))
        except UnreadableError:
            raise
        except DataError as error:
            raise DataError(f"{uri}: {str(error).removeprefix(f'{path}: ')}") from error
        except _DAMAGE as error:
            raise DataError(f"{uri}: is no readable file of tensors ({' '.join(str(error).split())})") from error


def _named(value: Any, name: str = "") -> Iterator[tuple[str, NDArray[Any]]]:
    """Every array in a value by its innermost name; one that stands alone has none."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _named(item, str(key))
    elif hasattr(value, "shape"):
        yield name, _as_array(value)
    elif isinstance(value, list | tuple) and value:
        if all(isinstance(item, int | float | str) for item in value):
            yield name, np.asarray(value)
        else:
            for number, item in enumerate(value):
                yield from _named(item, str(number))


def _as_array(tensor: Any) -> NDArray[Any]:
    try:
        return np.asarray(tensor)
    except TypeError:  # bfloat16, which numpy does not have
        return np.asarray(tensor.float())


def _pick(uri: str, tensors: Mapping[str, NDArray[Any]]) -> tuple[NDArray[Any], NDArray[Any] | None]:
    """Embeddings by name, else the only matrix; labels by name, else the only vector as long as it."""
    matrices = [tensor for tensor in tensors.values() if tensor.ndim == 2]
    named = [tensors[name] for name in _EMBEDDING_KEYS if name in tensors]
    if not named and len(matrices) != 1:
        have = ", ".join(f"{name or 'a tensor'} {tensor.shape}" for name, tensor in tensors.items()) or "no tensors"
        raise DataError(f"{uri}: no tensor `embeddings` of N rows × D columns; it has {have}")
    values = named[0] if named else matrices[0]
    labels = [tensors[name] for name in _LABEL_KEYS if name in tensors]
    vectors = [tensor for tensor in tensors.values() if tensor.shape == values.shape[:1]]
    return values, labels[0] if labels else vectors[0] if len(vectors) == 1 else None


def _raw_rows(shard: Shard, values: NDArray[Any], total: int, labels: NDArray[Any] | None = None) -> RawRows:
    """Rows of an array of `total` rows, of which `values` are the shard's."""
    _check_shape(shard.uri, values.shape, values.dtype)
    rows = range(shard.start, shard.start + len(values))
    vectors = Vectors()
    vectors.add(np.full(len(values), values.shape[1]), {values.shape[1]: values})
    raw = RawRows(
        [parquet.row_key(shard.name, row) for row in rows],
        [parquet.row_uri(shard.uri, row) for row in rows],
        [None] * len(values),
        vectors,
    )
    for place in shard.beside:
        if place.endswith(".parquet"):
            raw = _with_metadata(shard, raw, place, total)
        elif place.endswith(".npy") and labels is None and shard.label_source is not None:
            raw.labels = _labels_beside(shard, place, len(values), total)
    if labels is not None and shard.label_source is not None:
        raw.labels = _texts(shard.uri, labels, total)
    return raw


def _labels_beside(shard: Shard, place: str, count: int, total: int) -> Sequence[str | None]:
    try:
        found = npy.read_header(place).shape
        labels = npy.read_rows(place, shard.start, count)
    except npy.DamagedError as error:
        raise DataError(f"{place}: is no readable npy file ({error}); mend it, or set images.labels: none") from error
    if found[:1] != (total,):
        raise DataError(f"{place}: {found[0] if found else 0} labels for the {total} rows of {shard.uri}")
    return _texts(place, labels, count)


def _texts(where: str, labels: NDArray[Any], count: int) -> list[str | None]:
    if labels.shape[:1] != (count,) or labels.size != count:
        raise DataError(f"{where}: labels have shape {labels.shape} for {count} rows; one label per row is needed")
    return [label_text(label) for label in labels.reshape(-1).tolist()]


def _with_metadata(shard: Shard, raw: RawRows, place: str, total: int) -> RawRows:
    """Keys, URIs and labels from a table with one line per row of the array."""
    try:
        with parquet.opened(place) as file:
            schema, lines = file.schema_arrow, file.metadata.num_rows
            key, uri = columns.key_column(schema), columns.uri_column(schema)
            label = columns.label_column(schema, shard.label_source, place)
            table = file.read(columns=sorted({name for name in (key, uri, label) if name is not None}))
    except (*parquet.DAMAGE, UnreadableError) as error:
        raise DataError(f"{place}: cannot be read ({' '.join(str(error).split())}); mend or remove it") from error
    if lines != total:
        raise DataError(f"{place}: {lines} lines for the {total} rows of {shard.uri}; there must be as many")
    table = table.slice(shard.start, len(raw.keys))
    given = columns.texts(table[uri]) if uri else raw.uris
    uris = [text or fallback for text, fallback in zip(given, raw.uris, strict=True)]
    labels = columns.labels(table, label, shard.label_source) if label else raw.labels
    return RawRows(columns.unique_keys(table, key, list(raw.keys)), uris, labels, raw.vectors)
