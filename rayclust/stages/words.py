"""The words of a run: its vocabulary with embeddings, and the names that its clusters got."""

from __future__ import annotations

import logging

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from rayclust.config import RunConfig
from rayclust.errors import ConfigError, DataError
from rayclust.language import vocabulary
from rayclust.language.naming import encode_words
from rayclust.language.vocabulary import Vocabulary
from rayclust.stages.models import load_run_encoder
from rayclust.stages.pipeline import content_digest
from rayclust.store import filesystem, tables
from rayclust.store.layout import Run
from rayclust.store.manifest import read_manifest

logger = logging.getLogger(__name__)


def cluster_names(run: Run) -> dict[int, str | None]:
    """Names by cluster; empty before the stage label, and after another assignment."""
    label, assign = read_manifest(run, "label"), read_manifest(run, "assign")
    if label is None or assign is None or label.inputs.get("assign") != content_digest(assign):
        return {}
    table = tables.read_table(run.clusters, ["cluster", "name"])
    return dict(zip(table["cluster"].to_pylist(), table["name"].to_pylist(), strict=True))


def vocabulary_kind(config: RunConfig) -> str:
    """What names are to be taken from, `auto` resolved: ImageNet's names where the encoder reads text, else none."""
    kind = vocabulary.kind_of(config.label.vocabulary)
    if kind != "auto":
        return kind
    return "imagenet" if config.encoder.family == "open_clip" else "none"


def read_vocabulary(config: RunConfig) -> Vocabulary | None:
    """The run's words, with embeddings where they come with them; None where no names are wanted.

    Raises:
        ConfigError: the words are not shipped, or the encoder cannot read them.
        DataError: their file cannot be used.
    """
    kind, uri = vocabulary_kind(config), config.label.vocabulary
    if kind == "none":
        return None
    if kind == "wordnet":
        raise vocabulary.wordnet_refusal()
    if kind == "embeddings":
        return _with_rows(uri)
    if config.encoder.family != "open_clip":
        raise ConfigError(
            f"label.vocabulary = {uri}: the encoder {config.encoder.name} reads no text; take an open_clip one, "
            "a parquet of words with embeddings, or none"
        )
    if kind == "imagenet":
        return vocabulary.imagenet()
    return vocabulary.from_text(filesystem.read_bytes(uri), uri)


def embedded(config: RunConfig, words: Vocabulary) -> pa.Table:
    """The words with their embeddings: word string, embedding fixed_size_list<float>[D]."""
    rows = words.embeddings
    if rows is None:
        rows = encode_words(load_run_encoder(config).encode_texts, words.words, config.label.templates)
    return pa.table({"word": list(words.words), "embedding": tables.fixed_list(np.asarray(rows, np.float32))})


def _with_rows(uri: str) -> Vocabulary:
    try:
        with filesystem.open_input(uri) as source:
            table = pq.read_table(source)
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"label.vocabulary = {uri}: is not a readable parquet file ({error})") from None
    missing = [name for name in ("word", "embedding") if name not in table.column_names]
    if missing:
        have = ", ".join(table.column_names)
        raise DataError(f"label.vocabulary = {uri}: needs the columns word and embedding; it has {have}")
    try:
        rows = np.array(table["embedding"].to_pylist(), np.float32)
    except ValueError:
        raise DataError(f"label.vocabulary = {uri}: the embeddings are not numbers of one width") from None
    if rows.ndim != 2:
        raise DataError(f"label.vocabulary = {uri}: the column embedding must hold lists of numbers, at least one")
    return vocabulary.from_rows([str(word) for word in table["word"].to_pylist()], rows, uri)
