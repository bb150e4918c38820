"""Command `compare`: k-means of one input under several encoders, a baseline for what a method adds to an encoder."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from rayclust.config import validate, yaml_value
from rayclust.errors import ConfigError
from rayclust.runtime.api import load_config
from rayclust.runtime.pipeline import run_all
from rayclust.store import storage
from rayclust.store.manifest import digest_of
from rayclust.store.run import Run

KEPT = ("images", "features", "neighbors", "resources", "evaluate", "seed")
"""Groups of the RUN.yaml that hold for every run."""
SCORES = ("accuracy", "nmi", "ari", "knn_accuracy", "knn_accuracy_top5", "linear_probe", "silhouette")
"""Of `metrics.json`, in the order of the columns; of the test rows where the run keeps some aside."""


def compare(uri: str, overrides: Sequence[str]) -> list[dict[str, Any]]:
    """Run k-means with the number of clusters of a RUN.yaml under each of several encoders.

    The runs lie below `compare/` of the run, keep their embeddings, and are resumed like any other.

    Args:
        uri: of the RUN.yaml.
        overrides: KEY=VALUE; keys of `encoder` with a list, such as encoder.name=[a,b], are varied together.

    Returns:
        What is varied by key, and the scores by name, for each.

    Raises:
        ConfigError: nothing is varied, the lists are not of one length, or the number of clusters is open.
    """
    varied, others = dict[str, list[Any]](), list[str]()
    for override in overrides:
        key, _, value = override.partition("=")
        values = yaml_value(key, value) if key.startswith("encoder.") and value.lstrip().startswith("[") else None
        if isinstance(values, list) and values:
            varied[key.removeprefix("encoder.")] = values
        else:
            others.append(override)
    lengths = {key: len(values) for key, values in varied.items()}
    if len(set(lengths.values())) != 1:
        raise ConfigError(
            f"compare: give lists of one length, such as encoder.name=[A,B]; given are {lengths or 'none'}"
        )
    config = load_config(uri, others)
    if config.encoders and "name" not in varied:
        raise ConfigError("compare: the run has several encoders; give those to compare as encoder.name=[A,B]")
    if config.needs_selection:
        raise ConfigError("compare: needs one number of clusters; set method.clusters")
    tree, found = config.model_dump(mode="json", exclude_unset=True), list[dict[str, Any]]()
    kept = {key: tree[key] for key in KEPT if key in tree}
    method = {"name": "kmeans", "clusters": config.method.clusters}
    for values in zip(*varied.values(), strict=True):
        variant = dict(zip(varied, values, strict=True))
        run = Run(storage.join(config.run, "compare", digest_of(variant)[:16]))
        # Weights and image size belong to the encoder that the file names.
        own = ("pretrained", "image_size") if "name" in variant else ()
        encoder = {key: value for key, value in tree.get("encoder", {}).items() if key not in own} | variant
        content = kept | {"run": run.uri, "encoder": encoder, "method": method, "label": {"vocabulary": "none"}}
        run_all(validate(content), stop_after="evaluate")
        metrics = storage.read_json(run.metrics)
        scores = metrics | metrics.get("test", {})
        found.append(variant | {name: scores[name] for name in SCORES if name in scores})
    return found


def as_lines(found: Sequence[dict[str, Any]]) -> Iterator[str]:
    """Yield the scores as lines of a table; a score that an input does not have has no column."""
    names = list(dict.fromkeys(name for row in found for name in row))
    cells = [names]
    for each in found:
        values = ("" if each.get(name) is None else each[name] for name in names)
        cells.append([f"{value:.4f}" if isinstance(value, float) else str(value) for value in values])
    widths = [max(len(row[place]) for row in cells) for place in range(len(names))]
    for row in cells:
        yield "  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip()
