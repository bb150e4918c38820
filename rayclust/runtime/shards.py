"""Write the embeddings of a run, a part per input shard, with the sums that centring and z-scores need."""

from __future__ import annotations

import base64
import fnmatch
import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa

from rayclust.config import RunConfig
from rayclust.errors import ArtefactError
from rayclust.methods.settings import EMBEDDINGS
from rayclust.runtime.datasets import local_folder
from rayclust.runtime.tasks import Task, TaskResult, read_mark, write_mark
from rayclust.store import storage, tables
from rayclust.store.manifest import put_table
from rayclust.store.run import Run


def pack_moments(count: int, sums: np.ndarray) -> dict[str, Any]:
    """Return exact JSON of rows' count, sums and sums of squares, Float64[2 D]: as base64 of little-endian float64s."""
    total, squares = (base64.b64encode(values.astype("<f8").tobytes()).decode() for values in sums)
    return {"count": count, "total": total, "squares": squares}


@dataclass
class MomentsInOrder:
    """Sum of the moments of all parts in the order of the parts, whatever order they end in: same rows, same bytes.

    Moments are removed from the results that pass: about 21 D bytes a part would be most of the driver's memory.
    """

    dimension: int = 0
    """D, once a part with rows was seen."""
    _count: int = 0
    _sums: np.ndarray | None = None
    _next: int = 0
    _waiting: dict[int, dict[str, Any]] = field(default_factory=dict)

    def take(self, task: Task, result: TaskResult) -> None:
        """Add one part's moments (an `OnResult`); a part that comes again changes nothing."""
        moments = result.extra.pop("moments")
        if task.index >= self._next:
            self._waiting[task.index] = moments
        while self._next in self._waiting:
            found = self._waiting.pop(self._next)
            if found["count"]:
                sums = np.stack([np.frombuffer(base64.b64decode(found[name]), "<f8") for name in ("total", "squares")])
                self._sums = sums if self._sums is None else self._sums + sums
                self._count, self.dimension = self._count + found["count"], sums.shape[1]
            self._next += 1

    @property
    def sum(self) -> dict[str, Any]:
        """Moments of all rows; `ArtefactError` if a part before the last one seen is missing, or none has rows."""
        if self._sums is None or self._waiting:
            raise ArtefactError("encode: the moments of a part are missing; run encode again")
        return pack_moments(self._count, self._sums)


@dataclass(frozen=True)
class Split:
    """Which rows of a run are kept aside as the test split."""

    rule: float | tuple[str, ...]
    """A share of the rows, or patterns of keys and files."""
    source: str
    """Folder or file of a second input, whose rows all are; empty if there is none."""
    seed: int

    @classmethod
    def of(cls, config: RunConfig) -> Split | None:
        """Return the split that a run asks for."""
        rule, test = config.images.split, config.images.test
        if test is not None:
            return cls((), local_folder(test).rstrip("/"), config.seed)
        return None if rule is None else cls((rule,) if isinstance(rule, str) else rule, "", config.seed)

    def holds(self, key: str, uri: str) -> bool:
        """Return whether a row is kept aside; a share depends on key and seed alone, not on the other rows."""
        if self.source:
            return uri == self.source or uri.startswith((f"{self.source}/", f"{self.source}#"))
        if isinstance(self.rule, float):
            drawn = hashlib.blake2b(f"{self.seed}/{key}".encode(), digest_size=8).digest()
            return int.from_bytes(drawn, "big") < self.rule * 2**64
        names = key, uri.partition("#")[0]
        return any(fnmatch.fnmatchcase(name, pattern) for pattern in self.rule for name in names)


