"""What the methods that learn from pixels share: views, the E-step, features and clusters.

Rows are images as the encoder `pixels` gives them: values from 0 to 1, row-major, channels last. After every
`reassign` epochs all rows are mapped to features and cut by spherical k-means (the E-step of ProPos' EM framework,
arXiv 2111.11821, section 3.4); its centres are the method's clusters. Everything random is keyed by (seed, step), and
batch norm is one of all workers' rows, so that a training does not depend on their number.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from rayclust.arrays import require_matrix
from rayclust.clustering import gmm, kmeans
from rayclust.distributed import all_reduce, data_group, differentiable_all_gather, own_slice
from rayclust.errors import ConfigError
from rayclust.kernels.screening import accum_dtype
from rayclust.methods.base import BaseTrainer, Batch, Method, Rows
from rayclust.methods.layers import ema_update, matmul_dtype
from rayclust.methods.pixels.augment import FAMILIES, SquareImages, batch_view, keyed_seed
from rayclust.methods.pixels.backbones import SyncedBatchNorm2d, build_backbone, folded
from rayclust.methods.pixels.settings import MomentumConfig, PixelConfig
from rayclust.methods.settings import Plan
from rayclust.settings import GmmOptions, KMeansOptions

BLOCK, CPU_BLOCK = 512, 128
"""Images that go through a network at once outside of training; on a CPU as many as stay in its cache."""
MIXTURE = ("weights", "means", "variances")
"""Parts of a `gmm.Mixture`, in its order."""
PIXEL_STATE = ("mean", "std", "centers", "mixture_")
"""Prefixes of what every fitted method holds beside the networks that features need."""
TEMPERATURE = 0.1
"""Of the probabilities when assigning: the softmax of cosines to the centres divided by it."""


def accumulated(x: Tensor) -> Tensor:
    """Return a network's rows in the dtype in which losses are computed: float32 or wider."""
    return x.to(accum_dtype(x.dtype))


