"""SimCLR: an image's two views find each other among all views of the batch.

Source: arXiv 2002.05709, with the head of ProPos' experiments (arXiv 2111.11821).
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field
from torch import Tensor
from torch.nn import functional

from rayclust.losses.representation import nt_xent
from rayclust.methods.base import Batch
from rayclust.methods.pixels.backbones import mlp
from rayclust.methods.pixels.base import PixelConfig, PixelMethod, accumulated


class SimClrConfig(PixelConfig):
    """SimCLR (arXiv 2002.05709), clustered by k-means."""

    name: Literal["simclr"] = "simclr"
    """Contrast of all images of a batch."""
    features: int = Field(128, ge=2)
    """d, width of the space in which rows are compared and clustered."""
    temperature: float = Field(1.0, gt=0)
    """Of the cosines; the program's default, the paper takes 0.5 on small images."""
    reassign: int = Field(10, ge=1)
    """Epochs between two E-steps, which SimCLR does not learn from."""

    def short_settings(self, count: int, steps: int) -> dict[str, Any]:
        """Return a lower temperature, which weighs near negatives more."""
        return {"temperature": 0.2}


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
            first, second = (self.embed(view) for view in self.views(batch))
        first, second = (functional.normalize(accumulated(z), dim=1) for z in (first, second))
        return {"loss": nt_xent(first, second, self.config.temperature)}
