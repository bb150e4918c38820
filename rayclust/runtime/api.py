"""Read configs, of files and of runs, and run everything in one line (`quick`)."""

from __future__ import annotations

import logging
import sys
import textwrap
from collections.abc import Sequence
from typing import Any

import yaml
from pydantic import BaseModel
from pydantic_core import to_jsonable_python

from rayclust.config import RunConfig, kind_of, parse, validate, yaml_value
from rayclust.errors import ArtefactError, ConfigError
from rayclust.methods import reads_pixels
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
