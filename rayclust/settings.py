"""Base class of all groups of settings, and one-line messages for validation errors."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
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


def format_error(error: ValidationError, known: Sequence[str], methods: Sequence[str]) -> str:
    """Return the first error in one line: full key, value, bound, and for an unknown key the nearest known one.

    Args:
        error: of RUN.yaml's model.
        known: all dotted keys.
        methods: names of methods, which the error's paths go through.
    """
    problems = error.errors(include_url=False)
    unknown = [p for p in problems if p["type"] == "extra_forbidden"]
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    return f"{_describe((unknown or problems)[0], known, methods)}{more}"


def _describe(problem: Any, known: Sequence[str], methods: Sequence[str]) -> str:
    # 1. The dotted key, without pydantic's names for the branches of unions.
    path: list[str] = []
    for part in problem["loc"]:
        is_tag = path == ["method"] and part in methods
        is_branch = isinstance(part, str) and (
            "[" in part or part in {"int", "str", "float", "bool", "constrained-str"}
        )
        if not is_tag and not is_branch:
            path.append(str(part))
    key, kind, value = ".".join(path), problem["type"], problem["input"]
    # 2. The message for each kind of error.
    if kind == "extra_forbidden":
        return f"{key}: unknown key{_suggest_key(path, known)}"
    if kind == "missing":
        return f"{key}: this key is required"
    if kind.startswith("union_tag"):
        given = value.get("name") if isinstance(value, dict) else value
        return f"{key}.name = {given!r}: must be one of {', '.join(sorted(methods))}{_closest(str(given), methods)}"
    message = problem["msg"].removeprefix("Value error, ").removeprefix("Input ")
    if kind == "value_error" and isinstance(value, dict):
        return f"{key}.{message}" if key else message  # a group's own check names the key below it
    shown = repr(value) if isinstance(value, str) else str(value)
    return f"{key} = {shown if len(shown) <= 80 else shown[:77] + '...'}: {message}"


def _suggest_key(path: list[str], known: Sequence[str]) -> str:
    """Return a hint at the intended key: a similar one here, one of that name elsewhere, or all keys of the group."""
    prefix = "".join(part + "." for part in path[:-1])
    fields = sorted({key.removeprefix(prefix).split(".")[0] for key in known if key.startswith(prefix)})
    if near := _closest(path[-1], fields):
        return near
    elsewhere = [key for key in known if key.split(".")[-1] == path[-1]]
    if elsewhere:
        return f"; did you mean {elsewhere[0]}?"
    return f"; known here: {', '.join(fields)}" if fields else ""


def _closest(word: str, words: Sequence[str]) -> str:
    matches = difflib.get_close_matches(word, words, n=1, cutoff=0.6)
    return f"; did you mean {matches[0]}?" if matches else ""
