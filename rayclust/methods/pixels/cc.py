"""CC: contrast of images in one head and of clusters, the columns of the assignment, in another.

    L = NT-Xent of rows (T_I) + NT-Xent of columns (T_C) + Σ over views of (ln K − H(p̄))

Source: arXiv 2009.09687. Clusters are the cluster head's, as in the paper; ProPos' program scores k-means instead.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

from rayclust.distributed import all_reduce, differentiable_all_reduce
from rayclust.losses.contrastive import cluster_contrast
from rayclust.losses.representation import nt_xent
from rayclust.methods.base import Batch
from rayclust.methods.pixels.backbones import mlp
from rayclust.methods.pixels.base import PixelMethod, accumulated
from rayclust.methods.pixels.settings import CcConfig


class Cc(PixelMethod):
    """CC on images of D values.

    Args:
        config: the settings.
        dimension: D.
        count: N, the rows of all workers.
        seed: of weights and views.
    """

    config_type = CcConfig
    config: CcConfig
    kept = (*PixelMethod.kept, "cluster_head.")

    def __init__(self, config: CcConfig, dimension: int, count: int, seed: int) -> None:
        super().__init__(config, dimension, count, seed)
        config = self.config  # with the preset written out
        width = self.backbone_width
        with self.keyed_weights():
            self.projector = mlp(width, width, config.features, norm=False)
            self.cluster_head = mlp(width, width, config.clusters, norm=False)

    def training_step(self, batch: Batch) -> dict[str, Tensor]:
        """Compute the contrasts of rows and columns, and the entropy of the clusters' sizes.

        Args:
            batch: images, one view.

        Returns:
            Float[] each: "loss", "instance", "cluster" and "imbalance" (ln K − H(p̄), both views).
        """
        c = self.config
        with self.autocast():
            hidden = [self.backbone(view) for view in self.views(batch)]
            z = [functional.normalize(accumulated(self.projector(h)), dim=1) for h in hidden]
            p = [accumulated(self.cluster_head(h)).softmax(1) for h in hidden]
        instance = nt_xent(z[0], z[1], c.temperature)
        cluster = cluster_contrast(p[0], p[1], c.cluster_temperature)
        count = all_reduce(torch.tensor(float(len(batch.rows)), device=p[0].device))
        imbalance = torch.zeros_like(instance)
        for each in p:
            mean = differentiable_all_reduce(each.sum(0)) / count
            imbalance = imbalance + math.log(c.clusters) + torch.xlogy(mean, mean).sum()
        total = instance + cluster + imbalance
        return {"loss": total, "instance": instance, "cluster": cluster, "imbalance": imbalance}

    @torch.no_grad()
    def predict_proba(self, x: Tensor) -> Tensor:
        """Return the cluster head's probabilities, Float[B K] for Float[B D]; rows sum to 1."""
        return torch.cat([self.cluster_head(self.backbone(images)).softmax(1) for images in self.normalized_parts(x)])
