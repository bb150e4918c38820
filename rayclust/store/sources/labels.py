"""Labels as text, from whatever a data set holds them in. They serve evaluation only; what is no label becomes none."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from rayclust.errors import DataError
from rayclust.store import filesystem

LABEL_NAMES = (
    "label", "labels", "cls", "class", "class_name", "classname", "class_id", "category", "target", "fine_label",
    "label_name", "wnid", "y",
)  # fmt: skip
"""Columns of tables and fields of JSON that hold labels, the first that exists, in any case."""

_WNID_LINE = re.compile(r"n\d{8}\b")


def clean(text: str) -> str:
    """`text` with whatever UTF-8 cannot hold written as an escape."""
    return text.encode("utf-8", "backslashreplace").decode()


def label_text(value: Any, names: Sequence[str] | None = None) -> str | None:
    """A label as text.

    Args:
        value: text, a whole number, or anything.
        names: class names that whole numbers point into.

    Returns:
        None for nothing, empty text, -1 (marks unlabelled images) and what is no label: lists, objects, fractions.
    """
    if isinstance(value, bytes):
        value = value.decode("utf-8", "backslashreplace")
    if isinstance(value, str):
        return clean(value.strip()) or None
    if isinstance(value, bool | np.bool_):
        return str(bool(value)).lower()
    if isinstance(value, float | np.floating) and float(value).is_integer():
        value = int(value)
    if not isinstance(value, int | np.integer) or value == -1:
        return None
    return clean(names[int(value)]) if names is not None and 0 <= value < len(names) else str(int(value))


def folder_label(key: str) -> str | None:
    """The name of the folder that a file lies in; None for files that lie in none."""
    return key.rpartition("/")[0].rpartition("/")[2] or None


def json_label(data: bytes, field: str | None = None) -> str | None:
    """The label in a JSON object; None where it is damaged or has none.

    Args:
        data: the JSON text.
        field: name of the field, with `.` between levels; None takes the first of `LABEL_NAMES`.
    """
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        return None
    if field is not None:
        for name in field.split("."):
            value = value.get(name) if isinstance(value, dict) else None
        return label_text(value)
    if not isinstance(value, dict):
        return label_text(value)
    fields = {str(name).lower(): item for name, item in reversed(value.items())}
    return next((label_text(fields[name]) for name in LABEL_NAMES if name in fields), None)


def class_names(metadata: Mapping[bytes, bytes] | None, column: str) -> list[str] | None:
    """Names of the classes that a column of whole numbers points into, from a table's schema metadata.

    Two forms are known: `class_names`, a JSON list; and the `huggingface` description with a ClassLabel feature.
    """
    metadata = metadata or {}
    try:
        names = json.loads(metadata.get(b"class_names", b"null"))
        if names is None:
            features = json.loads(metadata.get(b"huggingface", b"{}"))["info"]["features"]
            names = features[column]["names"]
    except (ValueError, KeyError, TypeError):
        return None
    return names if isinstance(names, list) and all(isinstance(name, str) for name in names) else None


def read_classes(classes: Sequence[str] | str | None) -> frozenset[str] | None:
    """The classes to keep.

    Args:
        classes: names; or the URI of a text file with one a line, where `#` starts a comment line and what follows a
            WordNet id (n01440764) on its line is left out; None keeps all.

    Raises:
        DataError: the file cannot be read, or no class is named.
    """
    if classes is None:
        return None
    names = _lines(filesystem.read_bytes(classes)) if isinstance(classes, str) else [str(name) for name in classes]
    if not names:
        raise DataError(f"images.classes = {classes}: names no class; give at least one, or null for all")
    return frozenset(names)


def _lines(data: bytes) -> list[str]:
    lines = (line.strip() for line in data.decode("utf-8-sig", "backslashreplace").splitlines())
    kept = [line for line in lines if line and not line.startswith("#")]
    return [line.split()[0].rstrip(",:") if _WNID_LINE.match(line) else line for line in kept]
