"""Read configs, of YAML texts with overrides, of files and of runs, and run everything in one line (`quick`)."""

from __future__ import annotations

import logging
import re
import sys
import textwrap
from collections.abc import Sequence
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin

import yaml
from pydantic import BaseModel
from pydantic_core import to_jsonable_python

from rayclust.config import RunConfig, kind_of, validate
from rayclust.errors import ArtefactError, ConfigError
from rayclust.methods import config_types, reads_pixels
from rayclust.methods.settings import BaseMethodConfig
from rayclust.runtime.pipeline import run_all
from rayclust.store import storage
from rayclust.store.lock import run_lock
from rayclust.store.run import Run

logger = logging.getLogger(__name__)

SCHEMA_FILE = "RUN.schema.json"
"""Beside a RUN.yaml that `init` writes: its JSON schema, for editors."""


def load_config(uri: str, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a RUN.yaml, from a path, a URI or `-` for standard input, and make its local paths absolute.

    Raises:
        DataError: there is no such file.
        ConfigError: a key or value in it, or in the `KEY=VALUE` overrides, is refused.
    """
    data = sys.stdin.buffer.read() if uri == "-" else storage.read_bytes(uri)
    source = "standard input" if uri == "-" else uri
    return with_absolute_paths(parse(data.decode("utf-8", "replace"), overrides, source))


def parse(text: str, overrides: Sequence[str] = (), source: str = "RUN.yaml") -> RunConfig:
    """Read a run's config.

    Args:
        text: YAML.
        overrides: `KEY=VALUE` items; KEY is dotted, VALUE is YAML. They win over `text`.
        source: name of `text` in messages.

    Raises:
        ConfigError: the text is not a YAML mapping, or a key or value is refused; one line.
    """
    tree = _read_yaml(text, source)
    for override in overrides:
        key, equals, value = override.partition("=")
        *groups, last = key.split(".")
        if not equals or not all((*groups, last)):
            beside = "" if equals else "; what is read is one folder, file or URI"  # a shell has made many of *.jpg
            raise ConfigError(f"override {override!r}: write KEY=VALUE, for example method.clusters=20{beside}")
        node = tree
        for group in groups:
            if not isinstance(node.get(group), dict):
                node[group] = {}
            node = node[group]
        node[last] = _override_value(key, value)
    return validate(tree)


def _override_value(key: str, text: str) -> Any:
    """Return the value of an override: text as it is given where the key takes text, else what it is as YAML."""
    # The types that the key takes; several methods may share its name.
    found: set[Any] = {RunConfig}
    for part in key.split("."):
        fields, found = found, set()
        for kind in fields:
            if isinstance(kind, type) and issubclass(kind, BaseModel):
                is_own = kind is BaseMethodConfig and part not in kind.model_fields
                models = config_types().values() if is_own else (kind,)
                annotations = [model.model_fields[part].annotation for model in models if part in model.model_fields]
            else:
                annotations = list(get_args(kind)[1:]) if get_origin(kind) is dict else []
            for annotation in annotations:
                found |= _alternatives(annotation)
    kinds = {get_origin(kind) or kind for kind in found}
    takes_text = str in kinds and kinds <= {str, tuple, type(None)}
    is_quoted = len(text) > 1 and text[0] == text[-1] and text[0] in "'\""
    if takes_text and not is_quoted and not (tuple in kinds and text.startswith("[")):
        return None if type(None) in kinds and text in ("null", "~") else text
    return yaml_value(key, text)


def _alternatives(annotation: Any) -> set[Any]:
    origin = get_origin(annotation)
    if origin is Annotated:
        return _alternatives(get_args(annotation)[0])
    if origin in (Union, UnionType):
        return {kind for part in get_args(annotation) for kind in _alternatives(part)}
    return {annotation}


def yaml_value(key: str, text: str) -> Any:
    """Return what an override of a key says as YAML; raise `ConfigError`, in one line, if that is nothing."""
    try:
        return yaml.load(text, _Loader)  # noqa: S506 - a SafeLoader
    except (yaml.YAMLError, ConfigError, ValueError):
        raise ConfigError(f"override {key}: {text!r} is not a YAML value") from None


class _Loader(yaml.SafeLoader):
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


_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_yaml_int)
for _tag, _pattern, _first in (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?[0-9][0-9_]*|0o[0-7]+|0x[0-9a-fA-F]+", list("-+0123456789")),
    ("float", r"[-+]?(\.[0-9]+|[0-9][0-9_]*(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.inf|\.nan", list("-+0123456789.")),
    ("merge", r"<<", ["<"]),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_pattern})$"), _first)


def _read_yaml(text: str, source: str) -> dict[str, Any]:
    try:
        tree = yaml.load(text, _Loader)  # noqa: S506 - a SafeLoader
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


def load_run(uri: str) -> RunConfig:
    """Return the config that a run, named by its URI or its RUN.yaml, was last started with.

    Raise `ArtefactError` if there is no run.
    """
    run = load_config(uri).run if uri.lower().endswith((".yaml", ".yml")) else storage.absolute(uri)
    try:
        tree = storage.read_json(Run(run).config)
    except storage.MissingError:
        raise ArtefactError(f"{uri}: no run there: give the folder or URI that RUN.yaml names as `run`") from None
    try:
        return validate(dict(tree) | {"run": run})
    except (ConfigError, TypeError, ValueError) as error:
        raise ArtefactError(
            f"{Run(run).config}: is no config of a run ({error}); run it from its RUN.yaml again"
        ) from None


def as_yaml(config: RunConfig) -> str:
    """Return the keys of a config that were set, as a RUN.yaml."""
    return yaml.safe_dump(config.model_dump(mode="json", exclude_unset=True), sort_keys=False)


def starter(*, run: str, images: str, method: str, clusters: str) -> str:
    """Return a RUN.yaml to start from: what must be set, and every other key with its default and meaning as a comment.

    Defaults are those of the method: one that learns from pixels has its own encoder and features.

    Args:
        run: folder or URI of the run.
        images: as `images.uri` takes them.
        method: its name; its own keys are listed.
        clusters: a number, `auto`, or candidates in brackets.
    """
    given = {
        "run": run,
        "images.uri": images,
        "method.name": method,
        "method.clusters": yaml_value("method.clusters", clusters),
    }
    # The number of clusters changes no other default.
    config = validate({"run": run, "images": {"uri": images}, "method": {"name": method, "clusters": 2}})
    lines = [
        f"# yaml-language-server: $schema={SCHEMA_FILE}",
        "# Keys that begin with # stand for their defaults: remove it, and that of their group, to set them.",
    ]

    def write(defaults: BaseModel, prefix: str) -> None:
        indent = "  " * prefix.count(".")
        for name, field in type(defaults).model_fields.items():
            key = prefix + name
            value = getattr(defaults, name)
            mark = "" if any(each == key or each.startswith(f"{key}.") for each in given) else "#"
            if isinstance(value, BaseModel):
                lines.extend(["", f"{mark}{indent}{name}:"])
                write(value, f"{key}.")
                continue
            lines.extend(f"{indent}# {line}" for line in textwrap.wrap(field.description or "", 110))
            # One line; `...` ends a document that is a bare word.
            plain = to_jsonable_python(given.get(key, value))
            text = yaml.safe_dump(plain, default_flow_style=True, width=10**6, allow_unicode=True)
            lines.append(f"{mark}{indent}{name}: {text.strip().removesuffix('...').strip()}")

    write(config, "")
    return "\n".join(lines) + "\n"


def local_paths(config: RunConfig) -> dict[str, str]:
    """Return every path and URI in a config by its full key."""
    found = {"run": config.run}
    if not config.images.uri.startswith("dataset:"):
        found["images.uri"] = config.images.uri
    if config.images.test is not None and not config.images.test.startswith("dataset:"):
        found["images.test"] = config.images.test
    if isinstance(config.images.classes, str):
        found["images.classes"] = config.images.classes
    if config.encoder.weights_uri is not None:
        found["encoder.pretrained"] = config.encoder.weights_uri
    for place, encoder in enumerate(config.encoders):
        paths = {"pretrained": encoder.weights_uri, "embeddings": encoder.embeddings}
        named = {key: path for key, path in paths.items() if path is not None and not path.startswith("dataset:")}
        found |= {f"encoders.{place}.{key}": path for key, path in named.items()}
    found |= {f"method.members.{place}": uri for place, uri in enumerate(config.method.partitions())}
    if config.curate.duplicates.values is not None:
        found["curate.duplicates.values"] = config.curate.duplicates.values
    for group, words in (("label", config.label.vocabulary), ("method", getattr(config.method, "vocabulary", None))):
        for position, name in enumerate([words] if isinstance(words, str) else words or ()):
            if kind_of(name) in ("text", "embeddings") or (kind_of(name) == "wordnet" and name != "wordnet"):
                found[f"{group}.vocabulary" + ("" if isinstance(words, str) else f".{position}")] = name
    return found


def with_absolute_paths(config: RunConfig) -> RunConfig:
    """Return the config with absolute local paths: workers do not share the directory of the command."""
    for key, path in local_paths(config).items():
        config = _replaced(config, key.split("."), storage.absolute(path))
    return config


def _replaced(node: Any, keys: Sequence[str], value: str) -> Any:
    """Return a copy of a config, or of a list in one, with one value replaced; nothing is validated again."""
    if not keys:
        return value
    if isinstance(node, tuple):
        position = int(keys[0])
        return (*node[:position], _replaced(node[position], keys[1:], value), *node[position + 1 :])
    return node.model_copy(update={keys[0]: _replaced(getattr(node, keys[0]), keys[1:], value)})


def quick(
    images: str, out: str, *, clusters: str, method: str, encoder: str | None, overrides: Sequence[str] = ()
) -> str:
    """Run everything with settings for a first look, and leave the RUN.yaml in the run; return the run's URI.

    Args:
        images: anything that `images.uri` takes.
        out: folder or URI of the run.
        clusters: a number, `auto`, or candidates with commas between.
        method: its name.
        encoder: its name; None leaves it to `encoder.name: auto`.
        overrides: `KEY=VALUE` items for RUN.yaml.
    """
    tree: dict[str, Any] = {
        "run": out,
        "images": {"uri": images},
        "encoder": {"name": encoder or "auto"},
        **({} if reads_pixels(method) else {"features": {"center": True}}),
        "method": {"name": method},
    }
    number_or_list = f"[{clusters}]" if "," in clusters and "[" not in clusters else clusters
    if encoder is None and any(override.startswith("encoders=") for override in overrides):
        del tree["encoder"]
    text = yaml.safe_dump(tree, sort_keys=False)
    config = with_absolute_paths(parse(text, [f"method.clusters={number_or_list}", *overrides]))
    if config.encoder.family in ("timm", "pixels") and config.label.vocabulary == "auto":
        logger.info("encoder: %s has no text tower: clusters get no names", config.encoder.name)
    with run_lock(Run(config.run)):
        storage.write_bytes(storage.join(config.run, "RUN.yaml"), as_yaml(config).encode())
        run_all(config)
    return config.run
