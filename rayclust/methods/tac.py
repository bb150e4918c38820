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
from typing import Any, ClassVar, Literal, Protocol, runtime_checkable

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional

from rayclust.arrays import require_matrix
from rayclust.errors import DataError
from rayclust.language.nouns import center_count, counterparts
from rayclust.losses.contrastive import agreement_loss, balance, cluster_contrast
from rayclust.methods.base import EMBEDDINGS, BaseTrainer, Batch, Method, Pairing, Plan, Rows, TrainedConfig
from rayclust.methods.heads import StackedNorm
from rayclust.methods.kmeans import KMeans, KMeansConfig

__all__ = ["COUNTERPARTS", "Tac", "TacConfig", "WordedRows"]

COUNTERPARTS = "counterparts"
"""Name of the space of the images' counterparts in text."""
TEMPLATES = (
    "itap of a {}.",
    "a bad photo of the {}.",
    "a origami {}.",
    "a photo of the large {}.",
    "a {} in a video game.",
    "art of the {}.",
    "a photo of the small {}.",
)
"""Seven of the prompts of arXiv 2103.00020."""
RATE, RATE_ROWS = 1e-3, 256
"""Published learning rate, whatever the batch; and the rows of batch that a config's is given for."""
SMALL: dict[str, Any] = {"epochs": 20, "batch_size": 512, "temperature": 0.5}
LARGE: dict[str, Any] = {"epochs": 100, "batch_size": 8192, "temperature": 5.0}
"""The published program's settings, and those for many clusters."""
LARGE_CLUSTERS = 100
"""K from which `auto` takes the latter; UCF-101 and ImageNet have them in the paper."""
AUTO_STEPS = 100
"""Fewest steps of `auto`: small sets have few in 20 epochs."""
AUTO_CENTER_ROWS = 65_536
"""Rows of the sample up to which `auto` searches centres as published; of more it takes fewer, from one start."""
PAPER: dict[str, dict[str, Any]] = {
    "cifar10": SMALL | {"centers": 167},
    "cifar20": SMALL | {"centers": 167},
    "stl10": SMALL | {"centers": 17},
    "imagenet10": SMALL | {"centers": 43},
    "imagenet_dogs": SMALL | {"centers": 65},
    "dtd": SMALL | {"centers": 141},
    "ucf101": LARGE | {"centers": 303},
    "imagenet": LARGE | {"centers": 4271},
}
"""The published program's settings by data set."""
PREDICT_ROWS = 8192
"""Rows whose hidden units are held at once outside training."""


@runtime_checkable
class WordedRows(Rows, Protocol):
    """Rows with nouns that were chosen for them."""

    def nouns(self) -> Tensor:
        """Return the chosen nouns' embeddings in feature space, Float[M D]."""

    def counterparts(self) -> Rows:
        """Return the rows' counterparts in text, in the rows' order, with their neighbours among themselves."""


