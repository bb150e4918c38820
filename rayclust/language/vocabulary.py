"""The words that clusters can be named by."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from rayclust.arrays import FloatArray, require_matrix
from rayclust.errors import DataError

LONGEST = 200
"""Characters of one name; a longer line is not a list of names."""
_HEADERS = ("word", "lemma", "name", "label", "noun")


@dataclass(frozen=True)
class Vocabulary:
    """Distinct words, and their embeddings if the list has them."""

    words: tuple[str, ...]
    """V names as they are shown: spaces for underscores, the first of those that differ in case only."""
    embeddings: FloatArray | None = None
    """Float32[V D] in the images' space; None: computed by the encoder's text tower."""
    hypernyms: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """More general words of a word, in lower case as is the word; {} where the list has none."""


def from_text(data: bytes, source: str, *, verbatim: bool = False) -> Vocabulary:
    """Read a list of names: one a line, or the column `word`, `lemma` or `name` of a .csv or .tsv file with a header.

    Blank lines and lines that begin with # are skipped. `nan` and `null` are words like others.

    Args:
        data: the file, UTF-8.
        source: its path or URI; its suffix distinguishes tables from lists; used in messages.
        verbatim: keep names that come again, and underscores.

    Raises:
        DataError: not UTF-8, no column of names, a line too long to be a name, or no name at all.
    """
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(
            f"label.vocabulary = {source}: byte {error.start} is not UTF-8; save the list as UTF-8 text"
        ) from error
    if "\0" in text:
        raise DataError(f"label.vocabulary = {source}: holds zero bytes, so it is no text; one name a line is expected")
    delimiter = {".csv": ",", ".tsv": "\t"}.get(source[-4:].lower())
    lines = text.splitlines()
    if delimiter is not None:
        rows = csv.reader(io.StringIO(text), delimiter=delimiter)
        header = [cell.strip().lower() for cell in next(rows, [])]
        place = next((header.index(name) for name in _HEADERS if name in header), None)
        if place is None:
            found = ", ".join(header) or "nothing"
            raise DataError(f"label.vocabulary = {source}: no column of names among {found}; call it `word`")
        try:
            lines = [row[place] for row in rows if len(row) > place]
        except csv.Error as error:
            raise DataError(f"label.vocabulary = {source}: line {rows.line_num} cannot be read ({error})") from error
    names = (line for line in lines if not line.lstrip().startswith("#"))
    return from_names(names, source, verbatim=verbatim)


def from_names(names: Iterable[str], source: str, *, verbatim: bool = False) -> Vocabulary:
    """Make a vocabulary of names alone.

    Args:
        names: as they are written; of those that differ in case only the first counts.
        source: their path or URI, or the name of the list, for messages.
        verbatim: keep names that come again, and underscores.

    Raises:
        DataError: one is too long to be a name, or there is none.
    """
    return Vocabulary(tuple(_listed(names, source, verbatim=verbatim).values()))


def from_wordnet(data: bytes, source: str, *, verbatim: bool = False) -> Vocabulary:
    """Read the nouns of a WordNet data base, with their hypernyms.

    Args:
        data: a file `data.noun`.
        source: its path or URI, for messages.
        verbatim: one word for each synset and lemma in the file's order, with underscores, so that words repeat.

    Raises:
        DataError: it is no such file.

    Source: the format is that of the manual page wndb(5WN).
    """
    synsets: dict[str, tuple[list[str], list[str]]] = {}
    try:
        for line in data.decode("utf-8").splitlines():
            if line.startswith("  "):  # the licence
                continue
            fields = line.partition(" | ")[0].split()
            end = 4 + 2 * int(fields[3], 16)  # words, each before a number
            pointers = fields[end + 1 : end + 1 + 4 * int(fields[end])]  # kind, synset, part of speech, words
            pairs = zip(pointers[::4], pointers[1::4], strict=True)
            synsets[fields[0]] = fields[4:end:2], [other for kind, other in pairs if kind in ("@", "@i")]
    except (UnicodeDecodeError, ValueError, IndexError):
        raise DataError(f"label.vocabulary = {source}: is no data.noun of WordNet") from None
    words = [lemma for lemmas, _ in synsets.values() for lemma in lemmas]
    above = dict[str, dict[str, None]]()
    for lemmas, others in synsets.values():
        names = [_shown(synsets[other][0][0]).casefold() for other in others if other in synsets]
        for lemma in lemmas:
            above.setdefault(_shown(lemma).casefold(), {}).update(dict.fromkeys(names))
    hypernyms = {word: tuple(names) for word, names in above.items()}
    return Vocabulary(tuple(_listed(words, source, verbatim=verbatim).values()), None, hypernyms)


def from_rows(
    words: Sequence[str | None],
    embeddings: FloatArray,
    source: str,
    *,
    hypernyms: Sequence[Sequence[str] | None] | None = None,
    verbatim: bool = False,
) -> Vocabulary:
    """Make a vocabulary of names with embeddings, for encoders without a text tower.

    Args:
        words: V names; of equal ones the first counts.
        embeddings: Float[V D], in the space in which images will be compared with them (centred, if they will be).
        source: path or URI, for messages.
        hypernyms: V lists of more general words.
        verbatim: keep names that come again, and underscores.

    Raises:
        DataError: lengths differ, or a value is not finite.
        ShapeError: `embeddings` is no matrix.
    """
    require_matrix(embeddings, f"embeddings of {source}")
    if len(words) != len(embeddings):
        raise DataError(
            f"label.vocabulary = {source}: {len(words)} words but {len(embeddings)} rows; one row a word is needed"
        )
    finite = np.isfinite(embeddings).all(axis=1)
    if not finite.all():
        first = int(np.argmin(finite))
        raise DataError(f"label.vocabulary = {source}: the row of {words[first]!r} is not finite; remove it")
    kept = _listed((word or "" for word in words), source, longest=math.inf, verbatim=verbatim)
    above = dict[str, tuple[str, ...]]()
    for word, names in zip(words, hypernyms or (), strict=False):
        above.setdefault(_shown(word or "").casefold(), tuple(_shown(name).casefold() for name in names or ()))
    return Vocabulary(tuple(kept.values()), embeddings[list(kept)].astype(np.float32), above)


@dataclass(frozen=True)
class Candidates:
    """The distinct names of several lists: a name that came twice would share its probability with itself."""

    words: tuple[str, ...]
    """V names, spelt as in the first list that has them."""
    embeddings: FloatArray
    """Float32[V D]; zero where no list brought a row."""
    has_row: NDArray[np.bool_]
    """Bool[V]."""
    sources: tuple[frozenset[int], ...]
    """V sets: the places of the lists that each name is in."""
    hypernyms: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """More general words of a word, in lower case as is the word."""


def merged(lists: Sequence[Vocabulary], *, verbatim: bool = False) -> Candidates:
    """Merge lists, one or more, in their order; names that differ in case only are one, unless `verbatim`.

    Raises:
        DataError: two lists bring rows of different widths.
    """
    known: dict[str, int] = {}
    words, sources, rows = list[str](), list[set[int]](), dict[int, FloatArray]()
    hypernyms = dict[str, tuple[str, ...]]()
    for place, vocabulary in enumerate(lists):
        hypernyms = {**vocabulary.hypernyms, **hypernyms}
        for index, word in enumerate(vocabulary.words):
            at = len(words) if verbatim else known.setdefault(word.casefold(), len(words))
            if at == len(words):
                words.append(word)
                sources.append(set())
            sources[at].add(place)
            if vocabulary.embeddings is not None:
                rows.setdefault(at, vocabulary.embeddings[index])
    widths = sorted({len(row) for row in rows.values()})
    if len(widths) > 1:
        raise DataError(f"label.vocabulary: rows of {widths[0]} and of {widths[1]} values; all must be of one encoder")
    embeddings = np.zeros((len(words), widths[0] if widths else 0), np.float32)
    has_row = np.zeros(len(words), bool)
    for at, row in rows.items():
        embeddings[at], has_row[at] = row, True
    return Candidates(tuple(words), embeddings, has_row, tuple(map(frozenset, sources)), hypernyms)


def same_name(one: str | None, other: str | None) -> bool:
    """Return whether two names are equal but for case, spaces and underscores; nothing is equal to no name."""
    return one is not None and other is not None and _shown(one).casefold() == _shown(other).casefold()


def _listed(names: Iterable[str], source: str, longest: float = LONGEST, *, verbatim: bool = False) -> dict[int, str]:
    """Return the names as they are shown by their places, the first of those that differ in case only.

    With `verbatim` all of them, as they are written.
    """
    kept: dict[str | int, tuple[int, str]] = {}
    for place, written in enumerate(names):
        name = written.strip() if verbatim else _shown(written)
        if len(name) > longest:
            size = f"name {place + 1} has {len(name)} characters; {longest} at most, one a line"
            raise DataError(f"label.vocabulary = {source}: {size}")
        if name:
            kept.setdefault(place if verbatim else name.casefold(), (place, name))
    if not kept:
        raise DataError(f"label.vocabulary = {source}: holds no name; one name a line is expected")
    return dict(kept.values())


def _shown(word: str) -> str:
    return " ".join(word.replace("_", " ").split())
