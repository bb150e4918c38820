"""Command `predict`: clusters of new images by a finished run."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from rayclust.config import RunConfig, validate
from rayclust.errors import ArtefactError, ConfigError, DataError
from rayclust.runtime.datasets import SCHEME
from rayclust.runtime.edits import ShownClusters, shown_clusters
from rayclust.runtime.encoder import with_run_engines
from rayclust.runtime.pipeline import Manifests, content_digest, run_stage
from rayclust.runtime.rows import part_embeddings, transform_of
from rayclust.runtime.tensors import load_method, method_inputs
from rayclust.stages.assign import assign, calibration_of
from rayclust.store import storage, tables
from rayclust.store.manifest import EncodeOutputs, digest_of
from rayclust.store.run import Run, parts

logger = logging.getLogger(__name__)

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
_KEPT = ("columns", "shard_size", "max_bytes", "max_pixels")
"""Settings of the run's own images that hold for new ones."""


def predict(config: RunConfig, images: str, out: str, *, evaluate: bool = False) -> dict[str, Any]:
    """Encode `images` as the run did, assign them to its clusters, and write a table.

    Embeddings are kept below the run until the table is written, so that a killed prediction resumes.

    Args:
        config: the run's.
        images: a folder or URI in any format that `images` takes.
        out: a .parquet or .csv file or URI.
        evaluate: read the images' labels as the run reads those of its own, and score the clusters against them.

    Returns:
        Counts of `rows` and `rejects`; with `evaluate`, the `labelled` ones and their scores by name, among them
        `accuracy_held_out` by the majority classes of the run's own clusters where the run has labels.

    Raises:
        ArtefactError: the run is not trained.
        ConfigError: `out` has another ending.
        DataError: the images have embeddings of another width, or no labels to score.
    """
    if not out.endswith((".parquet", ".csv")):
        raise ConfigError(f"--out {out}: must end in .parquet or .csv")
    run, manifests = Run(config.run, config.spaces), Manifests(config)
    encode, train = manifests.of("encode"), manifests.of("train")
    if encode is None or train is None:
        raise ArtefactError(f"{run.uri}: is not trained: run `rayclust run RUN.yaml` first")
    # A scratch run of the new images: the run's encoder, columns and limits, no classes, and labels only to score.
    uri = images if images.startswith(SCHEME) else storage.absolute(images)
    labels = config.images.labels if evaluate and config.images.labels != "none" else "auto" if evaluate else "none"
    ready = [encoder.space for encoder in config.encoders if encoder.embeddings is not None]
    if ready:
        raise ConfigError(
            f"predict: the embeddings of the space {ready[0]} are ready ones, and no encoder makes more; in Python "
            "`rayclust.load(RUN).predict` takes rows with all spaces side by side"
        )
    folder = storage.join(config.run, "predict", digest_of([uri, labels] if evaluate else uri))
    scratch = Run(folder, config.spaces)
    tree = with_run_engines(config).model_dump(mode="json", exclude_unset=True)
    kept = {name: tree["images"][name] for name in _KEPT if name in tree["images"]}
    tree |= {"run": scratch.uri, "images": {"uri": uri, "labels": labels, "max_reject_share": 1.0} | kept}
    encoded = run_stage("encode", validate(tree))
    given, wanted = (found.outputs_of(EncodeOutputs).dimension for found in (encoded, encode))
    if given != wanted:
        raise DataError(f"{images}: embeddings of {given} values; the run's have {wanted}")
    if evaluate and not encoded.counts["labelled"]:
        raise DataError("predict --evaluate: none of the images has a label; see images.labels")
    method, transform = load_method(run.uri, content_digest(train)), transform_of(encode, config.features)
    calibration, shown = calibration_of(config, encode, train), shown_clusters(run)
    scored = list[tuple[pa.ChunkedArray, np.ndarray]]()

    def pieces() -> Iterator[pa.Table]:
        """Yield the lines of one part of the images after the other, and then those of what cannot be read."""
        for part, uri in parts(scratch.rows_folder):
            table = tables.read_table(uri, ["key", "uri", "label"])
            own, confidence = assign(method, method_inputs(method, transform, part_embeddings(scratch, part)))
            # Splits are lists of the run's own images: new ones follow renames and merges alone.
            clusters = own if shown is None else shown.edited.of(own)
            if evaluate:
                scored.append((table["label"], clusters))
            named = pa.nulls(len(own), pa.string()) if shown is None else shown.names_at(clusters)
            columns = {"key": table["key"], "uri": table["uri"], "cluster": clusters, "name": named}
            yield pa.table(columns | {"confidence": calibration(confidence)})
        for _, uri in parts(scratch.rejects_folder):
            yield tables.read_table(uri, ["key", "uri", "reason"])

    # Columns that a piece lacks become null.
    empty = SCHEMA.empty_table()
    filled = (pa.concat_tables([empty, piece], promote_options="default").cast(SCHEMA) for piece in pieces())
    tables.write_pieces(out, SCHEMA, filled)
    scores = _scores(run, scored, shown) if evaluate else {}
    storage.remove_tree(scratch.uri)
    return {"rows": encoded.counts["rows"], "rejects": encoded.counts["rejects"]} | scores


def _scores(
    run: Run, scored: Sequence[tuple[pa.ChunkedArray, np.ndarray]], shown: ShownClusters | None
) -> dict[str, Any]:
    """Score the clusters of new images against their labels, part by part."""
    from rayclust.metrics import external

    labels = np.concatenate([part.to_numpy() for part, _ in scored])
    known = external.labelled(labels)
    truth = labels[known].astype(str)
    found = np.concatenate([clusters for _, clusters in scored])[known].astype(np.int64)
    scores = {"labelled": int(known.sum())} | external.scores(truth, found)
    if storage.exists(run.contingency):
        cells = tables.read_table(run.contingency)
        own = cells["cluster"].to_numpy()
        counts = cells["count"].to_numpy()
        pairs = (cells["label"].to_numpy(zero_copy_only=False), own if shown is None else shown.edited.of(own))
        commonest = external.majority_map(*(np.repeat(np.asarray(values), counts) for values in pairs))
        if set(truth.tolist()).isdisjoint(commonest.values()):
            logger.warning("predict: no label of these images is one of the run's: accuracy_held_out is left out")
        else:
            scores["accuracy_held_out"] = external.mapped_accuracy(truth, found, commonest)
    return scores
