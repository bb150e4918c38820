"""One candidate number of clusters: fitted, assigned to every row, measured, and written. What a trial does.

A finished candidate leaves a marker, as a unit of any other stage does, and is not done again by whoever asks for the
same number under the same settings: neither after a kill nor from another list of candidates.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rayclust.arrays import FloatArray, IntArray
from rayclust.config import RunConfig
from rayclust.methods import METHODS, build
from rayclust.methods.base import Method
from rayclust.metrics import partition
from rayclust.metrics.criteria import CriteriaOptions, measure
from rayclust.metrics.internal import size_summary
from rayclust.stages.graph import SELECT_K, candidate_settings
from rayclust.stages.models import read_method
from rayclust.stages.outputs import put_json
from rayclust.stages.pipeline import StageContext, content_digest
from rayclust.stages.rows import BLOCK, StoredRows, cache_folder
from rayclust.stages.train import StoredCheckpoints, write_fit
from rayclust.stages.units import Unit, UnitResult, read_marker
from rayclust.store import filesystem, tables
from rayclust.store.layout import Run
from rayclust.store.manifest import Manifest, digest_of
from rayclust.training.checkpoints import Every
from rayclust.training.loop import Trainer

REVISION = 2
"""Raised when a candidate's result changes for the same settings."""
FIT = 0
"""Index of the one fit among the units, where a method needs no fit for each number of clusters."""


@dataclass(frozen=True)
class Search:
    """What every trial is told."""

    config: RunConfig
    """The run's, its number of clusters open."""
    encode: Manifest
    digest: str
    """Of the stage: the name of the rows' copy on each node."""
    settings: str
    """Digest of everything but the number of clusters that a candidate depends on."""
    largest: int
    """The number that the one fit is for, where a method needs no fit for each."""
    gpus: float
    """Of each trial."""

    @classmethod
    def of(cls, context: StageContext) -> Search:
        """The search that a stage is asked for."""
        config, inputs = context.config, context.inputs
        largest = config.select_k.largest(inputs["encode"].counts["rows"])
        content = {
            "revision": REVISION,
            "settings": candidate_settings(config),
            "inputs": {name: content_digest(sealed) for name, sealed in inputs.items()},
            "largest": None if refits(config) else largest,
        }
        gpus = config.select_k.gpus_per_trial
        gpus = config.resources.gpus_per_worker if gpus == "auto" else gpus
        return cls(config, inputs["encode"], context.digest, digest_of(content), largest, gpus)

    @property
    def run(self) -> Run:
        """Where everything lies."""
        return Run(self.config.run)

    def unit(self, clusters: int) -> Unit:
        """A candidate as a unit of work: its index is its number of clusters."""
        return Unit(clusters, digest_of([self.settings, clusters]))


def refits(config: RunConfig) -> bool:
    """Whether the run's method needs a fit of its own for each number of clusters."""
    found: bool = METHODS[config.method.name][1].refits_for_clusters
    return found


def examine(search: Search, clusters: int) -> UnitResult:
    """Fits, measures and writes one candidate.

    Returns:
        The files written; `criteria` in `extra`.
    """
    run, threads = search.run, search.config.select_k.cpus_per_trial
    torch.set_num_threads(threads)
    config = search.config.closed(clusters)
    rows = StoredRows(run, search.encode, config.features, cache_folder(search.digest))
    labels, kept = list[IntArray](), None
    for method, history in _fits(search, config, rows):
        labels.append(_labels(method, rows))
        kept = kept or (method, history)
    if kept is None:
        raise ValueError("select_k.seeds = 0")
    criteria = _criteria(config, kept[0], rows, labels)
    written = write_fit(run, run.candidate(clusters), *kept)
    result = {"k": clusters, "criteria": criteria}
    outputs = written["outputs"] | put_json(run, run.candidate(clusters) + ".json", result)
    drop_checkpoints(search, clusters)
    return UnitResult(outputs, {"steps": written["steps"]}, result)


