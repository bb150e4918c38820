"""CPP: features that fill all directions together and few within every row's soft group, then spectral clusters.

    L = −R(Z) + γ R_c(Z, Π) + (λ/2)‖Π‖²,   Π from the codes of the batch; no number of clusters is needed in training.

Source: arXiv 2306.05272. Departures from the published program are listed in docs/methods.md; the ones that change a
number are running batch-norm statistics at inference, taken over all rows, and a symmetric membership at the end.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional

from rayclust import distributed
from rayclust.arrays import require_matrix
from rayclust.clustering import row_stats, spectral
from rayclust.clustering.candidates import Bounds, choose, evidence, is_supported, make_candidates
from rayclust.clustering.consensus import match_confidence
from rayclust.clustering.row_stats import even_sample, gather_rows
from rayclust.clustering.spectral import Spectral
from rayclust.kernels.screening import accum_dtype
from rayclust.losses.coding_rate import CompressionOptions, coding_rate, compression_rate, membership_energy
from rayclust.methods.base import BaseTrainer, Batch, MethodState, Rows
from rayclust.methods.cpp_settings import CppConfig
from rayclust.methods.layers import StackedNorm, matmul_dtype
from rayclust.methods.settings import Plan
from rayclust.methods.spectral import SpectralMethod
from rayclust.search.knn import nearest_others

__all__ = ["Cpp", "CppConfig", "CppNetwork"]

logger = logging.getLogger(__name__)


PREDICT_ROWS = 8192
"""Rows whose hidden units are held at once outside training."""
LOW_RANK = 0.1
"""Standard deviation, relative to the largest, up to which a component does not count as separating clusters."""
UNUSED_SCALE = 1e-2
"""Scale of the random weights of those outputs for which the rows have no principal component."""
SPECTRAL, KEPT = "spectral.", "kept."
"""Prefixes of the partition's and of the kept start's tensors in a state."""
GUARD, GAIN = Bounds(modularity_loss=0.01, agreement_loss=-0.01), 0.025
"""What the final clusters must have for them: a point more neighbours together than the partition that they started
from, which is kept else, at little modularity; and both together must rise by the gain."""
SPACE_ROWS = 80
"""Rows for each cluster below which clusters of a learnt space are not taken: from fewer they gained and lost equally
often."""
EVIDENCE_NEIGHBORS = 10
"""Nearest neighbours of a row that speak for or against its cluster."""


class CppNetwork(nn.Module):
    """Linear → BatchNorm → ReLU → Linear → ReLU, then Linear → unit rows for features and, with two heads, for codes.

    Batch norm takes the statistics of all workers' rows in training and running ones otherwise.

    Args:
        config: sizes, variant and precision.
        dimension: D, the width of the rows that come in.
        seed: of the initial weights, which are torch's default.
    """

    def __init__(self, config: CppConfig, dimension: int, seed: int) -> None:
        super().__init__()
        self.precision, self.clusters = config.precision, config.clusters
        self.first = nn.Linear(dimension, config.hidden)
        self.norm = StackedNorm(1, config.hidden)
        self.second = nn.Linear(config.hidden, config.hidden)
        self.features = nn.Linear(config.hidden, config.width)
        self.codes = nn.Linear(config.hidden, config.width) if config.variant == "two_head" else None
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for layer in (self.first, self.second, self.features, self.codes):
                if layer is not None:
                    bound = 1.0 / math.sqrt(layer.in_features)
                    nn.init.uniform_(layer.weight, -bound, bound, generator=generator)
                    nn.init.uniform_(layer.bias, -bound, bound, generator=generator)

    def forward(self, x: Tensor, training: bool = False) -> tuple[Tensor, Tensor]:
        """Map rows to features z and codes c; equal for one head.

        Args:
            x: Float[B D].
            training: whether batch norm takes the batch's statistics, and products the training's precision.

        Returns:
            Unit rows Float[B d] each, in float32 or wider.
        """
        x = self.affine(self.first, x, training)
        x = functional.relu(self.norm(x.to(accum_dtype(x.dtype))[None], training)[0])
        x = functional.relu(self.affine(self.second, x, training))
        heads = [self.affine(head, x, training) for head in (self.features, self.codes) if head is not None]
        units = [functional.normalize(y.to(accum_dtype(y.dtype)), dim=1) for y in heads]
        return units[0], units[-1]

    def affine(self, layer: nn.Linear, x: Tensor, training: bool) -> Tensor:
        """Apply a layer to rows Float[B I], in training in the training's precision."""
        if not training:
            return functional.linear(x.to(layer.weight.dtype), layer.weight, layer.bias)
        dtype = torch.float16 if self.precision == "fp16" else matmul_dtype(self.precision, layer.weight)
        return functional.linear(x.to(dtype), layer.weight.to(dtype), layer.bias.to(dtype))

    @torch.no_grad()
    def copy_features_to_codes(self) -> None:
        """Start the cluster head as the feature head."""
        if self.codes is not None:
            self.codes.load_state_dict(self.features.state_dict())

    @torch.no_grad()
    def start_from_principal(self, blocks: Callable[[], Iterator[Tensor]]) -> None:
        """Set weights with which z is the direction of the rows' first d principal components.

        Some units of the trunk hold a component's positive and negative part, which the second layer passes on and the
        feature head subtracts; the others stay random, and the heads' weights on them are zero.

        Args:
            blocks: yields this worker's rows, Float[B D]s.
        """
        # 1. Principal components: directions as columns, falling standard deviations, and the mean of all rows.
        like, D = self.first.weight, self.first.in_features
        total = torch.zeros(D + 2, D, dtype=torch.float64, device=like.device)
        for block in blocks():
            x = block.to(like)
            total[:D] += x.T @ x
            total[D] += x.sum(0)
            total[D + 1] += len(x)
        total = distributed.all_reduce(total)
        mean = total[D] / total[D + 1, 0]
        values, vectors = torch.linalg.eigh(total[:D] / total[D + 1, 0] - mean.outer(mean))
        deviations = values.flip(0).clamp(min=0).sqrt()
        deviations = deviations.clamp(min=1e-6 * float(deviations[0]) + 1e-12)
        directions, deviations, mean = vectors.flip(1).to(like), deviations.to(like), mean.to(like)
        # 2. The layers that pass them on.
        count = min(len(self.features.weight), directions.shape[1], len(self.first.weight) // 2)
        directions, share = directions[:, :count].T, deviations[:count] / deviations[0]
        pair = torch.cat([directions, -directions])
        self.first.weight[: 2 * count] = pair / deviations[0]
        self.first.bias[: 2 * count] = -(pair @ mean) / deviations[0]
        self.norm.gains[0, : 2 * count] = torch.cat([share, share])
        self.second.weight[: 2 * count] = torch.eye(2 * count, self.second.in_features)
        self.second.bias[: 2 * count] = 0.0
        eye = torch.eye(count).to(share) / share.norm()
        self.features.weight[:count] = 0.0
        self.features.weight[:count, : 2 * count] = torch.cat([eye, -eye], dim=1)
        self.features.weight[count:] *= UNUSED_SCALE
        self.features.bias.zero_()
        # 3. Fewer components than clusters: the clusters' means are a simplex around the mean of all rows, with cosines
        # of −1/(K − 1), opposite each other for K = 2, which Π cannot tell apart. A constant makes them orthogonal.
        rank = int((deviations > LOW_RANK * deviations[0]).sum())
        if rank < min(self.clusters, len(self.features.bias)):
            self.features.bias[rank] = 1.0 / math.sqrt(self.clusters - 1)
        self.copy_features_to_codes()


class Cpp(SpectralMethod):
    """CPP on rows of width `dimension`.

    Args:
        config: the settings; a preset is written out for `count` rows.
        dimension: D.
        count: N, the rows of all workers.
        seed: of the initial weights and of the final partition.
    """

    config_type = CppConfig
    kept = ("network.",)
    config: CppConfig
    progress: Tensor
    start: tuple[Tensor, Tensor] | None = None
    """Float[D K] and Float[K] of the linear classifier that gives the clusters, where the start was kept."""

    def __init__(self, config: CppConfig, dimension: int, count: int, seed: int) -> None:
        config = config.resolved(count)
        super().__init__(config, dimension, count, seed)
        self.plan, self.width = Plan.of(config, count), config.width
        self.scales_loss = config.precision == "fp16"
        self.network = CppNetwork(config, dimension, seed)
        # Sum of losses and steps of the unfinished window of `patience`, and the mean of the last whole one.
        self.register_buffer("progress", torch.tensor([0.0, 0.0, math.inf], dtype=torch.float64))

    def training_step(self, batch: Batch) -> dict[str, Tensor]:
        """Compute −R during expansion and L after it, of all workers' rows.

        Args:
            batch: one worker's part, one view.

        Returns:
            Float[] each: "loss", "rate" (R), "compressed" (R_c) and "energy" (½‖Π‖²), the last two 0 in expansion.
        """
        config = self.config
        z, codes = self.network(self.read(batch.x[0], batch), training=True)
        z = distributed.differentiable_all_gather(z)
        rate = coding_rate(z, config.distortion)
        if batch.step <= config.last_expansion_step:
            return {"loss": -rate, "rate": rate, "compressed": torch.zeros_like(rate), "energy": torch.zeros_like(rate)}
        codes = z if self.network.codes is None else distributed.differentiable_all_gather(codes)
        membership = spectral.membership(codes, config.temperature, config.half_steps)
        # Each worker takes its columns of Π; R_c and the energy are sums over columns.
        own = membership[:, distributed.own_slice(len(z))]
        options = CompressionOptions(int(config.memory_gib * 2**30), config.top_entries)
        terms = torch.stack([compression_rate(z, own, config.distortion, options), membership_energy(own)])
        compressed, energy = distributed.differentiable_all_reduce(terms)
        loss = -rate + config.compression_weight * compressed + config.membership_weight * energy
        return {"loss": loss, "rate": rate, "compressed": compressed, "energy": energy}

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Return the trunk with the feature head, and the cluster head with its own rate and decay; all decay."""
        codes = [] if self.network.codes is None else list(self.network.codes.parameters())
        own = {id(parameter) for parameter in codes}
        groups: list[dict[str, Any]] = [{"params": [p for p in self.network.parameters() if id(p) not in own]}]
        if codes:
            groups.append(
                {"params": codes, "lr_scale": self.config.code_rate, "weight_decay": self.config.code_weight_decay}
            )
        return groups

    def on_step_end(self, step: int) -> None:
        """Copy the feature head into the cluster head after the last step of expansion."""
        if step == self.config.last_expansion_step:
            self.network.copy_features_to_codes()

    def on_epoch_end(self, metrics: dict[str, Tensor]) -> dict[str, Any]:
        """Stop where the loss no longer falls, once expansion is over.

        Returns:
            The epoch's mean "rate", "compressed" and "energy".
        """
        terms = super().on_epoch_end(metrics)
        if self.config.patience is not None and terms["compressed"] > 0.0:
            total, steps, before = self.progress.tolist()
            total += float(metrics["loss"]) * self.plan.steps_per_epoch
            steps += self.plan.steps_per_epoch
            if steps >= self.config.patience:
                mean = total / steps
                self.stop = not mean < before - self.config.improvement * abs(mean)
                total, steps, before = 0.0, 0.0, mean
            self.progress.copy_(torch.tensor([total, steps, before], dtype=torch.float64))
        return terms

    @torch.no_grad()
    def fit(self, rows: Rows, trainer: BaseTrainer) -> None:
        """Train the network and cut all rows' membership into clusters."""
        c, K = self.config, self.config.clusters
        principal = (lambda: self.network.start_from_principal(self.inputs(rows))) if c.start == "principal" else None
        with torch.enable_grad():
            trainer.fit(self, rows, start=principal)
        blocks, network = self.inputs(rows), self.network
        # 1. Running statistics over all workers' rows: after few steps they lag behind.
        weight = network.first.weight
        total = torch.zeros(3, network.norm.running_mean.shape[1], dtype=torch.float64, device=weight.device)
        for block in blocks():
            for part in torch.split(block.to(weight), 4096):
                units = network.affine(network.first, part, False).double() - network.norm.running_mean[0]
                total += torch.stack([units.sum(0), units.square().sum(0), torch.full_like(units[0], len(units))])
        sums, squares, count = distributed.all_reduce(total)
        shift = sums / count
        variance = (squares / count - shift.square()) * count / (count - 1).clamp(min=1)
        network.norm.running_mean += shift.to(weight)
        network.norm.running_var.copy_(variance[None])
        # 2. The membership of all rows, cut into clusters.
        fitted = spectral.partition(
            lambda: (self._forward(block)[1] for block in blocks()), K, c.spectral_options(), self.seed
        )
        # 3. From `auto`'s partition, which is kept where the graph speaks against the result.
        if c.final_start == "auto":
            stats = row_stats.compute(blocks, "euclidean")
            x = gather_rows(stats, even_sample(stats.count, c.dense_rows, self.seed)).float()
            neighbors = nearest_others(x, min(EVIDENCE_NEIGHBORS, len(x) - 1))
            start, reason = choose(make_candidates(x, neighbors, K, self.seed)), ""
            fitted.cut(K, start=start.labels)
            if stats.count < SPACE_ROWS * K:
                reason = f"{stats.count / K:.0f} rows a cluster are too few for"
            else:
                new, old = evidence(x, fitted.labels(K), neighbors, K), start.evidence
                gain = sum(new[name] - old[name] for name in ("modularity", "neighbor_agreement"))
                if not (is_supported(new, old, K, GUARD) and gain >= GAIN):
                    reason = "the neighbour graph speaks against"
            if reason:
                logger.warning("cpp: %s the learnt clusters, those of %s are kept", reason, start.name)
                sharpness = match_confidence(x @ start.weight + start.bias, start.evidence["neighbor_agreement"])
                self.start = start.weight / sharpness, start.bias / sharpness
        self.partition = fitted.cut(K)
        logger.info("spectral clusters: %d of %d rows", K, self.count)

    def read(self, x: Tensor, batch: Batch | None = None) -> Tensor:
        """Return what the network reads of rows Float[B D]: the rows.

        Args:
            x: Float[B D].
            batch: the batch that they are of, in training.
        """
        return x

    def inputs(self, rows: Rows) -> Callable[[], Iterator[Tensor]]:
        """Return what yields this worker's rows as the network reads them outside training, block by block."""
        return rows.blocks

    def _infer(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Map rows to features and codes: Float[B D] to unit rows Float[B d] each."""
        require_matrix(x, "x", self.dimension)
        return self._forward(self.read(x))

    @torch.no_grad()
    def _forward(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        like = self.network.first.weight
        parts = [self.network(part.to(like)) for part in torch.split(inputs, PREDICT_ROWS)]
        z, codes = zip(*parts, strict=True)
        return torch.cat(z), torch.cat(codes)

    def transform(self, x: Tensor) -> Tensor:
        """Map rows to z: Float[B D] to unit rows Float[B d]."""
        return self._infer(x)[0]

    @torch.no_grad()
    def membership(self, x: Tensor) -> Tensor:
        """Return Π of these rows alone: Float[B D] to Float[B B], rows and columns sum to 1."""
        return spectral.membership(self._infer(x)[1], self.config.temperature, None)

    def predict_proba(self, x: Tensor) -> Tensor:
        """Return probabilities of the clusters: Float[B D] to Float[B K]; each row's depend on it alone."""
        if self.start is not None:
            require_matrix(x, "x", self.dimension)
            weight, bias = (part.to(self.device) for part in self.start)
            return (self.read(x).to(weight) @ weight + bias).softmax(dim=1)
        return self.fitted().assign(self._infer(x)[1], self.config.clusters)

    def embed(self, x: Tensor) -> Tensor:
        """Map rows to their place among the membership's K leading eigenvectors: Float[B D] to unit rows Float[B K]."""
        return functional.normalize(self.fitted().embed(self._infer(x)[1])[:, : self.config.clusters], dim=1)

    def recut(self, clusters: int, seed: int | None = None) -> Self:
        """Return the same eigenvectors cut into another number of clusters, or from another seed; see `Recuttable`."""
        other = super().recut(clusters, seed)
        if clusters != self.config.clusters or seed not in (None, self.seed):
            other.start = None
        return other

    def prototypes(self) -> Tensor:
        """Return the clusters' centres among the membership's eigenvectors: unit rows Float[K K]."""
        clusters = self.config.clusters
        return functional.normalize(self.fitted().centers[clusters][:clusters], dim=1)

    def state(self) -> MethodState:
        """Return network and spectral partition, and the start where that was kept."""
        fitted = super().state()
        tensors = {name.removeprefix("network."): value for name, value in fitted.tensors.items()}
        tensors |= {SPECTRAL + name: value for name, value in self.fitted().tensors().items()}
        tensors["seed"] = torch.tensor(self.fitted().seed)
        if self.start is not None:
            tensors |= {KEPT + name: x.cpu() for name, x in zip(("weight", "bias"), self.start, strict=True)}
        return MethodState(fitted.settings, tensors)

    def load_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Load network, partition, and the start where that was kept."""
        self.seed = int(tensors.pop("seed"))
        partition = {n.removeprefix(SPECTRAL): value for n, value in tensors.items() if n.startswith(SPECTRAL)}
        weight, bias = tensors.pop(KEPT + "weight", None), tensors.pop(KEPT + "bias", None)
        self.start = None if weight is None or bias is None else (weight, bias)
        self.network.load_state_dict({n: value for n, value in tensors.items() if not n.startswith(SPECTRAL)})
        self.partition = Spectral.from_tensors(partition, self.config.spectral_options(), self.seed)
