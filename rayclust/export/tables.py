"""Tables: `atlas`, `table` and `keys`."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq

from rayclust.config import RunConfig
from rayclust.errors import ArtefactError, ConfigError, DataError
from rayclust.export.rows import RunRows
from rayclust.report.thumbnails import thumbnail
from rayclust.runtime.spaces import learnt_index
from rayclust.store import storage
from rayclust.store import tables as stored

THUMBNAIL = 128
"""Pixels on the shorter side of a thumbnail."""
IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
"""An image in a table, as Hugging Face's datasets and embedding-atlas read it."""

ATLAS_COLUMNS = ("--x", "x", "--y", "y", "--neighbors", "neighbors", "--image", "image")
"""Arguments of embedding-atlas that name the table's columns."""
_KEYS_FILE = "{:05d}.txt"
"""Name of a cluster's list of keys."""


def write_table(rows: RunRows, out: str, images: bool) -> dict[str, Any]:
    """Write one parquet or csv, a line per image."""
    if not out.endswith((".parquet", ".csv")):
        raise ConfigError(f"--out {out}: must end in .parquet or .csv")
    _write(out, (rows.table(part) for part in rows.parts))
    return {"files": 1}


def write_atlas(rows: RunRows, out: str, images: bool) -> dict[str, Any]:
    """Write one parquet with places on the plane and neighbours, as embedding-atlas takes them.

    `neighbors` holds row numbers, which are the places in the table, and cosine distances, nearest first; as many for
    each row, since embedding-atlas stacks them: a row that has fewer is its own neighbour.
    """
    if not out.endswith(".parquet"):
        raise ConfigError(f"--out {out}: must end in .parquet")
    if not rows.is_mapped:
        raise ArtefactError(f"{rows.run.uri}: has no map: run `rayclust map RUN.yaml` first")
    found: dict[str, Any] = {"files": 1, "missing": 0}
    learnt = learnt_index(rows.config)

    def tables() -> Iterator[pa.Table]:
        for part in rows.parts:
            table, places = rows.table(part), stored.read_table(rows.run.map(part), ["x", "y"])
            for name in ("x", "y"):
                table = table.append_column(name, pa.array(places[name].to_numpy()))
            if rows.neighbors is not None:
                if learnt is not None:
                    ids, cosines = learnt.neighbors(
                        table["row"].to_numpy(), min(rows.config.neighbors.k, rows.count - 1)
                    )
                else:
                    near = stored.read_table(rows.run.neighbors(part), ["neighbors", "similarity"])
                    ids, cosines = (stored.matrix(near[name]) for name in ("neighbors", "similarity"))
                distances = (1 - cosines.astype(np.float32)).clip(min=0)
                known = ids >= 0
                ids = np.where(known, ids, table["row"].to_numpy()[:, None])
                distances = np.where(known, distances, 0).astype(np.float32)
                order = np.argsort(distances, axis=1, kind="stable")
                ends = pa.array(np.arange(0, ids.size + 1, ids.shape[1]), pa.int32())
                columns = [np.take_along_axis(values, order, axis=1).ravel() for values in (ids, distances)]
                lists = [pa.ListArray.from_arrays(ends, pa.array(values)) for values in columns]
                table = table.append_column("neighbors", pa.StructArray.from_arrays(lists, ["ids", "distances"]))
            if images:
                small = list(rows.images(table["uri"].to_pylist()))
                found["missing"] += sum(data is None for _, data in small)
                cells = [None if data is None else {"bytes": thumbnail(data, THUMBNAIL)} for _, data in small]
                table = table.append_column("image", pa.array(cells, IMAGE))
            yield table

    _write(out, tables())
    return found


def open_atlas(config: RunConfig, host: str, port: int) -> None:
    """Write a run as `atlas` to a temporary file, with thumbnails, and serve it by embedding-atlas until interrupted.

    Raises:
        ArtefactError: the run has no clusters or no map.
        ConfigError: embedding-atlas is not installed.
        DataError: it ends with an error, whose lines it has shown.
    """
    program = shutil.which("embedding-atlas")
    if program is None:
        raise ConfigError("--atlas needs embedding-atlas: pip install embedding-atlas, beside rayclust or on its own")
    with tempfile.TemporaryDirectory(prefix="rayclust-") as folder:
        file = str(Path(folder) / "atlas.parquet")
        write_atlas(RunRows(config), file, images=True)
        ended = subprocess.run([program, file, *ATLAS_COLUMNS, "--host", host, "--port", str(port)], check=False)  # noqa: S603
    if ended.returncode:
        raise DataError(f"embedding-atlas: ended with exit code {ended.returncode}")


def write_keys(rows: RunRows, out: str, images: bool) -> dict[str, Any]:
    """Write a text file of keys for each cluster, a key a line, and `clusters.csv` with their names and sizes."""
    sizes = dict[int, int]()
    with tempfile.TemporaryDirectory(prefix="rayclust-") as folder:
        for part in rows.parts:
            table = rows.table(part).sort_by("cluster")
            clusters, keys = table["cluster"].to_numpy(), table["key"].to_pylist()
            if bad := next((key for key in keys if "\n" in key or "\r" in key), None):
                raise DataError(f"--to keys: the key {bad!r} holds a line break; use --to table")
            numbers, first = np.unique(clusters, return_index=True)
            for cluster, start, stop in zip(numbers.tolist(), first, [*first[1:], len(keys)], strict=True):
                sizes[cluster] = sizes.get(cluster, 0) + int(stop - start)
                with Path(folder, _KEYS_FILE.format(cluster)).open("a", encoding="utf-8") as file:
                    file.writelines(f"{key}\n" for key in keys[start:stop])
        for name in map(_KEYS_FILE.format, sizes):
            storage.write_bytes(storage.join(out, name), Path(folder, name).read_bytes())
    shown = [cluster for cluster in rows.shown.edited.shown if cluster in sizes]
    names, marks = rows.shown.names, rows.shown.edited.marks
    summary = {
        "cluster": pa.array(shown, pa.int32()),
        "name": pa.array([names.get(cluster) for cluster in shown], pa.string()),
        "mark": pa.array([marks.get(cluster) for cluster in shown], pa.string()),
        "size": pa.array([sizes[cluster] for cluster in shown], pa.int64()),
        "file": pa.array([_KEYS_FILE.format(cluster) for cluster in shown], pa.string()),
    }
    _write(storage.join(out, "clusters.csv"), iter([pa.table(summary)]))
    return {"files": len(sizes) + 1}


def _write(out: str, found: Iterator[pa.Table]) -> None:
    """Write tables of one schema as one file, csv or parquet by its ending."""
    with storage.open_output(out) as file:
        first = next(found)
        schema = first.schema.remove_metadata()
        if out.endswith(".csv"):
            writer: Any = pyarrow.csv.CSVWriter(file, schema)
        else:
            writer = pq.ParquetWriter(file, schema, compression="zstd", store_schema=True)
        with writer:
            writer.write_table(first.cast(schema))
            for table in found:
                writer.write_table(table.cast(schema))