def drop_checkpoints(search: Search, clusters: int) -> None:
    """Removes what a candidate's fits would go on from."""
    for seed in range(search.config.select_k.seeds):
        filesystem.remove_tree(search.run.checkpoints(_fit_digest(search, clusters, seed)))


def _fits(search: Search, config: RunConfig, rows: StoredRows) -> Iterator[tuple[Method, list[dict[str, Any]]]]:
    """The candidate's fits and their rows of metrics, one seed after the other: the first is the run's own."""
    clusters = config.method.clusters
    if not refits(config):
        folder = search.run.selection_fit
        history = tables.read_table(filesystem.join(folder, "metrics.parquet")).to_pylist()
        marked = read_marker(search.run.shard_manifest(FIT, SELECT_K))
        digests = {path: written["digest"] for path, written in marked[1].outputs.items()} if marked else {}
        fitted = read_method(folder, SELECT_K, digests)
        yield fitted.repartition(clusters), history
        for seed in range(1, config.select_k.seeds):
            yield fitted.repartition(clusters, config.seed + seed), history
        return
    device = "cuda" if search.gpus else "cpu"
    for seed in range(config.select_k.seeds):
        method = build(config.method, rows.dimension, rows.count, config.seed + seed)
        store = StoredCheckpoints(search.run, _fit_digest(search, clusters, seed))
        every = Every(epochs=None, seconds=config.resources.checkpoint_seconds)
        trainer = Trainer(config.seed + seed, device, None, store, every)
        method.fit(rows, trainer)
        yield method.eval(), trainer.history


def _fit_digest(search: Search, clusters: int, seed: int) -> str:
    return digest_of([search.settings, clusters, seed])


def _labels(method: Method, rows: StoredRows) -> IntArray:
    """Int32[N]: the most probable cluster of each row."""
    device = _device(method)
    with torch.inference_mode():
        found = [method.assign(block.to(device)).argmax(dim=1).int().cpu().numpy() for block in rows.blocks()]
    return np.concatenate(found)


def _device(method: Method) -> torch.device:
    return next((tensor.device for tensor in method.state_dict().values()), torch.device("cpu"))


def _criteria(config: RunConfig, method: Method, rows: StoredRows, labels: list[IntArray]) -> dict[str, float]:
    """Every criterion: what needs the rows' space on a sample of them, the others on all.

    What a partition cannot have (the silhouette of one occupied cluster, the stability of one fit) is left out.
    """
    options = config.select_k
    sample = _sample(rows.count, options.rows, config.seed)
    space = _space(method, rows.tensor(), sample)
    chosen = CriteriaOptions(options.distortion, silhouette_rows=options.rows, seed=config.seed)
    found = measure(space, [labels[0][sample]], None, chosen)
    neighbors = rows.neighbors().numpy()
    found["neighbor_agreement"] = partition.neighbor_agreement(labels[0], neighbors)
    found["modularity"] = partition.modularity(labels[0], neighbors)
    found["map_equation"] = partition.map_equation(labels[0], neighbors)
    if len(labels) > 1:
        found["stability"] = partition.stability(labels)
    found |= size_summary(labels[0], config.method.clusters)
    found["empty"] = config.method.clusters - found["occupied"]
    return {name: float(value) for name, value in found.items() if np.isfinite(value)}


def _sample(count: int, wanted: int, seed: int) -> IntArray:
    return np.sort(np.random.default_rng(seed).choice(count, min(wanted, count), replace=False))


def _space(method: Method, x: Tensor, sample: IntArray) -> FloatArray:
    """Float32[n d]: some rows in the method's own space where it has one, else unit features."""
    blocks, device = [], _device(method)
    with torch.inference_mode():
        for start in range(0, len(sample), BLOCK):
            block = x[torch.from_numpy(sample[start : start + BLOCK])].to(device)
            own = method.own_space is not None
            z = method.represent(block) if own else torch.nn.functional.normalize(block, dim=1)
            blocks.append(z.float().cpu().numpy())
    return np.concatenate(blocks)
