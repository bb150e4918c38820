"""quick: one line from images to a report; and how a run's config is read."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

import pyarrow as pa
import yaml

from rayclust.config import RunConfig, parse, validate
from rayclust.errors import ArtefactError
from rayclust.language.vocabulary import kind_of
from rayclust.runtime.pipeline import run_all
from rayclust.store import filesystem, tables
from rayclust.store.layout import Run, parts
from rayclust.store.lease import held
from rayclust.store.manifest import read_json_output

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
    config = with_absolute_paths(parse(text, [f"method.clusters={open_or_not}", *overrides]))
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
    return with_absolute_paths(parse(data.decode("utf-8", "replace"), overrides, source))


def local_paths(config: RunConfig) -> dict[str, str]:
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


def with_absolute_paths(config: RunConfig) -> RunConfig:
    """The config with every local path absolute: workers do not share the directory that the command was given in."""
    tree = config.model_dump(mode="json", exclude_unset=True)
    for key, place in local_paths(config).items():
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


# `rayclust.run` and `rayclust.load`: a run from Python.


def run(config: RunConfig | Mapping[str, Any] | str, overrides: Sequence[str] = ()) -> RunTables:
    """Runs every stage that is not done.

    Args:
        config: a RUN.yaml's path or URI, its content as a mapping, or a `RunConfig`.
        overrides: `KEY=VALUE` items, for a path or URI.

    Returns:
        The run's tables.

    Raises:
        RayclustError: what the command line would say.
    """
    if isinstance(config, str):
        settings = load_config(config, overrides)
    else:
        settings = with_absolute_paths(config if isinstance(config, RunConfig) else validate(dict(config)))
    run_all(settings)
    return load(settings.run)


def load(run: str) -> RunTables:
    """The run below a folder or URI; tables are read when they are asked for.

    Raises:
        ArtefactError: there is no run.
    """
    return RunTables(load_run(run))


class RunTables:
    """What a run has written so far."""

    def __init__(self, config: RunConfig) -> None:
        self.config = config
        """What the run was last started with."""
        self._run = Run(config.run)

    def iter(self, name: str, columns: Sequence[str] | None = None) -> Iterator[pa.Table]:
        """The parts of a table in order, one at a time.

        Args:
            name: embeddings, rejects, neighbors or assignments.
            columns: the columns to read; None reads all.

        Raises:
            ArtefactError: a part is missing or damaged.
        """
        return tables.iter_tables((uri for _, uri in parts(self._run.at(name))), columns)

    def table(self, name: str, columns: Sequence[str] | None = None) -> pa.Table:
        """A whole table in memory; see `iter`.

        Raises:
            ArtefactError: the stage that writes it has not begun.
        """
        found = list(self.iter(name, columns))
        if not found:
            raise ArtefactError(f"{self._run.at(name)}: no parts there: the stage that writes them has not run")
        return pa.concat_tables(found)

    @cached_property
    def clusters(self) -> pa.Table:
        """One line a cluster: size, name, score, runners-up, exemplars, outliers."""
        return tables.read_table(self._run.clusters)

    @cached_property
    def metrics(self) -> dict[str, Any]:
        """Scores.

        Raises:
            ArtefactError: the stage evaluate has not run.
        """
        try:
            scores: dict[str, Any] = read_json_output(self._run, "evaluate", self._run.metrics)
        except filesystem.MissingError:
            raise ArtefactError(f"{self._run.metrics}: is missing: run evaluate first") from None
        return scores

    @property
    def report(self) -> str:
        """URI of the page."""
        return self._run.report
