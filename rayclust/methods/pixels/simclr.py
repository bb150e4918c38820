"""SimCLR: an image's two views find each other among all views of the batch.

Source: arXiv 2002.05709, with the head of ProPos' experiments (arXiv 2111.11821).
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional

from rayclust.losses.representation import nt_xent
from rayclust.methods.base import Batch
from rayclust.methods.pixels.backbones import mlp
from rayclust.methods.pixels.base import PixelMethod, accumulated
from rayclust.methods.pixels.settings import SimClrConfig


class SimClr(PixelMethod):
    """SimCLR on images of D values.

    Args:
        config: the settings.
        dimension: D.
        count: N, the rows of all workers.
        seed: of weights, views and k-means.
    """

    config_type = SimClrConfig
    config: SimClrConfig

    def __init__(self, config: SimClrConfig, dimension: int, count: int, seed: int) -> None:
        super().__init__(config, dimension, count, seed)
        config = self.config  # with the preset written out
        with self.keyed_weights():
            self.projector = mlp(self.backbone_width, self.backbone_width, config.features, norm=False)

    def training_step(self, batch: Batch) -> dict[str, Tensor]:
        """Compute the normalised cross-entropy over the views of all workers' rows.

        Args:
            batch: images, one view.

        Returns:
            "loss": Float[].
        """
        with self.autocast():
            first, second = (self.embedder(view) for view in self.views(batch))
        first, second = (functional.normalize(accumulated(z), dim=1) for z in (first, second))
        return {"loss": nt_xent(first, second, self.config.temperature)}
