"""Command `search`: the images of a run that are nearest to an image or to words."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise, zip_longest
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from rayclust.arrays import require_matrix, unit_rows
from rayclust.config import RunConfig
from rayclust.encoders.settings import EncoderConfig
from rayclust.errors import ArtefactError, ConfigError, DataError
from rayclust.report.formats import shorten
from rayclust.runtime.edits import shown_clusters
from rayclust.runtime.pipeline import Manifests, content_digest
from rayclust.runtime.rows import part_embeddings, row_starts, rows_by_part, space_widths, transform_of
from rayclust.runtime.spaces import ENCODER, ENCODER_INDEX, OWN, OWN_INDEX, index_file
from rayclust.search.index import VectorIndex, load_index
from rayclust.store import storage, tables
from rayclust.store.manifest import EncodeOutputs, Manifest, read_manifest, read_output
from rayclust.store.run import Run

if TYPE_CHECKING:  # brings torch
    from rayclust.encoders.base import Encoder

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
    config: RunConfig,
    *,
    image: str | bytes | None = None,
    text: str | None = None,
    like: str | None = None,
    top: int,
    space: str | None = None,
) -> dict[str, list[Hit]]:
    """Return the `top` nearest images, nearest first, by space.

    Args:
        config: the run's.
        image: a path or URI of an image, or the bytes of its file; or
        text: words, for encoders that read text; or
        like: the key of one of the run's images, which is left out; no encoder is needed for it.
        top: how many.
        space: `encoder`, of several the first, or the name of one of them; `z` for methods that learn a space of their
            own; `both` gives one list for `encoder` and one for `z`. None is `z` for methods that learn from pixels,
            whose encoder gives the pixels themselves, and `encoder` for all others.

    Raises:
        ArtefactError: the run is not indexed.
        ConfigError: the query does not suit the run.
        DataError: the image cannot be read.
    """
    searcher = Searcher(config)
    spaces = searcher.resolve(space, has_text=text is not None)
    if sum(given is not None for given in (image, text, like)) != 1:
        raise ConfigError("search: give one of --image FILE, --text WORDS and --like KEY")
    source = f"--image {image}" if isinstance(image, str) else "image"
    data, found = storage.read_bytes(image) if isinstance(image, str) else image or b"", {}
    own = None if like is None else searcher.row_of(like)
    for wanted in spaces:
        if own is not None:
            query = searcher.embedding(own, wanted)
        elif text is not None:
            query = searcher.encode_text(text, wanted)
        else:
            query = searcher.encode_image(data, wanted, source)
        near = searcher.nearest(query, wanted, top + (own is not None))
        found[wanted] = dict([(row, cosine) for row, cosine in near.items() if row != own][:top])
    # What is known of these rows; each part that holds one is read once.
    run, starts, known = searcher.run, row_starts(searcher.encode), dict[int, Hit]()
    shown = shown_clusters(run) if searcher.manifests.of("assign") is not None else None
    for part, positions in rows_by_part(starts, np.array(sorted(set().union(*found.values())), np.int64)):
        places = pa.array(positions)
        records = tables.read_table(run.rows(part), ["key", "uri"]).take(places).to_pylist()
        clusters: list[int | None] = [None] * len(positions)
        if shown is not None:
            assigned = tables.read_table(run.assignments(part), ["cluster"])["cluster"].take(places).to_numpy()
            keys = pa.array([record["key"] for record in records], pa.string())
            clusters = shown.edited.of(assigned, keys).tolist()
        for row, record, cluster in zip((starts[part] + positions).tolist(), records, clusters, strict=True):
            name = None if shown is None or cluster is None else shown.names.get(cluster)
            known[row] = Hit(row, math.nan, record["key"], record["uri"], cluster, name)
    return {
        wanted: [replace(known[row], similarity=cosine) for row, cosine in near.items()]
        for wanted, near in found.items()
    }


class Searcher:
    """Search over one run, whose encoders and indexes stay in memory once they are loaded."""

    def __init__(self, config: RunConfig) -> None:
        self.config, self.run, self.manifests = config, Run(config.run, config.spaces), Manifests(config)
        self._indexes = dict[str, VectorIndex]()
        self._encoders: dict[int, Encoder] = {}

    @property
    def encode(self) -> Manifest:
        """Manifest of the run's embeddings; raises `ArtefactError` if they are not complete."""
        found = self.manifests.of("encode")
        if found is None:
            raise self._not_indexed()
        return found

    def resolve(self, space: str | None, *, has_text: bool) -> tuple[str, ...]:
        """Return the spaces that a query searches; see `search`.

        Raises:
            ArtefactError: the run is not indexed.
            ConfigError: there is no such space, or words do not live in it.
        """
        config, method = self.config, self.config.method.name
        if space is None:
            space = OWN if config.method.reads_pixels and not has_text else ENCODER
        if space not in (ENCODER, OWN, "both", *config.spaces):
            raise ConfigError(f"--space {space}: must be one of {', '.join((ENCODER, OWN, 'both', *config.spaces))}")
        if space == ENCODER and has_text and config.encoders:
            space = getattr(config.text_encoder, "space", ENCODER)
        spaces = (ENCODER, OWN) if space == "both" else (space,)
        if self.manifests.of("encode") is None:
            raise self._not_indexed()
        if OWN in spaces and not config.method.has_own_space:
            raise ConfigError(f"--space z: the method {method} has no space of its own; use --space encoder")
        if OWN in spaces and has_text:
            raise ConfigError(
                "--text: words live in the encoder's space alone; use --space encoder, or search by --image"
            )
        # An index of other rows or of another model is refused; other settings of the index are accepted.
        index = read_manifest(self.run, "index")
        for need in ("encode", "train") if OWN in spaces else ("encode",):
            needed = self.manifests.of(need)
            if index is None or needed is None or index.inputs.get(need) != content_digest(needed):
                raise self._not_indexed()
        return spaces

    def encode_text(self, text: str, space: str) -> np.ndarray:
        """Return the embedding of words, Float32[1 D]; raise `ConfigError` if the space's encoder reads no text."""
        [(settings, encoder)] = self._encoders_of(space)
        if not encoder.has_text:
            raise ConfigError(f"--text: the encoder {settings.name} has no text tower; search by --image")
        return encoder.encode_texts([text])

    def encode_image(self, data: bytes, space: str, name: str) -> np.ndarray:
        """Return the embedding of an encoded image, Float32[1 D]; for the own space by all encoders, side by side.

        Raise `DataError`, with the name, if it is no image.
        """
        from rayclust.encoders.decode import Undecodable, decode

        try:
            rows = [
                encoder.encode_images(decode(data, encoder.preprocess)[None]) for _, encoder in self._encoders_of(space)
            ]
        except Undecodable as error:
            raise DataError(f"{name}: {error.reason}: {error.detail}") from None
        return np.concatenate(rows, axis=1)

    def row_of(self, key: str) -> int:
        """Return the first row that has a key; raise `ConfigError` if none has it."""
        for part, (start, stop) in enumerate(pairwise(row_starts(self.encode))):
            if stop > start:
                keys = tables.read_table(self.run.rows(part), ["key"])["key"]
                if (place := pc.index(keys, key).as_py()) >= 0:
                    return start + int(place)
        raise ConfigError(f"--like {key}: no image of the run has this key; `rayclust export --to keys` lists them")

    def embedding(self, row: int, space: str) -> np.ndarray:
        """Return the embedding of a row, Float32[1 D]; for the own space those of all encoders, side by side."""
        [(part, places)] = rows_by_part(row_starts(self.encode), np.array([row]))
        named = () if space == OWN or not self.run.spaces else (self.run.spaces[0] if space == ENCODER else space,)
        return part_embeddings(self.run, part, named)[places].astype(np.float32)

    def nearest(self, query: np.ndarray, space: str, top: int) -> dict[int, float]:
        """Return cosines by row, nearest first, of a space that was resolved.

        The query, Float32[1 D], is scaled to a unit row for the encoder's space, and becomes features and then the
        method's transform of them for its own.
        """
        encode, train = self.encode, self.manifests.of("train")
        widths = space_widths(encode.outputs_of(EncodeOutputs))
        width = sum(widths.values()) if space == OWN else widths.get(space, next(iter(widths.values())))
        require_matrix(query, "the query", width)
        if space != OWN or train is None:
            query = unit_rows(query)
        else:
            from rayclust.runtime.tensors import load_method, transform_rows

            method = load_method(self.config.run, content_digest(train))
            query = transform_rows(method, transform_of(encode, self.config.features)(query))
        if space not in self._indexes:
            name = OWN_INDEX if space == OWN else ENCODER_INDEX
            if space in self.config.spaces:
                name = index_file(space, self.config.spaces)
            uri = storage.join(self.run.index_folder, name)
            self._indexes[space] = load_index(read_output(self.run, "index", uri))
        rows, similarity = self._indexes[space].search(query, min(top, encode.counts["rows"]))
        return {int(row): float(s) for row, s in zip(rows[0], similarity[0], strict=True) if row >= 0}

    def _encoders_of(self, space: str) -> list[tuple[EncoderConfig, Encoder]]:
        """Return the encoder of a space, or all for the method's own; each is loaded once."""
        from rayclust.runtime.encoder import load_run_encoder, with_run_engines  # torch may come with an encoder

        config = with_run_engines(self.config)
        every = list(enumerate(config.each_encoder))
        named = [(i, each) for i, each in every if getattr(each, "space", None) == space] or every[:1]
        chosen = every if space == OWN else named
        for place, settings in chosen:
            if place not in self._encoders:
                self._encoders[place] = load_run_encoder(config, settings=settings)
        return [(settings, self._encoders[place]) for place, settings in chosen]

    def _not_indexed(self) -> ArtefactError:
        return ArtefactError(f"{self.run.uri}: is not indexed: run `rayclust index RUN.yaml` first")


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
    head = f"{hit.similarity:.4f}  {shorten(cluster, 18, at_end=True):<18}  "
    return head + shorten(hit.key, _COLUMN_WIDTH - len(head))
