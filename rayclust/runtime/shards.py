"""Write the embeddings of a run, a part per input shard, with the sums that centring and z-scores need."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from rayclust.errors import ArtefactError
from rayclust.runtime.artefacts import put_table
from rayclust.runtime.tasks import Task, TaskResult, read_mark, write_mark
from rayclust.store import storage, tables
from rayclust.store.run import Run


@dataclass(frozen=True)
class Moments:
    """Count, sum and sum of squares of rows, in float64, for centring and z-scores."""

    count: int
    total: np.ndarray
    """Float64[D]."""
    squares: np.ndarray
    """Float64[D]."""

    @classmethod
    def of(cls, embeddings: np.ndarray) -> Moments:
        """Compute the moments of Float16[N D] rows."""
        rows = embeddings.astype(np.float64)
        return cls(len(rows), rows.sum(0), (rows**2).sum(0))

    def __add__(self, other: Moments) -> Moments:
        return Moments(self.count + other.count, self.total + other.total, self.squares + other.squares)

    def to_json(self) -> dict[str, Any]:
        """Return exact JSON: the sums as base64 of their little-endian float64s."""
        total, squares = (
            base64.b64encode(values.astype("<f8").tobytes()).decode() for values in (self.total, self.squares)
        )
        return {"count": self.count, "total": total, "squares": squares}

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> Moments:
        """Return the inverse of `to_json`."""
        total, squares = (np.frombuffer(base64.b64decode(content[name]), "<f8").copy() for name in ("total", "squares"))
        return cls(content["count"], total, squares)


class MomentsInOrder:
    """Sum of the moments of all parts in the order of the parts, whatever order they end in: same rows, same bytes.

    Moments are removed from the results that pass: about 21 D bytes a part would be most of the driver's memory.
    """

    def __init__(self) -> None:
        self._waiting: dict[int, Moments | None] = {}
        self._next = 0
        self._sum: Moments | None = None

    def take(self, task: Task, result: TaskResult) -> None:
        """Add one part's moments (an `OnResult`); a part that comes again changes nothing."""
        moments = Moments.from_json(result.extra.pop("moments"))
        if task.index >= self._next:
            self._waiting[task.index] = moments if result.counts["rows"] else None
        while self._next in self._waiting:
            found = self._waiting.pop(self._next)
            if found is not None:
                self._sum = found if self._sum is None else self._sum + found
            self._next += 1

    @property
    def sum(self) -> Moments:
        """Moments of all rows; `ArtefactError` if a part before the last one seen is missing, or none has rows."""
        if self._sum is None or self._waiting:
            raise ArtefactError("encode: the moments of a part are missing; run encode again")
        return self._sum


def write_shard(
    run: Run,
    task: Task,
    row_start: int,
    records: Sequence[dict[str, Any]],
    embeddings: np.ndarray,
    rejects: Sequence[dict[str, Any]],
) -> TaskResult:
    """Write embeddings and rejects of one input shard; the caller marks the task afterwards.

    Args:
        run: the run.
        task: index and digest of the shard.
        row_start: row of its first record; an estimate, which `renumber` corrects.
        records: key, uri and label of each image, in order of key.
        embeddings: Float16[n D], their embeddings. Rows that are not finite become rejects.
        rejects: key, uri, reason and detail of each image left out.
    """
    finite = np.atleast_1d(np.isfinite(embeddings.astype(np.float32)).all(axis=1))
    kept, rejects = [], list(rejects)
    for record, is_finite in zip(records, finite, strict=True):
        if is_finite:
            kept.append(record)
        else:
            detail = "the embedding has an infinite or undefined value"
            rejects.append({"key": record["key"], "uri": record["uri"], "reason": "not_finite", "detail": detail})
    embeddings = embeddings[finite]
    rejects.sort(key=lambda reject: reject["key"])
    columns = [
        pa.array(np.arange(row_start, row_start + len(kept), dtype=np.int64)),
        *(pa.array([record[name] for record in kept], pa.string()) for name in ("key", "uri", "label")),
        tables.fixed_list(embeddings.astype(np.float16)),
    ]
    outputs = put_table(
        run, run.embeddings(task.index), pa.table(columns, schema=tables.EMBEDDINGS(embeddings.shape[1]))
    )
    if rejects:
        outputs |= put_table(run, run.rejects(task.index), pa.Table.from_pylist(rejects, schema=tables.REJECTS))
    else:
        storage.remove(run.rejects(task.index))
    reasons = dict.fromkeys(sorted({reject["reason"] for reject in rejects}), 0)
    for reject in rejects:
        reasons[reject["reason"]] += 1
    return TaskResult(
        outputs,
        {"rows": len(kept), "rejects": len(rejects), "labelled": sum(r["label"] is not None for r in kept)},
        {"row_start": row_start, "reasons": reasons, "moments": Moments.of(embeddings).to_json()},
    )


def renumber(run: Run, index: int, row_start: int) -> TaskResult:
    """Rewrite a part so that its rows begin at `row_start`; idempotent. Raise `ArtefactError` if it has no mark."""
    uri = run.shard_manifest(index)
    mark = read_mark(uri)
    if mark is None:
        raise ArtefactError(f"{uri}: is missing or damaged; run encode again")
    digest, result = mark
    table = tables.read_table(run.embeddings(index))
    rows = pa.array(np.arange(row_start, row_start + table.num_rows, dtype=np.int64))
    table = table.set_column(table.schema.get_field_index("row"), table.schema.field("row"), rows)
    # Until the part is whole its mark names no row: after a kill half-way it could name one that the part has not.
    result.extra["row_start"] = None
    write_mark(uri, Task(index, digest), result)
    result.outputs |= put_table(run, run.embeddings(index), table)
    result.extra["row_start"] = row_start
    write_mark(uri, Task(index, digest), result)
    return result