class PixelMethod(Method):
    """A method on images; a subclass has the networks and `training_step`.

    Args:
        config: the settings.
        dimension: D = side² × channels of the square images.
        count: N, the rows of all workers.
        seed: of weights, views and k-means.

    Raises:
        ConfigError: D is not that of square images with 1 or 3 channels.
    """

    config_type: ClassVar[type[PixelConfig]]
    config: PixelConfig
    mean: Tensor
    std: Tensor
    centers: Tensor
    labels: Tensor
    epochs_done: Tensor
    projector: nn.Module
    reads_first_clusters: bool = False
    """Whether steps read clusters before the first E-step that an epoch ends with."""
    kept: ClassVar[tuple[str, ...]] = (*PIXEL_STATE, "backbone.", "projector.")

    def __init__(self, config: PixelConfig, dimension: int, count: int, seed: int) -> None:
        config = config.resolved(count)
        super().__init__(config, dimension, count, seed)
        self.shape = SquareImages.of(dimension, config.name)
        self.channels = self.shape.channels
        self.plan, self.parts = Plan.of(config, count), config.accumulation
        self.backbone, self.backbone_width = build_backbone(config.backbone, self.shape.side, self.channels, seed)
        self.width = config.features
        self.register_buffer("mean", torch.zeros(self.channels))
        self.register_buffer("std", torch.ones(self.channels))
        self.register_buffer("centers", torch.zeros(config.clusters, self.width))
        if config.e_step == "mixture":
            for name, shape in zip(MIXTURE, ((), (self.width,), (self.width,)), strict=True):
                self.register_buffer(f"mixture_{name}", torch.ones(config.clusters, *shape, dtype=torch.float64))
        self.register_buffer("labels", torch.zeros(count, dtype=torch.long))
        self.register_buffer("epochs_done", torch.zeros((), dtype=torch.long))
        self._rows: Rows | None = None  # for as long as a fit runs

    @property
    def block(self) -> int:
        """Images that go through a network at once outside of training."""
        return CPU_BLOCK if self.mean.device.type == "cpu" else BLOCK

    @contextmanager
    def keyed_weights(self) -> Iterator[None]:
        """Let the layers that are built in the block start from weights that depend on the method's seed alone."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(keyed_seed(self.seed, 0))
            yield

    @property
    def embedder(self) -> nn.Sequential:
        """The network from normalised images to the space of clusters: Float[B C H W] to Float[B d], of any length."""
        return nn.Sequential(self.backbone, self.projector)

    @property
    def trunk(self) -> nn.Module:
        """The network below the projector, Float[B C H W] to Float[B F], which serves as an encoder."""
        return self.embedder[0]

    # Views.

    def normalized(self, images: Tensor) -> Tensor:
        """Subtract each channel's mean over the rows and divide by its deviation, in one pass over memory."""
        scaled = torch.addcmul((-self.mean / self.std)[:, None, None], images, (1 / self.std)[:, None, None])
        return scaled.contiguous(memory_format=torch.channels_last)

    def normalized_parts(self, x: Tensor) -> Iterator[Tensor]:
        """Yield the images of rows Float[B D], normalised, some at a time; at least one tensor, empty without rows."""
        require_matrix(x, "x", self.dimension)
        for part in torch.split(x, self.block):
            yield self.normalized(self.shape.images(part.to(self.mean)))

    def views(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return two random views of a worker's part of a batch, normalised: Float[B C H W] each."""
        images, size = self.shape.images(batch.x[0]), self.plan.batch_size
        first, second = (
            batch_view(images, options, batch, size, keyed_seed(self.seed, batch.step, number))
            for number, options in enumerate(FAMILIES[self.config.augmentation])
        )
        return self.normalized(first), self.normalized(second)

    def autocast(self) -> AbstractContextManager[Any]:
        """Return the context in which networks compute in training."""
        dtype = matmul_dtype(self.config.precision, self.mean)
        return torch.autocast(self.mean.device.type, dtype, enabled=dtype == torch.bfloat16)

    # Training.

    def fit(self, rows: Rows, trainer: BaseTrainer) -> None:
        """Measure the pixels' moments, then alternate E-steps and epochs.

        Args:
            rows: images, all workers'.
            trainer: runs the steps.
        """
        self._rows = rows
        trainer.fit(self, rows, start=self._start)
        self._rows = None

    def _start(self) -> None:
        sums = self.mean.new_zeros((3, self.channels), dtype=torch.float64)
        for block in cast(Rows, self._rows).blocks():
            for part in torch.split(block, self.block):
                values = self.shape.images(part.to(self.mean)).double().transpose(0, 1).flatten(1)
                sums += torch.stack([values.sum(1), values.square().sum(1), torch.full_like(sums[0], values.shape[1])])
        total, squares, count = all_reduce(sums)
        self.mean.copy_(total / count)
        self.std.copy_((squares / count - (total / count).square()).clamp(min=1e-6).sqrt())
        if self.reads_first_clusters:
            self.e_step()

    @torch.no_grad()
    def e_step(self) -> dict[str, float]:
        """Cluster the features of all rows; sets `centers` and every row's `labels`.

        Returns:
            "inertia": mean 2·(1 − cosine) to the centre; "feature_std": deviation of the features' components, times
            √d: 1 where they fill all directions, 0 where they have collapsed.
        """
        c, is_last = self.config, int(self.epochs_done) == self.plan.epochs
        z = self.own_features(exactly=is_last)
        goes_on = c.warm_start and not is_last and bool(self.centers.any())
        if c.e_step == "mixture":
            options = GmmOptions(clusters=c.clusters, covariance="spherical", restarts=c.restarts)
            mixture = self.mixture() if goes_on else gmm.start(lambda: [z], options, self.seed)
            for reached in gmm.advance(lambda: [z], options, mixture):
                mixture = reached
            for name in MIXTURE:
                self.get_buffer(f"mixture_{name}").copy_(getattr(mixture, name))
            self.centers.copy_(functional.normalize(mixture.means, dim=1))
            labels = mixture.log_joint(z).argmax(1)
        else:
            init = self.centers if goes_on else None
            result = kmeans.fit(
                lambda: [z], KMeansOptions(clusters=c.clusters, restarts=c.restarts), seed=self.seed, init=init
            )
            self.centers.copy_(result.centers)
            labels, _ = kmeans.assign(z, self.centers)
        self.labels.copy_(data_group().all_gather_cat(labels, self.count))
        inertia = all_reduce((z - self.centers[labels]).square().sum(dtype=torch.float64)) / self.count
        moments = all_reduce(torch.stack([z.sum(0), z.square().sum(0)]).double()) / self.count
        deviation = (moments[1] - moments[0].square()).clamp(min=0).sqrt().mean()
        self.after_e_step(z)
        return {"inertia": float(inertia), "feature_std": float(deviation) * math.sqrt(self.width)}

    def own_features(self, *, exactly: bool) -> Tensor:
        """Map this worker's rows to features, Float[n d]: exactly as rows are assigned, or as training computes."""
        network: nn.Module = copy.deepcopy(self.embedder).eval().requires_grad_()  # such weights autocast casts once
        if not (exactly or self.config.backbone.startswith("timm/")):  # whose forward may depend on what it is given
            network = folded(network)
        with nullcontext() if exactly else self.autocast():
            parts = [self._features(network, block) for block in cast(Rows, self._rows).blocks()]
            return torch.cat([self.centers[:0], *parts])

    def mixture(self) -> gmm.Mixture:
        """Return the Gaussians of the last E-step, with `e_step: mixture`."""
        weights, means, variances = (self.get_buffer(f"mixture_{name}").double() for name in MIXTURE)
        return gmm.Mixture(weights, means, variances)

    def after_e_step(self, z: Tensor) -> None:
        """Take this worker's features of the E-step, unit rows Float[n d]."""

    def on_epoch_end(self, metrics: dict[str, Tensor]) -> dict[str, Any]:
        """Run the E-step where it is due; returns its metrics and the epoch's."""
        self.epochs_done += 1
        row = super().on_epoch_end(metrics)
        done = int(self.epochs_done)
        if done % self.config.reassign == 0 or done == self.plan.epochs:
            row |= self.e_step()
        return row

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Return all parameters with decay; for lars those with one axis are exempt. A predictor has its own rate."""
        rates = getattr(self.config, "predictor_rate", 1.0), getattr(self.config, "fix_predictor_rate", False)
        scales = {id(p): rates for p in getattr(self, "predictor", nn.Identity()).parameters()}
        groups: dict[tuple[float, bool, bool], dict[str, Any]] = {}
        for parameter in self.parameters():
            if parameter.requires_grad:
                scale, is_fixed = scales.get(id(parameter), (1.0, False))
                decays = self.config.optimizer != "lars" or parameter.dim() > 1
                rate = {"lr_scale": scale, "constant_lr": is_fixed}
                group = groups.setdefault((scale, is_fixed, decays), {"params": [], **rate})
                group["params"].append(parameter)
                if not decays:
                    group["weight_decay"] = 0.0
        return list(groups.values())

    # A fitted method.

    @torch.no_grad()
    def read(self, x: Tensor) -> Tensor:
        """Map images to the rows of the network below the projector: Float[B D] to Float[B F]."""
        return torch.cat([accumulated(self.trunk(images)) for images in self.normalized_parts(x)])

    @torch.no_grad()
    def transform(self, x: Tensor) -> Tensor:
        """Map images to features: Float[B D] to unit rows Float[B d]."""
        return self._features(self.embedder, x)

    def _features(self, network: nn.Module, x: Tensor) -> Tensor:
        """Map images to features by a network that is the `embedder` or computes the same."""
        parts = [accumulated(network(images)) for images in self.normalized_parts(x)]
        return functional.normalize(torch.cat(parts), dim=1)

    @torch.no_grad()
    def predict_proba(self, x: Tensor) -> Tensor:
        """Return Float[B K] for Float[B D], rows sum to 1: responsibilities, or largest for the nearest centre."""
        if self.config.e_step == "mixture":
            z = self.transform(x)
            return self.mixture().log_joint(z).softmax(dim=1).to(z)
        return (self.transform(x) @ self.centers.T / TEMPERATURE).softmax(dim=1)

    def prototypes(self) -> Tensor:
        """Return the clusters' centres among the features, unit rows Float[K d]."""
        return self.centers


class MomentumMethod(PixelMethod):
    """A method with a slowly moving copy of its network, in whose features rows are clustered."""

    kept = (*PIXEL_STATE, "target.")
    config: MomentumConfig
    online: nn.Sequential
    target: nn.Sequential
    seen: Tensor

    def start_target(self, online: nn.Sequential) -> None:
        """Take a network and its projector, and make the copy."""
        for layer in online.modules():
            if isinstance(layer, SyncedBatchNorm2d):
                layer.groups = self.config.norm_groups
        self.online, self.target = online, copy.deepcopy(online).requires_grad_(False)
        del self.backbone  # it is a part of the network
        if self.config.e_step_rows == "views":
            self.register_buffer("seen", torch.zeros(self.count, self.width))

    @torch.no_grad()
    def take_keys(self, keys: Sequence[Tensor], batch: Batch) -> None:
        """Take the copy's rows of a batch's views, Float[B d] each, once their loss is computed."""
        if self.config.e_step_rows == "views":
            total = torch.stack([functional.normalize(accumulated(k), dim=1) for k in keys]).sum(0)
            self.seen[in_batch_order(batch.rows)] = in_batch_order(functional.normalize(total, dim=1)).to(self.seen)

    def own_features(self, *, exactly: bool) -> Tensor:
        """Return those of the latest views where training has made them of every row; see `PixelMethod`."""
        if exactly or self.config.e_step_rows == "images" or not bool(self.seen.any(dim=1).all()):
            return super().own_features(exactly=exactly)
        return self.seen[own_slice(self.count)]

    def fit(self, rows: Rows, trainer: BaseTrainer) -> None:
        """See `PixelMethod.fit`.

        Raises:
            ConfigError: `norm_groups` is above 1, and no multiple of the workers or no divisor of the batch.
        """
        groups, size, workers = self.config.norm_groups, self.plan.batch_size, data_group().size
        if groups > 1 and (groups % workers or size % groups or size == groups):  # one row has no variance
            raise ConfigError(
                f"method.norm_groups = {groups}: must be 1, or a multiple of the {workers} workers that cuts the "
                f"batch of {size} rows into equal groups of two or more"
            )
        super().fit(rows, trainer)

    @torch.no_grad()
    def shuffled(self, x: Tensor, batch: Batch, number: int, *, back: bool = False) -> Tensor:
        """Exchange a batch's rows between groups and workers, or undo that: Shuffling-BN (arXiv 1911.05722, 3.3).

        The copy then sees an image among others than the network does, so that the statistics of a group don't tell
        which key is a query's. With one group there is nothing to tell, and rows stay.

        Args:
            x: Float[B ...], this worker's part.
            batch: what it is of.
            number: of the view; each has an order of its own.
            back: whether to undo the exchange.
        """
        if self.config.norm_groups == 1:
            return x
        generator = torch.Generator().manual_seed(keyed_seed(self.seed, batch.step, 5, number))
        order = torch.randperm(self.plan.batch_size, generator=generator)
        return batch.own(in_batch_order(x)[(order.argsort() if back else order).to(x.device)])

    def update_target(self, batch: Batch, momentum: float, final: float) -> None:
        """θ' ← m θ' + (1 − m) θ before every step but the first, m on half a cosine from `momentum` to `final`.

        Args:
            batch: of the step.
            momentum: at the first step.
            final: at the end; equal to `momentum` for a constant one.
        """
        if batch.step > 0 and batch.part == 0:
            m = final - (final - momentum) * (1 + math.cos(math.pi * batch.step / self.plan.steps)) / 2
            ema_update(self.target, self.online, m)

    @property
    def embedder(self) -> nn.Sequential:
        """The copy, Float[B C H W] to Float[B d]."""
        return self.target


def in_batch_order(x: Tensor) -> Tensor:
    """Return all workers' rows of a tensor in the order of their batch; called by all workers together."""
    group = data_group()
    places = torch.arange(len(x), device=x.device) * group.size + group.rank
    return differentiable_all_gather(x)[differentiable_all_gather(places).argsort()]


class KeyQueue(nn.Module):
    """The newest keys of all workers, oldest replaced first.

    Args:
        size: Q.
        width: d.
    """

    keys: Tensor
    rows: Tensor
    position: Tensor

    def __init__(self, size: int, width: int) -> None:
        super().__init__()
        self.register_buffer("keys", torch.zeros(size, width))
        self.register_buffer("rows", torch.full((size,), -1))
        self.register_buffer("position", torch.zeros((), dtype=torch.long))

    @torch.no_grad()
    def add(self, keys: Tensor, rows: Tensor) -> None:
        """Add this worker's keys Float[B d] of the rows Int64[B]; called by all workers together."""
        keys, rows = (in_batch_order(each)[-len(self.rows) :] for each in (keys.to(self.keys), rows))
        places = (torch.arange(len(rows), device=rows.device) + self.position) % len(self.rows)
        self.keys[places], self.rows[places] = keys, rows
        self.position.copy_((self.position + len(rows)) % len(self.rows))

    def filled(self) -> tuple[Tensor, Tensor]:
        """Return the keys so far, Float[n d], and their rows, Int64[n]."""
        known = self.rows >= 0
        return self.keys[known], self.rows[known]
