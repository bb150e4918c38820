"""Settings of CPP (arXiv 2306.05272) and its presets, to be read without torch."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator

from rayclust.methods.settings import RATE_ROWS, Plan, TrainedConfig
from rayclust.settings import SpectralOptions

PUBLISHED_RATE = 1e-4
"""Learning rate of every data set, whatever its batch."""
PAPER: dict[str, dict[str, Any]] = {
    "cifar10": {
        "variant": "two_head", "batch_size": 1024, "temperature": 0.175, "epochs": 15, "expansion_steps": 50
    },
    "cifar20": {
        "variant": "two_head", "batch_size": 1024, "temperature": 0.13, "epochs": 15, "expansion_epochs": 1
    },
    "cifar100": {
        "variant": "two_head", "batch_size": 1500, "temperature": 0.10, "epochs": 50, "expansion_epochs": 1
    },
    "imagenet": {
        "variant": "single_head", "batch_size": 1024, "temperature": 0.12, "epochs": 20, "expansion_steps": 2000,
        "hidden": 2048, "width": 1024,
    },
}  # fmt: skip
"""The published program's example commands for CIFAR-10 (`main.py`, two heads) and ImageNet (`main_efficient.py`, whose
codes are z); Table 8 of the paper for the others, run by `main.py`."""
FINAL_TEMPERATURE = 0.15
"""η of the published scripts that cluster after training, whatever the training's."""
AUTO_BATCH, AUTO_HIDDEN = 512, 512
AUTO_RATE = 1e-3
"""At the batch above and d = 32; R's slope grows with d, so that the rate falls as 1/d."""
AUTO_WIDTHS = (32, 128)
"""Bounds of d: it leaves each cluster some three dimensions."""
AUTO_STEPS, AUTO_EPOCHS = (75, 2_000), 4
"""Bounds of the steps, and the epochs that they are counted from; the loss may end them earlier."""
KERNEL_PRODUCTS = 20
"""Blocks of about 2 K + 10 vectors that the sites' kernel is multiplied with, about."""