class TacConfig(TrainedConfig):
    """TAC (arXiv 2310.11989): nouns guide the clusters. A key that is written wins over the preset."""

    draws_pairs: ClassVar[bool] = True
    reads_words: ClassVar[bool] = True
    name: Literal["tac"] = "tac"
    """Image clustering with external guidance."""
    preset: Literal[
        "auto", "cifar10", "cifar20", "stl10", "imagenet10", "imagenet_dogs", "dtd", "ucf101", "imagenet", "none"
    ] = "auto"
    """auto: by N and K. none: the defaults below. The others: the published program's settings for that data set."""
    train: bool = True
    """Whether two heads are trained; false clusters images and counterparts side by side by k-means."""
    predict: Literal["image", "text"] = "image"
    """The trained head that assigns rows. Published: image."""
    vocabulary: str | tuple[str, ...] | None = None
    """The nouns to choose from, as `label.vocabulary` names them; None takes that one."""
    templates: tuple[str, ...] = TEMPLATES
    """Prompts around each noun; their embeddings are averaged."""
    normalize_prompts: bool = False
    """Whether prompts count as unit rows in that mean, as CLIP's authors do; published: as they are."""
    verbatim: bool = False
    """Whether nouns count as often as the list has them and keep their underscores, as published."""
    centers: int | None = Field(None, ge=1)
    """k, semantic centres; None: round(N / 300) if N / K is at least 300, else 3K."""
    center_restarts: int = Field(10, ge=1)
    """Starts of the k-means that finds them."""
    center_rows: int = Field(256, ge=1)
    """Rows for each centre, a seeded sample, on which that k-means runs."""
    nouns_per_center: int = Field(5, ge=1)
    """Most certain nouns kept of each centre."""
    retrieval_temperature: float = Field(0.005, gt=0)
    """τ, divides cosines of images and nouns before the softmax. Smaller: counterparts are nearer to single nouns."""
    retrieval_nouns: int | None = Field(None, ge=1)
    """Nearest nouns that count for a counterpart; None counts all."""
    neighbors: int = Field(50, ge=1)
    """Nearest neighbours, in either space, from which one is drawn each time."""
    temperature: float = Field(0.5, gt=0)
    """T, divides cosines of clusters in D."""
    balance_weight: float = Field(5.0, ge=0)
    """λ, on the entropies of the clusters' shares."""
    restarts: int = Field(20, ge=1)
    """Starts of the k-means of `train: false`."""
    text_weight: float = Field(1.0, gt=0)
    """Length of a counterpart beside an image of length 1 in that k-means."""
    epochs: int = Field(20, ge=1)
    """Passes over the rows; not used when `steps` is set."""
    optimizer: Literal["adamw"] = "adamw"
    """Without decay, which is Adam; with β of 0.9 and 0.99, as published."""
    learning_rate: float = Field(5e-4, gt=0)
    """Peak learning rate per 256 rows of batch: the rate used is this × batch_size / 256."""
    min_learning_rate: float = Field(5e-4, ge=0)
    """Learning rate at the end of the cosine, per 256 rows of batch as well; published: no decay."""
    warmup_epochs: int = Field(0, ge=0)
    """Epochs in which the learning rate rises linearly from 0; published: none."""
    weight_decay: float = Field(0.0, ge=0)
    """Decay of matrices at the start; published: none."""
    final_weight_decay: float = Field(0.0, ge=0)
    """Decay at the end of a cosine."""

    @model_validator(mode="after")
    def _heads_are_trained(self) -> TacConfig:
        if self.predict == "text" and not self.train:
            raise ValueError("predict = text: train = false leaves no head, remove one of them")
        return self

    def resolved(self, count: int, dimension: int | None = None) -> TacConfig:
        """Return this config with its preset written out for N = `count` rows; `preset` is then `none`."""
        preset: dict[str, Any] = {}
        if self.preset in PAPER:
            preset = PAPER[self.preset] | {"verbatim": True}
        elif self.preset == "auto":
            preset = dict(SMALL if self.clusters < LARGE_CLUSTERS else LARGE)
            batch = min(preset["batch_size"], count)
            preset["steps"] = max(AUTO_STEPS, preset["epochs"] * max(1, count // max(batch, 1)))
        centers = min(count, self.centers or preset.get("centers") or center_count(count, self.clusters))
        preset["centers"] = centers
        if self.preset == "auto" and self.center_rows * centers > AUTO_CENTER_ROWS:
            preset |= {"center_rows": max(64, AUTO_CENTER_ROWS // centers), "center_restarts": 1}
        if self.preset != "none":
            batch = min(self.batch_size if "batch_size" in self.model_fields_set else preset["batch_size"], count)
            preset |= dict.fromkeys(("learning_rate", "min_learning_rate"), RATE * RATE_ROWS / max(batch, 1))
        written = {key: getattr(self, key) for key in self.model_fields_set}
        if "epochs" in written:
            preset.pop("steps", None)
        if "learning_rate" in written and "min_learning_rate" not in written:
            preset["min_learning_rate"] = self.learning_rate
        return TacConfig.model_validate(preset | written | {"preset": "none", "centers": centers})


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
        """Take the nouns that were chosen for the rows, then train the heads or run k-means.

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

    def on_epoch_end(self, metrics: dict[str, Tensor]) -> dict[str, Any]:
        """Return the epoch's mean terms."""
        return {name: float(metrics[name]) for name in ("distillation", "consistency", "balance")}

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

    def _load_tensors(self, tensors: dict[str, Tensor]) -> None:
        self.nouns = torch.zeros_like(tensors["nouns"])
        super()._load_tensors(tensors)
