"""Base class of all groups of settings, one-line messages for validation errors, and the reader of YAML."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence
from typing import Annotated, Any

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, ValidationError

from rayclust.errors import ConfigError


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


def _with_place(template: str) -> str:
    if template.count("{}") != 1:
        raise ValueError("should hold {} once, where the name goes")
    return template


Template = Annotated[str, AfterValidator(_with_place)]
"""A prompt around a name."""


def format_error(error: ValidationError, known: Sequence[str]) -> str:
    """Return the first error in one line: full key, value, bound, and for an unknown key the nearest known one.

    Args:
        error: of a config.
        known: all dotted keys.
    """
    problems: list[Any] = error.errors(include_url=False)
    problem = next((problem for problem in problems if problem["type"] == "extra_forbidden"), problems[0])
    path, kind, value = _path(problem), problem["type"], problem["input"]
    key, others = ".".join(path), len({tuple(_path(each)) for each in problems}) - 1
    more = f" (and {others} more)" if others else ""
    if kind == "extra_forbidden":
        return f"{key}: unknown key{_suggest_key(path, known)}{more}"
    if kind == "missing":
        return f"{key}: this key is required{more}"
    # Each branch of a union has a problem of its own: the value should be what one of them says.
    messages = list(dict.fromkeys(_message(each) for each in problems if _path(each) == path))
    message = ", or ".join([messages[0], *(each.removeprefix("should be ") for each in messages[1:])])
    if kind == "value_error" and isinstance(value, dict):  # a group's own check names the key below it
        return f"{key}.{message}{more}" if key else f"{message}{more}"
    shown = repr(value) if isinstance(value, str) else str(value)
    shown = shown if len(shown) <= 80 else shown[:77] + "..."
    return f"{key} = {shown}: {message}{more}" if key else f"{shown}: {message}{more}"


def _path(problem: Any) -> list[str]:
    """Return the parts of the dotted key, without pydantic's names for the branches of unions."""
    branches = {"int", "str", "float", "bool"}
    is_key = (
        isinstance(p, int) or not ("[" in p or p in branches or p.startswith("constrained-")) for p in problem["loc"]
    )
    return [str(part) for part, kept in zip(problem["loc"], is_key, strict=True) if kept]


def _message(problem: Any) -> str:
    """Return what is wrong with a value, in the words of RUN.yaml."""
    kind: str = problem["type"]
    text: str = problem["msg"]
    if kind in ("model_type", "model_attributes_type", "dict_type"):
        return "should be a group of keys"
    if kind in ("tuple_type", "list_type"):
        return "should be a list, such as [a, b]"
    for start in ("Value error, ", "Input ", "String ", "Tuple "):
        text = text.removeprefix(start)
    return text.partition(", unable to parse")[0]


def _suggest_key(path: list[str], known: Sequence[str]) -> str:
    """Return a hint at the intended key: a similar one here, one of that name elsewhere, or all keys of the group."""
    prefix = "".join(part + "." for part in path[:-1])
    fields = sorted({key.removeprefix(prefix).split(".")[0] for key in known if key.startswith(prefix)})
    elsewhere = [key for key in known if key.split(".")[-1] == path[-1]]
    if ".".join(path) in known:
        return "; only other methods have it"
    if (near := closest(path[-1], fields)) or not (elsewhere or fields):
        return near
    return f"; did you mean {elsewhere[0]}?" if elsewhere else f"; known here: {', '.join(fields)}"


def closest(word: str, words: Iterable[str]) -> str:
    """Return a hint at the word that a mistyped one most resembles, "" if none is near."""
    matches = difflib.get_close_matches(word, words, n=1, cutoff=0.6)
    return f"; did you mean {matches[0]}?" if matches else ""


class YamlLoader(yaml.SafeLoader):
    """YAML's safe loader, with the scalars of YAML 1.2: 010 is ten, and 1:30, no and 2024-01-01 are text.

    It refuses a key given twice: the second would silently win.
    """

    yaml_implicit_resolvers = {}  # noqa: RUF012 - none of YAML 1.1's

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Return a mapping of text to values; raise `ConfigError` for a key of another kind, or one given twice."""
        self.flatten_mapping(node)
        seen = set[Any]()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            where = f"line {key_node.start_mark.line + 1}: the key"
            if not isinstance(key, str):
                raise ConfigError(f"{where} {key!r} is not text")
            if key in seen:
                raise ConfigError(f"{where} {key} is given twice")
            seen.add(key)
        return super().construct_mapping(node, deep=True)

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        """Return a whole number; 0x and 0o mark other bases, a leading 0 does not."""
        text = node.value.lower()
        return int(text, 16 if "x" in text else 8 if "o" in text else 10)


YamlLoader.add_constructor("tag:yaml.org,2002:int", YamlLoader.construct_yaml_int)
for _tag, _pattern, _first in (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?[0-9][0-9_]*|0o[0-7]+|0x[0-9a-fA-F]+", list("-+0123456789")),
    ("float", r"[-+]?(\.[0-9]+|[0-9][0-9_]*(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.inf|\.nan", list("-+0123456789.")),
    ("merge", r"<<", ["<"]),
):
    YamlLoader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_pattern})$"), _first)


def read_yaml(text: str, source: str) -> dict[str, Any]:
    """Return the mapping that a YAML text holds; raise `ConfigError`, in one line with its place, if it holds none."""
    try:
        tree = yaml.load(text, YamlLoader)  # noqa: S506 - a SafeLoader
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        problem = getattr(error, "problem", None) or "not YAML"
        if isinstance(error, yaml.reader.ReaderError):
            problem = f"{error.reason}; a RUN.yaml is text in UTF-8"
        raise ConfigError(f"{source}{where}: {problem}") from None
    except RecursionError:
        raise ConfigError(f"{source}: nested too deeply") from None
    except (ConfigError, ValueError) as error:
        raise ConfigError(f"{source}: {error}") from None
    if not isinstance(tree, dict):
        found = "nothing" if tree is None else f"a {type(tree).__name__}"
        raise ConfigError(f"{source}: {found} where a mapping of keys is needed, such as `run: …`")
    return tree
