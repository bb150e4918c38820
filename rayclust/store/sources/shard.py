"""A unit of input: which images or rows it holds, and what each of them becomes."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff")
"""Of file names, in any case; what a file holds is decided by its bytes."""

MAX_RECORD_BYTES = 256 << 20
"""Bytes of one encoded image above which it is not even read, unless a reader is told otherwise."""


class Member(NamedTuple):
    """One file of a folder shard."""

    key: str
    uri: str
    size: int
    """Bytes, as listed."""


@dataclass(frozen=True)
class Shard:
    """A part of the input that is worked on as one; JSON both ways, and the same for the same input."""

    index: int
    """Position among the shards."""
    kind: str
    """folder | webdataset | parquet | embeddings_parquet | embeddings_npy | embeddings_pt."""
    uri: str
    """The folder or file."""
    name: str
    """For people and as the start of keys: the path below the input without its ending."""
    stamp: str
    """Changes when the listing shows another size, ETag or time of change of any file that it reads."""
    first: int = 0
    """Images and rows of the shards before, as far as known; the row that its first image gets if none is rejected."""
    count: int | None = None
    """Images or rows in it; None where only reading tells."""
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

    @property
    def label_source(self) -> str | None:
        """Where to look for labels; None where nobody asks for them."""
        if self.labels != "none":
            return self.labels
        return None if self.classes is None else "auto"

    @property
    def has_embeddings(self) -> bool:
        """Whether it holds ready embeddings, for `read_rows`, not images, for `read_records`."""
        return self.kind.startswith("embeddings")

    def to_json(self) -> dict[str, Any]:
        """Plain lists, strings and numbers."""
        return dataclasses.asdict(self) | {"members": [list(member) for member in self.members]}

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> Shard:
        """The inverse of `to_json`."""
        content = dict(content)
        content["members"] = tuple(Member(*member) for member in content["members"])
        for name in ("row_groups", "beside", "classes"):
            content[name] = None if content[name] is None else tuple(content[name])
        return cls(**content)

    def wants(self, key: str, label: str | None) -> bool:
        """Whether an image is of the classes asked for."""
        return self.classes is None or label in self._class_set or not self._class_set.isdisjoint(key.split("/")[:-1])

    @cached_property
    def _class_set(self) -> frozenset[str | None]:
        return frozenset(self.classes or ())

    def rejects(self, reason: str, detail: str) -> Iterator[Record]:
        """The one reject that stands for the whole file."""
        yield Record.reject(self.name, self.uri, reason, detail)


@dataclass(frozen=True)
class Record:
    """One image, or why it cannot be one."""

    key: str
    """Its name within the input, valid UTF-8."""
    uri: str
    """Where it lies; `fetch` reads it again."""
    data: bytes | None = None
    """Encoded image; None for a reject."""
    label: str | None = None
    """Name of its true class, for evaluation only."""
    reason: str | None = None
    """A short stable word; set for rejects only."""
    detail: str = ""
    """For people: what is wrong with it."""

    @classmethod
    def reject(cls, key: str, uri: str, reason: str, detail: str, label: str | None = None) -> Record:
        """An image that cannot be used."""
        return cls(key, uri, None, label, reason, detail)


@dataclass(frozen=True)
class Rows:
    """The usable rows of a shard of ready embeddings, in order of key."""

    keys: list[str]
    uris: list[str]
    labels: list[str | None]
    embeddings: NDArray[np.float16]
    """Float16[N D], finite and not zero."""
    rejects: list[dict[str, str]]
    """key, uri, reason and detail of the rows left out."""
