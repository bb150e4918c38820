"""Ready embeddings: tables with a column of vectors, and `.npy` and `.pt` files of N×D with labels or metadata beside.

Clip-retrieval's folders are read too: `img_emb/img_emb_0.npy` with `metadata/metadata_0.parquet`.
"""

from __future__ import annotations

import io
import logging
import math
import re
import struct
import tokenize
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain, islice
from pathlib import Path
from pickle import UnpicklingError
from typing import Any
from zipfile import BadZipFile

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from rayclust.errors import DataError
from rayclust.store import storage
from rayclust.store.sources import parquet
from rayclust.store.sources.base import Rows, Shard, enumerated, escape_invalid, label_text
from rayclust.store.sources.parquet import EMBEDDING_NAMES, Columns, Footer, RowNames, describe_columns
from rayclust.store.storage import FileStat, UnreadableError, prefetch
from rayclust.store.tables import in_storage

log = logging.getLogger(__name__)

LoadTensors = Callable[[Path], Any]
"""Reads a `.pt` file without running code in it: a tensor, or dicts and lists of tensors and plain values."""

SHARD_FACTOR = 32
"""Rows of embeddings are so much smaller than images that a shard takes this many times more."""

TENSOR_NAMES = (*EMBEDDING_NAMES, "feats", "x", "image_features")
"""Names of the embeddings in a file of tensors."""
TENSOR_LABEL_NAMES = ("labels", "label", "ys", "y", "targets", "target")

_ROW_NAMES = r"(.*[_-])?(ids?|keys|names|file_?names|paths|urls|captions|ind(ex|exes|ices))"
"""Of arrays that say which row is which."""
LABELS_OR_NAMES = re.compile(rf"((.*[_-])?(labels?|targets?|classes)|{_ROW_NAMES})\.(npy|pt)")
"""File names, in lower case, of arrays that hold no embeddings."""
LABELS_BESIDE = re.compile(r"(.*[_-])?labels\.(npy|pt)")
"""File names, in lower case, of those that are read with the embeddings beside them."""
_CLIP_RETRIEVAL = re.compile(r"(?P<folder>.*/)?img_emb/img_emb_(?P<number>\d+)\.npy")
_NAMED_SO = re.compile(r"emb|feat|vec|latent|repr")
"""In the name of an array of embeddings."""
_FAR_WIDER = 4
_COMPARED = 128
"""Files among which arrays of the same rows are looked for."""
_BATCH_ROWS = 4096
_FILES_AHEAD = 8
_HEADER_BYTES = 1 << 16
_MAX_WIDTH = 1 << 24
_NPY_DAMAGE = (ValueError, EOFError, OSError, SyntaxError, TypeError, tokenize.TokenError, RecursionError)
"""Raised when a damaged npy header is parsed: it is the text of a Python dict, read as literals only."""
_TENSOR_DAMAGE = (*_NPY_DAMAGE, AttributeError, LookupError, RuntimeError, struct.error, BadZipFile, UnpicklingError)
"""Raised by readers of tensors when a file is damaged in a way that they do not check for."""
_REJECT_DETAILS = {
    "not_finite": "the embedding has an infinite or undefined value",
    "overflow": "the embedding has a value above 3.4e38, the largest of float32; scale the rows",
    "zero_vector": "the embedding is zero, so it has no direction",
}


def plan(files: Iterable[FileStat], template: Shard, shard_rows: int) -> Iterator[Shard]:
    """Make shards of Parquet, `.npy` and `.pt` files, as the listing comes; footers and headers are read ahead.

    Parquet is cut at the row group where `shard_rows` are reached, a `.pt` file not at all.

    Raises:
        DataError: a file holds no embeddings, or not the column of labels that is asked for.
    """
    refused, has_any = list[DataError](), False
    inspected = prefetch(partial(_inspect, template), files, _FILES_AHEAD)
    first = list(islice(inspected, _COMPARED))
    other_facts = _other_facts([found for _, found in first if isinstance(found, _Array)])
    for file, found in chain(first, inspected):
        if isinstance(found, _Array) and _family(found.shard.uri) in other_facts:
            found = DataError(f"{file.uri}: {other_facts[_family(file.uri)]}")
        if isinstance(found, DataError):
            refused.append(found)
            continue
        for shard in _cut(file, found, template, shard_rows):
            has_any = True
            yield shard
    # An array that is no table of embeddings, such as names of rows, is left out beside others.
    for error in refused:
        if not has_any:
            raise error
        log.warning("%s: left out", error)


