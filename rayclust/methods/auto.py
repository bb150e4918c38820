"""The default: a consensus of k-means and spectral partitions, unless the evidence speaks against it; then k-means.

k-means is the start and the floor. A candidate of `clustering/candidates.py` replaces it unless it keeps the
neighbour graph of the raw rows less well. docs/methods.md says what to expect of it. This is not a paper's method, and
no label is read anywhere.
"""

from __future__ import annotations

import logging
from typing import Any

import torch

from rayclust.clustering.candidates import choose, make_candidates
from rayclust.clustering.consensus import match_confidence
from rayclust.methods.base import BaseTrainer, Pairing, Rows
from rayclust.methods.graph import sample_with_neighbors
from rayclust.methods.linear import LinearMethod
from rayclust.methods.settings import AutoConfig

logger = logging.getLogger(__name__)


class Auto(LinearMethod):
    """The default method on rows of width `dimension`.

    Args:
        config: the settings.
        dimension: D.
        count: N, the rows of all workers.
        seed: of the sample and of all starts.
    """

    config_type = AutoConfig
    config: AutoConfig
    report: list[dict[str, Any]]
    """Of the fit, for each candidate: `candidate`, its name; `chosen`, 0 or 1; and its evidence."""

    def __init__(self, config: AutoConfig, dimension: int, count: int, seed: int) -> None:
        super().__init__(config, dimension, count, seed)
        self.pairing = Pairing(columns=config.neighbors)

    @torch.no_grad()
    def fit(self, rows: Rows, trainer: BaseTrainer) -> None:
        """Make the candidates on a sample of the rows, choose one, and keep its classifier.

        Reports a row of metrics for each candidate; `chosen` is 1 for the one that is kept.
        """
        c = self.config
        x, neighbors = sample_with_neighbors(rows, c.clusters, c.neighbors, self.seed, self.weight.to(trainer.device))
        candidates = make_candidates(
            x, neighbors, c.clusters, self.seed, restarts=c.restarts, rounds=c.rounds, rivals=c.candidates
        )
        chosen = choose(candidates)
        self.report = [
            {"candidate": candidate.name, "chosen": float(candidate is chosen)} | candidate.evidence
            for candidate in candidates
        ]
        for place, row in enumerate(self.report):
            trainer.report(
                {"epoch": place, "step": place + 1, "loss": row["inertia"], "seconds": trainer.seconds()} | row
            )
        logger.info("auto: %s is kept, of %s", chosen.name, ", ".join(candidate.name for candidate in candidates))
        # The mean rows of the clusters, and probabilities as sharp as neighbours agree.
        counts = torch.bincount(chosen.labels, minlength=self.config.clusters).clamp(min=1)
        centers = torch.zeros_like(self.centers, device=x.device).index_add_(0, chosen.labels, x) / counts[:, None]
        temperature = match_confidence(x @ chosen.weight + chosen.bias, chosen.evidence["neighbor_agreement"])
        self.keep(trainer.device, chosen.weight, chosen.bias, centers, temperature)
