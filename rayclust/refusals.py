"""What a model of settings refuses, as one line for the person who wrote them."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import Any

from pydantic import ValidationError


def one_line(error: ValidationError, known: Sequence[str], methods: Sequence[str]) -> str:
    """The first thing that is wrong: full key, value, bound, and for an unknown key the nearest known one.

    Args:
        error: of RUN.yaml's model.
        known: all dotted keys.
        methods: names of methods, which the error's paths go through.
    """
    problems = error.errors(include_url=False)
    unknown = [p for p in problems if p["type"] == "extra_forbidden"]
    first = (unknown or problems)[0]
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    return f"{_describe(first, known, methods)}{more}"


def _describe(problem: Any, known: Sequence[str], methods: Sequence[str]) -> str:
    path = _key_path(problem["loc"], methods)
    key = ".".join(path)
    if problem["type"] == "extra_forbidden":
        return f"{key}: unknown key{_nearest(path, known)}"
    if problem["type"] == "missing":
        return f"{key}: this key is required"
    if problem["type"].startswith("union_tag"):
        names = ", ".join(sorted(methods))
        given = problem["input"].get("name") if isinstance(problem["input"], dict) else problem["input"]
        return f"{key}.name = {given!r}: must be one of {names}{_closest(str(given), methods)}"
    message = problem["msg"].removeprefix("Value error, ").removeprefix("Input ")
    if problem["type"] == "value_error" and isinstance(problem["input"], dict):
        return f"{key}.{message}" if key else message  # a group's own check names the key below it
    return f"{key} = {_shown(problem['input'])}: {message}"


def _shown(value: Any) -> str:
    text = repr(value) if isinstance(value, str) else str(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _key_path(location: tuple[Any, ...], methods: Sequence[str]) -> list[str]:
    """The dotted key without pydantic's names for branches of unions."""
    path: list[str] = []
    for part in location:
        is_tag = bool(path) and path == ["method"] and part in methods
        is_branch = isinstance(part, str) and (
            "[" in part or part in {"int", "str", "float", "bool", "constrained-str"}
        )
        if not is_tag and not is_branch:
            path.append(str(part))
    return path


def _nearest(path: list[str], known: Sequence[str]) -> str:
    fields = _fields_at(path[:-1], known)
    near = _closest(path[-1], fields)
    if near:
        return near
    elsewhere = [key for key in known if key.split(".")[-1] == path[-1]]
    if elsewhere:
        return f"; did you mean {elsewhere[0]}?"
    return f"; known here: {', '.join(fields)}" if fields else ""


def _closest(word: str, words: Sequence[str]) -> str:
    matches = difflib.get_close_matches(word, words, n=1, cutoff=0.6)
    return f"; did you mean {matches[0]}?" if matches else ""


def _fields_at(path: list[str], known: Sequence[str]) -> list[str]:
    prefix = "".join(part + "." for part in path)
    below = {key.removeprefix(prefix).split(".")[0] for key in known if key.startswith(prefix)}
    return sorted(below)