@dataclass(frozen=True)
class _Array:
    """An `.npy` or `.pt` file."""

    shard: Shard
    """Of all rows."""
    shape: tuple[int, ...] = ()
    """As the header says; empty where it is not known."""


def _family(uri: str) -> str:
    """Return the name that the shards of an array have in common: without the digits behind its folder."""
    folder, slash, name = uri.rpartition("/")
    return folder + slash + re.sub(r"\d+", "#", name)


def _other_facts(arrays: Sequence[_Array]) -> dict[str, str]:
    """Return the families of arrays that hold other facts of the same rows, such as boxes, and why.

    They lie in the folder of the embeddings, have as many rows, and another width. The embeddings are those named so,
    else those that are far wider.

    Raises:
        DataError: neither tells which are the embeddings.
    """
    firsts = {_family(array.shard.uri): array for array in reversed(arrays) if array.shape}
    groups = dict[tuple[str, int], dict[str, _Array]]()
    for family, array in firsts.items():
        groups.setdefault((family.rpartition("/")[0], array.shape[0]), {})[family] = array
    found = dict[str, str]()
    for (_, rows), families in groups.items():
        widths = sorted({array.shape[1] for array in families.values()})
        if len(widths) < 2:
            continue
        named = {
            array.shape[1] for family, array in families.items() if _NAMED_SO.search(family.rpartition("/")[2].lower())
        }
        if len(named) != 1 and widths[-1] < _FAR_WIDER * widths[-2]:
            places = " and ".join(array.shard.uri for array in families.values())
            raise DataError(f"{places}: arrays of {widths} values for the same {rows} rows; name one in images.uri")
        width = named.pop() if len(named) == 1 else widths[-1]
        reason = f"of the same {rows} rows as embeddings of {width} values beside it"
        found |= {
            family: f"holds {array.shape[1]} values {reason}"
            for family, array in families.items()
            if array.shape[1] != width
        }
    return found


def _cut(file: FileStat, found: _Array | Footer | None, template: Shard, shard_rows: int) -> Iterator[Shard]:
    """Make shards of one file: ranges of rows of an array, of row groups of a table."""
    if isinstance(found, _Array):
        whole = found.shard
        if whole.count is None:
            yield whole
            return
        for start in range(0, whole.count, shard_rows):
            count = min(shard_rows, whole.count - start)
            yield replace(whole, stamp=f"{whole.stamp}:{start}+{count}", start=start, count=count)
        return
    if found is not None:
        folder, _, name = file.key.rpartition("/")
        is_metadata = name.startswith("metadata") or folder.rpartition("/")[2] == "metadata"
        named = {} if is_metadata else template.columns
        if Columns.find(found.schema, None, file.uri, named).embedding is None:
            if is_metadata:  # beside clip-retrieval's arrays
                return
            have = describe_columns(found.schema)
            raise DataError(f"{file.uri}: no column `embedding` of lists of numbers; it has {have}")
        Columns.find(found.schema, template.label_source, file.uri, named)  # refuses a missing column of labels
    yield from parquet.cut(file, found, replace(template, kind="embeddings_parquet"), shard_rows)


