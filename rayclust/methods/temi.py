"""TEMI: heads on frozen embeddings, trained to agree on neighbours with their own moving averages.

Settings, presets, division over workers, and the method, in this order. Source: arXiv 2303.17896. Departures from the
published program are listed in docs/methods.md; the ones that change a number are the log space, the kNN that never
lists a row itself, and epochs below 30.
"""

from __future__ import annotations

import copy
import logging
import math
from dataclasses import dataclass, fields, replace
from functools import cache
from itertools import pairwise
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, field_validator, model_validator
from torch import Tensor, nn
from torch.nn import functional

from rayclust import distributed
from rayclust.arrays import require_matrix
from rayclust.errors import ConfigError
from rayclust.losses import information
from rayclust.losses.information import InformationOptions, Marginal, information_losses, log_probabilities
from rayclust.methods.base import BaseTrainer, Batch, Method, MethodState, Pairing, Rows, cosine_schedule
from rayclust.methods.heads import Heads, HeadShape, Precision, ema_update
from rayclust.methods.settings import Plan, TrainedConfig
from rayclust.methods.temi_init import (
    ComponentRows,
    Start,
    StartOptions,
    best_by_modularity,
    choose_start,
    may_replace_start,
    principal_axes,
    start_from_kmeans,
    start_from_partition,
)

logger = logging.getLogger(__name__)

PREDICT_ROWS = 8192
"""Rows whose hidden units are held at once in `predict_proba`."""
COLLAPSE_ENTROPY = 0.5
"""Part of ln K below which the entropy of a head's shares is a sign of collapse."""
BETA_STEP = 0.1
"""Difference between β and the lower one that a warning of collapse proposes."""
WHOLE_STATE = ("best_head", "head_losses", "basis")
"""Tensors of the state that every worker holds whole, whatever heads it trains."""


