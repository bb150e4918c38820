"""The default: a consensus of k-means and spectral partitions, moved in a space that CPP learns; k-means in doubt.

k-means is the start and the floor. A candidate of `clustering/candidates.py` replaces it unless it keeps the
neighbour graph of the raw rows less well. docs/methods.md says what to expect of it. This is not a paper's method, and
no label is read anywhere.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor

from rayclust.clustering.candidates import (
    LEARNT,
    Candidate,
    choose,
    component_count,
    make_candidates,
)
from rayclust.clustering.consensus import match_confidence
from rayclust.methods.base import BaseTrainer, Pairing, Rows
from rayclust.methods.cpp import Cpp, CppConfig
from rayclust.methods.graph import ComponentRows, sample_with_neighbors
from rayclust.methods.linear import LinearMethod
from rayclust.methods.settings import AutoConfig

logger = logging.getLogger(__name__)

MULTIPLICATIONS = 3e10
"""Multiplications of a training that count as a second of one core; a Xeon with amx_bf16 does 1.6e10 to 3.5e10."""
MIN_ROWS = 400
"""Rows below which nothing is trained."""


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
    candidates: list[Candidate]
    """Of the fit, the floor first; their labels are those of the sample."""
    report: list[dict[str, Any]]
    """Of the fit, for each candidate: `candidate`, its name; `chosen`, 0 or 1; its evidence, or why there is none."""

    def __init__(self, config: AutoConfig, dimension: int, count: int, seed: int) -> None:
        super().__init__(config, dimension, count, seed)
        self.pairing = Pairing(columns=config.neighbors)

    def refusal(self) -> str:
        """Return why CPP is not trained as a candidate; empty where it is."""
        c = self.config
        if c.budget == 0:
            return "budget = 0"
        if self.count < MIN_ROWS:
            return f"fewer than {MIN_ROWS} rows"
        training = CppConfig(clusters=c.clusters).multiplications(
            self.count, min(component_count(c.clusters), self.dimension)
        )
        seconds = training / MULTIPLICATIONS
        return f"some {seconds:,.0f} s of one core, of {c.budget:g}" if seconds > c.budget else ""

    @torch.no_grad()
    def fit(self, rows: Rows, trainer: BaseTrainer) -> None:
        """Make the candidates on a sample of the rows, choose one, and keep its classifier.

        Reports a row of metrics for each candidate; `chosen` is 1 for the one that is kept.
        """
        c = self.config
        x, neighbors = sample_with_neighbors(rows, c.clusters, c.neighbors, self.seed, self.weight.to(trainer.device))

        def learn(basis: Tensor) -> Tensor:
            """Train CPP on all rows; return the sample among the leading eigenvectors of its membership."""
            components = ComponentRows(rows, basis)
            config = CppConfig(clusters=c.clusters, final_start="kmeans")
            method = Cpp(config, components.dimension, rows.count, self.seed)
            with torch.enable_grad():
                method.fit(components, trainer)
            return method.embed(x @ basis)

        refused, options = self.refusal(), {"restarts": c.restarts, "rounds": c.rounds}
        self.candidates = make_candidates(
            x, neighbors, c.clusters, self.seed, **options, rivals=c.candidates, learn=None if refused else learn
        )
        chosen = choose(self.candidates)
        self.report = [
            {"candidate": candidate.name, "chosen": float(candidate is chosen)} | candidate.evidence
            for candidate in self.candidates
        ]
        if refused and c.candidates:
            self.report.append({"candidate": LEARNT, "chosen": 0.0, "note": f"left out: {refused}"})
        for place, row in enumerate(self.report):
            loss = row.get("inertia", chosen.evidence["inertia"])
            trainer.report({"epoch": place, "step": place + 1, "loss": loss, "seconds": trainer.seconds()} | row)
        logger.info("auto: %s is kept, of %s", chosen.name, ", ".join(candidate.name for candidate in self.candidates))
        # The mean rows of the clusters, and probabilities as sharp as neighbours agree.
        counts = torch.bincount(chosen.labels, minlength=self.config.clusters).clamp(min=1)
        centers = torch.zeros_like(self.centers, device=x.device).index_add_(0, chosen.labels, x) / counts[:, None]
        temperature = match_confidence(x @ chosen.weight + chosen.bias, chosen.evidence["neighbor_agreement"])
        self.keep(trainer.device, chosen.weight, chosen.bias, centers, temperature)
