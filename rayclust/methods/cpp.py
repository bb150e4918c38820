"""CPP: features that fill all directions together and few within every row's soft group, then spectral clusters.

    L = −R(Z) + γ R_c(Z, Π) + (λ/2)‖Π‖²,   Π from the codes of the batch; no number of clusters is needed in training.

Source: arXiv 2306.05272. Departures from the published program are listed in docs/methods.md; the ones that change a
number are running batch-norm statistics at inference, taken over all rows, and a symmetric membership at the end.
"""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from rayclust import distributed
from rayclust.arrays import require_matrix
from rayclust.clustering import sinkhorn, spectral
from rayclust.clustering.spectral import Spectral, SpectralOptions
from rayclust.errors import ArtefactError
from rayclust.losses.coding_rate import coding_rate, membership_energy
from rayclust.losses.compression_rate import compression_rate
from rayclust.methods.base import Batch, Method, MethodState, Plan, Rows, Trainer
from rayclust.methods.cpp_config import CppConfig
from rayclust.methods.cpp_network import CppNetwork

__all__ = ["Cpp", "CppConfig"]

logger = logging.getLogger(__name__)

ASSIGN_ROWS = 8192
"""Rows whose hidden units are held at once outside training."""
SPECTRAL = "spectral."


class Cpp(Method):
    """CPP on rows of width `dimension`.

    Args:
        config: the settings; a preset is written out for `count` rows.
        dimension: D.
        count: N, the rows of all workers.
        seed: of the initial weights and of the final partition.
    """

    config_type = CppConfig
    config: CppConfig
    progress: Tensor

    def __init__(self, config: CppConfig, dimension: int, count: int, seed: int) -> None:
        config = config.settled(count)
        super().__init__(config, dimension, count, seed)
        self.width, self.scales_loss = config.width, config.precision == "fp16"
        self.plan = Plan.of(config, count)
        self.network = CppNetwork(config, dimension, seed)
        self.spectral: Spectral | None = None
        # Sum of losses and steps of the unfinished window, the mean of the last whole one, and whether to stop.
        self.register_buffer("progress", torch.tensor([0.0, 0.0, math.inf, 0.0], dtype=torch.float64))

    def training_step(self, batch: Batch) -> dict[str, Tensor]:
        """−R during expansion, L after it, of all workers' rows; and the terms."""
        z, codes = self.network(batch.x[0], training=True)
        z = distributed.differentiable_all_gather(z)
        rate = coding_rate(z, self.config.distortion)
        if batch.step <= self.config.last_expansion_step:
            return {"loss": -rate, "rate": rate, "compressed": torch.zeros_like(rate), "energy": torch.zeros_like(rate)}
        codes = z if self.network.codes is None else distributed.differentiable_all_gather(codes)
        compressed, energy = self._by_columns(z, codes)
        loss = -rate + self.config.compression_weight * compressed + self.config.membership_weight * energy
        return {"loss": loss, "rate": rate, "compressed": compressed, "energy": energy}

    def _by_columns(self, z: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
        """R_c and ½‖Π‖², each worker taking its columns of Π."""
        membership = sinkhorn.membership(codes, self.config.temperature, self.config.half_steps)
        own = distributed.own_slice(len(z))
        compressed = compression_rate(z, membership[:, own], self.config.distortion, self.config.compression())
        both = distributed.differentiable_all_reduce(torch.stack([compressed, membership_energy(membership[:, own])]))
        return both[0], both[1]

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Return the cluster head with a rate and a decay of its own, and all others."""
        codes = [] if self.network.codes is None else list(self.network.codes.parameters())
        own = {id(parameter) for parameter in codes}
        features = [parameter for parameter in self.parameters() if id(parameter) not in own]
        c = self.config
        groups: list[dict[str, Any]] = [{"params": features}]
        groups.append({"params": codes, "lr_scale": c.code_rate, "weight_decay": c.code_weight_decay})
        return [group for group in groups if group["params"]]

    def on_step_end(self, step: int) -> None:
        """The feature head is copied into the cluster head after the last step of expansion."""
        if step == self.config.last_expansion_step:
            self.network.copy_features_to_codes()

    def on_epoch_end(self, metrics: dict[str, Tensor]) -> dict[str, Any]:
        """Looks whether the loss still falls, once expansion is over; gives the terms."""
        terms = {name: float(metrics[name]) for name in ("rate", "compressed", "energy")}
        if self.config.patience is not None and terms["compressed"] > 0.0:
            self._judge(float(metrics["loss"]), self.config.patience)
        return terms

    def _judge(self, loss: float, patience: int) -> None:
        total, steps, before, stop = self.progress.tolist()
        total, steps = total + loss * self.plan.steps_per_epoch, steps + self.plan.steps_per_epoch
        if steps >= patience:
            mean = total / steps
            stop = float(not mean < before - self.config.improvement * abs(mean))
            total, steps, before = 0.0, 0.0, mean
        self.stop = bool(stop)
        self.progress.copy_(torch.tensor([total, steps, before, stop], dtype=torch.float64))

    def fit(self, rows: Rows, trainer: Trainer) -> None:
        """Trains the network and cuts all rows' membership into clusters."""
        trainer.fit(self, rows, start=lambda: self._start(rows))
        self.network.settle(rows.blocks)
        clusters, options = self.config.clusters, self._spectral_options()
        self.spectral = spectral.partition(lambda: self._codes(rows), clusters, options, self.seed).cut(clusters)
        logger.info("spectral clusters: %d of %d rows", self.config.clusters, self.count)

    def _start(self, rows: Rows) -> None:
        if self.config.start == "principal":
            self.network.start_from_principal(rows.blocks)

    def _codes(self, rows: Rows) -> Iterator[Tensor]:
        for block in rows.blocks():
            yield self._infer(block)[1]

    @torch.no_grad()
    def _infer(self, x: Tensor) -> tuple[Tensor, Tensor]:
        require_matrix(x, "x", self.dimension)
        like = self.network.first.weight
        parts = [self.network(part.to(like)) for part in torch.split(x, ASSIGN_ROWS)]
        if not parts:
            empty = like.new_zeros((0, self.config.width))
            return empty, empty
        z, codes = zip(*parts, strict=True)
        return torch.cat(z), torch.cat(codes)

    def transform(self, x: Tensor) -> Tensor:
        """z: Float[B D] to unit rows Float[B d]."""
        return self._infer(x)[0]

    @torch.no_grad()
    def membership(self, x: Tensor) -> Tensor:
        """Π of these rows alone: Float[B D] to Float[B B], rows and columns sum to 1."""
        return sinkhorn.membership(self._infer(x)[1], self.config.temperature, None)

    def predict_proba(self, x: Tensor) -> Tensor:
        """Float[B D] to Float[B K], rows sum to 1; each row's depend on it alone."""
        return self._partition().assign(self._infer(x)[1], self.config.clusters)

    def prototypes(self) -> Tensor:
        """The clusters' centres among the membership's eigenvectors: unit rows Float[K K]."""
        clusters = self.config.clusters
        return torch.nn.functional.normalize(self._partition().centers[clusters][:clusters], dim=1)

    def recut(self, clusters: int, seed: int | None = None) -> Cpp:
        """The same network and eigenvectors cut into another number of clusters, or from another seed."""
        other = copy.copy(self)
        other.spectral = self._partition().cut(clusters, seed)
        other.config = self.config.model_copy(update={"clusters": clusters})
        return other

    def _partition(self) -> Spectral:
        if self.spectral is None:
            raise ArtefactError("method = cpp: has no clusters yet, fit it first")
        return self.spectral

    def state(self) -> MethodState:
        """Network and spectral partition."""
        tensors = {name: value.detach().cpu().clone() for name, value in self.network.state_dict().items()}
        tensors |= {SPECTRAL + name: value for name, value in self._partition().tensors().items()}
        tensors["seed"] = torch.tensor(self._partition().seed)
        return MethodState(self._settings(), tensors)

    def _load_tensors(self, tensors: dict[str, Tensor]) -> None:
        self.seed = int(tensors.pop("seed"))
        partition = {n.removeprefix(SPECTRAL): value for n, value in tensors.items() if n.startswith(SPECTRAL)}
        self.network.load_state_dict({n: value for n, value in tensors.items() if not n.startswith(SPECTRAL)})
        self.spectral = Spectral.from_tensors(partition, self._spectral_options(), self.seed)

    def _spectral_options(self) -> SpectralOptions:
        return SpectralOptions(temperature=self.config.final_temperature or self.config.temperature)
