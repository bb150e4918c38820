"""Read a run's vocabulary with its embeddings, and the names that its clusters were given."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from rayclust.config import RunConfig, VocabularyKind, kind_of
from rayclust.errors import ConfigError, DataError
from rayclust.language import vocabulary
from rayclust.language.naming import encode_words
from rayclust.language.vocabulary import Candidates, Vocabulary
from rayclust.runtime.encoder import load_run_encoder
from rayclust.runtime.pipeline import content_digest
from rayclust.store import storage, tables
from rayclust.store.manifest import read_manifest
from rayclust.store.run import Run


def cluster_names(run: Run) -> dict[int, str | None]:
    """Return names by cluster; {} before the stage label, and after another assignment."""
    label, assign = read_manifest(run, "label"), read_manifest(run, "assign")
    if label is None or assign is None or label.inputs.get("assign") != content_digest(assign):
        return {}
    table = tables.read_table(run.clusters, ["cluster", "name"])
    return dict(zip(table["cluster"].to_pylist(), table["name"].to_pylist(), strict=True))


def vocabulary_kinds(config: RunConfig) -> dict[str, VocabularyKind]:
    """Return the kind of each list of words, `auto` resolved: ImageNet's names if the encoder reads text, else none.

    {} if no names are wanted.
    """
    found = {name: kind_of(name) for name in config.label.lists}
    if "auto" in found:
        return {"imagenet": "imagenet"} if config.text_encoder.family == "open_clip" else {}
    return {name: kind for name, kind in found.items() if kind != "none"}


def read_lists(config: RunConfig, labels: Callable[[], Iterable[str]] | None = None) -> list[Vocabulary]:
    """Read the run's lists of words, with embeddings if they come with them.

    Args:
        config: of the run.
        labels: returns the labels of its rows, for the list `classes`; None leaves that list out.

    Returns:
        [] if no names are wanted.

    Raises:
        ConfigError: the encoder cannot read words, or there are no classes.
        DataError: a file cannot be used.
    """
    lists = []
    for name, kind in vocabulary_kinds(config).items():
        if kind == "embeddings":
            lists.append(_read_embeddings(name))
        elif kind == "classes":
            if labels is not None:
                lists.append(vocabulary.from_labels(labels()))
        elif config.text_encoder.family != "open_clip":
            raise ConfigError(
                f"label.vocabulary = {name}: the encoder {config.text_encoder.name} reads no text; take an open_clip "
                "one, a parquet of words with embeddings, or none"
            )
        elif kind == "imagenet":
            lists.append(vocabulary.imagenet())
        else:
            lists.append(vocabulary.from_text(storage.read_bytes(name), name))
    return lists


def _read_embeddings(uri: str) -> Vocabulary:
    try:
        with storage.open_input(uri) as source:
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


def check_classes(config: RunConfig) -> None:
    """Raise `ConfigError` if the list `classes` is wanted without classes, or with nothing to embed their names."""
    found = vocabulary_kinds(config)
    if "classes" not in found.values():
        return
    if config.images.labels == "none":
        raise ConfigError("label.vocabulary = classes: images.labels = none leaves no classes; name a list of words")
    if config.text_encoder.family != "open_clip" and "embeddings" not in found.values():
        raise ConfigError(
            f"label.vocabulary = classes: the encoder {config.text_encoder.name} reads no text; take an open_clip one, "
            "or add a parquet that holds the classes' names with embeddings"
        )


def word_embeddings(config: RunConfig, words: Candidates) -> np.ndarray:
    """Return Float32[V D], the embeddings of words; those that came with none are encoded.

    Raises:
        ConfigError: the encoder reads no text, or embeddings of the encoder and of other features would be mixed.
    """
    missing = [word for word, has_row in zip(words.words, words.has_row, strict=True) if not has_row]
    if not missing:
        return words.embeddings
    if config.text_encoder.family != "open_clip":
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise ConfigError(
            f"label.vocabulary: {missing[0]!r}{more} have no embedding in any list, and the encoder "
            f"{config.text_encoder.name} reads no text: add them to a parquet of words with embeddings"
        )
    if words.has_row.any() and config.label.space == "auto":
        raise ConfigError(
            "label.vocabulary: some lists come with embeddings and some are read by the encoder: say with label.space "
            "(encoder or features) where both lie"
        )
    encoder = load_run_encoder(config, settings=config.text_encoder)
    rows = encode_words(encoder.encode_texts, missing, config.label.templates)
    if not words.has_row.any():
        return rows
    if rows.shape[1] != words.embeddings.shape[1]:
        raise ConfigError(
            f"label.vocabulary: embeddings of {words.embeddings.shape[1]} values; the encoder's have {rows.shape[1]}"
        )
    found = words.embeddings.copy()
    found[~words.has_row] = rows
    return found