class TemiConfig(TrainedConfig):
    """TEMI (arXiv 2303.17896). A key that is written wins over the preset."""

    revision: ClassVar[int] = 5
    draws_pairs: ClassVar[bool] = True
    name: Literal["temi"] = "temi"
    """Teacher ensemble-weighted pointwise mutual information."""
    preset: Literal["auto", "readme", "paper", "none"] = "auto"
    """auto: chosen from N, D and K without labels. readme, paper: the published settings, but that a training of fewer
    than 3,000 steps starts from k-means unless `warm_start: none` is written. none: the defaults below."""
    heads: int = Field(16, ge=1)
    """H, heads trained side by side; `selection` says which one is kept. auto: 2 for at most 65,536 rows in at most 64
    clusters, else 16; a vote of heads by `consensus` wants 16 of them, written."""
    neighbors: int = Field(50, ge=1)
    """Nearest neighbours of a row among which its partner is drawn."""
    loss: Literal["temi", "pmi", "wmi", "scan"] = "temi"
    """What is minimised; see losses/information.py."""
    beta: float = Field(0.6, gt=0)
    """β, above 0.5. Lower keeps clusters more even; 1 for many more clusters than classes. SCAN's loss has none."""
    positive_pmi: bool = False
    """Whether a pair's information is cut off at 0 from below."""
    entropy_weight: float | None = None
    """α of WMI's and SCAN's entropy. None: 5 for SCAN, 0 for WMI."""
    student_temperature: float = Field(0.1, gt=0)
    """Divides the student's logits."""
    teacher_temperature: float = Field(0.1, gt=0)
    """Divides the teacher's logits after its warm-up, and when assigning."""
    warmup_teacher_temperature: float = Field(0.1, gt=0)
    """The teacher's temperature in the first epoch."""
    warmup_teacher_temperature_epochs: int = Field(30, ge=0)
    """Epochs in which the teacher's temperature moves linearly; longer than the training is allowed."""
    teacher_momentum: float = Field(0.996, ge=0, le=1)
    """Momentum of the teacher at the first step."""
    final_teacher_momentum: float = Field(0.996, ge=0, le=1)
    """Momentum of the teacher at the end of a cosine."""
    marginal_momentum: float = Field(0.9, ge=0, lt=1)
    """Momentum of the clusters' running shares p̂."""
    freeze_last_layer: int = Field(1, ge=0)
    """Epochs at the start in which the last layer is not trained."""
    components: int = Field(0, ge=0)
    """Leading principal components on which heads train; the first layer takes rows again after it. 0, or not less than
    the rows' width: the rows as they are. auto: 512 where it takes 2 heads, else 0."""
    hidden: int = Field(512, ge=1)
    """Width of the hidden layers of a head."""
    bottleneck: int = Field(256, ge=1)
    """Width of the unit rows before the last layer."""
    layers: int = Field(2, ge=1)
    """Linear layers of a head before the last one."""
    batch_norm: bool = False
    """Whether hidden layers are batch-normalised, over all workers."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Share of hidden units dropped in training."""
    final_gelu: bool = False
    """Whether a GELU follows the bottleneck."""
    learn_scale: bool = True
    """Whether the length of the last layer's rows is learnt; otherwise it stays 1."""
    noise: float = Field(0.0, ge=0)
    """Standard deviation of Gaussian noise added to each value of a view; the published option adds 0.1."""
    repeats: int = Field(1, ge=1)
    """Views drawn of a row and of its neighbour, each with its own noise."""
    warm_start: Literal["none", "kmeans", "auto"] = "none"
    """kmeans: heads start at the best of several k-means partitions of rows averaged with their neighbours. auto: all
    start at the partition that the method `auto` chooses."""
    start_restarts: int = Field(16, ge=1)
    """k-means partitions from which a warm start chooses by modularity."""
    start_neighbors: int = Field(10, ge=1)
    """Nearest neighbours that a warm start averages and that modularity counts."""
    start_rounds: int = Field(2, ge=0)
    """How often a warm start averages rows with their neighbours."""
    selection: Literal["loss", "modularity"] = "loss"
    """Head that is kept. loss: least training loss in the last epoch, as published. modularity: keeps most neighbours
    together, by its clusters of all rows; less drawn to even sizes. Neither sees labels."""
    keep_heads: bool = False
    """Whether the model holds all heads, as members of a `consensus`; else the best alone, which is all that clusters
    are taken from. Changes no result."""
    precision: Precision = "auto"
    """Matrix products in training. auto: bf16 where the processor multiplies it fast, else float32."""
    stop_on_collapse: bool = False
    """Whether training ends with the first epoch in which the best head's clusters have collapsed; else a warning."""
    parallel: str = Field("auto", pattern=r"^(auto|data|heads|[1-9]\d*x[1-9]\d*)$")
    """What workers divide. data: the rows of a batch. heads: the heads; next to nothing is sent. RxC: heads in R parts,
    rows in C. auto: the fastest. All are the same training."""
    worker_memory: float = Field(24.0, gt=0)
    """GB, of 10⁹ bytes, that a worker has for heads, optimiser and logits; only `parallel: auto` on several workers
    refuses heads that do not fit. 24 is an assumption about a GPU: nothing is measured."""

    @field_validator("parallel", mode="before")
    @classmethod
    def _refuse_divided_clusters(cls, value: Any) -> Any:
        if isinstance(value, str) and (value == "clusters" or value.count("x") == 2):
            raise ValueError("clusters are no longer divided over workers; use auto, data, heads or RxC")
        return value

    @model_validator(mode="after")
    def _settings_have_an_effect(self) -> TemiConfig:
        shallow = "there is no hidden layer to act on, set layers above 1"
        # A saved config has all fields set, β too, whatever the loss.
        is_written = "beta" in self.model_fields_set and not type(self).model_fields.keys() <= self.model_fields_set
        refused = (
            ("entropy_weight", self.loss in ("temi", "pmi") and self.entropy_weight, "is for loss: wmi and scan"),
            ("beta", self.loss == "scan" and is_written, "is not for loss: scan"),
            ("positive_pmi", self.loss == "scan" and self.positive_pmi, "is not for loss: scan"),
            ("batch_norm", self.layers == 1 and self.batch_norm, shallow),
            ("dropout", self.layers == 1 and self.dropout, shallow),
        )
        for name, is_idle, reason in refused:
            if is_idle:
                raise ValueError(f"{name} = {getattr(self, name)}: {reason}")
        return self

    def resolved(self, count: int, dimension: int) -> TemiConfig:
        """Return this config with its preset written out; `preset` is then `none`.

        Args:
            count: N.
            dimension: D.
        """
        chosen: dict[str, Any] = {}
        if self.preset == "auto":
            chosen = auto_settings(count, dimension, self.clusters, self)
        elif self.preset != "none":
            chosen = published_settings(self.preset, count, self.clusters)
        written = {key: getattr(self, key) for key in self.model_fields_set}
        if self.loss == "scan":
            chosen.pop("beta", None)
        config = TemiConfig.model_validate({**chosen, **written, "preset": "none"})
        if self.preset in ("readme", "paper") and Plan.of(config, count).steps < SHORT_STEPS:
            config = TemiConfig.model_validate({**chosen, "warm_start": "kmeans", **written, "preset": "none"})
        return config

    def trained_width(self, dimension: int) -> int:
        """Return the width of what heads train on for rows of width `dimension`."""
        return min(self.components or dimension, dimension)

    def head_shape(self, dimension: int) -> HeadShape:
        """Return the sizes and parts of the heads on rows of width `dimension`."""
        shared = {field.name for field in fields(HeadShape)} & TemiConfig.model_fields.keys()
        return HeadShape(dimension=dimension, **{name: getattr(self, name) for name in shared})

    def layout(self, count: int, dimension: int, workers: int) -> Layout:
        """Return how workers divide the training of this resolved config.

        Raises:
            ConfigError: they cannot divide it as `parallel` says, or heads do not fit.
        """
        if self.clip_norm is not None and self.parallel not in ("auto", "data"):
            raise ConfigError(f"method.parallel = {self.parallel}: clip_norm needs every head's gradient, set data")
        shape, plan = self.head_shape(self.trained_width(dimension)), Plan.of(self, count)
        layout = choose_layout(shape, plan, workers, self.parallel, self.worker_memory * GIGABYTE)
        return layout if self.clip_norm is None else Layout(1, workers)

    def describe_plan(self, count: int, dimension: int, workers: int, device: str = "cpu") -> str:
        """Describe the layout and its costs in a line; see `BaseMethodConfig`."""
        config = self.resolved(count, dimension)
        shape, plan = config.head_shape(config.trained_width(dimension)), Plan.of(config, count)
        layout = config.layout(count, dimension, workers)
        cost = estimate_cost(shape, plan, layout, device)
        return (
            f"{layout}: {cost.state_bytes / GIGABYTE:.2f} GB of weights and optimiser, "
            f"{cost.logits_bytes / GIGABYTE:.2f} GB of logits and {cost.passing_bytes / GIGABYTE:.2f} GB in passing "
            f"a worker, {cost.sent_bytes / 1e6:.3g} MB sent a step, {plan.steps:,} steps of "
            f"{cost.operations / 1e12:.3g} TFLOP ({cost.operations * plan.steps / 1e15:.3g} PFLOP a worker)"
        )