def _inspect(template: Shard, file: FileStat) -> _Array | Footer | DataError | None:
    """Read the footer of a table; of an array return the shard of all rows, with its labels and metadata beside.

    An array that is no table of embeddings gives the error that says so.
    """
    if not file.key.lower().endswith((".npy", ".pt")):
        return parquet.read_footer(file)
    # 1. Labels lie beside under the nearest name, metadata where clip-retrieval puts them.
    stem, _, ending = file.uri.rpartition(".")
    places = [f"{stem}_labels", f"{stem}-labels", f"{file.uri.rpartition('/')[0]}/labels"]
    endings = dict.fromkeys(["npy", ending.lower()])
    candidates = (storage.stat(f"{place}.{end}") for place in places for end in endings)
    beside = [next((found for found in candidates if found is not None), None)]
    match = _CLIP_RETRIEVAL.fullmatch(file.uri)
    if match:
        beside.append(storage.stat(f"{match['folder'] or ''}metadata/metadata_{match['number']}.parquet"))
    present = [found for found in beside if found is not None]

    # 2. A damaged header may claim any number of rows: only those within the file count.
    rows: int | None = None
    shape: tuple[int, ...] = ()
    if not file.key.lower().endswith(".pt"):
        try:
            header = read_npy_header(file.uri)
            check_matrix(file.uri, header.shape, header.dtype)
            rows, shape = header.rows_within(file.size) or (None if header.shape[0] else 0), header.shape
        except UnreadableError:  # becomes a reject when it is read
            pass
        except DataError as error:
            return error
    kind = "embeddings_pt" if ending.lower() == "pt" else "embeddings_npy"
    name, stamp = file.key.rpartition(".")[0], "+".join(found.stamp for found in [file, *present])
    uris = tuple(found.uri for found in present)
    shard = replace(template, kind=kind, uri=file.uri, name=name, stamp=stamp, beside=uris, count=rows)
    return _Array(shard, shape)


