"""Settings of TAC (arXiv 2310.11989) and its presets, to be read without torch."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from rayclust.methods.settings import RATE_ROWS, TrainedConfig
from rayclust.settings import Template

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
RATE = 1e-3
"""Published learning rate, whatever the batch."""
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
    templates: Annotated[tuple[Template, ...], Field(min_length=1)] = TEMPLATES
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
        from rayclust.language.nouns import center_count  # which brings torch

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
