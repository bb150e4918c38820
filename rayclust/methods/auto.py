"""The default: a consensus of k-means and spectral partitions, moved by what TEMI and CPP learn; k-means in doubt.

k-means is the start and the floor. A candidate of `clustering/candidates.py` replaces it unless it keeps the
neighbour graph of the raw rows less well. docs/methods.md says what to expect of it. This is not a paper's method, and
no label is read anywhere.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rayclust.clustering.candidates import (
    FEW_ROWS,
    HEADS,
    LEARNT,
    Candidate,
    choose,
    component_count,
    make_candidates,
)
from rayclust.clustering.consensus import match_confidence
from rayclust.methods.base import BaseTrainer, Rows
from rayclust.methods.cpp import SPACE_ROWS, Cpp, CppConfig
from rayclust.methods.graph import DerivedRows, sample_with_neighbors
from rayclust.methods.linear import LinearMethod
from rayclust.methods.settings import AutoConfig
from rayclust.methods.temi_settings import TemiConfig
from rayclust.methods.temi_start import Start, StartedTemi

logger = logging.getLogger(__name__)

MULTIPLICATIONS = 3e10
"""Multiplications of a training that count as a second of one core; a Xeon with amx_bf16 does 1.6e10 to 3.5e10."""
MAX_BATCH, MIN_BATCH = 256, 64
"""Pairs in a batch of TEMI's; a quarter of the rows between these."""
MAX_PARTNERS = 10
"""Nearest neighbours of a row among which its partner is drawn, at most."""


@dataclass(frozen=True)
class _Trainings:
    """What is trained on the leading components of all rows, and looked at on the sample."""

    config: AutoConfig
    rows: Rows
    x: Tensor
    """Float[n D], the sample."""
    neighbors: Tensor
    """Int64[n M], its neighbours."""
    trainer: BaseTrainer

    def heads(self, basis: Tensor, start: Candidate) -> Tensor:
        """Train a head of TEMI that starts at a partition; return the sample's clusters."""
        config = heads_config(self.config, self.rows.count)
        temi = StartedTemi(config, basis.shape[1], self.rows.count, self.trainer.seed)
        temi.start = Start(self.neighbors, start)
        with torch.enable_grad():
            temi.fit(DerivedRows(self.rows, basis), self.trainer.without_checkpoints())
        return temi.predict_proba(self.x @ basis).argmax(1)

    def space(self, basis: Tensor) -> Tensor:
        """Train CPP; return the sample among the leading eigenvectors of its membership."""
        config = CppConfig(clusters=self.config.clusters, final_start="kmeans")
        cpp = Cpp(config, basis.shape[1], self.rows.count, self.trainer.seed)
        with torch.enable_grad():
            cpp.fit(DerivedRows(self.rows, basis), self.trainer.without_checkpoints())
        return cpp.embed(self.x @ basis)


def heads_config(config: AutoConfig, count: int) -> TemiConfig:
    """Return the settings with which TEMI's head is trained on components of `count` rows."""
    quarter = 1 << max(0, (count // 4).bit_length() - 1)
    columns = round(min(max(3.0, (count / config.clusters) ** 0.5), MAX_PARTNERS, config.neighbors))
    batch = max(MIN_BATCH, min(MAX_BATCH, quarter))
    return TemiConfig(clusters=config.clusters, heads=1, components=0, batch_size=batch, neighbors=columns)


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

    def refusals(self) -> dict[str, str]:
        """Return the candidates that are not trained, each with the reason."""
        c, width = self.config, min(component_count(self.config.clusters), self.dimension)
        if c.budget == 0 or self.count < FEW_ROWS:
            return dict.fromkeys((HEADS, LEARNT), "budget = 0" if c.budget == 0 else f"fewer than {FEW_ROWS} rows")
        reasons, left = {}, c.budget
        for name, training in ((HEADS, heads_config(c, self.count)), (LEARNT, CppConfig(clusters=c.clusters))):
            seconds = training.multiplications(self.count, width) / MULTIPLICATIONS
            if name == LEARNT and self.count < SPACE_ROWS * c.clusters:
                reasons[name] = f"fewer than {SPACE_ROWS} rows a cluster"
            elif seconds > left:
                reasons[name] = f"some {seconds:,.0f} s of one core, of {left:.3g}"
            else:
                left -= seconds
        return reasons

    @torch.no_grad()
    def fit(self, rows: Rows, trainer: BaseTrainer) -> None:
        """Make the candidates on a sample of the rows, choose one, and keep its classifier.

        Reports a row of metrics for each candidate; `chosen` is 1 for the one that is kept.
        """
        c, refused = self.config, self.refusals()
        x, neighbors = sample_with_neighbors(rows, c.clusters, c.neighbors, self.seed, self.weight.to(trainer.device))
        trainings = _Trainings(c, rows, x, neighbors, trainer)
        self.candidates = make_candidates(
            x,
            neighbors,
            c.clusters,
            self.seed,
            restarts=c.restarts,
            rounds=c.rounds,
            rivals=c.candidates,
            heads=None if HEADS in refused else trainings.heads,
            learn=None if LEARNT in refused else trainings.space,
        )
        chosen = choose(self.candidates)
        self.report = [
            {"candidate": candidate.name, "chosen": float(candidate is chosen)} | candidate.evidence
            for candidate in self.candidates
        ]
        for name, reason in refused.items() if c.candidates else ():
            self.report.append({"candidate": name, "chosen": 0.0, "note": f"left out: {reason}"})
        for place, row in enumerate(self.report):
            loss = row.get("inertia", chosen.evidence["inertia"])
            trainer.report({"epoch": place, "step": place + 1, "loss": loss, "seconds": trainer.seconds()} | row)
        logger.info("auto: %s is kept, of %s", chosen.name, ", ".join(candidate.name for candidate in self.candidates))
        # The mean rows of the clusters, and probabilities as sharp as neighbours agree.
        counts = torch.bincount(chosen.labels, minlength=self.config.clusters).clamp(min=1)
        centers = torch.zeros_like(self.centers, device=x.device).index_add_(0, chosen.labels, x) / counts[:, None]
        temperature = match_confidence(x @ chosen.weight + chosen.bias, chosen.evidence["neighbor_agreement"])
        self.keep(trainer.device, chosen.weight, chosen.bias, centers, temperature)
