"""Read a run's vocabulary with its embeddings."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from rayclust.config import RunConfig, VocabularyKind, kind_of
from rayclust.errors import ConfigError, DataError
from rayclust.language import vocabulary
from rayclust.language.naming import encode_words
from rayclust.language.vocabulary import Candidates, Vocabulary
from rayclust.runtime.inputs import weights_stamp
from rayclust.store import storage, tables
from rayclust.store.manifest import digest_of
from rayclust.store.run import PART, Run

if TYPE_CHECKING:  # brings torch
    from rayclust.encoders.base import Encoder


WORDNET_FOLDERS = ("/usr/share/wordnet", "/usr/local/share/wordnet", "/opt/homebrew/share/wordnet")
"""Where packages put WordNet's data base; the variables WNSEARCHDIR and WNHOME, as WordNet reads them, come first."""
WORDS_PER_BLOCK = 2048
"""Words that are encoded at once and kept in one file."""


def vocabulary_kinds(config: RunConfig, names: Sequence[str] | None = None) -> dict[str, VocabularyKind]:
    """Return the kind of each list of words, `auto` resolved: ImageNet's names if the encoder reads text, else none.

    {} if no names are wanted. The lists are those of `label`, unless others are named.
    """
    found = {name: kind_of(name) for name in (config.label.lists if names is None else names)}
    if "auto" in found:
        return {"imagenet": "imagenet"} if config.text_encoder.family == "open_clip" else {}
    return {name: kind for name, kind in found.items() if kind != "none"}


def word_stamps(names: Sequence[str]) -> list[str | None]:
    """Return the stamps of those lists of words that are files; None for one that is missing."""
    files = [name for name in names if kind_of(name) in ("text", "embeddings", "wordnet")]
    found = [storage.stat(uri) if (uri := _wordnet(name)) else None for name in files]
    return [file.stamp if file else None for file in found]


def _wordnet(name: str) -> str | None:
    """Return the URI of a list of words: for `wordnet` this machine's `data.noun`, None if it has none."""
    if name != "wordnet":
        return name
    home = os.environ.get("WNHOME")
    folders = [os.environ.get("WNSEARCHDIR"), f"{home}/dict" if home else None, *WORDNET_FOLDERS]
    places = (storage.join(folder, "data.noun") for folder in folders if folder)
    return next((uri for uri in places if storage.stat(uri) is not None), None)


def read_lists(
    config: RunConfig,
    labels: Callable[[], Iterable[str]] | None = None,
    names: Sequence[str] | None = None,
    *,
    verbatim: bool = False,
) -> list[Vocabulary]:
    """Read the run's lists of words, with embeddings if they come with them.

    Args:
        config: of the run.
        labels: returns the labels of its rows, for the list `classes`; None leaves that list out.
        names: the lists; None reads those of `label`.
        verbatim: keep names of files that come again, and underscores.

    Returns:
        [] if no names are wanted.

    Raises:
        ConfigError: the encoder cannot read words, or there are no classes.
        DataError: a file cannot be used.
    """
    lists = []
    for name, kind in vocabulary_kinds(config, names).items():
        if kind == "embeddings":
            lists.append(_read_embeddings(name, verbatim))
        elif kind == "classes":
            if labels is not None:
                classes = sorted(set(labels()))
                if not classes:
                    raise DataError("label.vocabulary = classes: no image has a label; name a list of words")
                lists.append(vocabulary.from_names(classes, "classes"))
        elif config.text_encoder.family != "open_clip":
            raise ConfigError(
                f"label.vocabulary = {name}: the encoder {config.text_encoder.name} reads no text; take an open_clip "
                "one, a parquet of words with embeddings, or none"
            )
        elif kind == "imagenet":
            from open_clip import IMAGENET_CLASSNAMES  # its 1,000 classes, of which some share a name

            lists.append(vocabulary.from_names(IMAGENET_CLASSNAMES, "imagenet"))
        elif kind == "wordnet":
            uri = _wordnet(name)
            if uri is None:
                raise ConfigError(
                    f"label.vocabulary = {name}: this machine has no WordNet; install it, set WNSEARCHDIR to its "
                    "folder, or give the path of a data.noun"
                )
            lists.append(vocabulary.from_wordnet(storage.read_bytes(uri), uri, verbatim=verbatim))
        else:
            lists.append(vocabulary.from_text(storage.read_bytes(name), name, verbatim=verbatim))
    return lists


