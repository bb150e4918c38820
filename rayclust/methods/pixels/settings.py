"""Settings of the methods that learn from pixels, and their presets, to be read without torch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from rayclust.encoders.settings import EncoderConfig
from rayclust.methods.cpp_settings import CppConfig
from rayclust.methods.settings import Plan, TrainedConfig, cosine_schedule

STEP_FACTOR = 0.1
"""By which the learning rate falls at a milestone."""
Family = Literal["simclr", "simclr_blur", "simclr_small", "byol", "weak"]
SHORT_STEPS, SHORT_RATE, SHORT_AVERAGE = 1_000, 4e-3, 16
"""Of `preset: short`: steps where the config counts none, rate per 256 rows, and into how many parts a training is cut
of which a copy averages the last."""
SHORT_PREDICTION = {"optimizer": "sgd", "learning_rate": 0.2, "weight_decay": 5e-4, "final_weight_decay": 5e-4}
"""Of short trainings by prediction without negatives: SGD as published, four times as fast, in smaller batches and with
a predictor ten times faster, since they learn only as well as the predictor follows."""
SHORT_CONTRAST = {"temperature": 0.2}
"""Of short trainings by contrast: a lower temperature, which weighs near negatives more. MoCo v2's on ImageNet."""


class PixelConfig(TrainedConfig):
    """Settings of every method that learns from pixels; defaults are those of ProPos on CIFAR-10."""

    revision: ClassVar[int] = 3
    has_own_space: ClassVar[bool] = True
    reads_pixels: ClassVar[bool] = True
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    """Settings of each preset but `none` and `short`, where they are not the defaults."""
    short: ClassVar[dict[str, Any]] = {}
    """Settings of the method's own in a short training."""
    short_batch: ClassVar[int] = 128
    """Rows of a step of a short training."""
    preset: Literal["none", "short"] = "none"
    """none: the defaults, of the papers' 78,000 steps and more. short: for hundreds to some thousand steps, with which
    a set of thousands of images is learnt from in minutes."""
    backbone: str = "resnet18"
    """small (for CPUs), resnet18, resnet34, resnet50, preact_resnet18, or timm/<architecture>; always from random
    weights. Residual networks have the stem for small images up to 64 pixels."""
    augmentation: Family = "simclr"
    """Family of the two views; simclr_blur for images from some 96 pixels on, simclr_small for small ones, with crops
    from a fifth of the area. weak: crops and mirrors alone."""
    features: int = Field(256, ge=2)
    """d, width of the space in which rows are compared and clustered."""
    reassign: int = Field(1, ge=1)
    """Epochs between two E-steps; the last epoch always ends with one."""
    e_step: Literal["kmeans", "mixture"] = "kmeans"
    """What clusters the features: spherical k-means, or a mixture of Gaussians, one variance each, that starts from
    it."""
    restarts: int = Field(10, ge=1)
    """Starts of the E-step's k-means."""
    warm_start: bool = True
    """Whether E-steps but the first and the last go on from the centres of the one before, in place of `restarts`
    starts; published: none does."""
    accumulation: int = Field(1, ge=1)
    """Parts of a worker's batch that go through the network one after another, for batches beyond a GPU's memory. Batch
    norm, and losses that compare the images of a batch, then see a part."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Of the network's products in training. auto: bf16 where the processor multiplies it fast."""
    epochs: int = Field(1000, ge=1)
    """Passes over the rows; not used when `steps` is set."""
    learning_rate: float = Field(0.05, gt=0)
    """Peak learning rate per 256 rows of batch: the rate used is this × batch_size / 256."""
    min_learning_rate: float = Field(0.0, ge=0)
    """What the cosine falls to, per 256 rows of batch as well; it is counted over all epochs, warm-up included."""
    cosine_by_epochs: bool = False
    """Whether the rate falls from epoch to epoch, on a cosine that begins with the warm-up, which rises to where it
    meets it; published for CIFAR-20 with ResNet-34."""
    milestones: tuple[int, ...] = ()
    """Epochs from which on the rate is a tenth of what it was; without any it falls on the cosine."""
    warmup_epochs: int = Field(50, ge=0)
    """Epochs in which the learning rate rises linearly from 0."""
    optimizer: Literal["adamw", "sgd", "lars"] = "sgd"
    """adamw (0.9, 0.999), sgd and lars with momentum 0.9."""
    weight_decay: float = Field(5e-4, ge=0)
    """Decay of all parameters; with lars biases and norms have none."""
    final_weight_decay: float = Field(5e-4, ge=0)
    """Decay at the end of a cosine."""

    @model_validator(mode="after")
    def _has_one_schedule(self) -> Self:
        if self.milestones and (self.cosine_by_epochs or "min_learning_rate" in self.model_fields_set):
            raise ValueError("milestones: without a cosine, so without cosine_by_epochs and min_learning_rate")
        return self

    def rate_at(self, step: int, plan: Plan) -> float:
        """Return the learning rate: a warm-up, then a cosine as long as all steps whose end it cuts off, or steps."""
        peak, end = self.rates_for(plan.batch_size)
        epoch, warmup = step // plan.steps_per_epoch, plan.warmup_steps
        if step < warmup:
            top = cosine_schedule(peak, end, warmup, plan.steps) if self.cosine_by_epochs else peak
            return top * step / max(warmup - 1, 1)
        if self.cosine_by_epochs:
            return cosine_schedule(peak, end, epoch, plan.epochs)
        if self.milestones:
            return peak * STEP_FACTOR ** sum(epoch >= milestone for milestone in self.milestones)
        return cosine_schedule(peak, end, step - warmup, plan.steps)

    def resolved(self, count: int) -> Self:
        """Return this config with its preset written out for N = `count` rows; `preset` is then `none`.

        `short` is what few steps need, whatever the images: AdamW in place of SGD, whose published rates move little in
        few steps; the whole of a cosine to 0, a tenth of it warm-up; a copy that averages the last sixteenth of the
        steps, at most as many as published; and a queue of at most half the rows.
        """
        chosen = dict(self.presets.get(self.preset, {}))
        if self.preset == "short":
            batch = self.batch_size if "batch_size" in self.model_fields_set else self.short_batch
            per_epoch = max(1, count // min(batch, count))
            epochs = self.epochs if "epochs" in self.model_fields_set else math.ceil(SHORT_STEPS / per_epoch)
            epochs = epochs if self.steps is None else math.ceil(self.steps / per_epoch)
            chosen = {
                "batch_size": batch, "epochs": epochs, "warmup_epochs": epochs // 10, "augmentation": "simclr_small",
                "optimizer": "adamw", "learning_rate": SHORT_RATE, "min_learning_rate": 0.0,
                "weight_decay": 0.01, "final_weight_decay": 0.01,
            }  # fmt: skip
            chosen |= self.short
            if "queue" in self.short:
                chosen["queue"] = max(1, min(self.short["queue"], count // 2))
            fields, steps = type(self).model_fields, self.steps or epochs * per_epoch
            for name in {"momentum", "final_momentum"} & fields.keys():
                chosen[name] = max(0.0, min(fields["momentum"].default, 1 - SHORT_AVERAGE / steps))
        written = {key: getattr(self, key) for key in self.model_fields_set}
        return type(self).model_validate(chosen | written | {"preset": "none"})


class MomentumConfig(PixelConfig):
    """Settings of methods with a slowly moving copy of the network."""

    norm_groups: int = Field(1, ge=1)
    """Groups of a batch whose batch norms are separate, a multiple of the workers; the copy's rows are shuffled between
    groups (Shuffling-BN). 4 with the published runs on 4 GPUs. 1: one norm of all rows, on any number of workers."""
    e_step_rows: Literal["images", "views"] = "images"
    """What E-steps cluster. images, as published: all images go through the copy for it. views: the rows that the copy
    has made of the latest views in training, once it has seen all images; the last E-step takes images."""

    @model_validator(mode="after")
    def _shuffles_whole_batches(self) -> Self:
        if self.norm_groups > 1 and self.accumulation > 1:
            raise ValueError("norm_groups, accumulation: only one of them; parts of a batch have norms of their own")
        return self


class PredictorConfig(MomentumConfig):
    """Settings of BYOL and of what is built on it."""

    short: ClassVar[dict[str, Any]] = SHORT_PREDICTION | {"hidden": 1024}
    """Narrower heads, and a copy that follows to the end."""
    short_batch: ClassVar[int] = 64
    hidden: int = Field(4096, ge=1)
    """Width of the hidden layer of projector and predictor."""
    momentum: float = Field(0.996, ge=0, le=1)
    """Of the copy, at the first step."""
    final_momentum: float = Field(0.996, ge=0, le=1)
    """Of the copy at the end of half a cosine; published: 1 or, for CIFAR-10, as at the start."""
    predictor_rate: float = Field(10.0, gt=0)
    """Learning rate of the predictor relative to the others'."""
    fix_predictor_rate: bool = False
    """Whether the predictor's learning rate stays at the peak, without warm-up and cosine."""
    joint_views: bool = False
    """Whether both views go through the network as one batch, whose statistics they then share."""


class ByolConfig(PredictorConfig):
    """BYOL (arXiv 2006.07733), clustered by k-means."""

    name: Literal["byol"] = "byol"
    """Prediction of a slowly moving copy of the network."""
    final_momentum: float = Field(1.0, ge=0, le=1)
    """Of the copy at the end of half a cosine."""
    reassign: int = Field(10, ge=1)
    """Epochs between two E-steps, which BYOL does not learn from."""


class CcConfig(PixelConfig):
    """Contrastive clustering (arXiv 2009.09687)."""

    short: ClassVar[dict[str, Any]] = SHORT_CONTRAST
    name: Literal["cc"] = "cc"
    """Contrast of images and of clusters."""
    features: int = Field(128, ge=2)
    """d, width of the space in which images are compared."""
    temperature: float = Field(0.5, gt=0)
    """T_I, of the images' cosines."""
    cluster_temperature: float = Field(1.0, gt=0)
    """T_C, of the columns' cosines."""
    optimizer: Literal["adamw", "sgd", "lars"] = "adamw"
    """adamw (0.9, 0.999) without decay is the paper's Adam; sgd and lars with momentum 0.9."""
    learning_rate: float = Field(3e-4, gt=0)
    """Learning rate per 256 rows of batch: the rate used is this × batch_size / 256."""
    min_learning_rate: float = Field(3e-4, ge=0)
    """Learning rate at the end of the cosine; published: no decay."""
    weight_decay: float = Field(0.0, ge=0)
    """Decay of all parameters."""
    final_weight_decay: float = Field(0.0, ge=0)
    """Decay at the end of a cosine."""
    batch_size: int = Field(256, ge=2)
    """Rows per step over all workers; a smaller set is taken whole."""
    warmup_epochs: int = Field(0, ge=0)
    """Epochs in which the learning rate rises linearly from 0."""
    reassign: int = Field(10, ge=1)
    """Epochs between two E-steps, which CC does not learn from."""


class QueueConfig(MomentumConfig):
    """Settings of MoCo and of what is built on it."""

    short: ClassVar[dict[str, Any]] = SHORT_CONTRAST | {"queue": 4096}
    features: int = Field(128, ge=2)
    """d, width of the space in which rows are compared and clustered."""
    momentum: float = Field(0.999, ge=0, le=1)
    """Of the copy."""
    temperature: float = Field(0.07, gt=0)
    """Of the cosines."""
    queue: int = Field(65_536, ge=1)
    """Keys that are kept."""
    symmetric: bool = True
    """Whether either view is query once."""
    reassign: int = Field(10, ge=1)
    """Epochs between two E-steps."""


class MoCoConfig(QueueConfig):
    """MoCo v2 (arXiv 2003.04297), clustered by k-means."""

    name: Literal["moco"] = "moco"
    """Contrast with a queue of keys."""


class PclConfig(QueueConfig):
    """PCL (arXiv 2005.04966): contrast with prototypes. Defaults are its record on CIFAR-20."""

    name: Literal["pcl"] = "pcl"
    """MoCo with prototypes."""
    prototypes: tuple[int, ...] = (250, 500, 1000)
    """Numbers of clusters of the E-steps that are learnt from; those above half the rows are left out."""
    prototype_weight: float = Field(0.01, ge=0)
    """w, on the prototypes' loss; 0 in the warm-up."""
    momentum: float = Field(0.99, ge=0, le=1)
    """Of the copy."""
    temperature: float = Field(1.0, gt=0)
    """Of the cosines, and the mean of the concentrations."""
    queue: int = Field(4096, ge=1)
    """Keys that are kept; as many prototypes are negatives."""
    learning_rate: float = Field(0.1, gt=0)
    """Peak learning rate per 256 rows of batch: the rate used is this × batch_size / 256."""
    batch_size: int = Field(128, ge=2)
    """Rows per step over all workers; a smaller set is taken whole."""
    weight_decay: float = Field(1e-4, ge=0)
    """Decay of all parameters."""
    final_weight_decay: float = Field(1e-4, ge=0)
    """Decay at the end of a cosine."""
    reassign: int = Field(1, ge=1)
    """Epochs between two E-steps."""


CIFAR20 = {"batch_size": 256, "final_momentum": 1.0, "joint_views": True, "resample": True}
PUBLISHED: dict[str, dict[str, Any]] = {
    "cifar10_r18": {"batch_size": 512},
    "cifar20_r18": CIFAR20,
    "cifar20_r34": CIFAR20 | {"backbone": "resnet34", "cosine_by_epochs": True},
    "imagenetdogs_r34": CIFAR20 | {"backbone": "resnet34", "augmentation": "simclr_blur"},
    "imagenet_r50": {
        "backbone": "resnet50", "epochs": 200, "batch_size": 4096, "learning_rate": 0.3, "optimizer": "lars",
        "momentum": 0.99, "final_momentum": 1.0, "scatter_weight": 0.001, "noise": 1e-4, "augmentation": "byol",
        "weight_decay": 1e-6, "final_weight_decay": 1e-6, "warmup_epochs": 10, "predictor_rate": 1.0,
        "queue": 10_240, "reassign": 10, "accumulation": 16,
    },
}  # fmt: skip
"""Settings of the published configurations, where they are not the defaults."""
OURS: dict[str, dict[str, Any]] = {
    "stl10": CIFAR20 | {"backbone": "resnet34", "augmentation": "simclr_blur"},
    "imagenet10": CIFAR20 | {"backbone": "resnet34", "augmentation": "simclr_blur"},
    "tiny_imagenet": CIFAR20 | {"backbone": "resnet34"},
}
"""Recipes for sets of which no configuration was published, after the nearest one that was."""


class ProPosConfig(PredictorConfig):
    """ProPos (arXiv 2111.11821): BYOL with prototype scattering. A key that is written wins over the preset."""

    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = PUBLISHED | OURS
    short: ClassVar[dict[str, Any]] = PredictorConfig.short | {"e_step_rows": "views"}
    """BYOL's, and E-steps that take no pass of their own: there is one after every epoch."""
    revision: ClassVar[int] = 4
    name: Literal["propos"] = "propos"
    """BYOL with prototypes that scatter."""
    preset: Literal[
        "none",
        "short",
        "cifar10_r18",
        "cifar20_r18",
        "cifar20_r34",
        "imagenetdogs_r34",
        "imagenet_r50",
        "stl10",
        "imagenet10",
        "tiny_imagenet",
    ] = "none"  # type: ignore[assignment]
    """The published configurations, and recipes after them for stl10, imagenet10 and tiny_imagenet. none: the defaults,
    those of CIFAR-10. short: see the other methods."""
    scatter_weight: float = Field(0.1, ge=0)
    """λ, on the prototypes' loss. Effective in full whatever the number of workers; the published runs on 4 GPUs
    had a quarter of it."""
    noise: float = Field(0.001, ge=0)
    """σ, deviation of the noise on the embedding before the predictor."""
    temperature: float = Field(0.5, gt=0)
    """Of the prototypes' loss."""
    queue: int = Field(0, ge=0)
    """Keys of earlier batches that count in the prototypes; for batches with few rows of each cluster."""
    resample: bool = False
    """Whether epochs draw each cluster equally often."""


class SimClrConfig(PixelConfig):
    """SimCLR (arXiv 2002.05709), clustered by k-means."""

    short: ClassVar[dict[str, Any]] = SHORT_CONTRAST
    name: Literal["simclr"] = "simclr"
    """Contrast of all images of a batch."""
    features: int = Field(128, ge=2)
    """d, width of the space in which rows are compared and clustered."""
    temperature: float = Field(1.0, gt=0)
    """Of the cosines; the program's default, the paper takes 0.5 on small images."""
    reassign: int = Field(10, ge=1)
    """Epochs between two E-steps, which SimCLR does not learn from."""


class SimSiamConfig(PixelConfig):
    """SimSiam (arXiv 2011.10566), clustered by k-means."""

    revision: ClassVar[int] = 4
    short: ClassVar[dict[str, Any]] = SHORT_PREDICTION | {
        "features": 512, "bottleneck": 128, "predictor_rate": 10.0, "fix_predictor_rate": False
    }  # fmt: skip
    """Narrower heads, and a predictor that follows."""
    short_batch: ClassVar[int] = 64
    name: Literal["simsiam"] = "simsiam"
    """Prediction of the network's own output, without negatives or a copy."""
    features: int = Field(2048, ge=2)
    """d, width of the space in which rows are compared and clustered."""
    bottleneck: int = Field(512, ge=1)
    """Width of the predictor's hidden layer."""
    layers: Literal[2, 3] = 2
    """Of the projector."""
    predictor_rate: float = Field(1.0, gt=0)
    """Learning rate of the predictor relative to the others'."""
    fix_predictor_rate: bool = True
    """Whether the predictor's learning rate stays at the peak, without warm-up and cosine, as published."""
    learning_rate: float = Field(0.06, gt=0)
    """Peak learning rate per 256 rows of batch: the rate used is this × batch_size / 256."""
    reassign: int = Field(50, ge=1)
    """Epochs between two E-steps, which SimSiam does not learn from."""


class CppPixelsConfig(CppConfig):
    """CPP on images (arXiv 2306.05272): a pretrained network inside, frozen or with its last blocks trained."""

    revision: ClassVar[int] = 3
    reads_pixels: ClassVar[bool] = True
    pixel_settings: ClassVar[Mapping[str, Any]] = {"image_size": 224, "resize": "crop"}
    name: Literal["cpp_pixels"] = "cpp_pixels"  # type: ignore[assignment]
    """CPP with its backbone inside."""
    backbone: str = "open_clip/ViT-L-14"
    """open_clip/<architecture> or timm/<architecture>; `.<tag>` may follow, as in `encoder.name`."""
    pretrained: str | None = None
    """Its weights, as in `encoder.pretrained`: a tag, a path or a URI. A fitted model holds no more of them than the
    trained blocks, so that they must stay where they are."""
    augmentation: Literal["none"] | Family = "none"
    """Family of the random view that a step sees of each image; none, as published: the image."""
    tune: Literal["none", "last_blocks"] = "none"
    """none, as published: the backbone is frozen. last_blocks: the last `tuned_blocks` of its longest stage train."""
    tuned_blocks: int = Field(1, ge=1)
    """Blocks that train with `tune: last_blocks`."""
    tune_rate: float = Field(0.1, gt=0)
    """Learning rate of the trained blocks relative to the others'."""

    @model_validator(mode="after")
    def _is_a_network(self) -> CppPixelsConfig:
        if self.encoder(1).family not in ("open_clip", "timm"):
            raise ValueError(f"backbone = {self.backbone}: must be open_clip/<architecture> or timm/<architecture>")
        if self.tune == "none" and {"tuned_blocks", "tune_rate"} & self.model_fields_set - {"tune"}:
            raise ValueError("tuned_blocks, tune_rate: have no effect with tune: none; set tune: last_blocks")
        return self

    def encoder(self, side: int) -> EncoderConfig:
        """Return the settings of the backbone as an encoder of images of that side, in pixels."""
        return EncoderConfig(
            name=self.backbone, pretrained=self.pretrained, image_size=side, normalize=False, precision="fp32"
        )
