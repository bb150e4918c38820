"""Command `search`: the images of a run that are nearest to an image or to words."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import zip_longest

import numpy as np
import pyarrow as pa

from rayclust.arrays import require_matrix, unit_rows
from rayclust.config import RunConfig
from rayclust.encoders.decode import Undecodable, decode
from rayclust.errors import ArtefactError, ConfigError, DataError
from rayclust.methods import has_transform
from rayclust.report.formats import abbreviate, shorten
from rayclust.runtime.encoder import load_run_encoder
from rayclust.runtime.models import load_method, transform_rows
from rayclust.runtime.pipeline import Manifests, content_digest
from rayclust.runtime.rows import row_starts, rows_by_part, space_widths, transform_of
from rayclust.runtime.vocabularies import cluster_names
from rayclust.search.index import load_index
from rayclust.stages.index import ENCODER, ENCODER_INDEX, OWN, OWN_INDEX, index_file
from rayclust.store import storage, tables
from rayclust.store.manifest import EncodeOutputs, Manifest, read_manifest, read_output
from rayclust.store.run import Run

_COLUMN_WIDTH = 60
"""Letters of a column where two spaces stand side by side."""


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


def search(
    config: RunConfig, *, image: str | None, text: str | None, top: int, space: str = ENCODER
) -> dict[str, list[Hit]]:
    """Return the `top` nearest images, nearest first, by space.

    Args:
        config: the run's.
        image: a path or URI of an image; or
        text: words, for encoders that read text.
        top: how many.
        space: `encoder`, of several the first, or the name of one of them; `z` for methods that learn a space of their
            own; `both` gives one list for `encoder` and one for `z`.

    Raises:
        ArtefactError: the run is not indexed.
        ConfigError: the query does not suit the run.
        DataError: the image cannot be read.
    """
    run, manifests = Run(config.run, config.spaces), Manifests(config)
    encode = manifests.of("encode")
    if space not in (ENCODER, OWN, "both", *config.spaces):
        raise ConfigError(f"--space {space}: must be one of {', '.join((ENCODER, OWN, 'both', *config.spaces))}")
    if space == ENCODER and text is not None and config.encoders:
        space = getattr(config.text_encoder, "space", ENCODER)
    spaces = (ENCODER, OWN) if space == "both" else (space,)
    # 1. Refuse what cannot be searched.
    not_indexed = ArtefactError(f"{run.uri}: is not indexed: run `rayclust index RUN.yaml` first")
    if encode is None:
        raise not_indexed
    if OWN in spaces and not has_transform(config.method.name):
        raise ConfigError(f"--space z: the method {config.method.name} has no space of its own; use --space encoder")
    if OWN in spaces and text is not None:
        raise ConfigError("--text: words live in the encoder's space alone; use --space encoder, or search by --image")
    # An index of other rows or of another model is refused; other settings of the index are accepted.
    index = read_manifest(run, "index")
    for need in ("encode", "train") if OWN in spaces else ("encode",):
        needed = manifests.of(need)
        if index is None or needed is None or index.inputs.get(need) != content_digest(needed):
            raise not_indexed
    # 2. Encode the query and search every space for it.
    top, found = min(top, encode.counts["rows"]), {}
    for wanted in spaces:
        query = _query(config, image, text, wanted)
        widths = space_widths(encode.outputs_of(EncodeOutputs))
        width = sum(widths.values()) if wanted == OWN else widths.get(wanted, next(iter(widths.values())))
        require_matrix(query, "the query", width)
        found[wanted] = _nearest(config, manifests, query, wanted, top)
    hits = _hits(run, encode, set().union(*found.values()), is_assigned=manifests.of("assign") is not None)
    return {
        wanted: [replace(hits[row], similarity=cosine) for row, cosine in near.items()]
        for wanted, near in found.items()
    }


def as_lines(found: dict[str, list[Hit]]) -> Iterator[str]:
    """Yield hits as lines of text: all columns for one space, keys side by side for two."""
    if len(found) == 1:
        [hits] = found.values()
        yield f"{'similarity':>10}  {'cluster':>7}  {'name':<24}  uri"
        for hit in hits:
            cluster = "" if hit.cluster is None else str(hit.cluster)
            yield f"{hit.similarity:>10.4f}  {cluster:>7}  {hit.name or '':<24}  {hit.uri}"
        return
    yield "rank  " + "  ".join(f"{space:<{_COLUMN_WIDTH}}" for space in found).rstrip()
    for rank, beside in enumerate(zip_longest(*found.values()), 1):
        yield f"{rank:>4}  " + "  ".join(f"{_short(hit):<{_COLUMN_WIDTH}}" for hit in beside).rstrip()


def _short(hit: Hit | None) -> str:
    """Format cosine, cluster and key to the column's width; empty where an index found fewer."""
    if hit is None:
        return ""
    cluster = "" if hit.cluster is None else hit.name or f"cluster {hit.cluster}"
    head = f"{hit.similarity:.4f}  {abbreviate(cluster, 18):<18}  "
    return head + shorten(hit.key, _COLUMN_WIDTH - len(head))