def check_matrix(where: str, shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
    """Refuse an array that is no table of embeddings.

    Raises:
        DataError: it has other axes than rows and columns, or holds no real numbers.
    """
    if len(shape) != 2 or shape[1] == 0:
        raise DataError(f"{where}: has shape {shape}; embeddings are an array of N rows × D columns")
    if dtype.kind not in "fiu":
        raise DataError(f"{where}: holds {dtype}; embeddings are real numbers")


@dataclass
class EmbeddingBuffer:
    """Rows of embeddings collected block by block, converted to their type in storage at once to save memory."""

    widths: list[int] = field(default_factory=list)
    """Numbers in each row; -1 where there is none."""
    stored: dict[int, list[NDArray[Any]]] = field(default_factory=dict)
    """By width, blocks of the rows of that width in order, [m width] as `tables.in_storage` gives them."""
    reasons: dict[int, list[str]] = field(default_factory=dict)
    """By width, the reason to reject each of its rows, or an empty text."""

    def add(self, widths: NDArray[np.int64], values: Mapping[int, NDArray[Any]]) -> None:
        """Add a block.

        Args:
            widths: Int64[n], numbers in each row; -1 where there is none.
            values: by width, the rows of that width in order, [m width] of any type of real numbers.
        """
        self.widths += widths.tolist()
        for width, block in values.items():
            stored = in_storage(block)
            reasons = np.full(len(block), "", dtype="U16")
            reasons[~stored.any(axis=1)] = "zero_vector"
            reasons[~np.isfinite(stored).all(axis=1)] = "overflow"
            if block.dtype.kind == "f":
                reasons[~np.isfinite(block).all(axis=1)] = "not_finite"
            self.stored.setdefault(width, []).append(stored)
            self.reasons.setdefault(width, []).extend(reasons.tolist())


def validate_embeddings(
    shard: Shard,
    names: RowNames,
    buffer: EmbeddingBuffer,
    width: int | None,
    rejects: Iterable[Mapping[str, str]] = (),
) -> Rows:
    """Return the usable rows in order of key, and the rejects.

    Args:
        shard: decides which labels are kept.
        names: of the rows of `buffer`.
        buffer: the rows.
        width: D that every row must have; None takes that of most rows.
        rejects: of rows that could not be read at all; they come first.

    Returns:
        Embeddings in float16 or float32; rows that are null, of another width, not finite or all zero are rejects.
    """
    # 1. The width of most rows, of equals the smaller.
    if width is None:
        counts = {width: len(reasons) for width, reasons in buffer.reasons.items()}
        width = max(counts, key=lambda width: (counts[width], -width), default=0)
    stored = np.concatenate(buffer.stored.get(width, [np.empty((0, width), np.float16)]))
    reasons = buffer.reasons.get(width, [])

    # 2. Keep or reject each row; `place` is its index among the rows of this width.
    kept: list[tuple[str, int, int]] = []
    lost, place = [dict(reject) for reject in rejects], -1
    for row, found in enumerate(buffer.widths):
        place += found == width
        if not shard.selects(names.keys[row], names.labels[row]):
            continue
        if found < 0:
            reason, detail = "null_embedding", "the row holds no embedding"
        elif found != width:
            reason, detail = "wrong_width", f"{found} numbers where the other rows have {width}"
        elif reasons[place]:
            reason, detail = reasons[place], _REJECT_DETAILS[reasons[place]]
        else:
            kept.append((names.keys[row], place, row))
            continue
        lost.append(_reject(names.keys[row], names.uris[row], reason, detail))

    # 3. Sort by key.
    kept.sort()
    labels = [None if shard.labels == "none" else names.labels[row] for _, _, row in kept]
    order = np.array([place for _, place, _ in kept], dtype=np.int64)
    return Rows([key for key, _, _ in kept], [names.uris[row] for _, _, row in kept], labels, stored[order], lost)


def _reject(key: str, uri: str, reason: str, detail: str) -> dict[str, str]:
    return {"key": key, "uri": uri, "reason": reason, "detail": escape_invalid(detail)}


def read(shard: Shard, width: int | None, load_tensors: LoadTensors | None) -> Rows:
    """Read the embeddings of a shard; see `read_rows`. A file that cannot be read is one reject."""
    rejects = list[dict[str, str]]()
    try:
        if shard.kind == "embeddings_parquet":
            names, buffer = _table_rows(shard)
        elif shard.kind == "embeddings_npy":
            header, size = read_npy_header(shard.uri), getattr(storage.stat(shard.uri), "size", 0)
            values = read_npy_rows(shard.uri, header, shard.start, shard.count)
            total, present = header.shape[0], header.rows_within(size)
            # What a file cut short lacks is one reject, of the shard that holds the last row before it.
            if present < total and shard.start + len(values) == present:
                detail = f"the file ends early: rows {present} to {total - 1} are missing"
                rejects.append(_reject(shard.name, shard.uri, "truncated", detail))
            names, buffer = _array_rows(shard, values, total)
        elif load_tensors is not None:
            names, buffer = _tensor_rows(shard, load_tensors)
        else:
            raise DataError(f"{shard.uri}: reading .pt files needs load_tensors; pass one, or save the tensor as .npy")
    except (*parquet.DAMAGE, UnreadableError) as error:
        lost = [_reject(shard.name, shard.uri, "unreadable_file", " ".join(str(error).split()))]
        return Rows([], [], [], np.empty((0, width or 0), np.float16), lost)
    return validate_embeddings(shard, names, buffer, width, rejects)


def _table_rows(shard: Shard) -> tuple[RowNames, EmbeddingBuffer]:
    """Read a range of row groups of a Parquet file."""
    with parquet.opened(shard.uri) as file:
        groups = list(range(*(shard.row_groups or (0, file.metadata.num_row_groups))))
        columns = Columns.find(file.schema_arrow, shard.label_source, shard.uri, shard.columns)
        if columns.embedding is None:
            raise DataError(f"{shard.uri}: no column `embedding`; it has {describe_columns(file.schema_arrow)}")
        buffer = EmbeddingBuffer()
        for batch in file.iter_batches(_BATCH_ROWS, groups, [columns.embedding], use_threads=False):
            # Lists of numbers of any lengths are matrices by width; a null list has the width -1.
            array = batch.column(0)
            if isinstance(array.type, pa.BaseExtensionType):
                array = array.storage
            lengths = pc.if_else(array.is_null(), -1, pc.list_value_length(array)).to_numpy(zero_copy_only=False)
            widths, values = lengths.astype(np.int64), {}
            for each in np.unique(widths[widths > 0]).tolist():
                lists = array.filter(pa.array(widths == each))
                values[each] = lists.flatten().to_numpy(zero_copy_only=False).reshape(-1, each)
            buffer.add(widths, values)
        return parquet.read_names(file, columns, shard, groups, len(buffer.widths)), buffer


def _tensor_rows(shard: Shard, load_tensors: LoadTensors) -> tuple[RowNames, EmbeddingBuffer]:
    """Read the rows of a file of tensors."""
    tensors = _named_arrays(shard.uri, load_tensors)
    # 1. Embeddings by name, else the only matrix.
    matrices = [tensor for tensor in tensors.values() if tensor.ndim == 2]
    named = [tensors[name] for name in TENSOR_NAMES if name in tensors]
    if not named and len(matrices) != 1:
        have = enumerated(f"{name or 'a tensor'} {tensor.shape}" for name, tensor in tensors.items()) or "no tensors"
        raise DataError(f"{shard.uri}: no tensor `embeddings` of N rows × D columns; it has {have}")
    values = named[0] if named else matrices[0]
    # 2. Labels by name, else the only vector as long as the embeddings that names no rows, else a file beside.
    found = [tensors[name] for name in TENSOR_LABEL_NAMES if name in tensors]
    others = {name: tensor for name, tensor in tensors.items() if tensor.shape == values.shape[:1]}
    vectors = [
        others[name] for name in others if not re.fullmatch(f"{_ROW_NAMES}|file_?name|path|key|url", name.lower())
    ]
    labels = found[0] if found else vectors[0] if len(vectors) == 1 else None
    beside = [place for place in shard.beside if place.lower().endswith(".pt")]
    if labels is None and beside:
        labels = next(iter(_named_arrays(beside[0], load_tensors).values()), None)
    return _array_rows(shard, values, len(values), labels)


def _named_arrays(uri: str, load_tensors: LoadTensors) -> dict[str, NDArray[Any]]:
    """Load every array in a file by its innermost name; one that stands alone has an empty name."""
    with storage.local_copy(uri) as path:
        try:
            return dict(_walk_tensors(load_tensors(path)))
        except UnreadableError:
            raise
        except DataError as error:
            raise DataError(f"{uri}: {str(error).removeprefix(f'{path}: ')}") from error
        except _TENSOR_DAMAGE as error:
            raise DataError(f"{uri}: is no readable file of tensors ({' '.join(str(error).split())})") from error


def _walk_tensors(value: Any, name: str = "") -> Iterator[tuple[str, NDArray[Any]]]:
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _walk_tensors(item, str(key))
    elif hasattr(value, "shape"):
        value = value.detach() if hasattr(value, "detach") else value
        try:
            array = np.asarray(value)
        except TypeError:  # bfloat16, which numpy does not have
            array = np.asarray(value.float())
        yield name, array
    elif isinstance(value, list | tuple) and value:
        if all(isinstance(item, int | float | str) for item in value):
            yield name, np.asarray(value)
        else:
            for number, item in enumerate(value):
                yield from _walk_tensors(item, str(number))


def _array_rows(
    shard: Shard, values: NDArray[Any], total: int, labels: NDArray[Any] | None = None
) -> tuple[RowNames, EmbeddingBuffer]:
    """Name the rows of an array, from its file and the files beside it.

    Args:
        shard: of the array.
        values: [n D], the rows of the shard.
        total: rows of the whole array.
        labels: [N ...], of the whole array, from the same file.
    """
    check_matrix(shard.uri, values.shape, values.dtype)
    count, buffer = len(values), EmbeddingBuffer()
    buffer.add(np.full(count, values.shape[1]), {values.shape[1]: values})
    names = RowNames.numbered(shard, count)
    for place in shard.beside:
        # 1. Metadata: keys, URIs and labels of all rows of the array.
        if place.endswith(".parquet"):
            try:
                with parquet.opened(place) as file:
                    columns = Columns.find(file.schema_arrow, shard.label_source, place)
                    key, lines = parquet.key_column(file, columns), file.metadata.num_rows
                    table = file.read(columns=columns.naming(key))
                if lines == total:
                    names = names.replaced(table.slice(shard.start, count), columns, key, shard)
            except (*parquet.DAMAGE, UnreadableError) as error:
                raise DataError(
                    f"{place}: cannot be read ({' '.join(str(error).split())}); mend or remove it"
                ) from error
            if lines != total:
                raise DataError(f"{place}: {lines} lines for the {total} rows of {shard.uri}; there must be as many")
        # 2. An array of labels, of which only the rows of the shard are read.
        elif place.endswith(".npy") and labels is None and shard.label_source is not None:
            try:
                header = read_npy_header(place)
                found = read_npy_rows(place, header, shard.start, count)
            except UnreadableError as error:
                detail = f"is no readable npy file ({error}); mend it, or set images.labels: none"
                raise DataError(f"{place}: {detail}") from error
            if header.shape[0] != total:
                raise DataError(f"{place}: {header.shape[0]} labels for the {total} rows of {shard.uri}")
            names = replace(names, labels=_label_texts(place, found, count))
    if labels is not None and shard.label_source is not None:
        names = replace(names, labels=_label_texts(shard.uri, labels, total))
    return names, buffer


def _label_texts(where: str, labels: NDArray[Any], count: int) -> Sequence[str | None]:
    if labels.shape[:1] != (count,) or labels.size != count:
        raise DataError(f"{where}: labels have shape {labels.shape} for {count} rows; one label per row is needed")
    return [label_text(label) for label in labels.reshape(-1).tolist()]


class DamagedNpyError(UnreadableError):
    """The file is not an npy file, or ends too early."""


@dataclass(frozen=True)
class NpyHeader:
    """The description of the array in an npy file."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    is_fortran: bool
    """True if columns are contiguous, so that a range of rows is not a range of bytes."""
    offset: int
    """Bytes before the array."""

    row_bytes: int
    """Bytes of one row, in C order."""

    def rows_within(self, size: int) -> int:
        """Return the whole rows that a file of `size` bytes can hold, at most those of the shape."""
        if not self.row_bytes:
            return self.shape[0]
        return min(self.shape[0], max(0, size - self.offset) // self.row_bytes)


def read_npy_header(uri: str) -> NpyHeader:
    """Read the header of an npy file.

    Raises:
        DamagedNpyError: there is none.
        DataError: the array holds Python objects or records, which are not read.
    """
    start = io.BytesIO(storage.read_bytes(uri, 0, _HEADER_BYTES))
    try:
        version = np.lib.format.read_magic(start)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, is_fortran, dtype = read(start)
    except _NPY_DAMAGE as error:
        raise DamagedNpyError(" ".join(str(error).split())) from error
    if dtype.hasobject:
        raise DataError(f"{uri}: holds Python objects, which are not read; save it as an array of numbers")
    if dtype.fields is not None:
        raise DataError(f"{uri}: holds records of {len(dtype.fields)} fields; save the numbers as an array of two axes")
    if any(length < 0 for length in shape) or math.prod(shape[1:]) > _MAX_WIDTH:
        raise DamagedNpyError(f"its shape {shape} is impossible")
    return NpyHeader(tuple(shape), dtype, is_fortran, start.tell(), int(dtype.itemsize) * math.prod(shape[1:]))


def read_npy_rows(uri: str, header: NpyHeader, start: int = 0, count: int | None = None) -> NDArray[Any]:
    """Read rows `start` up to `start + count` of an npy file, fewer where it ends early; nothing is unpickled.

    Args:
        uri: the file.
        header: from `read_npy_header`.
        start: first row.
        count: number of rows; None is up to the end.

    Returns:
        [n ...], a copy in C order.

    Raises:
        DamagedNpyError: a file in Fortran order ends early.
        DataError: the array has no axis of rows, or the storage cannot be read.
    """
    if not header.shape:
        raise DataError(f"{uri}: holds a single number; an array with an axis of rows is needed")
    total, row_bytes = header.shape[0], header.row_bytes
    end = total if count is None else min(start + count, total)
    if header.is_fortran and len(header.shape) > 1:
        data = storage.read_bytes(uri)[header.offset :]
        if len(data) < total * row_bytes:
            raise DamagedNpyError("the file ends early")
        values = np.frombuffer(data, header.dtype, math.prod(header.shape))
        return np.ascontiguousarray(values.reshape(header.shape, order="F"))[start:end]
    data = storage.read_bytes(uri, header.offset + start * row_bytes, header.offset + end * row_bytes)
    rows = len(data) // row_bytes if row_bytes else 0
    return np.frombuffer(data[: rows * row_bytes], header.dtype).reshape(rows, *header.shape[1:])
