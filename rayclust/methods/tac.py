"""TAC: clusters of images with the help of nouns that nobody chose for them.

Every image has a counterpart in text, a mean of near nouns (`language/nouns.py`). Without training, k-means runs on
images and counterparts side by side. With it, a head for images and one for counterparts teach each other:

    L = D(P, Qⁿ) + D(Q, Pⁿ) + L_con(P, Q) − λ (H(P̄) + H(Q̄)),

P and Q the heads' probabilities for an image and its counterpart, Pⁿ for a neighbour in image space and Qⁿ for one in
text space. A counterpart is a function of the image, so that the fitted method needs images alone.

Source: arXiv 2310.11989 ("Image Clustering with External Guidance"). Departures from the published program are listed
in docs/methods.md.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.nn import functional

from rayclust.arrays import require_matrix
from rayclust.errors import DataError
from rayclust.language.nouns import counterparts
from rayclust.losses.contrastive import agreement_loss, balance, cluster_contrast
from rayclust.methods.base import BaseTrainer, Batch, Method, Pairing, Rows
from rayclust.methods.kmeans import KMeans
from rayclust.methods.layers import StackedNorm
from rayclust.methods.settings import EMBEDDINGS, KMeansConfig, Plan
from rayclust.methods.tac_settings import TacConfig

__all__ = ["COUNTERPARTS", "Tac", "TacConfig", "WordedRows"]

COUNTERPARTS = "counterparts"
"""Name of the space of the images' counterparts in text."""
PREDICT_ROWS = 8192
"""Rows whose hidden units are held at once outside training."""


@runtime_checkable
class WordedRows(Rows, Protocol):
    """Rows with nouns that were chosen for them."""

    def nouns(self) -> Tensor:
        """Return the chosen nouns' embeddings in feature space, Float[M D]."""

    def counterparts(self) -> Rows:
        """Return the rows' counterparts in text, in the rows' order, with their neighbours among themselves."""


class TacHead(nn.Module):
    """Linear → BatchNorm → ReLU → Linear → softmax. Batch norm takes the statistics of all workers' rows in training.

    Args:
        dimension: D, the width of the rows and of the hidden layer.
        clusters: K.
        generator: of the initial weights.
    """

    def __init__(self, dimension: int, clusters: int, generator: torch.Generator) -> None:
        super().__init__()
        self.first, self.norm = nn.Linear(dimension, dimension), StackedNorm(1, dimension)
        self.last = nn.Linear(dimension, clusters)
        with torch.no_grad():
            for layer in (self.first, self.last):
                bound = 1.0 / math.sqrt(layer.in_features)
                nn.init.trunc_normal_(layer.weight, std=0.02, a=-2.0, b=2.0, generator=generator)
                nn.init.uniform_(layer.bias, -bound, bound, generator=generator)

    def forward(self, x: Tensor, training: bool = False) -> Tensor:
        """Return probabilities, Float[B K], of rows Float[B D]."""
        hidden = self.norm(self.first(x)[None], training)[0]
        logits: Tensor = self.last(functional.relu(hidden))
        return logits.softmax(dim=1)


class _SideBySide:
    """Images and counterparts as rows of one space, of length 1: [x ‖ w·t̃] / √(1 + w²).

    Args:
        x: rows of the images.
        texts: rows of their counterparts.
        weight: w.
    """

    def __init__(self, x: Rows, texts: Rows, weight: float) -> None:
        self._x, self._texts, self._weight = x, texts, weight
        self.count, self.dimension = x.count, 2 * x.dimension

    def blocks(self) -> Iterator[Tensor]:
        """Yield this worker's rows."""
        for x, text in zip(self._x.blocks(), self._texts.blocks(), strict=True):
            yield side_by_side(x, text, self._weight)


def side_by_side(x: Tensor, text: Tensor, weight: float) -> Tensor:
    """Return unit rows [x ‖ w·t̃] / √(1 + w²), Float[B 2D], of Float[B D]s of any length and type."""
    x = functional.normalize(x.float() if x.dtype == torch.float16 else x, dim=1)
    text = weight * functional.normalize(text.to(x), dim=1)
    return torch.cat([x, text], dim=1) / math.sqrt(1.0 + weight * weight)


