"""Command `predict`: clusters of new images by a finished run."""

from __future__ import annotations

import io
from typing import Any

import pyarrow as pa
import pyarrow.csv

from rayclust.config import RunConfig, validate
from rayclust.errors import ArtefactError, ConfigError, DataError
from rayclust.runtime.datasets import SCHEME
from rayclust.runtime.models import load_method
from rayclust.runtime.pipeline import Manifests, content_digest, run_stage
from rayclust.runtime.rows import transform_of
from rayclust.runtime.vocabularies import cluster_names
from rayclust.stages.assign import assign
from rayclust.store import storage, tables
from rayclust.store.manifest import Manifest, digest_of
from rayclust.store.run import Run, parts

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
    """Encode `images` as the run did, assign them to its clusters, and write a table.

    Embeddings are kept below the run until the table is written, so that a killed prediction resumes.

    Args:
        config: the run's.
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
    run, manifests = Run(config.run), Manifests(config)
    encode, train = manifests.of("encode"), manifests.of("train")
    if encode is None or train is None:
        raise ArtefactError(f"{run.uri}: is not trained: run `rayclust run RUN.yaml` first")
    # A scratch run of the new images: the run's encoder and limits, no labels or classes.
    uri = images if images.startswith(SCHEME) else storage.absolute(images)
    scratch = Run(storage.join(config.run, "predict", digest_of(uri)))
    tree = config.model_dump(mode="json", exclude_unset=True)
    limits = {key: tree["images"][key] for key in ("shard_size", "max_bytes", "max_pixels") if key in tree["images"]}
    tree |= {"run": scratch.uri, "images": {"uri": uri, "labels": "none", "max_reject_share": 1.0} | limits}
    encoded = run_stage("encode", validate(tree))
    given, wanted = int(encoded.extra["dimension"]), int(encode.extra["dimension"])
    if given != wanted:
        raise DataError(f"{images}: embeddings of {given} values; the run's have {wanted}")
    _write(out, _table(run, scratch, config, encode, content_digest(train)))
    storage.remove_tree(scratch.uri)
    return {"rows": encoded.counts["rows"], "rejects": encoded.counts["rejects"]}


def _table(run: Run, scratch: Run, config: RunConfig, encode: Manifest, model: str) -> pa.Table:
    method, transform = load_method(run.uri, model), transform_of(encode, config.features)
    names = cluster_names(run)
    found: list[pa.Table] = []
    for _, uri in parts(scratch.embeddings_folder):
        table = tables.read_table(uri, ["key", "uri", "embedding"])
        clusters, confidence = assign(method, transform(tables.matrix(table["embedding"])))
        columns = {
            "cluster": pa.array(clusters),
            "name": pa.array([names.get(cluster) for cluster in clusters.tolist()], pa.string()),
            "confidence": pa.array(confidence),
        }
        found.append(_filled({"key": table["key"], "uri": table["uri"], **columns}))
    for _, uri in parts(scratch.rejects_folder):
        table = tables.read_table(uri, ["key", "uri", "reason"])
        found.append(_filled({name: table[name] for name in table.column_names}))
    return pa.concat_tables(found)


def _filled(columns: dict[str, Any]) -> pa.Table:
    """Return a table of `SCHEMA` with nulls where no column is given."""
    count = len(columns["key"])
    arrays = [columns[field.name] if field.name in columns else pa.nulls(count, field.type) for field in SCHEMA]
    return pa.table(arrays, schema=SCHEMA)


def _write(out: str, table: pa.Table) -> None:
    if out.endswith(".parquet"):
        tables.write_table(out, table)
        return
    buffer = io.BytesIO()
    pyarrow.csv.write_csv(table, buffer)
    storage.write_bytes(out, buffer.getvalue())
