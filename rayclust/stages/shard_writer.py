"""The end of encode inside a Ray worker: gathers each shard's chunks and writes the shard when it is whole."""

from __future__ import annotations

import json
import time
from typing import Any

import numpy as np

from rayclust.stages.shards import write_shard
from rayclust.stages.units import Unit, UnitResult, finish
from rayclust.store.layout import Run


class ShardWriter:
    """Gathers the chunks of each shard and writes it when it is whole; a Ray actor.

    A chunk that comes twice (its worker died after sending) is taken once. If the writer itself dies, its unfinished
    shards have no marker and the driver sends them through again.
    """

    def __init__(self, run: str, dimension: int) -> None:
        self._run, self._dimension = Run(run), dimension
        self._open: dict[str, dict[int, tuple[Any, ...]]] = {}
        self._lengths: dict[str, int] = {}
        self._written: set[str] = set()

    def add(
        self, unit: str, chunk: int, last: bool, records: list[Any], rejects: list[Any], embeddings: np.ndarray
    ) -> float:
        """Takes one chunk of the shard that `unit` names; the seconds that this took."""
        started = time.monotonic()
        if unit not in self._written:
            self._take(unit, chunk, last, (records, rejects, np.array(embeddings)))
        return time.monotonic() - started

    def _take(self, unit: str, chunk: int, last: bool, content: tuple[Any, ...]) -> None:
        chunks = self._open.setdefault(unit, {})
        chunks[chunk] = content
        if last:
            self._lengths[unit] = chunk + 1
        if len(chunks) == self._lengths.get(unit):
            self._write(unit, [chunks[number] for number in range(len(chunks))])
            self._written.add(unit)
            del self._open[unit], self._lengths[unit]

    def _write(self, unit: str, chunks: list[tuple[Any, ...]]) -> None:
        named = json.loads(unit)
        records = [record for kept, _, _ in chunks for record in kept]
        shard = Unit(named["index"], named["digest"])
        embeddings = np.concatenate([embeddings for _, _, embeddings in chunks])
        rejects = [reject for _, rejects, _ in chunks for reject in rejects]

        def write() -> UnitResult:
            return write_shard(self._run, shard, named["row_start"], records, embeddings, rejects)

        finish(self._run.shard_manifest(shard.index), shard, write)

    def ping(self) -> bool:
        """Answers once the actor is up."""
        return True