class Tac(Method):
    """TAC on rows of width `dimension`.

    Args:
        config: the settings; a preset is written out for `count` rows.
        dimension: D.
        count: N, the rows of all workers.
        seed: of the initial weights, or of the first centres.
    """

    config_type = TacConfig
    spaces = 2
    config: TacConfig
    nouns: Tensor

    def __init__(self, config: TacConfig, dimension: int, count: int, seed: int) -> None:
        config = config.resolved(count)
        super().__init__(config, dimension, count, seed)
        self.register_buffer("nouns", torch.zeros(0, dimension))  # Float[M D], unit rows; set by `fit`
        if config.train:
            self.plan = Plan.of(config, count)
            self.pairing = Pairing(config.neighbors, own_neighbors=True)
            generator = torch.Generator().manual_seed(seed)
            self.image_head = TacHead(dimension, config.clusters, generator)
            self.text_head = TacHead(dimension, config.clusters, generator)
        else:
            options = KMeansConfig(clusters=config.clusters, restarts=config.restarts)
            self.partition = KMeans(options, 2 * dimension, count, seed)

    def fit(self, rows: Rows, trainer: BaseTrainer) -> None:
        """Read the nouns that were chosen for the rows, then train the heads or run k-means.

        Raises:
            DataError: no nouns were chosen for the rows.
        """
        if not isinstance(rows, WordedRows):
            raise DataError("method.name = tac: needs words; name a list of nouns in method.vocabulary")
        self.nouns = functional.normalize(rows.nouns().to(self.nouns), dim=1)
        self.to(trainer.device)
        texts = rows.counterparts()
        if self.config.train:
            trainer.fit(self, {EMBEDDINGS: rows, COUNTERPARTS: texts})
        else:
            self.partition.fit(_SideBySide(rows, texts, self.config.text_weight), trainer)  # type: ignore[arg-type]

    def training_step(self, batch: Batch) -> dict[str, Tensor]:
        """Compute L of all workers' rows, and of each term its part.

        Args:
            batch: one worker's part: rows and a neighbour of each, in both spaces.

        Returns:
            Float[] each: "loss", "distillation" (both directions), "consistency" and "balance" (both heads' entropies).
        """
        c = self.config
        # Rows and neighbours pass separately, each with its own statistics of batch norm, as published.
        p, p_near = (self.image_head(functional.normalize(x, dim=1), True) for x in batch.views[EMBEDDINGS])
        q, q_near = (self.text_head(functional.normalize(x, dim=1), True) for x in batch.views[COUNTERPARTS])
        distillation = cluster_contrast(p, q_near, c.temperature) + cluster_contrast(q, p_near, c.temperature)
        consistency, entropies = agreement_loss(p, q), balance(p) + balance(q)
        loss = distillation + consistency - c.balance_weight * entropies
        return {"loss": loss, "distillation": distillation, "consistency": consistency, "balance": entropies}

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Return all parameters with the published β of Adam; matrices decay where that is asked for."""
        return [{**group, "betas": (0.9, 0.99)} for group in super().parameter_groups()]

    def counterparts(self, x: Tensor) -> Tensor:
        """Return the counterparts in text of images: Float[B D] to unit rows Float[B D]."""
        unit = functional.normalize(x.to(self.nouns), dim=1)
        return counterparts(unit, self.nouns, self.config.retrieval_temperature, self.config.retrieval_nouns)

    @torch.no_grad()
    def predict_proba(self, x: Tensor) -> Tensor:
        """Return probabilities of the clusters: Float[B D] to Float[B K], rows sum to 1."""
        require_matrix(x, "x", self.dimension)
        c, found = self.config, []
        for block in torch.split(x.to(self.nouns), PREDICT_ROWS):
            if not c.train:
                found.append(self.partition.predict_proba(side_by_side(block, self.counterparts(block), c.text_weight)))
            elif c.predict == "text":
                found.append(self.text_head(self.counterparts(block)))
            else:
                found.append(self.image_head(functional.normalize(block, dim=1)))
        return torch.cat(found)

    def prototypes(self) -> Tensor:
        """Return the directions of the last layer's clusters, or the centres of k-means: unit rows Float[K d]."""
        if not self.config.train:
            return self.partition.prototypes()
        head = self.text_head if self.config.predict == "text" else self.image_head
        return functional.normalize(head.last.weight.detach(), dim=1)

    def load_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Load a state with any number of nouns."""
        self.nouns = torch.zeros_like(tensors["nouns"])
        super().load_tensors(tensors)
