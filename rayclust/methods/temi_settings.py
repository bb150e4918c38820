"""Settings of TEMI (arXiv 2303.17896), how workers divide its heads, and its presets, to be read without torch.

Rows divided: every worker holds all heads, and all gradients are summed in every step. Heads divided: every worker sees
the whole batch, and all that is summed is one number a pair. Both are the same training.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from itertools import pairwise
from typing import Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from rayclust.errors import ConfigError
from rayclust.methods.settings import Plan, Precision, TrainedConfig


@dataclass(frozen=True)
class HeadShape:
    """Sizes and parts of H equal heads."""

    heads: int
    """H."""
    dimension: int
    """D, the width of the rows that come in."""
    clusters: int
    """K, the logits that come out."""
    hidden: int = 512
    """Width of the hidden layers."""
    bottleneck: int = 256
    """Width of the unit rows before the last layer."""
    layers: int = 2
    """Linear layers before the last one, at least 1; 1 is a single map to the bottleneck."""
    batch_norm: bool = False
    """Whether hidden layers are batch-normalised."""
    dropout: float = 0.0
    """Share of hidden units dropped in training."""
    final_gelu: bool = False
    """Whether a GELU follows the bottleneck."""
    learn_scale: bool = True
    """Whether g is learnt; otherwise it stays 1."""
    first: int = 0
    """Number of the first head, where other workers hold those before it."""

    @property
    def widths(self) -> list[int]:
        """Input and output widths of the layers before the last."""
        return [self.dimension, *[self.hidden] * (self.layers - 1), self.bottleneck]


# What heads cost a worker, and how workers divide them.

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
    from rayclust.losses.information import CHUNK_BYTES, KEPT_BYTES  # which brings torch

    heads, pairs = -(-shape.heads // layout.head_parts), -(-plan.batch_size // layout.row_parts)
    layers = list(pairwise(shape.widths))
    parameters = heads * (sum(o * i + o for i, o in layers) + shape.clusters * (shape.bottleneck + 1))
    # Products of a pair: teacher and student forward, both sides of the student back; rows get no gradient, so that the
    # first layer has one product less.
    products = 4 * sum(o * i for i, o in layers) - shape.widths[0] * shape.widths[1]
    products += 4 * shape.clusters * shape.bottleneck
    # Logits of the teacher, kept where they fit, and of a chunk of the student; last layers of that chunk's heads.
    logits = 2 * pairs * shape.clusters * NARROW
    kept, chunk = KEPT_BYTES[device], CHUNK_BYTES[device]
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
        if (found := layout.head_parts * layout.row_parts) != workers:
            raise ConfigError(
                f"method.parallel = {wanted}: is for {found} workers, there are {workers}; "
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


class TemiConfig(TrainedConfig):
    """TEMI (arXiv 2303.17896). A key that is written wins over the preset."""

    revision: ClassVar[int] = 7
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
    start at the partition that the method `auto` chooses, with votes that need no evidence of their own."""
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
        # The config of a stored model has all fields set but these two, β too, whatever the loss.
        is_stored = type(self).model_fields.keys() - {"components", "keep_heads"} <= self.model_fields_set
        is_written = "beta" in self.model_fields_set and not is_stored
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

    def head_shape(self, dimension: int) -> HeadShape:
        """Return the sizes and parts of the heads in training, on rows of width `dimension` or their components."""
        shared = {field.name for field in fields(HeadShape)} & TemiConfig.model_fields.keys()
        width = min(self.components or dimension, dimension)
        return HeadShape(dimension=width, **{name: getattr(self, name) for name in shared})

    def layout(self, count: int, dimension: int, workers: int) -> Layout:
        """Return how workers divide the training of this resolved config.

        Raises:
            ConfigError: they cannot divide it as `parallel` says, or heads do not fit.
        """
        if self.clip_norm is not None and self.parallel not in ("auto", "data"):
            raise ConfigError(f"method.parallel = {self.parallel}: clip_norm needs every head's gradient, set data")
        shape, plan = self.head_shape(dimension), Plan.of(self, count)
        layout = choose_layout(shape, plan, workers, self.parallel, self.worker_memory * GIGABYTE)
        return layout if self.clip_norm is None else Layout(1, workers)

    def multiplications(self, count: int, dimension: int) -> float:
        """Return about how many multiplications the steps for `count` rows of width `dimension` take."""
        config = self.resolved(count, dimension)
        plan, shape = Plan.of(config, count), config.head_shape(dimension)
        return 0.5 * plan.steps * estimate_cost(shape, plan, Layout(1, 1), "cpu").operations

    def describe_plan(self, count: int, dimension: int, workers: int, device: str = "cpu") -> str:
        """Describe the layout and its costs in a line; see `BaseMethodConfig`."""
        config = self.resolved(count, dimension)
        shape, plan = config.head_shape(dimension), Plan.of(config, count)
        layout = config.layout(count, dimension, workers)
        cost = estimate_cost(shape, plan, layout, device)
        parts = {"heads": layout.head_parts, "rows of a batch": layout.row_parts}
        over = " and ".join(f"{what} over {count}" for what, count in parts.items() if count > 1)
        division = f"{over} workers" if over else "one worker"
        return (
            f"{division}: {cost.state_bytes / GIGABYTE:.2f} GB of weights and optimiser, "
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
