"""What TEMI can be told. Source of the settings' meaning: arXiv 2303.17896."""

from __future__ import annotations

from typing import ClassVar, Literal, Self

from pydantic import Field

from rayclust.errors import ConfigError
from rayclust.methods import temi_plan
from rayclust.methods.base import Plan, TrainedConfig
from rayclust.methods.heads import HeadShape, Precision
from rayclust.methods.temi_presets import preset_values


class TemiConfig(TrainedConfig):
    """TEMI (arXiv 2303.17896). A key that is written wins over the preset."""

    draws_pairs: ClassVar[bool] = True
    name: Literal["temi"] = "temi"
    """Teacher ensemble-weighted pointwise mutual information."""
    preset: Literal["auto", "readme", "paper", "none"] = "auto"
    """auto: chosen from N, D and K without labels. readme, paper: the published settings. none: the defaults below."""
    heads: int = Field(16, ge=1)
    """H, heads trained side by side; the one with the lowest training loss is kept."""
    neighbors: int = Field(50, ge=1)
    """Nearest neighbours of a row among which its partner is drawn."""
    loss: Literal["temi", "pmi", "wmi", "scan"] = "temi"
    """What is minimised; see losses/information.py."""
    beta: float = Field(0.6, gt=0)
    """β, above 0.5. Lower keeps clusters more even; 1 for many more clusters than classes."""
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
    warm_start: Literal["none", "kmeans"] = "none"
    """kmeans: heads start at the best of several k-means partitions of rows averaged with their neighbours."""
    start_restarts: int = Field(16, ge=1)
    """k-means partitions from which a warm start chooses by modularity."""
    start_neighbors: int = Field(10, ge=1)
    """Nearest neighbours that a warm start averages and that modularity counts."""
    start_rounds: int = Field(2, ge=0)
    """How often a warm start averages rows with their neighbours."""
    selection: Literal["loss", "modularity"] = "loss"
    """Head that is kept. loss: least training loss in the last epoch, as published. modularity: keeps most neighbours
    together, by its clusters of all rows; less drawn to even sizes. Neither sees labels."""
    precision: Precision = "auto"
    """Matrix products in training. auto: bf16 where the processor multiplies it fast, else float32."""
    stop_on_collapse: bool = False
    """Whether training ends with the first epoch in which the best head's clusters have collapsed; else it is told."""
    parallel: str = Field("auto", pattern=r"^(auto|data|heads|clusters|[1-9]\d*x[1-9]\d*(x[1-9]\d*)?)$")
    """What workers divide. data: the rows of a batch. heads: the heads; next to nothing is sent. clusters: those of
    each head, where one is too large for a worker. RxC: heads in R parts, rows in C. RxCxS: and clusters in S. auto:
    the fastest, with clusters divided only where one head does not fit. All are the same training."""
    worker_memory: float = Field(24.0, gt=0)
    """GB, of 10⁹ bytes, that a worker has for heads, optimiser and logits; only `parallel: auto` heeds it. 24 is an
    assumption about a GPU: nothing is measured."""

    def settled(self, count: int, dimension: int) -> TemiConfig:
        """This config with its preset written out for N = `count`, D = `dimension`; `preset` is then `none`."""
        chosen = preset_values(self, count, dimension)
        written = {key: getattr(self, key) for key in self.model_fields_set}
        return TemiConfig.model_validate({**chosen, **written, "preset": "none"})

    def head_shape(self, dimension: int) -> HeadShape:
        """The sizes and parts of the heads on rows of width `dimension`."""
        return HeadShape(
            heads=self.heads,
            dimension=dimension,
            clusters=self.clusters,
            hidden=self.hidden,
            bottleneck=self.bottleneck,
            layers=self.layers,
            batch_norm=self.batch_norm,
            dropout=self.dropout,
            final_gelu=self.final_gelu,
            learn_scale=self.learn_scale,
        )

    def layout(self, count: int, dimension: int, workers: int) -> tuple[temi_plan.Load, temi_plan.Layout]:
        """How `workers` divide the training of this settled config, and what it is made of."""
        load = temi_plan.Load(self.head_shape(dimension), Plan.of(self, count))
        whole_for = "clip_norm" if self.clip_norm else "optimizer = lars" if self.optimizer == "lars" else None
        layout = temi_plan.choose(load, workers, self.parallel, self.worker_memory * temi_plan.GIGABYTE, whole_for)
        if self.clip_norm is None:
            return load, layout
        if self.parallel not in ("auto", "data"):
            raise ConfigError(f"method.parallel = {self.parallel}: clip_norm needs every head's gradient, set data")
        return load, temi_plan.Layout(1, workers)

    def outlook(self, count: int, dimension: int, workers: int, device: str = "cpu") -> str:
        """See `BaseMethodConfig`."""
        settled = self.settled(count, dimension)
        return temi_plan.outlook(*settled.layout(count, dimension, workers), device)

    def dividing_rows(self) -> Self:
        """See `BaseMethodConfig`."""
        if self.parallel not in ("auto", "data"):
            raise ConfigError(
                f"method.parallel = {self.parallel}: with resources.rows = cells workers divide the rows, set data"
            )
        return self.model_copy(update={"parallel": "data"})
