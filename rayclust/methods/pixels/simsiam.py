"""SimSiam: a network predicts its own output on another view, whose gradient is stopped.

Source: arXiv 2011.10566, with the settings of ProPos' experiments (arXiv 2111.11821).
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from rayclust.losses.representation import alignment
from rayclust.methods.base import Batch
from rayclust.methods.pixels.backbones import mlp
from rayclust.methods.pixels.base import SHORT_PREDICTION, PixelConfig, PixelMethod, accumulated


class SimSiamConfig(PixelConfig):
    """SimSiam (arXiv 2011.10566), clustered by k-means."""

    short_batch: ClassVar[int] = 64
    name: Literal["simsiam"] = "simsiam"
    """Prediction of the network's own output, without negatives or a copy."""
    features: int = Field(2048, ge=2)
    """d, width of the space in which rows are compared and clustered."""
    bottleneck: int = Field(512, ge=1)
    """Width of the predictor's hidden layer."""
    layers: Literal[2, 3] = 2
    """Of the projector."""
    predictor_rate: float = Field(1.0, gt=0)
    """Learning rate of the predictor relative to the others'."""
    learning_rate: float = Field(0.06, gt=0)
    """Peak learning rate per 256 rows of batch: the rate used is this × batch_size / 256."""
    reassign: int = Field(50, ge=1)
    """Epochs between two E-steps, which SimSiam does not learn from."""

    def short_settings(self, count: int, steps: int) -> dict[str, Any]:
        """Return narrower heads, and a predictor that follows."""
        return SHORT_PREDICTION | {"features": 512, "bottleneck": 128, "predictor_rate": 10.0}


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

    @property
    def predictor_rate(self) -> float:
        """Learning rate of the predictor relative to the others'."""
        return self.config.predictor_rate

    def training_step(self, batch: Batch) -> dict[str, Tensor]:
        """Compute ½ D(p₁, z₂) + ½ D(p₂, z₁), both views in one batch of the norms.

        Args:
            batch: images, one view.

        Returns:
            "loss": Float[].
        """
        with self.autocast():
            z = self.embed(torch.cat(self.views(batch)))
            p = self.predictor(z)
        (z1, z2), (p1, p2) = accumulated(z).detach().chunk(2), accumulated(p).chunk(2)
        return {"loss": (alignment(p1, z2) + alignment(p2, z1)) / 2}
