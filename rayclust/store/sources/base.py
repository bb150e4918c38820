"""Data model of an input: shards, records of images, rows of embeddings, and labels as text."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

log = logging.getLogger(__name__)

RAW_SUFFIXES = (".dng", ".cr2", ".cr3", ".nef", ".nrw", ".arw", ".orf", ".raf", ".rw2", ".pef", ".srw")
"""Of cameras' raw files: most are TIFFs by their bytes, of which a decoder finds the small preview only."""
DECODED_SUFFIXES = (
    "jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "jpe", "jfif", "mpo", "avif", "jp2", "j2k", "jpx", "jpf",
    "jpc", "j2c", "apng", "dib", "ico", "ppm", "pgm", "pbm", "pnm", "pfm",
)  # fmt: skip
"""Suffixes of images that the decoder reads."""
IMAGE_SUFFIXES = (
    *DECODED_SUFFIXES,
    "heic", "heif", "hif", "jxl", "svg", "svgz", "psd", "psb", "eps", "dcm", "dicom", "exr", "tga", "pcx", "dds",
    "icns", "qoi", "jxr", "xcf", "bpg", *(suffix.removeprefix(".") for suffix in RAW_SUFFIXES),
)  # fmt: skip
"""Suffixes of file names, in any case, that mark an image in folders and tars; the format is decided by the bytes.

The decoder refuses those that it does not read with a reason: they become rejects, so that no image is left out in
silence. The order is that of preference where one webdataset sample has several images.
"""

LABEL_NAMES = (
    "label", "labels", "cls", "class", "class_name", "classname", "class_id", "category", "target", "fine_label",
    "label_name", "wnid", "y",
)  # fmt: skip
"""Columns of tables and fields of JSON that hold labels, the first that exists, in any case."""

MAX_RECORD_BYTES = 256 << 20
"""Default bound on the bytes of one encoded image; a larger one is rejected unread."""
TOO_LARGE = "{} bytes, above the bound of {}"
"""Detail of a `too_large` reject."""


class Member(NamedTuple):
    """One file of a folder shard."""

    key: str
    uri: str
    size: int
    """Bytes, as listed."""


@dataclass(frozen=True)
class Record:
    """One image, or a reject with its reason."""

    key: str
    """Name within the input, valid UTF-8."""
    uri: str
    """Location; `fetch_many` reads it again."""
    data: bytes | None = None
    """Encoded image; None for a reject."""
    label: str | None = None
    """Name of the true class, for evaluation only."""
    reason: str | None = None
    """A short stable word; set for rejects only."""
    detail: str = ""
    """Explanation of `reason` for people."""


@dataclass(frozen=True)
class Rows:
    """The usable rows of a shard of ready embeddings, in order of key."""

    keys: list[str]
    uris: list[str]
    labels: list[str | None]
    embeddings: NDArray[Any]
    """Float[N D] as `tables.in_storage` gives them, finite and not zero."""
    rejects: list[dict[str, str]]
    """key, uri, reason and detail of the rows left out."""


@dataclass(frozen=True)
class Shard:
    """A part of the input that is processed as one; round-trips through JSON, and is the same for the same input."""

    index: int
    """Position among the shards."""
    kind: str
    """folder | webdataset | parquet | embeddings_parquet | embeddings_npy | embeddings_pt."""
    uri: str
    """The folder or file."""
    name: str
    """Path below the input without its ending; for people and as the start of keys."""
    stamp: str
    """Changes when the listing shows another size, ETag or time of change of any file that it reads."""
    first: int = 0
    """Images and rows of the shards before, as far as known; the row that its first image gets if none is rejected."""
    count: int | None = None
    """Images or rows in it; None if unknown before it is read."""
    start: int = 0
    """First row within the file, for tables that are split."""
    row_groups: tuple[int, int] | None = None
    """Range of Parquet row groups; None is the whole file."""
    members: tuple[Member, ...] = ()
    """The files of a folder shard, in order of key."""
    beside: tuple[str, ...] = ()
    """URIs of the files that hold labels or metadata of its rows."""
    labels: str = "auto"
    """auto | none | folder | a column or tar suffix."""
    classes: tuple[str, ...] | None = None
    """Only images with one of these labels, or below a folder of one of these names, are kept; None keeps all."""
    columns: dict[str, str] = field(default_factory=dict)
    """Names of the columns of tables by what they hold: image, embedding, key."""
    prefixed: str = "never"
    """Keys that begin with the name of their table, to tell those of several tables apart: never (there is one table),
    names (all but paths, which hold a `/`), or always (tables have paths in common)."""

    @property
    def label_source(self) -> str | None:
        """Where labels are read from; None if neither labels nor classes are asked for."""
        if self.labels != "none":
            return self.labels
        return None if self.classes is None else "auto"

    @property
    def has_embeddings(self) -> bool:
        """True for ready embeddings, read with `read_rows`; False for images, read with `read_records`."""
        return self.kind.startswith("embeddings")

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> Shard:
        """Build a shard from the JSON of its `dataclasses.asdict`."""
        content = dict(content)
        content["members"] = tuple(Member(*member) for member in content["members"])
        for name in ("row_groups", "beside", "classes"):
            content[name] = None if content[name] is None else tuple(content[name])
        return cls(**content)

    @property
    def folder(self) -> str | None:
        """Name of the folder that the file lies in, of `cat/part-0` and of `label=cat/part-0` alike cat."""
        name = folder_label(self.name)
        return None if name is None else name.rpartition("=")[2] or None

    def selects(self, key: str, label: str | None) -> bool:
        """Return whether an image belongs to the requested classes, by its label or by a folder of its key."""
        return self.classes is None or not {label, *key.split("/")[:-1]}.isdisjoint(self.classes)


@lru_cache(128)
def log_once(level: int, message: str) -> None:
    """Log a line on an input once, however often a command lists it."""
    log.log(level, "%s", message)


def escape_invalid(text: str) -> str:
    """Return `text` as valid UTF-8: surrogates are written as escapes."""
    return text.encode("utf-8", "backslashreplace").decode()


def enumerated(names: Iterable[str], most: int = 12) -> str:
    """Return names with commas between them; of very many the first, and how many more there are."""
    found = list(names)
    return ", ".join(found[:most]) + (f" and {len(found) - most} more" if len(found) > most else "")


def label_text(value: Any, names: Sequence[str] | None = None) -> str | None:
    """Convert a label to text.

    Args:
        value: text, a whole number, or anything.
        names: class names that whole numbers point into.

    Returns:
        None for nothing, empty text, -1 (marks unlabelled images) and values that are no label: lists, objects,
        fractions.
    """
    if isinstance(value, bytes):
        value = value.decode("utf-8", "backslashreplace")
    if isinstance(value, str):
        return escape_invalid(value.strip("\ufeff \t\r\n\f\v").strip()) or None
    if isinstance(value, bool | np.bool_):
        return str(bool(value)).lower()
    if isinstance(value, float | np.floating | Decimal) and float(value).is_integer():
        value = int(value)
    if not isinstance(value, int | np.integer) or value == -1:
        return None
    return escape_invalid(names[int(value)]) if names is not None and 0 <= value < len(names) else str(int(value))


def folder_label(key: str) -> str | None:
    """Return the name of the folder that a file lies in; None for files at the top.

    A folder `images` in the folder of a class, as Tiny ImageNet has one in each, gives the class.
    """
    folders = key.split("/")[:-1]
    while len(folders) > 1 and folders[-1].lower() in ("images", "image", "imgs", "img"):
        folders.pop()
    return folders[-1] or None if folders else None
