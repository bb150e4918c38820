"""One input shard's embeddings as an artefact: part, rejects, moments, and the marker that vouches for them."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from rayclust.errors import ArtefactError
from rayclust.stages.outputs import put_table
from rayclust.stages.units import Unit, UnitResult, read_marker, write_marker
from rayclust.store import filesystem, tables
from rayclust.store.layout import Run


@dataclass(frozen=True)
class Moments:
    """Count, sum and sum of squares of rows, in float64: what centring and z-scores need."""

    count: int
    total: np.ndarray
    squares: np.ndarray

    @classmethod
    def of(cls, embeddings: np.ndarray) -> Moments:
        """The moments of Float16[N D] rows."""
        rows = embeddings.astype(np.float64)
        return cls(len(rows), rows.sum(0), (rows**2).sum(0))

    def __add__(self, other: Moments) -> Moments:
        return Moments(self.count + other.count, self.total + other.total, self.squares + other.squares)

    def to_json(self) -> dict[str, Any]:
        """Exact: the sums travel as the bytes of their float64s."""
        return {"count": self.count, "total": _packed(self.total), "squares": _packed(self.squares)}

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> Moments:
        """The inverse of `to_json`."""
        return cls(content["count"], _unpacked(content["total"]), _unpacked(content["squares"]))


class MomentsInOrder:
    """The moments of all parts, summed in the order of the parts whatever order they end in: same rows, same bytes.

    Results lose theirs as they are seen: some 21 D bytes a part would be most of what the driver holds.
    """

    def __init__(self) -> None:
        self._waiting: dict[int, Moments | None] = {}
        self._next = 0
        self._sum: Moments | None = None

    def take(self, unit: Unit, result: UnitResult) -> None:
        """Sees one part's result; a part that is read again changes nothing."""
        moments = Moments.from_json(result.extra.pop("moments"))
        if unit.index >= self._next:
            self._waiting[unit.index] = moments if result.counts["rows"] else None
        while self._next in self._waiting:
            found = self._waiting.pop(self._next)
            if found is not None:
                self._sum = found if self._sum is None else self._sum + found
            self._next += 1

    @property
    def sum(self) -> Moments:
        """Of all parts.

        Raises:
            ArtefactError: a part before one that was seen was not, or no part has rows.
        """
        if self._sum is None or self._waiting:
            raise ArtefactError("encode: the moments of a part are missing; run encode again")
        return self._sum


def _packed(values: np.ndarray) -> str:
    return base64.b64encode(values.astype("<f8").tobytes()).decode()


def _unpacked(text: str) -> np.ndarray:
    return np.frombuffer(base64.b64decode(text), "<f8").copy()


def write_shard(
    run: Run,
    unit: Unit,
    row_start: int,
    records: Sequence[dict[str, Any]],
    embeddings: np.ndarray,
    rejects: Sequence[dict[str, Any]],
) -> UnitResult:
    """Writes one shard's part and rejects; the caller marks the unit afterwards.

    Args:
        run: where.
        unit: index and digest of the shard.
        row_start: the row of its first record, as far as is known; `renumber` mends it.
        records: key, uri and label of each kept image, in order of key.
        embeddings: Float16[n D], their embeddings. Rows that are not finite become rejects.
        rejects: key, uri, reason and detail of each image left out.
    """
    finite = np.atleast_1d(np.isfinite(embeddings.astype(np.float32)).all(axis=1))
    kept = [record for record, good in zip(records, finite, strict=True) if good]
    lost = [_not_finite(record) for record, good in zip(records, finite, strict=True) if not good]
    rejects = sorted([*rejects, *lost], key=lambda reject: reject["key"])
    embeddings = embeddings[finite]
    outputs = put_table(run, run.embeddings(unit.index), _part(row_start, kept, embeddings))
    if rejects:
        outputs |= put_table(run, run.rejects(unit.index), pa.Table.from_pylist(rejects, schema=tables.REJECTS))
    else:
        filesystem.remove(run.rejects(unit.index))
    return UnitResult(
        outputs,
        {"rows": len(kept), "rejects": len(rejects), "labelled": sum(r["label"] is not None for r in kept)},
        {"row_start": row_start, "reasons": _tally(rejects), "moments": Moments.of(embeddings).to_json()},
    )


def renumber(run: Run, index: int, row_start: int) -> UnitResult:
    """Rewrites a part so that its rows begin at `row_start`; the same bytes whenever it is run again."""
    marker = read_marker(run.shard_manifest(index))
    if marker is None:
        raise ArtefactError(f"{run.shard_manifest(index)}: is missing or damaged; run encode again")
    digest, result = marker
    table = tables.read_table(run.embeddings(index))
    rows = pa.array(np.arange(row_start, row_start + table.num_rows, dtype=np.int64))
    table = table.set_column(table.schema.get_field_index("row"), table.schema.field("row"), rows)
    # Until the part is whole its marker names no row: after a kill half-way it could name one that the part has not.
    result.extra["row_start"] = None
    write_marker(run.shard_manifest(index), Unit(index, digest), result)
    result.outputs |= put_table(run, run.embeddings(index), table)
    result.extra["row_start"] = row_start
    write_marker(run.shard_manifest(index), Unit(index, digest), result)
    return result


def _part(row_start: int, records: Sequence[dict[str, Any]], embeddings: np.ndarray) -> pa.Table:
    columns = [
        pa.array(np.arange(row_start, row_start + len(records), dtype=np.int64)),
        *(pa.array([record[name] for record in records], pa.string()) for name in ("key", "uri", "label")),
        tables.fixed_list(embeddings.astype(np.float16)),
    ]
    return pa.table(columns, schema=tables.EMBEDDINGS(embeddings.shape[1]))


def _not_finite(record: dict[str, Any]) -> dict[str, Any]:
    return {
        "key": record["key"],
        "uri": record["uri"],
        "reason": "not_finite",
        "detail": "the embedding has an infinite or undefined value",
    }


def _tally(rejects: Sequence[dict[str, Any]]) -> dict[str, int]:
    reasons = sorted({reject["reason"] for reject in rejects})
    return {reason: sum(reject["reason"] == reason for reject in rejects) for reason in reasons}