class CppConfig(SpectralOptions, TrainedConfig):
    """CPP (arXiv 2306.05272): rate reduction on frozen embeddings. A key that is written wins over the preset."""

    revision: ClassVar[int] = 7
    has_own_space: ClassVar[bool] = True
    name: Literal["cpp"] = "cpp"
    """Clustering by the principle of rate reduction with pretrained models."""
    preset: Literal["auto", "cifar10", "cifar20", "cifar100", "imagenet", "none"] = "auto"
    """auto: few steps from principal components. none: the defaults below. The others: the paper's settings."""
    variant: Literal["single_head", "two_head"] = "single_head"
    """single_head: Π comes from z. two_head: from a head of its own, which starts as a copy of z's."""
    start: Literal["random", "principal"] = "random"
    """random: torch's default weights, as published. principal: z starts as the rows' principal components."""
    hidden: int = Field(4096, ge=1)
    """h, width of the trunk."""
    width: int = Field(128, ge=2)
    """d, width of z and of the codes."""
    distortion: float = Field(0.1, gt=0)
    """Squared error allowed per row, in squared row lengths. The paper's ε²."""
    temperature: float = Field(0.175, gt=0)
    """η of the membership in training. Smaller: each row belongs to fewer others."""
    half_steps: int | None = Field(5, ge=1)
    """Sinkhorn half-steps in training, odd; None goes on until rows and columns sum to 1."""
    compression_weight: float = Field(1.0, ge=0)
    """γ, on R_c."""
    membership_weight: float = Field(0.05, ge=0)
    """λ, on ½‖Π‖²: pushes Π away from the identity."""
    expansion_steps: int = Field(50, ge=0)
    """W, steps that maximise R alone; then the feature head is copied into the cluster head."""
    extra_expansion_step: bool = True
    """Whether expansion takes W + 1 steps, as the published program does."""
    optimizer: Literal["sgd"] = "sgd"
    """With momentum 0.9, as published."""
    warmup_epochs: int = Field(0, ge=0)
    """Epochs in which the learning rate rises linearly from 0; published: none."""
    learning_rate: float = Field(2.5e-5, gt=0)
    """Peak learning rate per 256 rows of batch: the rate used is this × batch_size / 256."""
    min_learning_rate: float = Field(2.5e-5, ge=0)
    """Learning rate at the end of the cosine, per 256 rows of batch as well; published: no decay."""
    batch_size: int = Field(1024, ge=2)
    """Rows per step over all workers, which Π relates to each other; a smaller set is taken whole."""
    code_rate: float = Field(1.0, gt=0)
    """Learning rate of the cluster head, relative to the others'."""
    code_weight_decay: float = Field(5e-3, ge=0)
    """Weight decay of the cluster head. All parameters decay, biases as well, as published."""
    patience: int | None = Field(None, ge=1)
    """Steps over which the loss is averaged; training ends where the mean is no longer better than the one before by
    `improvement`. None trains all steps."""
    improvement: float = Field(1e-3, ge=0)
    """What counts as better, relative to the loss."""
    top_entries: int | None = Field(None, ge=1)
    """Largest entries of each column of Π that R_c keeps; None keeps all, which is exact. Where more than 0.1 % of Π's
    mass would be left out, all are kept."""
    memory_gib: float = Field(1.0, gt=0)
    """Memory that R_c may work in, about."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Matrix products of the network. auto: bf16 where the processor multiplies it fast, else float32. fp16 scales the
    loss. Membership and log-determinants are float32 in any case."""
    final_temperature: float | None = Field(None, gt=0)
    """η of the membership of all rows that is cut into clusters; None is the training's."""
    final_half_steps: int | None = Field(None, ge=1)
    """Sinkhorn half-steps of that membership, odd (published: 5); None goes on until rows and columns sum to 1."""
    final_start: Literal["kmeans", "auto"] = "kmeans"
    """kmeans: the final k-means has `restarts` starts of its own. auto: it starts at the partition that the method
    `auto` chooses without training; that one is kept where the neighbour graph of the rows speaks against the result.
    Only for `clusters`: another number that the eigenvectors are cut into, as in `select-k`, has its own starts."""

    @model_validator(mode="after")
    def _codes_have_a_head(self) -> CppConfig:
        written = self.variant if "variant" in self.model_fields_set else None
        variant = written or PAPER.get(self.preset, {}).get("variant", self.variant)
        for name in ("code_rate", "code_weight_decay") if variant == "single_head" else ():
            if (value := getattr(self, name)) != type(self).model_fields[name].default:
                raise ValueError(f"{name} = {value:g}: there is no cluster head, set variant: two_head")
        if self.final_start == "auto" and self.beyond == "tiles":
            raise ValueError("final_start = auto: looks at a sample of the rows, set beyond: sample")
        return self

    def resolved(self, count: int) -> CppConfig:
        """Return this config with its preset written out for N = `count` rows; `preset` is then `none`."""
        preset: dict[str, Any] = {}
        if self.preset in PAPER:
            paper = dict(PAPER[self.preset])
            rate = PUBLISHED_RATE * RATE_ROWS / min(paper["batch_size"], max(count, 2))
            epochs = paper.pop("expansion_epochs", None)
            if epochs is not None:
                paper["expansion_steps"] = epochs * max(1, count // paper["batch_size"])
            rates = {"learning_rate": rate, "min_learning_rate": rate, "final_temperature": FINAL_TEMPERATURE}
            preset = {"hidden": 4096, "width": 128, **rates, **paper}
        elif self.preset == "auto":  # docs/methods.md has the numbers behind each choice
            batch = max(2, min(AUTO_BATCH, count))
            width = max(AUTO_WIDTHS[0], min(AUTO_WIDTHS[1], 1 << (3 * self.clusters - 1).bit_length()))
            rate = AUTO_RATE * RATE_ROWS / AUTO_BATCH * AUTO_WIDTHS[0] / width
            preset = {
                "start": "principal",
                "hidden": AUTO_HIDDEN,
                "width": width,
                "batch_size": batch,
                "learning_rate": rate,
                "min_learning_rate": rate,
                "steps": max(AUTO_STEPS[0], min(AUTO_STEPS[1], AUTO_EPOCHS * (count // batch))),
                "expansion_steps": 0,
                "patience": 25,
                "improvement": 0.1,
                "final_temperature": 0.1,
                "final_start": "auto" if self.beyond == "sample" else "kmeans",
            }
        written = {key: getattr(self, key) for key in self.model_fields_set}
        values = preset | written | {"preset": "none"}
        if "learning_rate" in written and "min_learning_rate" not in written:
            values["min_learning_rate"] = self.learning_rate
        return type(self).model_validate(values)

    def spectral_options(self) -> SpectralOptions:
        """Return the settings of the final partition, which has its own η and half-steps."""
        own = {"temperature": self.final_temperature or self.temperature, "half_steps": self.final_half_steps}
        return SpectralOptions.model_validate(self.model_dump(include=set(SpectralOptions.model_fields)) | own)

    def multiplications(self, count: int, dimension: int) -> float:
        """Return about how many multiplications a fit of `count` rows of width `dimension` takes.

        In each step three products with the network's weights, R_c's sums of outer products with their gradients, and
        for each column of Π some four factorisations; then two passes of all rows, and the products with the kernel.
        """
        c = self.resolved(count)
        B, d, sites = min(c.batch_size, count), c.width, min(c.dense_rows, count)
        weights = float(dimension * c.hidden + c.hidden**2 + c.hidden * d)
        step = 3.0 * B * weights + 1.5 * B * B * d * d + 4.0 * B * d**3
        kernel = float(sites * sites * (d + KERNEL_PRODUCTS * (2 * c.clusters + 10)))
        return Plan.of(c, count).steps * step + 2.0 * count * weights + kernel

    @property
    def last_expansion_step(self) -> int:
        """Number of the step after which the cluster head is copied; −1 where there is none."""
        return self.expansion_steps - (0 if self.extra_expansion_step else 1)