def write_shard(
    run: Run,
    task: Task,
    row_start: int,
    records: Sequence[dict[str, Any]],
    embeddings: np.ndarray | Mapping[str, np.ndarray],
    rejects: Sequence[dict[str, Any]],
    *,
    split: Split | None = None,
) -> TaskResult:
    """Write embeddings and rejects of one input shard; the caller marks the task afterwards.

    Args:
        run: the run.
        task: index and digest of the shard.
        row_start: row of its first record; an estimate, which `renumber` corrects.
        records: key, uri and label of each image, in order of key.
        embeddings: Float[n D], their embeddings, stored as float32 if they are, else as float16; of a run with several
            spaces by space, in the run's order. Rows that are not finite become rejects.
        rejects: key, uri, reason and detail of each image left out.
        split: says which rows are kept aside; the moments leave these out.
    """
    spaces = embeddings if isinstance(embeddings, Mapping) else {EMBEDDINGS: embeddings}
    finite = np.ones(len(records), bool)
    for values in spaces.values():
        finite &= np.atleast_1d(np.isfinite(values.astype(np.float32)).all(axis=1))
    kept, rejects = [], list(rejects)
    for record, is_finite in zip(records, finite, strict=True):
        if is_finite:
            kept.append(record)
        else:
            detail = "the embedding has an infinite or undefined value"
            rejects.append({"key": record["key"], "uri": record["uri"], "reason": "not_finite", "detail": detail})
    spaces = {
        name: values[finite].astype(np.float32 if values.dtype == np.float32 else np.float16)
        for name, values in spaces.items()
    }
    rejects.sort(key=lambda reject: reject["key"])
    texts = {name: [record[name] for record in kept] for name in ("key", "uri", "label")}
    aside = np.zeros(len(kept), bool)
    if split is not None:
        aside[:] = [split.holds(record["key"], record["uri"]) for record in kept]
        texts["split"] = ["test" if is_test else "train" for is_test in aside]
        if split.source:  # keys of two inputs may be the same
            texts["key"] = [f"test/{key}" if is_test else key for key, is_test in zip(texts["key"], aside, strict=True)]
    rows = pa.array(np.arange(row_start, row_start + len(kept), dtype=np.int64))
    columns = [rows, *(pa.array(values, pa.string()) for values in texts.values())]
    if run.spaces:
        outputs = put_table(run, run.rows(task.index), pa.table(columns, schema=tables.ROWS(split is not None)))
        for name, values in spaces.items():
            schema = tables.SPACE(values.shape[1], pa.from_numpy_dtype(values.dtype))
            table = pa.table([rows, tables.fixed_list(values)], schema=schema)
            outputs |= put_table(run, run.embeddings(task.index, name), table)
    else:
        [values] = spaces.values()
        schema = tables.EMBEDDINGS(values.shape[1], split is not None, pa.from_numpy_dtype(values.dtype))
        table = pa.table([*columns, tables.fixed_list(values)], schema=schema)
        outputs = put_table(run, run.embeddings(task.index), table)
    if rejects:
        outputs |= put_table(run, run.rejects(task.index), pa.Table.from_pylist(rejects, schema=tables.REJECTS))
    else:
        storage.remove(run.rejects(task.index))
    reasons = dict(sorted(Counter(reject["reason"] for reject in rejects).items()))
    counts = {"rows": len(kept), "rejects": len(rejects), "labelled": sum(r["label"] is not None for r in kept)}
    counts |= {} if split is None else {"test": int(aside.sum())}
    # Moments in float64, for centring and z-scores.
    fitted = np.concatenate(list(spaces.values()), axis=1)[~aside].astype(np.float64)
    moments = pack_moments(len(fitted), np.stack([fitted.sum(0), (fitted**2).sum(0)]))
    extra = {"row_start": row_start, "reasons": reasons, "moments": moments}
    if run.spaces:
        extra["widths"] = [values.shape[1] for values in spaces.values()]
    return TaskResult(outputs, counts, extra)


def renumber(run: Run, index: int, row_start: int) -> TaskResult:
    """Rewrite a part so that its rows begin at `row_start`; idempotent. Raise `ArtefactError` if it has no mark."""
    mark_uri = run.mark(index)
    mark = read_mark(mark_uri)
    if mark is None:
        raise ArtefactError(f"{mark_uri}: is missing or damaged; run encode again")
    digest, result = mark
    # Until the part is whole its mark names no row: after a kill half-way it could name one that the part has not.
    result.extra["row_start"] = None
    write_mark(mark_uri, Task(index, digest), result)
    for uri in (run.rows(index), *(run.embeddings(index, space) for space in run.spaces)):
        table = tables.read_table(uri)
        rows = pa.array(np.arange(row_start, row_start + table.num_rows, dtype=np.int64))
        table = table.set_column(table.schema.get_field_index("row"), table.schema.field("row"), rows)
        result.outputs |= put_table(run, uri, table)
    result.extra["row_start"] = row_start
    write_mark(mark_uri, Task(index, digest), result)
    return result
