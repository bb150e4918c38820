"""Settings of CPP."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from rayclust.losses.compression_rate import CompressionOptions
from rayclust.methods.configs import TrainedConfig
from rayclust.methods.cpp_presets import preset_values


class CppConfig(TrainedConfig):
    """CPP (arXiv 2306.05272): rate reduction on frozen embeddings. A key that is written wins over the preset."""

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
    """Sinkhorn half-steps, odd; None goes on until rows and columns sum to 1."""
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

    @model_validator(mode="after")
    def _half_steps_are_odd(self) -> CppConfig:
        if self.half_steps is not None and self.half_steps % 2 == 0:
            raise ValueError(f"half_steps = {self.half_steps}: must be odd, rows are normalised last")
        return self

    def settled(self, count: int) -> CppConfig:
        """This config with its preset written out for N = `count` rows; `preset` is then `none`."""
        written = {key: getattr(self, key) for key in self.model_fields_set}
        values = preset_values(self.preset, count, self.clusters) | written | {"preset": "none"}
        if "learning_rate" in written and "min_learning_rate" not in written:
            values["min_learning_rate"] = self.learning_rate
        return CppConfig.model_validate(values)

    @property
    def last_expansion_step(self) -> int:
        """Number of the step after which the cluster head is copied; −1 where there is none."""
        return self.expansion_steps - (0 if self.extra_expansion_step else 1)

    def compression(self) -> CompressionOptions:
        """What R_c is told."""
        return CompressionOptions(int(self.memory_gib * 2**30), self.top_entries)
