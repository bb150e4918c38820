"""CC: contrast of images in one head and of clusters, the columns of the assignment, in another.

    L = NT-Xent of rows (T_I) + NT-Xent of columns (T_C) + Σ over views of (ln K − H(p̄))

Source: arXiv 2009.09687. Clusters are the cluster head's, as in the paper; ProPos' program scores k-means instead.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional

from rayclust.distributed import all_reduce, differentiable_all_reduce
from rayclust.losses.contrastive import cluster_contrast
from rayclust.losses.representation import nt_xent
from rayclust.methods.base import Batch
from rayclust.methods.pixels.backbones import mlp
from rayclust.methods.pixels.base import PixelConfig, PixelMethod, accumulated


class CcConfig(PixelConfig):
    """Contrastive clustering (arXiv 2009.09687)."""

    name: Literal["cc"] = "cc"
    """Contrast of images and of clusters."""
    features: int = Field(128, ge=2)
    """d, width of the space in which images are compared."""
    temperature: float = Field(0.5, gt=0)
    """T_I, of the images' cosines."""
    cluster_temperature: float = Field(1.0, gt=0)
    """T_C, of the columns' cosines."""
    optimizer: Literal["adamw", "sgd", "lars"] = "adamw"
    """adamw (0.9, 0.999) without decay is the paper's Adam; sgd and lars with momentum 0.9."""
    learning_rate: float = Field(3e-4, gt=0)
    """Learning rate per 256 rows of batch: the rate used is this × batch_size / 256."""
    min_learning_rate: float = Field(3e-4, ge=0)
    """Learning rate at the end of the cosine; published: no decay."""
    weight_decay: float = Field(0.0, ge=0)
    """Decay of all parameters."""
    final_weight_decay: float = Field(0.0, ge=0)
    """Decay at the end of a cosine."""
    batch_size: int = Field(256, ge=2)
    """Rows per step over all workers; a smaller set is taken whole."""
    warmup_epochs: int = Field(0, ge=0)
    """Epochs in which the learning rate rises linearly from 0."""
    reassign: int = Field(10, ge=1)
    """Epochs between two E-steps, which CC does not learn from."""

    def short_settings(self, count: int, steps: int) -> dict[str, Any]:
        """Return a lower temperature, which weighs near negatives more."""
        return {"temperature": 0.2}


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
    exported = ("backbone.", "projector.", "cluster_head.")

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
        parts = [self.cluster_head(self.backbone(images)).softmax(1) for images in self.normalized_parts(x)]
        return torch.cat(parts) if parts else self.centers.new_zeros((0, self.config.clusters))
