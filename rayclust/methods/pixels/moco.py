"""MoCo: an image's view finds its key among a queue of other images' keys, made by a slowly moving copy.

Source: arXiv 1911.05722 and 2003.04297, with the settings of ProPos' experiments (arXiv 2111.11821). Batch norm is one
of all workers' rows, or with `norm_groups` that of groups, between which keys are shuffled as in the paper.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from rayclust.losses.representation import queue_contrast
from rayclust.methods.base import Batch
from rayclust.methods.pixels.backbones import mlp
from rayclust.methods.pixels.base import KeyQueue, MomentumMethod, accumulated
from rayclust.methods.pixels.settings import MoCoConfig, PixelConfig, QueueConfig


class MoCo(MomentumMethod):
    """MoCo on images of D values.

    Args:
        config: the settings.
        dimension: D.
        count: N, the rows of all workers.
        seed: of weights, views and k-means.
    """

    config_type: ClassVar[type[PixelConfig]] = MoCoConfig
    config: QueueConfig

    def __init__(self, config: QueueConfig, dimension: int, count: int, seed: int) -> None:
        super().__init__(config, dimension, count, seed)
        config = self.config  # with the preset written out
        width = self.backbone_width
        with self.keyed_weights():
            self.start_target(nn.Sequential(self.backbone, mlp(width, width, config.features, norm=False)))
        self.queue = KeyQueue(config.queue, config.features)

    def training_step(self, batch: Batch) -> dict[str, Tensor]:
        """Compute the cross-entropy of finding each query's key among the queue's.

        Args:
            batch: images, one view.

        Returns:
            Float[] each: "loss", and for methods built on this one its terms.
        """
        self.update_target(batch, self.config.momentum, self.config.momentum)
        views = self.views(batch)
        orders = [views, views[::-1]] if self.config.symmetric else [views]
        queue, _ = self.queue.filled()
        terms, keys = [], []
        for number, (query_view, key_view) in enumerate(orders):
            with self.autocast():
                q = self.online(query_view)
                with torch.no_grad():
                    k = self.shuffled(self.target(self.shuffled(key_view, batch, number)), batch, number, back=True)
            q, k = (functional.normalize(accumulated(each), dim=1) for each in (q, k))
            terms.append(self.query_loss(q, k, queue, batch))
            keys.append(k)
        for k in keys:
            self.queue.add(k, batch.rows)
        self.take_keys(keys, batch)
        return {name: torch.stack([term[name] for term in terms]).mean() for name in terms[0]}

    def query_loss(self, q: Tensor, k: Tensor, queue: Tensor, batch: Batch) -> dict[str, Tensor]:
        """Compute the loss of one order of the views.

        Args:
            q: Float[B d], unit queries.
            k: Float[B d], unit keys.
            queue: Float[Q d], unit keys of earlier batches.
            batch: the worker's part.

        Returns:
            Float[] each: "loss" and its terms.
        """
        return {"loss": queue_contrast(q, k, queue, self.config.temperature)}
