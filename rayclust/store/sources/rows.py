"""Checks rows of ready embeddings: what cannot be stored or compared becomes a reject with a reason."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rayclust.store.sources.labels import clean
from rayclust.store.sources.shard import Rows, Shard

_DETAILS = {
    "not_finite": "the embedding has an infinite or undefined value",
    "overflow": "the embedding has a value above 65504, the largest of float16; scale the rows",
    "zero_vector": "the embedding is zero in float16, so it has no direction",
}


class Vectors:
    """Rows of embeddings gathered block by block, in float16 at once: in wider numbers they might not fit memory."""

    def __init__(self) -> None:
        self._widths: list[NDArray[np.int64]] = []
        self._halves: dict[int, list[NDArray[np.float16]]] = {}
        self._reasons: dict[int, list[NDArray[np.str_]]] = {}

    def add(self, widths: NDArray[np.int64], values: dict[int, NDArray[Any]]) -> None:
        """Adds a block.

        Args:
            widths: Int64[n], numbers in each row; -1 where there is none.
            values: by width, the rows of that width in order, [m width] of any type of real numbers.
        """
        self._widths.append(widths)
        for width, block in values.items():
            halves, reasons = _as_halves(block)
            self._halves.setdefault(width, []).append(halves)
            self._reasons.setdefault(width, []).append(reasons)

    def widths(self) -> list[int]:
        """Numbers in each row; -1 where there is none."""
        return [int(width) for block in self._widths for width in block]

    def usual_width(self) -> int:
        """The width of most rows; of equals the smaller, and 0 where there are none."""
        counts = {width: sum(map(len, blocks)) for width, blocks in self._halves.items()}
        return max(counts, key=lambda width: (counts[width], -width), default=0)

    def of_width(self, width: int) -> tuple[NDArray[np.float16], list[str]]:
        """Float16[N width], and for each row the reason why it cannot be used, or nothing."""
        if width not in self._halves:
            return np.empty((0, width), np.float16), []
        return np.concatenate(self._halves[width]), np.concatenate(self._reasons[width]).tolist()


def _as_halves(values: NDArray[Any]) -> tuple[NDArray[np.float16], NDArray[np.str_]]:
    with np.errstate(over="ignore", invalid="ignore"):
        halves = values.astype(np.float16)
    reasons = np.full(len(values), "", dtype="U16")
    reasons[~halves.any(axis=1)] = "zero_vector"
    reasons[~np.isfinite(halves).all(axis=1)] = "overflow"
    if values.dtype.kind == "f":
        reasons[~np.isfinite(values).all(axis=1)] = "not_finite"
    return halves, reasons


@dataclass
class RawRows:
    """Rows as a file holds them."""

    keys: Sequence[str]
    uris: Sequence[str]
    labels: Sequence[str | None]
    vectors: Vectors
    rejects: list[dict[str, str]] = field(default_factory=list)
    """Of rows that could not be read at all."""

    def reject(self, row: int, reason: str, detail: str) -> None:
        """Notes that a row is left out."""
        self.rejects.append(reject(self.keys[row], self.uris[row], reason, detail))


def reject(key: str, uri: str, reason: str, detail: str) -> dict[str, str]:
    """A line of the table of rejects."""
    return {"key": key, "uri": uri, "reason": reason, "detail": clean(detail)}


def checked(shard: Shard, raw: RawRows, width: int | None) -> Rows:
    """The usable rows in order of key.

    Args:
        shard: decides which labels are kept.
        raw: the rows.
        width: wanted number of columns; None takes that of most rows.

    Returns:
        Embeddings in float16; rows that are null, of another width, not finite, beyond float16 or all zero are rejects.
    """
    width = raw.vectors.usual_width() if width is None else width
    halves, reasons = raw.vectors.of_width(width)
    kept, place = [], -1
    for row, found in enumerate(raw.vectors.widths()):
        place += found == width
        if not shard.wants(raw.keys[row], raw.labels[row]):
            continue
        if found != width:
            raw.reject(row, *_wrong_width(found, width))
        elif reasons[place]:
            raw.reject(row, reasons[place], _DETAILS[reasons[place]])
        else:
            kept.append((raw.keys[row], place, row))
    kept.sort()
    labels = [None if shard.labels == "none" else raw.labels[row] for _, _, row in kept]
    order = np.array([place for _, place, _ in kept], dtype=np.int64)
    return Rows([key for key, _, _ in kept], [raw.uris[row] for _, _, row in kept], labels, halves[order], raw.rejects)


def _wrong_width(found: int, width: int) -> tuple[str, str]:
    if found < 0:
        return "null_embedding", "the row holds no embedding"
    return "wrong_width", f"{found} numbers where the other rows have {width}"


def unreadable(shard: Shard, detail: str, width: int | None) -> Rows:
    """No rows, and the one reject that stands for the file."""
    lost = reject(shard.name, shard.uri, "unreadable_file", detail)
    return Rows([], [], [], np.empty((0, width or 0), np.float16), [lost])
