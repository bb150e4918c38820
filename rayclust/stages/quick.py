"""quick: one line from images to a report; and how a run's config is read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import yaml

from rayclust.config import RunConfig, parse, validate
from rayclust.errors import ArtefactError
from rayclust.stages.pipeline import run_all
from rayclust.store import filesystem
from rayclust.store.layout import Run

DEFAULT_ENCODER = {"name": "open_clip/ViT-B-32", "pretrained": "openai"}
"""Small enough for a laptop's CPU."""


def quick(
    images: str, out: str, *, clusters: str, method: str, encoder: str | None, overrides: Sequence[str] = ()
) -> str:
    """Runs everything with settings for a first look, and leaves the RUN.yaml it used in the run.

    Args:
        images: anything that `images.uri` takes.
        out: folder or URI of the run.
        clusters: a number.
        method: its name.
        encoder: its name; None takes the default.
        overrides: `KEY=VALUE` items for RUN.yaml.

    Returns:
        The run's URI.
    """
    tree: dict[str, Any] = {
        "run": filesystem.absolute(out),
        "images": {"uri": images if images.startswith("dataset:") else filesystem.absolute(images)},
        "encoder": dict(DEFAULT_ENCODER) if encoder is None else {"name": encoder},
        "features": {"center": True},
        "method": {"name": method, "clusters": yaml.safe_load(clusters)},
    }
    text = yaml.safe_dump(tree, sort_keys=False)
    config = parse(text, overrides)
    filesystem.write_bytes(filesystem.join(config.run, "RUN.yaml"), as_yaml(config).encode())
    run_all(config)
    return config.run


def as_yaml(config: RunConfig) -> str:
    """What was set of a config, as a RUN.yaml."""
    return yaml.safe_dump(config.model_dump(mode="json", exclude_unset=True), sort_keys=False)


def load_config(uri: str, overrides: Sequence[str] = ()) -> RunConfig:
    """The config in a RUN.yaml, a path or URI.

    Raises:
        DataError: there is no such file.
        ConfigError: a key or value in it is refused.
    """
    text = filesystem.read_bytes(uri).decode("utf-8", "replace")
    return parse(text, overrides, uri)


def load_run(uri: str) -> RunConfig:
    """The config that the run at `uri` was last started with.

    Raises:
        ArtefactError: there is no run.
    """
    try:
        tree = filesystem.read_json(Run(uri).config)
    except filesystem.MissingError:
        raise ArtefactError(f"{uri}: no run there: give the folder or URI that RUN.yaml names as `run`") from None
    return validate(tree | {"run": uri.rstrip("/")})
