"""BYOL: a network predicts what a slowly moving copy of it makes of another view of the image; no negatives.

    L = 2 − 2 cos(h(q), k),   q = g(f(x₁)) of the network, k of its copy on x₂; both orders of the views, averaged.

Source: arXiv 2006.07733, with the projector and the settings of ProPos' experiments (arXiv 2111.11821). Departures: the
copy moves before each step instead of after the loss, and all workers' rows share their batch norm unless there are
`norm_groups`.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from rayclust.losses.representation import alignment
from rayclust.methods.base import Batch
from rayclust.methods.pixels.backbones import mlp
from rayclust.methods.pixels.base import MomentumMethod, accumulated
from rayclust.methods.pixels.settings import ByolConfig, PixelConfig, PredictorConfig


class Byol(MomentumMethod):
    """BYOL on images of D values.

    Args:
        config: the settings.
        dimension: D.
        count: N, the rows of all workers.
        seed: of weights, views and k-means.
    """

    config_type: ClassVar[type[PixelConfig]] = ByolConfig
    config: PredictorConfig

    def __init__(self, config: PredictorConfig, dimension: int, count: int, seed: int) -> None:
        super().__init__(config, dimension, count, seed)
        config = self.config  # with the preset written out
        with self.keyed_weights():
            self.start_target(nn.Sequential(self.backbone, mlp(self.backbone_width, config.hidden, config.features)))
            self.predictor = mlp(config.features, config.hidden, config.features)
            for layer in self.predictor:
                if isinstance(layer, nn.Linear):
                    nn.init.normal_(layer.weight, std=0.01)
                    nn.init.zeros_(layer.bias)

    def training_step(self, batch: Batch) -> dict[str, Tensor]:
        """Compute the loss of one worker's part of a batch, of both orders of the views.

        Args:
            batch: images, one view.

        Returns:
            Float[] each: "loss", and for methods built on this one its terms.
        """
        self.update_target(batch, self.config.momentum, self.config.final_momentum)
        first, second = self.views(batch)
        with self.autocast():
            queries = self._both(self.online, first, second)
            with torch.no_grad():
                keys = self._both(self.target, *(self.shuffled(x, batch, n) for n, x in enumerate((second, first))))
                keys = tuple(self.shuffled(k, batch, n, back=True) for n, k in enumerate(keys))
        terms = [
            self.order_loss(accumulated(q), accumulated(k), batch, order)
            for order, (q, k) in enumerate(zip(queries, keys, strict=True))
        ]
        self.take_keys(keys, batch)
        return {name: (terms[0][name] + terms[1][name]) / 2 for name in terms[0]}

    def _both(self, network: nn.Module, first: Tensor, second: Tensor) -> tuple[Any, ...]:
        if self.config.joint_views:
            return tuple(network(torch.cat([first, second])).chunk(2))
        return network(first), network(second)

    def order_loss(self, q: Tensor, k: Tensor, batch: Batch, order: int) -> dict[str, Tensor]:
        """Compute the loss of one order of the views.

        Args:
            q: Float[B d], the network's rows of one view.
            k: Float[B d], the copy's of the other.
            batch: the worker's part.
            order: 0 or 1.

        Returns:
            Float[] each: "loss" and its terms.
        """
        with self.autocast():
            predicted = self.predictor(q)
        return {"loss": 2 + 2 * alignment(accumulated(predicted), k)}