# Published settings.

OVERCLUSTERED_ROWS, OVERCLUSTERED_CLUSTERS = 200, 1_000
"""Rows per cluster below which, and clusters from which, a partition counts as much finer than the classes (ImageNet at
25,000 has 51 rows each)."""
IMAGENET_CLASS_ROWS = 1_000, 1_500
"""Rows per cluster of ImageNet and its subsets (1,281 a class; CIFAR-100 has 600, CIFAR-20 3,000, CIFAR-10 6,000)."""
CIFAR_ROWS = 60_000
"""Rows of the CIFAR sets, train and test; ImageNet's smallest subset, IN50, has 64,000."""
STL10_ROWS = 13_000
"""Rows up to which the paper's settings for STL-10 hold (5,000 in train, 8,000 in test, 800 epochs)."""
SHORT_STEPS = 3_000
"""Steps below which heads start from k-means, unless `warm_start: none` is written: random ones do not settle in them.
A departure: of the published sets it concerns STL-10 with `readme` (400 steps of 5,000 rows, 1,200 of 13,000)."""


def is_overclustered(count: int, clusters: int) -> bool:
    """Return whether a partition of `count` rows is much finer than classes."""
    return clusters >= OVERCLUSTERED_CLUSTERS and count / clusters < OVERCLUSTERED_ROWS


def published_settings(preset: Literal["readme", "paper"], count: int, clusters: int) -> dict[str, Any]:
    """Return published config values for N rows in K clusters.

    Args:
        preset: readme: the example commands of the published program; 16 heads, 100 epochs, batch 1024 (128 when
            over-clustering). paper: Table 10; 50 heads, 200 epochs (800 on STL-10), batch 512 (1024 on ImageNet), and
            β 0.55 for CIFAR-20, for which a set is taken by its 20 clusters of at least 2,000 rows. Both take 25
            neighbours on ImageNet and 50 elsewhere. A set counts as ImageNet by its rows per cluster and its size, or
            where it is over-clustered and larger than CIFAR.
        count: N.
        clusters: K.
    """
    fine, (least, most) = is_overclustered(count, clusters), IMAGENET_CLASS_ROWS
    imagenet = count > CIFAR_ROWS and (fine or least <= count / clusters <= most)
    values: dict[str, Any] = {
        "learning_rate": 1e-4,
        "min_learning_rate": 1e-4,
        "weight_decay": 1e-4,
        "final_weight_decay": 1e-4,
        "teacher_momentum": 0.996,
        "final_teacher_momentum": 0.996,
        "neighbors": 25 if imagenet else 50,
        "warmup_epochs": 20,
    }
    if preset == "readme":
        return {
            **values,
            "heads": 16,
            "epochs": 100,
            "batch_size": 128 if fine else 1024,
            "beta": 1.0 if fine else 0.6,
        }
    coarse = clusters == 20 and count / clusters >= 2_000
    return {
        **values,
        "heads": 50,
        "epochs": 800 if count <= STL10_ROWS else 200,
        "batch_size": 1024 if imagenet else 512,
        "warmup_epochs": 10 if imagenet else 20,
        "beta": 1.0 if fine else 0.55 if coarse else 0.6,
    }


