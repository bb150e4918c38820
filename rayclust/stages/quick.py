"""quick: one line from images to a report; and how a run's config is read."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import yaml

from rayclust.config import RunConfig, parse, validate
from rayclust.errors import ArtefactError
from rayclust.language.vocabulary import kind_of
from rayclust.stages.pipeline import run_all
from rayclust.store import filesystem
from rayclust.store.layout import Run
from rayclust.store.lease import held

DEFAULT_ENCODER = {"name": "open_clip/ViT-B-32", "pretrained": "openai"}
"""Small enough for a laptop's CPU."""


def quick(
    images: str, out: str, *, clusters: str, method: str, encoder: str | None, overrides: Sequence[str] = ()
) -> str:
    """Runs everything with settings for a first look, and leaves the RUN.yaml it used in the run.

    Args:
        images: anything that `images.uri` takes.
        out: folder or URI of the run.
        clusters: a number, `auto`, or candidates with commas between.
        method: its name.
        encoder: its name; None takes the default.
        overrides: `KEY=VALUE` items for RUN.yaml.

    Returns:
        The run's URI.
    """
    tree: dict[str, Any] = {
        "run": out,
        "images": {"uri": images},
        "encoder": dict(DEFAULT_ENCODER) if encoder is None else {"name": encoder},
        "features": {"center": True},
        "method": {"name": method},
    }
    text = yaml.safe_dump(tree, sort_keys=False)
    open_or_not = f"[{clusters}]" if "," in clusters and "[" not in clusters else clusters
    config = anchored(parse(text, [f"method.clusters={open_or_not}", *overrides]))
    with held(Run(config.run)):
        filesystem.write_bytes(filesystem.join(config.run, "RUN.yaml"), as_yaml(config).encode())
        run_all(config)
    return config.run


def as_yaml(config: RunConfig) -> str:
    """What was set of a config, as a RUN.yaml."""
    return yaml.safe_dump(config.model_dump(mode="json", exclude_unset=True), sort_keys=False)


def load_config(uri: str, overrides: Sequence[str] = ()) -> RunConfig:
    """The config in a RUN.yaml: a path, a URI, or `-` for what comes on standard input.

    Raises:
        DataError: there is no such file.
        ConfigError: a key or value in it is refused.
    """
    data = sys.stdin.buffer.read() if uri == "-" else filesystem.read_bytes(uri)
    source = "standard input" if uri == "-" else uri
    return anchored(parse(data.decode("utf-8", "replace"), overrides, source))


def places(config: RunConfig) -> dict[str, str]:
    """Every path and URI in a config by its full key."""
    found = {"run": config.run}
    if not config.images.uri.startswith("dataset:"):
        found["images.uri"] = config.images.uri
    if isinstance(config.images.classes, str):
        found["images.classes"] = config.images.classes
    if config.encoder.weights_uri is not None:
        found["encoder.pretrained"] = config.encoder.weights_uri
    for place, name in enumerate(config.label.lists):
        if kind_of(name) in ("text", "embeddings"):
            found["label.vocabulary" if isinstance(config.label.vocabulary, str) else f"label.vocabulary.{place}"] = (
                name
            )
    return found


def anchored(config: RunConfig) -> RunConfig:
    """The config with every local path absolute: workers do not share the directory that the command was given in."""
    tree = config.model_dump(mode="json", exclude_unset=True)
    for key, place in places(config).items():
        *groups, last = key.split(".")
        node: Any = tree
        for group in groups:
            node = node[group]
        node[int(last) if isinstance(node, list) else last] = filesystem.absolute(place)
    return validate(tree)


def load_run(uri: str) -> RunConfig:
    """The config that the run at `uri` was last started with.

    Raises:
        ArtefactError: there is no run.
    """
    run = filesystem.absolute(uri)
    try:
        tree = filesystem.read_json(Run(run).config)
    except filesystem.MissingError:
        raise ArtefactError(f"{uri}: no run there: give the folder or URI that RUN.yaml names as `run`") from None
    return validate(tree | {"run": run})
