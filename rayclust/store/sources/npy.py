"""Rows of `.npy` files by ranges, local or remote; nothing in them is ever unpickled."""

from __future__ import annotations

import io
import math
import tokenize
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rayclust.errors import DataError
from rayclust.store import filesystem

_HEADER_BYTES = 1 << 16
_MAX_WIDTH = 1 << 24
_DAMAGE = (ValueError, EOFError, OSError, SyntaxError, TypeError, tokenize.TokenError, RecursionError)
"""What parsing a damaged header raises: it is the text of a Python dict, read as literals only."""


@dataclass(frozen=True)
class NpyHeader:
    """What a file says of its array."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    is_fortran: bool
    """Columns lie one after the other, so that a range of rows is not a range of bytes."""
    offset: int
    """Bytes before the array."""

    @property
    def row_bytes(self) -> int:
        """Bytes of one row, in C order."""
        return int(self.dtype.itemsize) * math.prod(self.shape[1:])

    def rows_within(self, size: int) -> int:
        """Whole rows that a file of `size` bytes can hold, at most those of the shape."""
        if not self.row_bytes:
            return self.shape[0]
        return min(self.shape[0], max(0, size - self.offset) // self.row_bytes)


class DamagedError(Exception):
    """The file is not an npy file, or ends too early."""


def read_header(uri: str) -> NpyHeader:
    """The header of an npy file.

    Raises:
        DamagedError: there is none.
        DataError: the array holds Python objects or records, which are not read.
    """
    start = io.BytesIO(filesystem.read_bytes(uri, _HEADER_BYTES))
    try:
        version = np.lib.format.read_magic(start)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, is_fortran, dtype = read(start)
    except _DAMAGE as error:
        raise DamagedError(" ".join(str(error).split())) from error
    if dtype.hasobject:
        raise DataError(f"{uri}: holds Python objects, which are not read; save it as an array of numbers")
    if dtype.fields is not None:
        raise DataError(f"{uri}: holds records of {len(dtype.fields)} fields; save the numbers as an array of two axes")
    if any(length < 0 for length in shape) or math.prod(shape[1:]) > _MAX_WIDTH:
        raise DamagedError(f"its shape {shape} is impossible")
    return NpyHeader(tuple(shape), dtype, is_fortran, start.tell())


def read_rows(uri: str, start: int = 0, count: int | None = None) -> NDArray[Any]:
    """Rows `start` up to `start + count` of an array, fewer where the file ends early.

    Args:
        uri: the file.
        start: first row.
        count: number of rows; None is up to the end.

    Returns:
        [n ...], a copy in C order.

    Raises:
        DamagedError: there is no header, or a file in Fortran order ends early.
        DataError: the array holds Python objects, or the storage cannot be read.
    """
    header = read_header(uri)
    if not header.shape:
        raise DataError(f"{uri}: holds a single number; an array with an axis of rows is needed")
    end = header.shape[0] if count is None else min(start + count, header.shape[0])
    if header.is_fortran and len(header.shape) > 1:
        return _fortran(uri, header)[start:end]
    first = header.offset + start * header.row_bytes
    data = filesystem.read_range(uri, first, header.offset + end * header.row_bytes)
    rows = len(data) // header.row_bytes if header.row_bytes else 0
    return np.frombuffer(data[: rows * header.row_bytes], header.dtype).reshape(rows, *header.shape[1:])


def _fortran(uri: str, header: NpyHeader) -> NDArray[Any]:
    data = filesystem.read_bytes(uri)[header.offset :]
    if len(data) < header.shape[0] * header.row_bytes:
        raise DamagedError("the file ends early")
    values = np.frombuffer(data, header.dtype, math.prod(header.shape))
    return np.ascontiguousarray(values.reshape(header.shape, order="F"))