# Settings from the size of the data, without labels. The published ones count epochs of sets of 50,000 rows and more;
# on 3,000 rows they give 1,000 steps, in which random heads do not settle. Here steps are counted, and heads start from
# k-means, so that a few hundred steps do. docs/methods.md has the numbers behind each choice.

STEPS_PER_CLUSTER = 30
"""Steps of a training that starts warm, for each cluster; twice as many change little."""
MIN_STEPS = 200
PUBLISHED_EPOCHS = 200
PUBLISHED_RATE = 2e-4
"""The published learning rate at batch 512."""
PUBLISHED_STEPS = 3_000
"""Steps from which the published rate and momentum are kept; shorter trainings move faster."""
MAX_SPEED = 10.0
"""Largest factor on the published rate, and divisor of the published horizon of the teacher."""
START_LIMIT = 2e13
"""Multiplications of one k-means partition above which heads start from random weights."""
FEW_HEADS, FEW_COMPONENTS, MANY_HEADS = 2, 512, 16
"""Heads that all start at one partition find much the same; from random weights they do not. 128 components lose 0.8
points of NMI on cifar10."""
FEW_ROWS, FEW_CLUSTERS = 65_536, 64
"""Rows, those that the start sees, and clusters up to which heads are few. Measured up to 10,000 and 20."""


