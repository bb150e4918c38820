"""Command `predict`: clusters of new images by a finished run."""

from __future__ import annotations

import io

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
    table = _table(run, scratch, config, encode, content_digest(train))
    if out.endswith(".parquet"):
        tables.write_table(out, table)
    else:
        buffer = io.BytesIO()
        pyarrow.csv.write_csv(table, buffer)
        storage.write_bytes(out, buffer.getvalue())
    storage.remove_tree(scratch.uri)
    return {"rows": encoded.counts["rows"], "rejects": encoded.counts["rejects"]}


def _table(run: Run, scratch: Run, config: RunConfig, encode: Manifest, model: str) -> pa.Table:
    method, transform = load_method(run.uri, model), transform_of(encode, config.features)
    names = cluster_names(run)
    found = [SCHEMA.empty_table()]
    for _, uri in parts(scratch.embeddings_folder):
        table = tables.read_table(uri, ["key", "uri", "embedding"])
        clusters, confidence = assign(method, transform(tables.matrix(table["embedding"])))
        named = pa.array([names.get(cluster) for cluster in clusters.tolist()], pa.string())
        columns = {"key": table["key"], "uri": table["uri"], "cluster": clusters, "name": named}
        found.append(pa.table(columns | {"confidence": confidence}))
    found += [tables.read_table(uri, ["key", "uri", "reason"]) for _, uri in parts(scratch.rejects_folder)]
    # Columns that a table lacks become null.
    return pa.concat_tables(found, promote_options="default").cast(SCHEMA)