def _query(config: RunConfig, image: str | None, text: str | None, space: str) -> np.ndarray:
    """Encode the query for a space, Float32[1 D]; for the method's own by all encoders, side by side."""
    if (image is None) == (text is None):
        raise ConfigError("search: give either --image FILE or --text WORDS")
    data = storage.read_bytes(image) if image is not None else b""
    named = [encoder for encoder in config.encoders if encoder.space == space] or config.each_encoder[:1]
    rows = []
    for settings in config.each_encoder if space == OWN else named:
        encoder = load_run_encoder(config, settings=settings)
        if text is not None:
            if not encoder.has_text:
                raise ConfigError(f"--text: the encoder {settings.name} has no text tower; search by --image")
            return encoder.encode_texts([text])
        try:
            rows.append(encoder.encode_images(decode(data, encoder.preprocess)[None]))
        except Undecodable as error:
            raise DataError(f"--image {image}: {error.reason}: {error.detail}") from None
    return np.concatenate(rows, axis=1)


def _nearest(config: RunConfig, manifests: Manifests, query: np.ndarray, space: str, top: int) -> dict[int, float]:
    """Return cosines by row, nearest first.

    The query is scaled to a unit row for the encoder's space, and becomes features and then the method's transform of
    them for its own.
    """
    encode, train = manifests.of("encode"), manifests.of("train")
    if space != OWN or encode is None or train is None:
        query = unit_rows(query)
    else:
        method = load_method(config.run, content_digest(train))
        query = transform_rows(method, transform_of(encode, config.features)(query))
    run, name = Run(config.run), OWN_INDEX if space == OWN else ENCODER_INDEX
    if space in config.spaces:
        name = index_file(space, config.spaces)
    index = load_index(read_output(run, "index", storage.join(run.index_folder, name)))
    rows, similarity = index.search(query, top)
    return {int(row): float(s) for row, s in zip(rows[0], similarity[0], strict=True) if row >= 0}


def _hits(run: Run, encode: Manifest, wanted: set[int], *, is_assigned: bool) -> dict[int, Hit]:
    """Return hits by row, without their cosines; each part that holds one is read once."""
    names, starts = cluster_names(run), row_starts(encode)
    found: dict[int, Hit] = {}
    for part, positions in rows_by_part(starts, np.array(sorted(wanted), np.int64)):
        places = pa.array(positions)
        records = tables.read_table(run.rows(part), ["key", "uri"]).take(places).to_pylist()
        clusters: list[int | None] = [None] * len(positions)
        if is_assigned:
            clusters = tables.read_table(run.assignments(part), ["cluster"])["cluster"].take(places).to_pylist()
        for row, record, cluster in zip((starts[part] + positions).tolist(), records, clusters, strict=True):
            name = None if cluster is None else names.get(cluster)
            found[row] = Hit(row, math.nan, record["key"], record["uri"], cluster, name)
    return found
