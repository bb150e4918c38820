"""ProPos: BYOL whose positives are drawn around the embedding, and whose clusters' prototypes scatter.

    L = L_psa + λ L_psl,   L_psa = 2 − 2 cos(h(q + σ ε), k),   L_psl: `losses.representation.prototype_scattering`

λ and σ are 0 during the warm-up. Clusters are the E-step's: k-means of all rows in the copy's features.

Source: arXiv 2111.11821. Departures from the published program, whose effects its own issues show: prototypes hold the
rows of all workers with the right pseudo-labels, clusters count as present where any worker has a row of them, absent
ones are left out instead of getting the logit −10, and the gradient does not shrink with the number of workers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from rayclust.losses.representation import class_prototypes, prototype_scattering
from rayclust.methods.base import Batch, Pairing
from rayclust.methods.pixels.augment import keyed_seed
from rayclust.methods.pixels.base import KeyQueue, accumulated
from rayclust.methods.pixels.byol import Byol
from rayclust.methods.pixels.settings import PixelConfig, ProPosConfig


class ProPos(Byol):
    """ProPos on images of D values.

    Args:
        config: the settings; a preset is written out.
        dimension: D.
        count: N, the rows of all workers.
        seed: of weights, views, noise and k-means.
    """

    config_type: ClassVar[type[PixelConfig]] = ProPosConfig
    config: ProPosConfig

    def __init__(self, config: ProPosConfig, dimension: int, count: int, seed: int) -> None:
        super().__init__(config, dimension, count, seed)
        config = self.config  # with the preset written out
        self.queue = KeyQueue(config.queue, config.features) if config.queue else None
        self.pairing = Pairing(epoch_order=self.epoch_order)
        # The first epochs draw by cluster, or prototypes scatter before the first E-step that is due.
        self.reads_first_clusters = config.resample or config.warmup_epochs < config.reassign

    def epoch_order(self, epoch: int) -> Tensor | None:
        """Return the rows of an epoch where clusters are drawn equally often: Int64[N], with repeats."""
        if not self.config.resample:
            return None
        # Weight 1 / rows of its cluster: each cluster with rows is as likely as any other.
        weights = 1.0 / torch.bincount(self.labels, minlength=self.config.clusters).double()[self.labels].cpu()
        shares = weights.cumsum(0)
        generator = torch.Generator().manual_seed(keyed_seed(self.seed, 3, epoch))
        drawn = torch.rand(self.count, generator=generator, dtype=torch.float64) * shares[-1]
        return torch.searchsorted(shares, drawn, right=True).clamp_(max=self.count - 1)

    def order_loss(self, q: Tensor, k: Tensor, batch: Batch, order: int) -> dict[str, Tensor]:
        """Compute L_psa + λ L_psl of one order of the views; see `Byol.order_loss`.

        Returns:
            Float[] each: "loss", "alignment" (L_psa) and "scattering" (L_psl, 0 in the warm-up).
        """
        c, is_warm = self.config, batch.epoch >= self.config.warmup_epochs
        # Positive sampling: a neighbour of the embedding, before the predictor.
        sampled = q
        if is_warm and c.noise:
            generator = torch.Generator().manual_seed(keyed_seed(self.seed, batch.step, 2 + order))
            sampled = q + c.noise * batch.own(torch.randn((self.plan.batch_size, q.shape[1]), generator=generator))
        psa = super().order_loss(sampled, k, batch, order)["loss"]
        if not (is_warm and c.scatter_weight):
            return {"loss": psa, "alignment": psa, "scattering": torch.zeros_like(psa)}
        # Prototype scattering: clusters' means over the batch, by the labels of the last E-step.
        labels, queued = self.labels[batch.rows], None
        if self.queue is not None:
            keys, rows = self.queue.filled()
            queued = keys, self.labels[rows]
        online, present = class_prototypes(functional.normalize(q, dim=1), labels, c.clusters, queued)
        target, _ = class_prototypes(functional.normalize(k, dim=1), labels, c.clusters, queued)
        psl = prototype_scattering(online, target, present, c.temperature)
        return {"loss": psa + c.scatter_weight * psl, "alignment": psa, "scattering": psl}

    def take_keys(self, keys: Sequence[Tensor], batch: Batch) -> None:
        """Add both views' keys to the queue, if there is one; see `MomentumMethod.take_keys`."""
        super().take_keys(keys, batch)
        if self.queue is not None:
            for k in keys:
                self.queue.add(functional.normalize(accumulated(k), dim=1), batch.rows)
