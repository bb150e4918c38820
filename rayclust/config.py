"""RUN.yaml as a tree of frozen models: every setting of a run, in the order of its keys.

Settings of methods stand in `methods/`, each paper's in its own file, those of encoders in `encoders/settings.py`,
`features` in `features.py`; all others are here. `parse` is the one reader. It refuses unknown keys and bad values in
one line, with the full key, the value, the bound and the nearest known key.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from itertools import pairwise
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    Field,
    SerializerFunctionWrapHandler,
    StringConstraints,
    ValidationError,
    field_validator,
    model_serializer,
    model_validator,
)

from rayclust.encoders.settings import PIXEL_CEILING, EncoderConfig, SpaceConfig, normalize_encoders
from rayclust.errors import ConfigError
from rayclust.features import FeaturesConfig
from rayclust.methods import AnyMethodConfig, config_type, config_types, reads_pixels
from rayclust.methods.settings import EMBEDDINGS, BaseMethodConfig
from rayclust.settings import Config, Template, format_error

MEBIBYTE = 1 << 20


def _at_least_one(value: int | str) -> int | str:
    if not isinstance(value, str) and value < 1:
        raise ValueError("must be at least 1, or auto")
    return value


def _few_gpus(value: float | str) -> float | str:
    if not isinstance(value, str) and not 0 <= value <= 16:
        raise ValueError("must be from 0 to 16, or auto")
    return value


CountOrAuto = Annotated[int | Literal["auto"], AfterValidator(_at_least_one)]
GpusOrAuto = Annotated[float | Literal["auto"], AfterValidator(_few_gpus)]


class ImagesConfig(Config):
    """Source of the images, and limits above which they are rejected."""

    uri: str = Field(min_length=1)
    """A folder tree, *.tar shards, *.parquet, a table of embeddings (local or s3://), or `dataset:NAME`."""
    format: Literal["auto", "folder", "webdataset", "parquet", "embeddings"] = "auto"
    """How the images are stored; `auto` looks at the names."""
    labels: str = "auto"
    """auto | none | folder | a column or tar suffix. Used for evaluation only, never to fit."""
    columns: dict[Literal["image", "embedding", "key", "label"], str] = Field(default_factory=dict)
    """Names of a table's columns of images (bytes), of embeddings (lists of numbers), of the rows' keys and of their
    labels, where they are called otherwise than docs/inputs.md expects."""
    classes: tuple[str, ...] | str | None = None
    """Keep only these classes: a list of names (ImageNet: wnids), a text file with one a line, or the published subset
    imagenet-10, imagenet-dogs, imagenet-50, imagenet-100 or imagenet-200. None keeps all."""
    split: Annotated[float, Field(gt=0, lt=1)] | str | Annotated[tuple[str, ...], Field(min_length=1)] | None = None
    """Rows kept aside as the test split: methods are fitted on the others and scored on both. Patterns of keys or files
    ("test/*", "*/val-*.tar"), or a share of all rows, drawn by the run's seed. None fits and scores on all rows."""
    test: str | None = None
    """A second input like `uri`, all of whose rows are kept aside; the start of their keys is test/."""
    shard_size: int = Field(512, ge=1, le=1_000_000)
    """Images per task where the input has no shards of its own (folders, large parquet files)."""
    max_reject_share: float = Field(0.1, ge=0, le=1)
    """Above this share of rejected images the encode stage fails."""
    max_bytes: int = Field(64 * MEBIBYTE, ge=1)
    """Bytes of one encoded image above which it is rejected."""
    max_pixels: int = Field(128_000_000, ge=1, le=PIXEL_CEILING)
    """Pixels of one image above which it is rejected before it is decoded (decompression bombs)."""

    @model_validator(mode="after")
    def _one_split(self) -> ImagesConfig:
        if self.split is not None and self.test is not None:
            raise ValueError(f"test = {self.test}: keeps rows aside, as does split = {self.split}; give one of them")
        return self


class NeighborsConfig(Config):
    """Nearest neighbours in feature space by cosine."""

    k: int = Field(50, ge=1, le=4096)
    """Neighbours kept per row, the row itself excluded; at most N − 1 are written."""
    method: Literal["auto", "exact", "ivf"] = "auto"
    """exact: all pairs by blocks. ivf: an inverted file with measured recall; not where rows are kept aside, since it
    finds no neighbours in one split alone. auto: ivf above `exact_rows` rows, but exact where rows are kept aside."""
    exact_rows: int = Field(2_000_000, ge=1)
    """Rows up to which `auto` is exact."""
    features: Literal["run", "raw"] = "run"
    """run: rows as `features` makes them. raw: the encoder's unit rows, where TEMI's published neighbours are found."""
    spaces: Literal["joint", "agree"] = "joint"
    """In a run with several encoders. joint: by the mean of the cosines in all spaces. agree: those that are among the
    2·k nearest in every space, but at least 3 for each row; exact, and rows may have fewer than k."""
    min_recall: float = Field(0.95, gt=0, le=1)
    """Recall@k that the ivf route must reach on a sample of rows, else the stage fails."""


Rule = Literal[
    "vote",
    "coding_length",
    "feature_coding_length",
    "eigengap",
    "knee",
    "silhouette",
    "calinski_harabasz",
    "davies_bouldin",
    "modularity",
    "near_modularity",
    "map_equation",
    "stability",
    "prediction_strength",
    "null_contrast",
    "resampled_silhouette",
    "umap_silhouette",
    "merge",
]


class SelectKConfig(Config):
    """The choice of K: the stage select-k."""

    candidates: tuple[int, ...] | Literal["auto"] | None = None
    """Numbers of clusters to try: a list, or `auto`; the same as writing that for `method.clusters`. None: nothing to
    choose."""
    least: int = Field(2, ge=2)
    """Smallest number that `auto` tries."""
    most: int | Literal["auto"] = "auto"
    """Largest number that `auto` tries, at most the rows. auto: 2·√N."""
    rounds: int = Field(2, ge=0, le=10)
    """Times that `auto` tries numbers between the best so far and its neighbours, after its first, geometric grid."""
    seeds: int = Field(2, ge=1, le=100)
    """Fits of each number, from `seed` on; their agreement is its stability. With 1 it is not measured."""
    rule: Rule = "vote"
    """vote: the middle, in ratio, of what the criteria pick, each with the weight of its evidence.
    knee: where the curve of coding lengths bends most.
    merge: what is left of the largest candidate's clusters when they are merged along a tree while modularity rises.
    prediction_strength: the most clusters that two seeds agree on, worst cluster by worst cluster.
    resampled_silhouette: the most clusters that come back in subsamples as well as the surest number does (chooseR).
    Any other: the number that is best by that criterion."""
    rows: int = Field(15_000, ge=2)
    """Rows of the seeded sample on which coding length, silhouette, Calinski–Harabasz and Davies–Bouldin are taken."""
    resamples: int = Field(0, ge=0)
    """Subsamples of 1,000 rows in which k-means is to find each candidate's clusters again; 100 as published (chooseR),
    some 0.1 s each. 0 measures none."""
    umap: bool = False
    """Whether the silhouette in a UMAP of 10 dimensions is listed too, on 2,000 rows; needs umap-learn."""
    distortion: float = Field(0.1, gt=0)
    """Squared error allowed per row in the coding length, in squared row lengths. The paper's ε²."""
    cpus_per_trial: int = Field(1, ge=1)
    """CPUs, and threads, of each trial."""
    gpus_per_trial: GpusOrAuto = "auto"
    """GPUs of each trial; 0 computes on the CPU. auto: as many as `resources.gpus_per_worker`."""
    max_concurrent: CountOrAuto = "auto"
    """Trials at a time. auto: as many as the cluster has room for when the stage begins."""

    @model_validator(mode="after")
    def _bounded(self) -> SelectKConfig:
        if self.most != "auto" and self.most < self.least:
            raise ValueError(f"most = {self.most}: must be at least select_k.least = {self.least}, or auto")
        if self.rule in ("stability", "prediction_strength") and self.seeds < 2:
            raise ValueError(f"rule = {self.rule}: needs select_k.seeds of at least 2, whose partitions it compares")
        for rule, name, is_set in (
            ("resampled_silhouette", "resamples", self.resamples > 0),
            ("umap_silhouette", "umap", self.umap),
        ):
            if self.rule == rule and not is_set:
                raise ValueError(f"rule = {rule}: needs select_k.{name}")
        return self

    def refuse_above(self, rows: int) -> None:
        """Raise `ConfigError` if a candidate, or the least that `auto` tries, is above the number of rows."""
        if self.candidates == "auto" and self.least > rows:
            raise ConfigError(f"select_k.least = {self.least}: must be at most the number of rows, {rows}")
        if isinstance(self.candidates, tuple) and max(self.candidates) > rows:
            shown = list(self.candidates)
            raise ConfigError(f"method.clusters = {shown}: {max(shown)} is above the number of rows, {rows}")

    def bounds(self, rows: int) -> tuple[int, int]:
        """Return the smallest and the largest candidate on so many rows."""
        if isinstance(self.candidates, tuple):
            return min(self.candidates), max(self.candidates)
        most = math.ceil(2 * math.sqrt(rows)) if self.most == "auto" else self.most
        return min(self.least, rows), min(max(most, self.least), rows)


class AssignConfig(Config):
    """Clusters of rows, and levels above them."""

    levels: tuple[Annotated[int, Field(ge=2)], ...] = ()
    """Numbers of clusters of coarser levels, finest first: [1000, 50] puts each cluster into one of 1,000 and each of
    those into one of 50, by their prototypes. K itself may stand at the start."""

    @field_validator("levels")
    @classmethod
    def _fall(cls, levels: tuple[int, ...]) -> tuple[int, ...]:
        if any(after >= before for before, after in pairwise(levels)):
            raise ValueError("should fall, the finest level first")
        return levels


VocabularyKind = Literal["auto", "none", "imagenet", "classes", "embeddings", "text", "wordnet"]


class LabelConfig(Config):
    """Names for clusters."""

    vocabulary: str | tuple[str, ...] = "auto"
    """auto | none | imagenet | wordnet | classes | a text file or URI, one name a line | a parquet of words with
    embeddings; or a list of them, in which equal names count once.

    `wordnet` are the nouns of the machine's WordNet; the path or URI of a `data.noun` names another.
    `auto` is ImageNet's names when the encoder reads text, else none. `classes` are the true names of the run's labels:
    what is named by them says so, and beside other lists every cluster is named without them as well.
    """
    templates: Annotated[tuple[Template, ...], Field(min_length=1)] = ("a photo of a {}",)
    """Prompts around each name; their embeddings are averaged."""
    scale: float = Field(100, gt=0)
    """What cosines between images and words are multiplied by before the softmax; CLIP's own is 100."""
    space: Literal["auto", "encoder", "features"] = "auto"
    """Where images meet words: the encoder's unit rows, or what `features` makes of them. auto: features for words that
    come with embeddings, else encoder."""
    encoder_space: str | None = None
    """In a run with several encoders, the space in which images meet words. None: the first encoder's that reads text,
    else the first."""
    distinct: bool = False
    """Whether names tell clusters apart: no two share one, words that other clusters vote for as well count less, and a
    cluster gets none where one of shuffled images would get as good a name. More general words name clusters of many
    words where the list has hypernyms."""
    specificity: float = Field(0.5, ge=0)
    """λ of `distinct`: weight of a word's specificity beside its votes; 0 goes by votes alone."""
    voters: int | Literal["auto", "all"] = "auto"
    """Images per cluster that vote, a seeded sample. auto: all of them for up to 5,000 words, else 300."""
    runners_up: int = Field(5, ge=0, le=100)
    """Next best names kept per cluster."""
    exemplars: int = Field(12, ge=0, le=200)
    """Most typical images kept per cluster."""
    outliers: int = Field(6, ge=0, le=200)
    """Least certain images kept per cluster."""

    @property
    def lists(self) -> tuple[str, ...]:
        """Return the lists of names that `vocabulary` gives."""
        return (self.vocabulary,) if isinstance(self.vocabulary, str) else self.vocabulary

    @model_validator(mode="before")
    @classmethod
    def _without_unique(cls, tree: Any) -> Any:
        if isinstance(tree, dict) and tree.get("unique"):
            raise ValueError(f"unique = {tree['unique']}: is now distinct, which also weighs and refuses names")
        return {key: value for key, value in tree.items() if key != "unique"} if isinstance(tree, dict) else tree

    @model_validator(mode="after")
    def _consistent(self) -> LabelConfig:
        if isinstance(self.vocabulary, tuple):
            alone = [name for name in self.vocabulary if name in ("auto", "none")]
            if alone or not self.vocabulary:
                given = f"[{', '.join(self.vocabulary)}]"
                raise ValueError(f"vocabulary = {given}: a list needs at least one name, and neither auto nor none")
        if isinstance(self.voters, int) and self.voters < 1:
            raise ValueError(f"voters = {self.voters}: must be at least 1, all or auto")
        return self


def kind_of(value: str) -> VocabularyKind:
    """Return the kind of a `label.vocabulary`: a keyword, a parquet file of words with embeddings, or a text file."""
    if value in ("auto", "none", "imagenet", "classes", "wordnet"):
        return value  # type: ignore[return-value]
    if value.endswith("data.noun"):
        return "wordnet"
    return "embeddings" if value.lower().endswith((".parquet", ".pq")) else "text"


class IndexConfig(Config):
    """The search index over unit embeddings."""

    kind: Literal["auto", "flat", "ivf"] = "auto"
    """flat: exact. ivf: approximate with measured recall. auto: ivf above `flat_rows` rows."""
    flat_rows: int = Field(200_000, ge=1)
    """Rows up to which `auto` is flat: a query reads all of them, 0.4 GB at a width of 512."""


class EvaluateConfig(Config):
    """Measures of the partition."""

    silhouette_rows: int = Field(5000, ge=0)
    """Rows of the seeded sample on which the silhouette is taken; 0 leaves it out."""
    probe_neighbors: int = Field(20, ge=1)
    """Neighbours that vote in the k-NN probe, where labels exist, each with weight exp(cosine / 0.02)."""
    linear_probe_rows: int = Field(0, ge=0)
    """Rows of the seeded sample on which a linear probe is trained and, the other half, scored; 0 leaves it out. With a
    split it is trained on so many fitted rows, and scored on so many of the test."""
    linear_epochs: int = Field(0, ge=0)
    """Epochs of the linear evaluation of a network that was learnt from pixels: as published 100, over all labelled
    images of the train rows, or of one half, each time in another view. 0 leaves it out."""


class MapConfig(Config):
    """The map: a place on the plane for every row."""

    rows: int = Field(20_000, ge=2)
    """Rows that are laid out together; of more, so many are drawn, and the others lie among their nearest of these."""


Preset = Literal["none", "list", "semdedup", "d4", "hierarchical"]

PRESETS: dict[str, dict[str, Any]] = {
    # Nothing is removed: duplicates and outliers to look at, and the share that each ε would keep.
    "list": {"duplicates": {"remove": False}},
    # arXiv 2303.09540.
    "semdedup": {"duplicates": {"policy": "semdedup"}},
    # arXiv 2308.12284: duplicates to 75 % of the rows, k-means anew, the most prototypical rows out.
    "d4": {
        "duplicates": {"policy": "semdedup", "keep_share": 0.75, "largest_epsilon": 0.3},
        "prune": {"keep": 0.8, "which": "hard"},
    },
    # arXiv 2405.15613.
    "hierarchical": {"sample": {"levels": "auto"}},
}
"""Settings that a preset fills where they are not given."""


class DuplicatesConfig(Config):
    """Near-duplicates, by cosine in the space of the run's neighbours."""

    remove: bool = True
    """Whether duplicates are removed; else they are only listed."""
    epsilon: float = Field(0.03, ge=0, lt=1)
    """ε: rows are near from a cosine of 1 − ε on. Larger removes more."""
    keep_share: float | None = Field(None, gt=0, le=1)
    """Share of the rows to keep; ε is then the one that does so, up to `largest_epsilon`. None takes `epsilon`."""
    largest_epsilon: float = Field(0.1, gt=0, lt=1)
    """Up to which the share kept is measured, in one search; at least `epsilon`."""
    policy: Literal["component", "semdedup", "greedy"] = "greedy"
    """greedy: rows without an earlier kept near row; no two kept rows are near, each removed one has a kept one near.
    component: one row of each group. semdedup: rows without any earlier near row, as published (with cos > 1 − ε)."""
    keep: str = "hard"
    """Order, first is kept first: hard (far from the run's centroid of its cluster), easy (near it), first (by row), or
    a column of `values`, largest first."""
    values: str | None = None
    """Parquet file or URI with the columns `key` and that of `keep`: resolution, bytes, a score."""
    search: Literal["auto", "neighbors", "clusters"] = "auto"
    """neighbors: pairs of the run's neighbours. clusters: rows against their own of √N clusters and `probes` − 1 more.
    auto: neighbors up to `neighbors.exact_rows` rows."""
    probes: int | None = Field(4, ge=1)
    """Clusters that a row is compared with; 1 is its own, as published; None all that an exact result needs."""
    recall_rows: int = Field(1000, ge=0)
    """Rows, drawn by their keys, on which the search is compared with all pairs; 0 leaves it out."""

    @model_validator(mode="after")
    def _consistent(self) -> DuplicatesConfig:
        is_column = self.keep not in ("hard", "easy", "first")
        if is_column and self.values is None:
            raise ValueError(f"keep = {self.keep}: must be hard, easy or first, or a column of the file in `values`")
        if not is_column and self.values is not None:
            raise ValueError(f"values = {self.values}: is not read with keep = {self.keep}")
        return self


class OutliersConfig(Config):
    """Odd rows, by their neighbours and their cluster."""

    share: float = Field(0.001, ge=0, le=0.5)
    """Share of the rows that is flagged, the oddest."""
    remove: bool = False
    """Whether they are removed; else they are only listed."""


class PruneConfig(Config):
    """Pruning by the distance to centroids of a new k-means of what is left, with as many clusters as the method."""

    keep: float = Field(1.0, gt=0, le=1)
    """Share of the rows left that is kept; 1 prunes nothing."""
    which: Literal["hard", "easy"] = "hard"
    """hard keeps rows far from their centroid, for much data; easy near ones, for little."""
    per_cluster: float = Field(0.5, gt=0, le=1)
    """Largest share of a cluster that is dropped."""


class SampleConfig(Config):
    """A sample that is even over the clusters of all levels."""

    rows: int | None = Field(None, ge=1)
    """Rows to draw, copies counted. None draws no sample."""
    levels: tuple[Annotated[int, Field(ge=1)], ...] | Literal["auto", "run"] = "run"
    """Numbers of clusters, finest first. auto: a hundredth of the rows, a tenth of that, and again. run: the run's
    clusters alone."""
    resamples: int = Field(10, ge=0)
    """Times that a level above the first is fitted anew to points drawn evenly from its clusters."""
    weights: Literal["count", "rows"] = "count"
    """Whether a centroid counts once in the next level (as published) or as its rows do."""
    draw: Literal["random", "nearest", "diverse"] = "random"
    """From a cluster: at random by key, nearest to its centroid, or each row the farthest from those before."""
    copies: int = Field(1, ge=1, le=32_767)
    """Times that one row may be drawn."""

    @field_validator("levels")
    @classmethod
    def _fall(cls, levels: tuple[int, ...] | str) -> tuple[int, ...] | str:
        if isinstance(levels, tuple) and sorted(levels, reverse=True) != list(levels):
            raise ValueError("should fall, the finest level first")
        return levels


class CurateConfig(Config):
    """The stage curate, in runs that name a preset; settings that are given win over the preset's."""

    preset: Preset = "none"
    """none: no such stage. list: duplicates and outliers are listed, nothing is removed. semdedup: duplicates out. d4:
    duplicates out, then the most prototypical rows. hierarchical: duplicates out, then a balanced sample of
    `sample.rows`."""
    duplicates: DuplicatesConfig = DuplicatesConfig()
    outliers: OutliersConfig = OutliersConfig()
    prune: PruneConfig = PruneConfig()
    sample: SampleConfig = SampleConfig()

    @model_validator(mode="before")
    @classmethod
    def _filled(cls, tree: Any) -> Any:
        if not isinstance(tree, dict):
            return tree
        preset = PRESETS.get(str(tree.get("preset")), {})
        groups = {
            name: values | tree[name] if isinstance(tree.get(name), dict) else tree.get(name, values)
            for name, values in preset.items()
        }
        return tree | groups

    @model_validator(mode="after")
    def _complete(self) -> CurateConfig:
        changed = [name for name, field in type(self).model_fields.items() if getattr(self, name) != field.default]
        if self.preset == "none" and changed:
            raise ValueError(f"{changed[0]}: has no effect without a preset; name one, such as preset: list")
        if self.preset == "hierarchical" and self.sample.rows is None:
            raise ValueError("sample.rows: this key is required by the preset hierarchical, the rows to draw")
        if self.duplicates.keep_share is None and self.duplicates.epsilon > self.duplicates.largest_epsilon:
            bound = self.duplicates.largest_epsilon
            raise ValueError(
                f"duplicates.epsilon = {self.duplicates.epsilon}: must be at most largest_epsilon, {bound}"
            )
        return self


class ReportConfig(Config):
    """The page."""

    thumbnail: int = Field(112, ge=16, le=512)
    """Longer side of a thumbnail, pixels."""
    pictures: int = Field(100_000, ge=1, le=1_000_000)
    """Most pictures in all. Clusters share them evenly, and each has at least three; what the page has no room for
    lies beside it."""

    @model_validator(mode="before")
    @classmethod
    def _without_max_clusters(cls, tree: Any) -> Any:
        # Finished runs have it from when only some clusters were shown with pictures.
        return {key: value for key, value in tree.items() if key != "max_clusters"} if isinstance(tree, dict) else tree


class TrackingConfig(Config):
    """Services that show a training while it runs; changes no result."""

    to: tuple[Literal["tensorboard", "wandb", "mlflow"], ...] = ("tensorboard",)
    """tensorboard: event files in `tensorboard/` below the run. wandb, mlflow: need their package, and find server and
    key in their own variables."""
    project: str = "rayclust"
    """Project or experiment that the services file the run under."""


_WORD = r"[A-Za-z0-9]([A-Za-z0-9_.\-]{0,61}[A-Za-z0-9])?"
_Key = Annotated[str, StringConstraints(pattern=rf"^([a-z0-9.\-]{{1,253}}/)?{_WORD}$")]
_Value = Annotated[str, StringConstraints(pattern=rf"^{_WORD}$")]
Labels = dict[_Key, _Value]
"""Label and value, as `ray start --labels` and cluster files write them; a node must carry all of them."""


class PlacementConfig(Config):
    """Labels that a node must carry to get a kind of work; {} is any node. Changes no result."""

    decode: Labels = Field(default_factory=dict)
    """Actors that read and decode images."""
    encode: Labels = Field(default_factory=dict)
    """Actors that encode."""
    train: Labels = Field(default_factory=dict)
    """Training workers."""
    trials: Labels = Field(default_factory=dict)
    """select-k's trials."""
    tasks: Labels = Field(default_factory=dict)
    """All other work: writers, neighbours, assignments, names, indexes, measures."""


class ResourcesConfig(Config):
    """Resources of the machine or cluster that a run may use."""

    workers: CountOrAuto = "auto"
    """Workers of encode and train. auto: one per GPU; without GPUs, encode takes every CPU and train one worker."""
    min_workers: int | None = Field(None, ge=1)
    """Fewest workers that train goes on with while others are lost, with the same batches. None: all are needed."""
    gpus_per_worker: GpusOrAuto = "auto"
    """GPUs of each worker; 0 computes on the CPU. auto: 1 where the cluster has or can add GPUs, else 0."""
    decode_workers: CountOrAuto = "auto"
    """CPU actors that decode images."""
    max_failures: int = Field(3, ge=0)
    """Times a lost training worker is replaced before the stage fails."""
    checkpoint_seconds: float = Field(30, gt=0)
    """Seconds between two checkpoints of a training."""
    in_driver: Literal["auto", "never"] = "auto"
    """Where small work runs: never: in Ray workers. auto: in the command's own process where no cluster, GPU, placement
    or second worker is asked for; some ten thousand rows are small. Changes no result."""
    placement: PlacementConfig = PlacementConfig()

    @property
    def gpus(self) -> float:
        """`gpus_per_worker` as a number; 0 for an `auto` that no connected run has resolved."""
        return 0.0 if self.gpus_per_worker == "auto" else self.gpus_per_worker

    @model_validator(mode="before")
    @classmethod
    def _without_rows(cls, tree: Any) -> Any:
        if isinstance(tree, dict) and "rows" in tree:
            raise ValueError(
                f"rows = {tree['rows']}: was removed, training workers map all rows; for rows beyond a node's disk, "
                "images.split: 0.99 fits to a seeded hundredth and assigns all"
            )
        return tree

    @model_validator(mode="after")
    def _bounded(self) -> ResourcesConfig:
        if self.min_workers is not None and self.workers != "auto" and self.min_workers > self.workers:
            raise ValueError(f"min_workers = {self.min_workers}: must be at most workers, {self.workers}")
        return self


class NodePrice(Config):
    """Kind of node that can be rented, for the estimates of `check`; a run does not depend on it."""

    dollars_per_hour: float = Field(ge=0)
    """Price of one such node, as its provider states it today."""
    cpus: int = Field(ge=1)
    """CPUs of one node."""
    gpus: int = Field(0, ge=0)
    """GPUs of one node."""
    images_per_second: float | None = Field(None, gt=0)
    """Images that one of its GPUs (without GPUs: one of its CPUs) encodes in a second, as an earlier run shows.
    None: as many as on the machine that checks, if that has a GPU as well."""


class RunConfig(Config):
    """RUN.yaml."""

    run: str = Field(min_length=1)
    """A folder or an s3:// URI; every artefact of the run lies below it."""
    seed: int = Field(0, ge=0, lt=2**31)
    """Seed of everything random."""
    images: ImagesConfig
    encoder: EncoderConfig = EncoderConfig()
    encoders: tuple[SpaceConfig, ...] = ()
    """Several encoders, each with a space of its own, in place of `encoder`; one in the list is as `encoder`."""
    features: FeaturesConfig = FeaturesConfig()
    neighbors: NeighborsConfig = NeighborsConfig()
    method: AnyMethodConfig
    select_k: SelectKConfig = SelectKConfig()
    assign: AssignConfig = AssignConfig()
    label: LabelConfig = LabelConfig()
    index: IndexConfig = IndexConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    map: MapConfig = MapConfig()
    curate: CurateConfig = CurateConfig()
    report: ReportConfig = ReportConfig()
    tracking: TrackingConfig = TrackingConfig()
    resources: ResourcesConfig = ResourcesConfig()
    prices: dict[str, NodePrice] = Field(default_factory=dict)
    """Kinds of nodes by name, with their prices, for the estimates of `check`. No price is built in."""

    @model_validator(mode="before")
    @classmethod
    def _open(cls, tree: Any) -> Any:
        return _with_pixels(normalize_encoders(normalize_clusters(tree))) if isinstance(tree, dict) else tree

    @model_validator(mode="after")
    def _groups_fit_each_other(self) -> RunConfig:
        name, encoder, features = self.method.name, self.encoder, self.features
        plain = not (encoder.normalize or features.normalize or features.center or features.standardize)
        if self.method.reads_pixels and not (encoder.family == "pixels" and plain):
            raise ValueError(
                f"method.name = {name}: learns from pixels: leave `encoder` and `features` out, or set encoder.name: "
                "pixels, encoder.normalize: false and features: {center: false, normalize: false}"
            )
        levels, clusters = self.assign.levels, self.method.clusters
        if levels and not self.needs_selection and levels[0] > clusters:
            raise ValueError(f"assign.levels = {list(levels)}: must be at most method.clusters, {clusters}")
        if self.neighbors.method == "ivf" and (self.images.split is not None or self.images.test is not None):
            raise ValueError("neighbors.method = ivf: finds no neighbours in one split alone; set it to exact")
        if self.neighbors.spaces == "agree" and not self.encoders:
            raise ValueError("neighbors.spaces = agree: the run has one encoder; list several in `encoders`")
        for name in self.spaces:
            if self.spaces.count(name) > 1:
                raise ValueError(f"encoders: {name} is the space of two; set `space` of one of them")
            if name in (EMBEDDINGS, "encoder", "z", "both"):
                raise ValueError(f"encoders: space = {name}: is taken for something else; choose another name")
        if self.encoders and all(encoder.embeddings is not None for encoder in self.encoders):
            raise ValueError("encoders: all have `embeddings`; name those of the first space as images.uri")
        if self.label.encoder_space is not None and self.label.encoder_space not in self.spaces:
            known = ", ".join(self.spaces) or "none: the run has one encoder"
            raise ValueError(f"label.encoder_space = {self.label.encoder_space}: is no space of the run ({known})")
        if any(encoder.embeddings is not None for encoder in self.encoders) and self.images.test is not None:
            raise ValueError("images.test: ready embeddings of a space have no second input; use images.split")
        return self

    @model_serializer(mode="wrap")
    def _write(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        tree = denormalize_clusters(handler(self))
        if self.features.spaces:  # they stand in `encoders` as well
            tree["features"] = {key: value for key, value in tree["features"].items() if key != "spaces"}
        return tree

    @property
    def spaces(self) -> tuple[str, ...]:
        """Names of the spaces of a run with several encoders; () for one encoder."""
        return tuple(encoder.space for encoder in self.encoders)

    @property
    def each_encoder(self) -> tuple[EncoderConfig, ...]:
        """The encoders of the run, also where there is one."""
        return self.encoders or (self.encoder,)

    @property
    def text_encoder(self) -> EncoderConfig:
        """The encoder in whose space words and images meet: `label.encoder_space`, or the first that reads text."""
        for encoder in self.encoders:
            if encoder.space == self.label.encoder_space:
                return encoder
        reading = (encoder for encoder in self.each_encoder if encoder.family == "open_clip")
        return next(reading, self.each_encoder[0])

    @property
    def needs_selection(self) -> bool:
        """True if `select-k` chooses the number of clusters. `method.clusters` is then a placeholder."""
        return self.select_k.candidates is not None

    @property
    def curates(self) -> bool:
        """True if the run has the stage curate."""
        return self.curate.preset != "none"

    def with_clusters(self, clusters: int) -> RunConfig:
        """Return this config with a number of clusters, as if it had been written so.

        Raises:
            ConfigError: the method refuses the number.
        """
        tree = self.model_dump(mode="json", exclude_unset=True)
        tree["method"]["clusters"] = clusters
        return validate(tree)

    @classmethod
    def model_json_schema(cls, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Return the JSON schema of RUN.yaml, in which `method.clusters` may also be open."""
        schema = super().model_json_schema(*args, **kwargs)
        for method in config_types().values():
            # What `normalize_clusters` reads: `clusters` is open, or `select_k.candidates` stands for it.
            group = schema["$defs"][method.__name__]
            clusters = group["properties"]["clusters"]
            number = {key: clusters.pop(key) for key in ("type", "minimum")}
            candidates = {"type": "array", "items": number, "minItems": 1, "uniqueItems": True}
            clusters["anyOf"] = [number, {"const": "auto"}, candidates]
            group["required"] = [key for key in group.get("required", []) if key != "clusters"]
        del schema["$defs"]["FeaturesConfig"]["properties"]["spaces"]  # written as `encoders[].features`
        encoder = schema["properties"]["encoder"]
        schema["properties"]["encoder"] = {"anyOf": [{"type": "string"}, encoder]}  # `encoder: auto`
        return schema


def normalize_clusters(tree: dict[str, Any]) -> dict[str, Any]:
    """Move an open number of clusters from `method.clusters` to `select_k.candidates`; the tree is not changed.

    Returns:
        The tree with a number in `method.clusters` in any case: for an open one the largest candidate, or 2 for `auto`.

    Raises:
        ValueError: a candidate is no number of clusters, or both keys are set.
    """
    method, group = tree.get("method"), tree.get("select_k", {})
    if not isinstance(method, dict) or not isinstance(group, dict):
        return tree
    clusters, candidates = method.get("clusters"), group.get("candidates")
    is_number = isinstance(clusters, str) and clusters.strip().isdecimal()
    if isinstance(clusters, str | list | tuple) and not is_number:
        if candidates is not None:
            raise ValueError(f"select_k.candidates = {candidates}: method.clusters = {clusters} says it already")
        key, candidates = "method.clusters", clusters
    elif candidates is None:
        return tree
    elif clusters is not None:
        raise ValueError(f"method.clusters = {clusters}: select_k.candidates = {candidates} leaves it open; keep one")
    else:
        key = "select_k.candidates"
    stand_in = 2  # nothing reads it
    if candidates != "auto":
        form, shown = "a list of integers such as [5, 8, 10]", candidates
        if not isinstance(shown, list | tuple):
            one = "an integer, " if key == "method.clusters" else ""
            raise ValueError(f"{key} = {shown!r}: must be {one}auto, or {form}")
        shown = list(shown)
        if not shown:
            raise ValueError(f"{key} = []: names no candidate; write auto, or {form}")
        for one in shown:
            if not isinstance(one, int) or isinstance(one, bool):
                raise ValueError(f"{key} = {shown}: {one!r} is no integer; write auto, or {form}")
            if one < 2:
                raise ValueError(f"{key} = {shown}: {one} must be at least 2")
            if shown.count(one) > 1:
                raise ValueError(f"{key} = {shown}: names {one} more than once")
        candidates = tuple(sorted(shown))
        stand_in = candidates[-1]
    return tree | {"method": method | {"clusters": stand_in}, "select_k": group | {"candidates": candidates}}


def denormalize_clusters(tree: dict[str, Any]) -> dict[str, Any]:
    """Return the inverse of `normalize_clusters`: a dumped tree as a RUN.yaml has it."""
    group = dict(tree.get("select_k") or {})
    candidates = group.pop("candidates", None)
    if candidates is None:
        return tree
    method = tree["method"] | {"clusters": candidates if candidates == "auto" else list(candidates)}
    rest = {key: value for key, value in tree.items() if key != "select_k"}
    return rest | {"method": method} | ({"select_k": group} if group else {})


def _with_pixels(tree: dict[str, Any]) -> dict[str, Any]:
    """Return the tree with the encoder and the features of a method that learns from pixels, where they are open."""
    method = tree.get("method")
    if not isinstance(method, dict) or not reads_pixels(method.get("name", "auto")) or "encoders" in tree:
        return tree
    images = dict(config_type(method["name"]).pixel_settings)
    filled = {"encoder": {"name": "pixels", "normalize": False} | images, "features": {"normalize": False}}
    given = {key: tree[key] for key in filled if isinstance(tree.get(key), dict)}
    if given.get("encoder", {}).get("name") == "auto":
        given["encoder"] = {key: value for key, value in given["encoder"].items() if key != "name"}
    return tree | {key: value | given.get(key, {}) for key, value in filled.items() if key in given or key not in tree}


def parse(text: str, overrides: Sequence[str] = (), source: str = "RUN.yaml") -> RunConfig:
    """Read a run's config.

    Args:
        text: YAML.
        overrides: `KEY=VALUE` items; KEY is dotted, VALUE is YAML. They win over `text`.
        source: name of `text` in messages.

    Raises:
        ConfigError: the text is not a YAML mapping, or a key or value is refused; one line.
    """
    tree = _read_yaml(text, source)
    for override in overrides:
        key, equals, value = override.partition("=")
        *groups, last = key.split(".")
        if not equals or not all((*groups, last)):
            beside = "" if equals else "; what is read is one folder, file or URI"  # a shell has made many of *.jpg
            raise ConfigError(f"override {override!r}: write KEY=VALUE, for example method.clusters=20{beside}")
        node = tree
        for group in groups:
            if not isinstance(node.get(group), dict):
                node[group] = {}
            node = node[group]
        node[last] = _override_value(key, value)
    return validate(tree)


def validate(tree: dict[str, Any]) -> RunConfig:
    """Return the config of a tree; raise `ConfigError`, in one line, if a key or value is refused."""
    try:
        return RunConfig.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(format_error(error, known_keys())) from None


def known_keys(model: type[BaseModel] | None = None, prefix: str = "") -> list[str]:
    """Return all dotted keys of a model below a prefix that ends with a dot; None is RUN.yaml's with all methods'."""
    keys: list[str] = []
    for name, field in (model or RunConfig).model_fields.items():
        keys.append(prefix + name)
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            keys += known_keys(field.annotation, f"{prefix}{name}.")
    for method in () if model else config_types().values():
        keys += known_keys(method, "method.")
    return list(dict.fromkeys(keys))


# RUN.yaml as text.


def _override_value(key: str, text: str) -> Any:
    """Return the value of an override: text as it is given where the key takes text, else what it is as YAML."""
    # The types that the key takes; several methods may share its name.
    found: set[Any] = {RunConfig}
    for part in key.split("."):
        fields, found = found, set()
        for kind in fields:
            if isinstance(kind, type) and issubclass(kind, BaseModel):
                is_own = kind is BaseMethodConfig and part not in kind.model_fields
                models = config_types().values() if is_own else (kind,)
                annotations = [model.model_fields[part].annotation for model in models if part in model.model_fields]
            else:
                annotations = list(get_args(kind)[1:]) if get_origin(kind) is dict else []
            for annotation in annotations:
                found |= _alternatives(annotation)
    kinds = {get_origin(kind) or kind for kind in found}
    takes_text = str in kinds and kinds <= {str, tuple, type(None)}
    is_quoted = len(text) > 1 and text[0] == text[-1] and text[0] in "'\""
    if takes_text and not is_quoted and not (tuple in kinds and text.startswith("[")):
        return None if type(None) in kinds and text in ("null", "~") else text
    return yaml_value(key, text)


def _alternatives(annotation: Any) -> set[Any]:
    origin = get_origin(annotation)
    if origin is Annotated:
        return _alternatives(get_args(annotation)[0])
    if origin in (Union, UnionType):
        return {kind for part in get_args(annotation) for kind in _alternatives(part)}
    return {annotation}


def yaml_value(key: str, text: str) -> Any:
    """Return what an override of a key says as YAML; raise `ConfigError`, in one line, if that is nothing."""
    try:
        return yaml.load(text, _Loader)  # noqa: S506 - a SafeLoader
    except (yaml.YAMLError, ConfigError, ValueError):
        raise ConfigError(f"override {key}: {text!r} is not a YAML value") from None


class _Loader(yaml.SafeLoader):
    """YAML's safe loader, with the scalars of YAML 1.2: 010 is ten, and 1:30, no and 2024-01-01 are text.

    It refuses a key given twice: the second would silently win.
    """

    yaml_implicit_resolvers = {}  # noqa: RUF012 - none of YAML 1.1's

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Return a mapping of text to values; raise `ConfigError` for a key of another kind, or one given twice."""
        self.flatten_mapping(node)
        seen = set[Any]()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            where = f"line {key_node.start_mark.line + 1}: the key"
            if not isinstance(key, str):
                raise ConfigError(f"{where} {key!r} is not text")
            if key in seen:
                raise ConfigError(f"{where} {key} is given twice")
            seen.add(key)
        return super().construct_mapping(node, deep=True)

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        """Return a whole number; 0x and 0o mark other bases, a leading 0 does not."""
        text = node.value.lower()
        return int(text, 16 if "x" in text else 8 if "o" in text else 10)


_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_yaml_int)
for _tag, _pattern, _first in (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?[0-9][0-9_]*|0o[0-7]+|0x[0-9a-fA-F]+", list("-+0123456789")),
    ("float", r"[-+]?(\.[0-9]+|[0-9][0-9_]*(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.inf|\.nan", list("-+0123456789.")),
    ("merge", r"<<", ["<"]),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_pattern})$"), _first)


def _read_yaml(text: str, source: str) -> dict[str, Any]:
    try:
        tree = yaml.load(text, _Loader)  # noqa: S506 - a SafeLoader
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        problem = getattr(error, "problem", None) or "not YAML"
        if isinstance(error, yaml.reader.ReaderError):
            problem = f"{error.reason}; a RUN.yaml is text in UTF-8"
        raise ConfigError(f"{source}{where}: {problem}") from None
    except RecursionError:
        raise ConfigError(f"{source}: nested too deeply") from None
    except (ConfigError, ValueError) as error:
        raise ConfigError(f"{source}: {error}") from None
    if not isinstance(tree, dict):
        found = "nothing" if tree is None else f"a {type(tree).__name__}"
        raise ConfigError(f"{source}: {found} where a mapping of keys is needed, such as `run: …`")
    return tree