def noun_lists(config: RunConfig) -> tuple[str, ...]:
    """Return the lists of nouns for a method that reads words: its own, else those of `label`.

    Raises:
        ConfigError: there is none, or one of them holds the classes' names, which must not enter a fit.
    """
    own = getattr(config.method, "vocabulary", None)
    names = config.label.lists if own is None else (own,) if isinstance(own, str) else own
    if own is None:
        names = tuple(name for name in names if kind_of(name) != "classes")
    kinds = vocabulary_kinds(config, names)
    if "classes" in kinds.values():
        raise ConfigError("method.vocabulary = classes: the classes' names may not enter a fit; name a list of nouns")
    if not kinds:
        raise ConfigError(f"method.name = {config.method.name}: needs words; name a list of nouns in method.vocabulary")
    return tuple(kinds)


@dataclass(frozen=True)
class WordBank:
    """Words and their embeddings by the encoder's text tower, in files below the run that are made once.

    The folder is named by encoder, prompts and words, so that all that reads the same words shares it.
    """

    config: RunConfig
    words: tuple[str, ...]
    templates: tuple[str, ...]
    normalize_each: bool

    @property
    def blocks(self) -> int:
        """Number of files."""
        return -(-len(self.words) // WORDS_PER_BLOCK)

    @cached_property
    def digest(self) -> str:
        """Digest of encoder, weights, prompts and words."""
        encoder = self.config.text_encoder
        made_by = [encoder.name, weights_stamp(self.config, encoder), list(self.templates), self.normalize_each]
        return digest_of([made_by, list(self.words)])

    def encode(self, block: int) -> None:
        """Write the embeddings of one block, unless they are there."""
        uri = self._at(block)
        if storage.stat(uri) is not None:
            return
        some = self.words[block * WORDS_PER_BLOCK : (block + 1) * WORDS_PER_BLOCK]
        encode = _kept_encoder(self.config.model_dump_json(exclude_unset=True)).encode_texts
        rows = encode_words(encode, some, self.templates, normalize_each=self.normalize_each)
        columns = [pa.array(some), tables.fixed_list(tables.in_storage(rows))]
        tables.write_table(uri, pa.table(columns, names=["word", "embedding"]))

    def read(self) -> np.ndarray:
        """Return Float32[V D]."""
        blocks = (tables.read_table(self._at(block), ["embedding"])["embedding"] for block in range(self.blocks))
        return np.concatenate([tables.matrix(column).astype(np.float32) for column in blocks])

    def _at(self, block: int) -> str:
        return Run(self.config.run).at("words", self.digest[:16], PART.format(block))


@lru_cache(1)
def _kept_encoder(config: str) -> Encoder:
    """Load the encoder of a config, JSON, once for the blocks that a worker encodes."""
    from rayclust.runtime.encoder import load_run_encoder

    found = RunConfig.model_validate_json(config)
    return load_run_encoder(found, settings=found.text_encoder)


def _read_embeddings(uri: str, verbatim: bool = False) -> Vocabulary:
    try:
        with storage.open_input(uri) as source:
            table = pq.read_table(source)
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"label.vocabulary = {uri}: is not a readable parquet file ({error})") from None
    missing = [name for name in ("word", "embedding") if name not in table.column_names]
    if missing:
        have = ", ".join(table.column_names)
        raise DataError(f"label.vocabulary = {uri}: needs the columns word and embedding; it has {have}")
    # Flat, without a Python object for each number: 120,000 words of width 512 would take gigabytes.
    try:
        [width] = pc.unique(pc.list_value_length(table["embedding"])).to_pylist()
        rows = pc.list_flatten(table["embedding"]).cast(pa.float32()).to_numpy().reshape(-1, width)
    except (pa.ArrowException, ValueError, TypeError):
        raise DataError(
            f"label.vocabulary = {uri}: the column embedding must hold lists of numbers of one width, at least one"
        ) from None
    hypernyms = None
    if "hypernyms" in table.column_names:
        try:
            lists = table["hypernyms"].cast(pa.list_(pa.string())).to_pylist()
        except pa.ArrowException:
            raise DataError(f"label.vocabulary = {uri}: the column hypernyms must hold lists of words") from None
        hypernyms = [[name for name in names or () if name] for names in lists]
    words = [None if word is None else str(word) for word in table["word"].to_pylist()]
    return vocabulary.from_rows(words, rows, uri, hypernyms=hypernyms, verbatim=verbatim)


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
    from rayclust.runtime.encoder import load_run_encoder

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
