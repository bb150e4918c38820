"""PCL: MoCo whose queries also find the centre of their cluster among other centres, at several numbers of clusters.

    L = L_moco + w · mean over m of the contrast of q with centres of the m-th E-step, divided by their concentrations

Source: arXiv 2005.04966, with the settings of ProPos' experiments (arXiv 2111.11821).
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from rayclust.clustering import kmeans
from rayclust.distributed import all_reduce, data_group
from rayclust.losses.representation import concentration, prototype_contrast
from rayclust.methods.base import Batch
from rayclust.methods.pixels.augment import keyed_seed
from rayclust.methods.pixels.moco import MoCo
from rayclust.methods.pixels.settings import PclConfig, PixelConfig
from rayclust.settings import KMeansOptions


class Pcl(MoCo):
    """PCL on images of D values.

    Args:
        config: the settings.
        dimension: D.
        count: N, the rows of all workers.
        seed: of weights, views, negatives and k-means.
    """

    config_type: ClassVar[type[PixelConfig]] = PclConfig
    config: PclConfig

    def __init__(self, config: PclConfig, dimension: int, count: int, seed: int) -> None:
        super().__init__(config, dimension, count, seed)
        config = self.config  # with the preset written out
        self.granularities = [m for m in config.prototypes if m <= count // 2]
        # Prototypes are learnt from before the first E-step that is due.
        self.reads_first_clusters = config.warmup_epochs < config.reassign
        for m in self.granularities:
            self.register_buffer(f"prototypes_{m}", torch.zeros(m, config.features))
            self.register_buffer(f"labels_{m}", torch.zeros(count, dtype=torch.long))
            self.register_buffer(f"phi_{m}", torch.ones(m))

    def query_loss(self, q: Tensor, k: Tensor, queue: Tensor, batch: Batch) -> dict[str, Tensor]:
        """Compute the queue's contrast and, after the warm-up, that with the prototypes; see `MoCo.query_loss`.

        Returns:
            Float[] each: "loss", "instance" and "prototype", the last 0 in the warm-up.
        """
        c, instance = self.config, super().query_loss(q, k, queue, batch)["loss"]
        prototype = torch.zeros_like(instance)
        if batch.epoch >= c.warmup_epochs and c.prototype_weight:
            for m in self.granularities:
                own = self.get_buffer(f"labels_{m}")[batch.rows]
                # Negatives: clusters, with repeats, that are no row's own in the batch of all workers.
                others = (all_reduce(torch.bincount(own, minlength=m)) == 0).nonzero()[:, 0]
                generator = torch.Generator().manual_seed(keyed_seed(self.seed, batch.step, 4, m))
                drawn = torch.rand(c.queue, generator=generator).to(own.device)
                negatives = others[(drawn * len(others)).long()] if len(others) else others
                buffers = self.get_buffer(f"prototypes_{m}"), self.get_buffer(f"phi_{m}")
                prototype = prototype + prototype_contrast(q, own, *buffers, negatives) / len(self.granularities)
        return {
            "loss": instance + c.prototype_weight * prototype,
            "instance": instance,
            "prototype": prototype,
        }

    def after_e_step(self, z: Tensor) -> None:
        """Cluster the features into each number of prototypes."""
        for m in self.granularities:
            before = self.get_buffer(f"prototypes_{m}")
            init = before if self.config.warm_start and bool(before.any()) else None
            options = KMeansOptions(clusters=m, restarts=1)
            result = kmeans.fit(lambda: [z], options, seed=self.seed, init=init)
            labels, squares = kmeans.assign(z, result.centers)
            labels = data_group().all_gather_cat(labels, self.count)
            distances = data_group().all_gather_cat(squares.clamp(min=0).sqrt(), self.count)
            before.copy_(result.centers)
            self.get_buffer(f"labels_{m}").copy_(labels)
            self.get_buffer(f"phi_{m}").copy_(concentration(distances, labels, m, self.config.temperature))
