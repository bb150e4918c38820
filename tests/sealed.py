"""Finished runs that many tests look at, without a cluster."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rayclust.config import RunConfig, validate
from rayclust.runtime.api import load_run
from rayclust.runtime.pipeline import run_all
from rayclust.store.manifest import Manifest, read_manifest
from rayclust.store.run import Run
from tests.stages.in_process import without_ray
from tests.stages.runs import tree, write_tars

VECTORS = np.array([[3, 0], [4, 1], [0, 2], [1, 5], [0, 4], [6, 0], [5, 1]], np.float32)
"""Two directions, told apart by the larger value."""
LABELS = ["right", None, "up", "up", "up", "right", "right"]


@dataclass(frozen=True)
class Sealed:
    """A run with every stage done."""

    config: RunConfig

    @property
    def run(self) -> Run:
        return Run(self.config.run)

    @property
    def folder(self) -> Path:
        return Path(self.config.run)

    def manifest(self, stage: str) -> Manifest:
        found = read_manifest(self.run, stage)
        assert found is not None
        return found


def sealed_run(config: RunConfig) -> Iterator[Sealed]:
    with pytest.MonkeyPatch.context() as patch:
        without_ray(patch)
        run_all(config)
    yield Sealed(load_run(config.run))  # with the encoder that `auto` became


def sealed_pictures(folder: Path) -> Iterator[Sealed]:
    """Tars of 12, 0 and 12 patches in three colours and a broken one, as pixels in three clusters; read only."""
    write_tars(folder / "images", shards=2, per_shard=12)
    tarfile.open(folder / "images" / "shard-000a.tar", "w").close()
    with tarfile.open(folder / "images" / "shard-001.tar", "a") as tar:
        tar.addfile(tarfile.TarInfo("broken.png"), io.BytesIO())
    yield from sealed_run(validate(tree(str(folder / "run"), str(folder / "images"))))


def sealed_vectors(folder: Path) -> Iterator[Sealed]:
    """Tables of 3 and 4 ready embeddings, one without a label, in two clusters; read only."""
    (folder / "table").mkdir()
    for part, some in enumerate((slice(0, 3), slice(3, 7))):
        columns = {
            "embedding": pa.array(list(VECTORS[some]), pa.list_(pa.float32())),
            "label": pa.array(LABELS[some], pa.string()),
        }
        pq.write_table(pa.table(columns), folder / "table" / f"{part}.parquet")
    groups = {"method": {"clusters": 2}, "features": {"center": False}, "neighbors": {"k": 2}}
    yield from sealed_run(validate(tree(str(folder / "run"), str(folder / "table"), **groups)))
