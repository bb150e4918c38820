"""The table of bad inputs: for each, the rows that must come through, the rejects with their reasons, or the error."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class BadInput:
    """One input below a folder, and what must become of it."""

    name: str
    files: Callable[[], Mapping[str, bytes]]
    """Builds the files, by their paths."""
    rows: tuple[str, ...] = ()
    """Keys that are read, in order; none may be lost."""
    rejects: tuple[tuple[str, str], ...] = ()
    """Key and reason of each reject, sorted."""
    error: str = ""
    """Regular expression that the one-line DataError or ConfigError holds instead."""
    undecodable: tuple[str, ...] = ()
    """Keys of `rows` whose bytes are no image: rejects of the decoder, later."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """What differs from the defaults of `images`."""


def all_cases() -> list[BadInput]:
    """The whole table."""
    from tests.store import bad_arrays, bad_folders, bad_tables, bad_tars, bad_vectors

    tables = (bad_folders, bad_tars, bad_tables, bad_vectors, bad_arrays)
    return [case for table in tables for case in table.cases()]
