"""Base class of all groups of settings, and one-line messages for validation errors."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError


class Config(BaseModel):
    """A frozen group of settings that refuses unknown keys.

    The string below each field is its description: meaning, unit or range, special values.
    """

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        use_attribute_docstrings=True,
        allow_inf_nan=False,
        validate_default=True,
        protected_namespaces=(),
    )


def format_error(error: ValidationError, known: Sequence[str]) -> str:
    """Return the first error in one line: full key, value, bound, and for an unknown key the nearest known one.

    Args:
        error: of a config.
        known: all dotted keys.
    """
    problems: list[Any] = error.errors(include_url=False)
    problem = next((problem for problem in problems if problem["type"] == "extra_forbidden"), problems[0])
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""

    # 1. The dotted key, without pydantic's names for the branches of unions.
    branches = {"int", "str", "float", "bool", "constrained-str"}
    path = [str(part) for part in problem["loc"] if isinstance(part, int) or ("[" not in part and part not in branches)]
    key, kind, value = ".".join(path), problem["type"], problem["input"]

    # 2. The message for each kind of error.
    if kind == "extra_forbidden":
        return f"{key}: unknown key{_suggest_key(path, known)}{more}"
    if kind == "missing":
        return f"{key}: this key is required{more}"
    message = problem["msg"].removeprefix("Value error, ").removeprefix("Input ")
    if kind == "value_error" and isinstance(value, dict):  # a group's own check names the key below it
        return f"{key}.{message}{more}" if key else f"{message}{more}"
    shown = repr(value) if isinstance(value, str) else str(value)
    return f"{key} = {shown if len(shown) <= 80 else shown[:77] + '...'}: {message}{more}"


def _suggest_key(path: list[str], known: Sequence[str]) -> str:
    """Return a hint at the intended key: a similar one here, one of that name elsewhere, or all keys of the group."""
    prefix = "".join(part + "." for part in path[:-1])
    fields = sorted({key.removeprefix(prefix).split(".")[0] for key in known if key.startswith(prefix)})
    elsewhere = [key for key in known if key.split(".")[-1] == path[-1]]
    if (near := closest(path[-1], fields)) or not (elsewhere or fields):
        return near
    return f"; did you mean {elsewhere[0]}?" if elsewhere else f"; known here: {', '.join(fields)}"


def closest(word: str, words: Iterable[str]) -> str:
    """Return a hint at the word that a mistyped one most resembles, "" if none is near."""
    matches = difflib.get_close_matches(word, words, n=1, cutoff=0.6)
    return f"; did you mean {matches[0]}?" if matches else ""
