"""SimSiam: a network predicts its own output on another view, whose gradient is stopped.

Source: arXiv 2011.10566, with the settings of ProPos' experiments (arXiv 2111.11821).
"""

from __future__ import annotations

import torch
from torch import Tensor

from rayclust.losses.representation import alignment
from rayclust.methods.base import Batch
from rayclust.methods.pixels.backbones import mlp
from rayclust.methods.pixels.base import PixelMethod, accumulated
from rayclust.methods.pixels.settings import SimSiamConfig


class SimSiam(PixelMethod):
    """SimSiam on images of D values.

    Args:
        config: the settings.
        dimension: D.
        count: N, the rows of all workers.
        seed: of weights, views and k-means.
    """

    config_type = SimSiamConfig
    config: SimSiamConfig

    def __init__(self, config: SimSiamConfig, dimension: int, count: int, seed: int) -> None:
        super().__init__(config, dimension, count, seed)
        config = self.config  # with the preset written out
        hidden = [config.features] * config.layers
        with self.keyed_weights():
            self.projector = mlp(self.backbone_width, *hidden, bias=False, last_norm=True)
            self.predictor = mlp(config.features, config.bottleneck, config.features)

    def training_step(self, batch: Batch) -> dict[str, Tensor]:
        """Compute ½ D(p₁, z₂) + ½ D(p₂, z₁), both views in one batch of the norms.

        Args:
            batch: images, one view.

        Returns:
            "loss": Float[].
        """
        with self.autocast():
            z = self.embedder(torch.cat(self.views(batch)))
            p = self.predictor(z)
        (z1, z2), (p1, p2) = accumulated(z).detach().chunk(2), accumulated(p).chunk(2)
        return {"loss": (alignment(p1, z2) + alignment(p2, z1)) / 2}
