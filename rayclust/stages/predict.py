"""predict: clusters of new images by a frozen run."""

from __future__ import annotations

import io
from typing import Any

import pyarrow as pa
import pyarrow.csv

from rayclust.config import RunConfig, validate
from rayclust.errors import ArtefactError, ConfigError
from rayclust.stages.assign import assign
from rayclust.stages.models import load_method
from rayclust.stages.pipeline import content_digest, run_stage
from rayclust.stages.rows import transform_of
from rayclust.stages.words import cluster_names
from rayclust.store import filesystem, tables
from rayclust.store.layout import Run, parts
from rayclust.store.manifest import Manifest, digest_of, read_manifest

SCHEMA = pa.schema(
    [
        pa.field("key", pa.string(), nullable=False),
        pa.field("uri", pa.string(), nullable=False),
        pa.field("cluster", pa.int32()),
        pa.field("name", pa.string()),
        pa.field("confidence", pa.float32()),
        pa.field("reason", pa.string()),
    ]
)
"""One line per image; an image that cannot be read has a reason instead of a cluster."""


def predict(config: RunConfig, images: str, out: str) -> dict[str, int]:
    """Encodes `images` as the run did, assigns them to its clusters, and writes a table.

    The encoding is kept below the run while it goes on, so that a killed prediction continues.

    Args:
        config: the frozen run's.
        images: a folder or URI in any format that `images` takes.
        out: a .parquet or .csv file or URI.

    Returns:
        Counts of rows and rejects.

    Raises:
        ArtefactError: the run is not trained.
        ConfigError: `out` has another ending.
    """
    if not out.endswith((".parquet", ".csv")):
        raise ConfigError(f"--out {out}: must end in .parquet or .csv")
    run = Run(config.run)
    encode, train = read_manifest(run, "encode"), read_manifest(run, "train")
    if encode is None or train is None:
        raise ArtefactError(f"{run.uri}: is not trained: run `rayclust run RUN.yaml` first")
    scratch = Run(run.at("predict", digest_of(images)))
    tree = config.model_dump(mode="json", exclude_unset=True)
    tree |= {"run": scratch.uri, "images": {"uri": images, "labels": "none", "max_reject_share": 1.0}}
    sealed = run_stage("encode", validate(tree))
    table = _table(run, scratch, config, encode, content_digest(train))
    _write(out, table)
    filesystem.remove_tree(scratch.uri)
    return {"rows": sealed.counts["rows"], "rejects": sealed.counts["rejects"]}


def _table(run: Run, scratch: Run, config: RunConfig, encode: Manifest, model: str) -> pa.Table:
    method, transform = load_method(run.uri, model), transform_of(encode, config.features)
    names = cluster_names(run)
    rows: list[dict[str, Any]] = []
    for _, uri in parts(scratch.embeddings_folder):
        table = tables.read_table(uri, ["key", "uri", "embedding"])
        clusters, confidence = assign(method, transform(tables.matrix(table["embedding"])))
        found = zip(
            table["key"].to_pylist(), table["uri"].to_pylist(), clusters.tolist(), confidence.tolist(), strict=True
        )
        rows += [{"key": k, "uri": u, "cluster": c, "name": names.get(c), "confidence": p} for k, u, c, p in found]
    for _, uri in parts(scratch.rejects_folder):
        rows += tables.read_table(uri, ["key", "uri", "reason"]).to_pylist()
    return pa.Table.from_pylist(rows, schema=SCHEMA)


def _write(out: str, table: pa.Table) -> None:
    if out.endswith(".parquet"):
        tables.write_table(out, table)
        return
    buffer = io.BytesIO()
    pyarrow.csv.write_csv(table, buffer)
    filesystem.write_bytes(out, buffer.getvalue())