def auto_settings(count: int, dimension: int, clusters: int, config: TemiConfig) -> dict[str, Any]:
    """Choose config values for N rows of width D in K clusters; keys that the config sets itself win over them.

    Args:
        count: N.
        dimension: D.
        clusters: K.
        config: as written; what depends on its batch size and steps uses them.
    """
    # 1. Start: warm, unless a single k-means partition takes too long.
    operations = 25.0 * min(count, max(65_536, 64 * clusters)) * clusters * dimension
    warm = operations <= START_LIMIT
    # 2. Batch: a quarter of the rows, as a power of 2 between 64 and 512; 1024 from 200,000 rows, as published.
    batch = 1024 if count >= 200_000 else max(64, min(512, 1 << max(0, (count // 4).bit_length() - 1)))
    batch = max(2, min(config.batch_size if "batch_size" in config.model_fields_set else batch, count))
    # 3. Steps: as published from random heads; fewer from warm ones, in proportion to the clusters.
    published = max(MIN_STEPS, PUBLISHED_EPOCHS * max(1, count // batch))
    steps = max(MIN_STEPS, min(published, STEPS_PER_CLUSTER * clusters)) if warm else max(published, PUBLISHED_STEPS)
    steps = config.steps or steps
    # 4. Speed: short trainings move faster.
    speed = min(MAX_SPEED, max(1.0, PUBLISHED_STEPS / steps))
    rate = PUBLISHED_RATE * speed * 256 / batch
    momentum = 1.0 - 0.004 * min(speed, 5.0)
    # 5. Neighbours: √(N / K), enough to walk through a cluster, too few to leave it.
    columns = max(1, min(round(min(50.0, max(3.0, math.sqrt(count / clusters)))), count - 1))
    # 6. β: 1 for partitions finer than classes, as published from random heads; warm ones need less push to evenness.
    beta = 1.0 if is_overclustered(count, clusters) else 0.8 if warm else 0.6
    # 7. Heads: few of them on leading components, eight times as many as clusters; else many on whole rows.
    few = warm and count <= FEW_ROWS and clusters <= FEW_CLUSTERS
    return {
        "heads": FEW_HEADS if few else MANY_HEADS,
        "components": FEW_COMPONENTS if few else 0,
        "steps": steps,
        "batch_size": batch,
        "learning_rate": rate,
        "min_learning_rate": rate,
        "warmup_steps": max(1, min(steps // 15, 20_000)),
        "teacher_momentum": momentum,
        "final_teacher_momentum": momentum,
        "beta": beta,
        "neighbors": columns,
        "freeze_last_layer": 0 if warm else 1,
        "warm_start": "auto" if warm else "none",
        "start_neighbors": min(10, columns),
        "selection": "modularity",
    }


# Division over workers. Rows divided: every worker holds all heads, and all gradients are summed in every step. Heads
# divided: every worker sees the whole batch, and all that is summed is one number a pair. Both are the same training.

OPERATIONS_PER_BYTE_SENT = 4000.0
"""Operations of matrix products in the time of a byte between workers: 400 TFLOP/s and 100 GB/s; CPUs have as many."""
OPERATIONS_PER_BYTE_HELD = 150.0
"""The same for a byte of memory that the optimiser reads or writes."""
MIN_GRADIENT_BYTES = 1 << 24
"""Bytes of gradients below which the rows are divided, whatever is faster."""
STATE_COPIES = 5
"""Student, teacher, gradient and the optimiser's two averages."""
OPTIMIZER_BYTES = 36
"""Read and written per parameter and step."""
FLOAT, NARROW = 4, 2
GIGABYTE = 1e9


@dataclass(frozen=True)
class Layout:
    """Workers in a mesh of `head_parts` × `row_parts`."""

    head_parts: int
    """Parts into which the heads are divided."""
    row_parts: int
    """Parts into which the rows of a batch are divided."""

    @property
    def workers(self) -> int:
        """W."""
        return self.head_parts * self.row_parts

    def __str__(self) -> str:
        if self.workers == 1:
            return "one worker"
        parts = {"heads": self.head_parts, "rows of a batch": self.row_parts}
        return " and ".join(f"{what} over {count}" for what, count in parts.items() if count > 1) + " workers"


@dataclass(frozen=True)
class Cost:
    """What the most loaded worker of a layout needs."""

    state_bytes: float
    """Parameters, their teacher, gradients and the optimiser's averages."""
    logits_bytes: float
    """Logits that are there at one time."""
    passing_bytes: float
    """Last layers as matrix products take them."""
    sent_bytes: float
    """Sent and received per step."""
    operations: float
    """Of matrix products per step."""
    step_operations: float
    """Time of a step, in operations: those of products, of sending, and of the optimiser's memory."""


def estimate_cost(shape: HeadShape, plan: Plan, layout: Layout, device: str = "cuda") -> Cost:
    """Estimate what a layout takes of each worker.

    Args:
        shape: of all heads.
        plan: of the training.
        layout: its division.
        device: `cpu` or `cuda`, where the workers compute.
    """
    heads, pairs = -(-shape.heads // layout.head_parts), -(-plan.batch_size // layout.row_parts)
    layers = list(pairwise(shape.widths))
    parameters = heads * (sum(o * i + o for i, o in layers) + shape.clusters * (shape.bottleneck + 1))
    # Products of a pair: teacher and student forward, both sides of the student back; rows get no gradient, so that the
    # first layer has one product less.
    products = 4 * sum(o * i for i, o in layers) - shape.widths[0] * shape.widths[1]
    products += 4 * shape.clusters * shape.bottleneck
    # Logits of the teacher, kept where they fit, and of a chunk of the student; last layers of that chunk's heads.
    logits = 2 * pairs * shape.clusters * NARROW
    kept, chunk = information.KEPT_BYTES[device], information.CHUNK_BYTES[device]
    last = min(heads, max(1, chunk // logits)) * shape.clusters * shape.bottleneck
    # Numbers sent: gradients and p̂ over rows, agreement over heads; a ring sends each about twice.
    ring_rows, ring_heads = (2 * (parts - 1) / parts for parts in (layout.row_parts, layout.head_parts))
    sent = FLOAT * ((parameters + heads * shape.clusters) * ring_rows + pairs * ring_heads)
    operations = float(heads * pairs * 4 * products)
    held = float(parameters) * OPTIMIZER_BYTES
    return Cost(
        state_bytes=float(FLOAT * STATE_COPIES * parameters),
        logits_bytes=float(min(heads * logits, kept) + min(heads * logits, chunk)),
        passing_bytes=float((2 * NARROW + FLOAT) * last),
        sent_bytes=sent,
        operations=operations,
        step_operations=operations + OPERATIONS_PER_BYTE_SENT * sent + OPERATIONS_PER_BYTE_HELD * held,
    )


def choose_layout(
    shape: HeadShape, plan: Plan, workers: int, wanted: str = "auto", memory: float = float("inf")
) -> Layout:
    """Return the layout that is wanted or, for `auto`, the one with the fastest steps.

    Args:
        shape: of all heads.
        plan: of the training.
        workers: W.
        wanted: `auto`, `data`, `heads`, or `RxC`: heads in R parts, rows in C.
        memory: bytes that a worker has, for `auto` on several workers.

    Raises:
        ConfigError: the workers do not make up that mesh, some would have no head, or a head does not fit.
    """
    if wanted != "auto":
        words = {"data": (1, workers), "heads": (workers, 1)}
        layout = Layout(*words.get(wanted) or (int(number) for number in wanted.split("x")))
        if layout.workers != workers:
            raise ConfigError(
                f"method.parallel = {wanted}: is for {layout.workers} workers, there are {workers}; "
                "set resources.workers, or auto"
            )
        if layout.head_parts > shape.heads:
            raise ConfigError(
                f"method.parallel = {wanted}: {shape.heads} heads cannot be divided over {layout.head_parts} workers; "
                "use fewer, or data"
            )
        return layout
    layouts = [Layout(parts, workers // parts) for parts in range(1, workers + 1) if workers % parts == 0]
    layouts = [grid for grid in layouts if grid.head_parts <= shape.heads and grid.row_parts <= plan.batch_size]
    gradient_bytes = estimate_cost(shape, plan, Layout(1, 1)).state_bytes / STATE_COPIES
    if not layouts or gradient_bytes < MIN_GRADIENT_BYTES:
        return Layout(1, workers)
    head = estimate_cost(replace(shape, heads=1), plan, Layout(1, 1))
    head_bytes = head.state_bytes + head.logits_bytes + head.passing_bytes
    if workers > 1 and head_bytes > memory:
        raise ConfigError(
            f"method.clusters = {shape.clusters}: a head takes {head_bytes / GIGABYTE:.1f} GB, a worker has "
            f"{memory / GIGABYTE:g}; use fewer clusters, or raise method.worker_memory"
        )
    return min(layouts, key=lambda grid: (estimate_cost(shape, plan, grid).step_operations, grid.head_parts))


def collapsed_heads(entropy: Tensor, live: Tensor, clusters: int) -> Tensor:
    """Return which heads have put most rows into few clusters: Bool[H].

    Low entropy alone is no collapse: classes may be of very different size. Half of the clusters must be dead as well.

    Args:
        entropy: Float[H], nats, of the clusters' shares.
        live: Int[H], clusters with more than a tenth of an even share.
        clusters: K.
    """
    return (entropy < COLLAPSE_ENTROPY * math.log(clusters)) & (2 * live <= clusters)


class Temi(Method):
    """TEMI on rows of width `dimension`.

    Args:
        config: the settings; a preset is written out for `count` rows.
        dimension: D.
        count: N, the rows of all workers.
        seed: of the initial weights.
    """

    config_type = TemiConfig
    config: TemiConfig
    best_head: Tensor
    head_losses: Tensor
    basis: Tensor | None

    def __init__(self, config: TemiConfig, dimension: int, count: int, seed: int) -> None:
        config = config.resolved(count, dimension)
        super().__init__(config, dimension, count, seed)
        self.plan = Plan.of(config, count)
        self.pairing = Pairing(config.neighbors, config.noise, config.repeats)
        layout = config.layout(count, dimension, distributed.data_group().size)
        self.register_buffer("basis", None)
        self._build_heads(distributed.DeviceMesh.of(layout.head_parts))
        self._momentum, self._warned_of_collapse = config.teacher_momentum, False
        self.register_buffer("best_head", torch.tensor(0))
        self.register_buffer("head_losses", torch.zeros(config.heads, dtype=torch.float64))

    def _build_heads(self, mesh: distributed.DeviceMesh) -> None:
        """Build the part of the heads that this worker trains in a mesh, anew where there are some."""
        before = getattr(self, "student", None)
        config, self.mesh = self.config, mesh
        self._own_heads = distributed.even_slices(config.heads, mesh.heads.size)[mesh.heads.rank]
        first, last = self._own_heads.start, self._own_heads.stop
        width = self.dimension if self.basis is None else self.basis.shape[1]
        shape = replace(config.head_shape(width), heads=last - first, first=first)
        self.student = Heads(shape, self.seed, config.precision)
        self.teacher = copy.deepcopy(self.student).requires_grad_(False)
        self.marginal = Marginal(shape.heads, shape.clusters, config.marginal_momentum)
        if before is not None:
            self.to(before.direction.device, before.direction.dtype)

    def fit(self, rows: Rows, trainer: BaseTrainer) -> None:
        """Start warm, where asked for, take the plan's steps, and choose a head; then every worker holds all heads.

        A start from `auto` comes back where the neighbour graph speaks against what training has made of it.
        """
        c = self.config
        if c.trained_width(self.dimension) < self.dimension:
            rows = self._on_components(rows, trainer)

        @cache  # what the heads start from is also what the guard compares with
        def start() -> Start:
            return choose_start(rows, c.clusters, c.start_neighbors, self.seed, self.student.direction)

        def warm_start() -> None:
            if c.warm_start == "auto":
                start_from_partition(self.student, rows, start(), self.seed)
            elif c.warm_start == "kmeans":
                options = StartOptions(c.clusters, c.start_restarts, c.start_neighbors, c.start_rounds)
                start_from_kmeans(self.student, rows, options, self.seed)
            self.teacher.load_state_dict(self.student.state_dict())

        with distributed.data_parallel(self.mesh.data):
            trainer.fit(self, rows, start=warm_start)
            if c.selection == "modularity":
                best, values = best_by_modularity(self.teacher, rows, c.start_neighbors, self.seed, self.mesh.heads)
                self.best_head.fill_(best)
                logger.info("best head: %d, modularity %.3f", best, float(values[best]))
        if self.mesh.heads.size > 1:
            state = self.gather_state(self.state_dict())
            self._build_heads(distributed.DeviceMesh(data=distributed.world()))
            self.load_state_dict(state)
        best = int(self.best_head)
        if c.warm_start == "auto" and not may_replace_start(self.teacher, best, rows, start(), self.seed):
            logger.warning("temi: training has left the neighbour graph's clusters; the start is kept")
            self._build_heads(self.mesh)
            warm_start()
            self.best_head.zero_()
        if self.basis is not None:
            self._on_rows(self.basis)

    def _on_components(self, rows: Rows, trainer: BaseTrainer) -> Rows:
        """Build heads for the leading components alone, and return the rows on them.

        The first layer's products are most of a step's. A resumed training keeps its checkpoint's axes.
        """
        checkpoint, like = trainer.restore(), self.student.direction
        if checkpoint is None:
            self.basis = principal_axes(rows, self.config.components, self.config.clusters, self.seed, like)
        else:
            self.basis = checkpoint[0]["method.basis"].to(like)
        self._build_heads(self.mesh)
        return ComponentRows(rows, self.basis)

    def _on_rows(self, basis: Tensor) -> None:
        """Fold the axes V into the first layers: ⟨w, Vᵀx⟩ = ⟨Vw, x⟩, the same heads on rows."""
        for heads in (self.student, self.teacher):
            weight = heads.weights[0]
            heads.weights[0] = nn.Parameter((weight @ basis.T).detach(), weight.requires_grad)
            heads.shape = replace(heads.shape, dimension=self.dimension)
        self.basis = None

    def training_step(self, batch: Batch) -> dict[str, Tensor]:
        """Compute the mean of all heads' losses, this worker's part of it; and of each head loss and agreement.

        Returns:
            "loss": Float[], nats; "head_loss" and "head_agreement": Float[H].
        """
        c, views = self.config, batch.x
        alpha = c.entropy_weight if c.entropy_weight is not None else 5.0 if c.loss == "scan" else 0.0
        options = InformationOptions(c.loss, c.beta, c.positive_pmi, alpha, self.mean_agreement)
        with torch.no_grad():
            teacher = self.teacher.last_layer(views, self.teacher_temperature(batch.epoch))
        student = self.student.last_layer(views, c.student_temperature)
        losses, agreements = information_losses(student, teacher, self.marginal, options)
        return {
            "loss": losses.sum() / c.heads,
            "head_loss": losses.detach(),
            "head_agreement": agreements.detach().mean(1),
        }

    def mean_agreement(self, agreements: Tensor) -> Tensor:
        """Return the mean over all workers' heads, Float[1 B], from those of this worker's, Float[H B]."""
        return self.mesh.heads.all_reduce(agreements.sum(0, keepdim=True)) / self.config.heads

    def teacher_temperature(self, epoch: int) -> float:
        """Return τ_t: linear over the first epochs, then constant."""
        start, end = self.config.warmup_teacher_temperature, self.config.teacher_temperature
        length = self.config.warmup_teacher_temperature_epochs
        return end if epoch >= length - 1 else start + (end - start) * epoch / (length - 1)

    def teacher_momentum(self, step: int) -> float:
        """Return the momentum m after step number `step`: a cosine over the whole training."""
        c = self.config
        return cosine_schedule(c.teacher_momentum, c.final_teacher_momentum, step, self.plan.steps)

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Return the last layer, frozen in the first epochs; the other matrices; and biases and norms without decay.

        The last layer's scale g decays with its directions, as published.
        All are stacked: heads are trained as if each were alone.
        """
        student, others = self.student, [*self.student.biases, *self.student.norms.parameters()]
        last = [parameter for parameter in (student.direction, student.scale) if parameter.requires_grad]
        return [
            {"params": last, "stacked": True, "frozen_epochs": self.config.freeze_last_layer},
            {"params": list(student.weights), "stacked": True},
            {"params": others, "stacked": True, "weight_decay": 0.0},
        ]

    def on_step_end(self, step: int) -> None:
        """Move the teacher towards the student."""
        self._momentum = self.teacher_momentum(step)
        ema_update(self.teacher, self.student, self._momentum)

    def on_epoch_end(self, metrics: dict[str, Tensor]) -> dict[str, Any]:
        """Keep the head with the lowest mean loss of this epoch, without labels; warn once if its clusters collapse."""
        c = self.config
        self.head_losses.copy_(metrics["head_loss"])
        self.best_head.copy_(self.head_losses.argmin())
        best = int(self.best_head)
        health = {"entropy": self.marginal.entropy(), "live": self.marginal.live()}
        health = self.gather_state({**health, "largest": self.marginal.shares.amax(1)})
        entropy, live, largest = health["entropy"], health["live"], health["largest"]
        collapsed = collapsed_heads(entropy, live, c.clusters)
        if bool(collapsed[best]) and not self._warned_of_collapse:
            self._warned_of_collapse = True
            lower = max(0.51, round(c.beta - BETA_STEP, 2))
            advice = (
                f"set method.beta below {c.beta:g}, such as {lower:g}: a lower β keeps clusters more even"
                if c.beta > lower and c.loss != "scan"
                else "lower method.learning_rate, or ask for fewer clusters"
            )
            logger.warning(
                "clusters collapse: head %d has %d live clusters of %d, entropy %.2f of %.2f, largest share %.0f %%; "
                "%s", best, int(live[best]), c.clusters, float(entropy[best]), math.log(c.clusters),
                100 * float(largest[best]), advice,
            )  # fmt: skip
        self.stop = self.stop or (bool(collapsed[best]) and c.stop_on_collapse)
        return {
            "teacher_momentum": self._momentum,
            "head_losses": self.head_losses.tolist(),
            "best_head": best,
            "head_entropies": entropy.tolist(),
            "head_live_clusters": live.tolist(),
            "head_largest_shares": largest.tolist(),
            "head_agreements": metrics["head_agreement"].tolist(),
            "collapsed_heads": int(collapsed.sum()),
            "collapsed": int(collapsed[best]),
            "marginal_entropy": float(entropy[best]),
            "live_clusters": int(live[best]),
            "largest_share": float(largest[best]),
            "agreement": float(metrics["head_agreement"][best]),
        }

    def gather_state(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return tensors of all heads; see `HeadParallel`. A loss is the sum of all heads'."""
        group, gathered = self.mesh.heads, {}
        for name, x in tensors.items():
            is_by_head = x.dim() > 0 and name not in WHOLE_STATE
            gathered[name] = group.all_gather_cat(x, self.config.heads) if is_by_head else x
            if name == "loss":
                gathered[name] = group.all_reduce(x)
        return gathered

    def shard_state(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return this worker's heads of what `gather_state` gave; a loss stays with the first worker along `heads`."""
        if self.mesh.heads.size == 1:
            return tensors
        shards = {}
        for name, x in tensors.items():
            shards[name] = x[self._own_heads] if x.dim() and name not in WHOLE_STATE else x
            if name == "loss" and self.mesh.heads.rank:
                shards[name] = torch.zeros_like(x)
        return shards

    @torch.no_grad()
    def predict_proba(self, x: Tensor) -> Tensor:
        """Return the teacher's best head's probabilities, in float32: Float[B D] to Float[B K], rows sum to 1."""
        require_matrix(x, "x", self.dimension)
        like = self.teacher.direction
        blocks = torch.split(x, PREDICT_ROWS)
        logits = [self.teacher(block.to(like), head=int(self.best_head))[0] for block in blocks]
        return log_probabilities(torch.cat(logits), self.config.teacher_temperature).exp()

    @torch.no_grad()
    def predict_heads(self, x: Tensor) -> Tensor:
        """Return the most probable cluster by each of the teacher's heads: Float[B D] to Int64[H B]."""
        require_matrix(x, "x", self.dimension)
        blocks, heads = torch.split(x.to(self.teacher.direction), PREDICT_ROWS), range(len(self.teacher.direction))
        return torch.stack([torch.cat([self.teacher(b, head=h)[0].argmax(1) for b in blocks]) for h in heads])

    def prototypes(self) -> Tensor:
        """Return the directions of the best head's last layer, with which the bottleneck's unit rows are compared."""
        return functional.normalize(self.teacher.direction[int(self.best_head)].detach(), dim=1)

    def state(self) -> MethodState:
        """Return the teacher's best head alone, or all of them with `keep_heads`."""
        settings = self._settings()
        del settings["config"]["components"]  # heads take rows again
        if self.config.keep_heads:
            kept = {name: x.detach().cpu().clone() for name, x in self.teacher.state_dict().items()}
            return MethodState(settings, kept | {"best_head": self.best_head.cpu().clone()})
        best = int(self.best_head)
        tensors = {name: x[best : best + 1].detach().cpu().clone() for name, x in self.teacher.state_dict().items()}
        tensors["best_head"] = torch.tensor(0)
        del settings["config"]["keep_heads"]  # a model of one head has the bytes that it had without this setting
        return MethodState({**settings, "config": {**settings["config"], "heads": 1}}, tensors)

    def _load_tensors(self, tensors: dict[str, Tensor]) -> None:
        self.best_head.copy_(tensors.pop("best_head"))
        self.teacher.load_state_dict(tensors)
        self.student.load_state_dict(tensors)
