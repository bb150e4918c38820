"""search: the images of a run that are nearest to an image or to words."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from rayclust.arrays import require_matrix
from rayclust.config import RunConfig
from rayclust.encoders.base import Encoder
from rayclust.encoders.decode import Undecodable, decode
from rayclust.errors import ArtefactError, ConfigError, DataError
from rayclust.search.index import load_index
from rayclust.stages.index import ENCODER_INDEX
from rayclust.stages.models import load_run_encoder
from rayclust.stages.pipeline import Seals, content_digest
from rayclust.stages.rows import row_starts
from rayclust.stages.words import cluster_names
from rayclust.store import filesystem, tables
from rayclust.store.layout import Run
from rayclust.store.manifest import Manifest, read_manifest


@dataclass(frozen=True)
class Hit:
    """One image found."""

    row: int
    similarity: float
    """Cosine."""
    key: str
    uri: str
    cluster: int | None
    """None where the run has no assignments yet."""
    name: str | None
    """The cluster's name."""


def search(config: RunConfig, *, image: str | None, text: str | None, top: int, space: str) -> list[Hit]:
    """The `top` nearest images, nearest first.

    Args:
        config: the run's.
        image: a path or URI of an image; or
        text: words, for encoders that read text.
        top: how many.
        space: `encoder`, or `z` for methods that learn a space of their own.

    Raises:
        ArtefactError: the run is not indexed.
        ConfigError: the query does not suit the run.
        DataError: the image cannot be read.
    """
    run, seals = Run(config.run), Seals(config)
    encode, index = seals.of("encode"), read_manifest(run, "index")
    # Settings of the index may have changed since; its rows may not.
    if encode is None or index is None or index.inputs.get("encode") != content_digest(encode):
        raise ArtefactError(f"{run.uri}: is not indexed: run `rayclust index RUN.yaml` first")
    if space == "z":
        raise ConfigError(f"--space z: the method {config.method.name} has no space of its own; use --space encoder")
    query = _query(config, image, text)
    require_matrix(query, "the query", int(encode.extra["dimension"]))
    found = load_index(filesystem.read_bytes(filesystem.join(run.index_folder, ENCODER_INDEX)))
    rows, similarity = found.search(query, min(top, encode.counts["rows"]))
    near = {int(row): float(s) for row, s in zip(rows[0], similarity[0], strict=True) if row >= 0}
    return _hits(run, encode, near, is_assigned=seals.of("assign") is not None)


def _query(config: RunConfig, image: str | None, text: str | None) -> np.ndarray:
    if (image is None) == (text is None):
        raise ConfigError("search: give either --image FILE or --text WORDS")
    data = filesystem.read_bytes(image) if image is not None else b""
    encoder = load_run_encoder(config)
    if text is not None:
        if not encoder.has_text:
            raise ConfigError(f"--text: the encoder {config.encoder.name} has no text tower; search by --image")
        return _unit(encoder.encode_texts([text]))
    return _encoded(encoder, str(image), data)


def _encoded(encoder: Encoder, uri: str, data: bytes) -> np.ndarray:
    try:
        pixels = decode(data, encoder.preprocess)
    except Undecodable as error:
        raise DataError(f"--image {uri}: {error.reason}: {error.detail}") from None
    return _unit(encoder.encode_images(pixels[None]))


def _unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)


def _hits(run: Run, encode: Manifest, near: dict[int, float], *, is_assigned: bool) -> list[Hit]:
    """The hits, nearest first; each part that holds one is read once."""
    names, starts = cluster_names(run), row_starts(encode)
    rows = np.array(sorted(near), np.int64)
    found: dict[int, Hit] = {}
    for part in np.unique(np.searchsorted(starts, rows, "right") - 1):
        own = rows[(rows >= starts[part]) & (rows < starts[part + 1])]
        places = pa.array(own - starts[part])
        records = tables.read_table(run.embeddings(part), ["key", "uri"]).take(places).to_pylist()
        clusters: list[int | None] = [None] * len(own)
        if is_assigned:
            clusters = tables.read_table(run.assignments(part), ["cluster"])["cluster"].take(places).to_pylist()
        for row, record, cluster in zip(own.tolist(), records, clusters, strict=True):
            name = None if cluster is None else names.get(cluster)
            found[row] = Hit(row, near[row], record["key"], record["uri"], cluster, name)
    return [found[row] for row in near]
