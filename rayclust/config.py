"""RUN.yaml as a tree of frozen models: every setting of a run.

A method's own settings live in the method's file, the encoder's in `encoders/settings.py`. `parse` is the one reader.
It refuses unknown keys and bad values in one line, with the full key, the value, the bound and the nearest known key.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
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
    model_serializer,
    model_validator,
)

from rayclust.clustering.curation import CurateConfig
from rayclust.encoders.settings import PIXEL_CEILING, EncoderConfig
from rayclust.errors import ConfigError
from rayclust.methods import AnyMethodConfig, config_types, reads_pixels
from rayclust.methods.base import EMBEDDINGS, BaseMethodConfig
from rayclust.metrics.selection import geometric_grid
from rayclust.settings import Config, format_error


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

# The number of clusters.
#
# `method.clusters: auto` or a list leaves it to select-k: written there because that is where the number would stand,
# and read as `select_k.candidates` because it is a setting of the search and of no method.

Rule = Literal[
    "vote",
    "coding_length",
    "knee",
    "silhouette",
    "calinski_harabasz",
    "davies_bouldin",
    "modularity",
    "map_equation",
    "stability",
]

_LIST = "a list of integers such as [5, 8, 10]"


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
    """vote: the middle, in ratio, of what the criteria pick. knee: where the curve of coding lengths bends most.
    Any other: the number that is best by that criterion."""
    rows: int = Field(15_000, ge=2)
    """Rows of the seeded sample on which coding length, silhouette, Calinski–Harabasz and Davies–Bouldin are taken."""
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
        if self.rule == "stability" and self.seeds < 2:
            raise ValueError("rule = stability: needs select_k.seeds of at least 2, whose partitions it compares")
        return self

    def refuse_above(self, rows: int) -> None:
        """Raise `ConfigError` if a candidate, or the least that `auto` tries, is above the number of rows."""
        if self.candidates == "auto" and self.least > rows:
            raise ConfigError(f"select_k.least = {self.least}: must be at most the number of rows, {rows}")
        if isinstance(self.candidates, tuple) and max(self.candidates) > rows:
            shown = list(self.candidates)
            raise ConfigError(f"method.clusters = {shown}: {max(shown)} is above the number of rows, {rows}")

    def first(self, rows: int) -> tuple[int, ...]:
        """Return the candidates of the first round: the list, or for `auto` a geometric grid of ratio 1.5."""
        if isinstance(self.candidates, tuple):
            return self.candidates
        return geometric_grid(min(self.least, rows), self.largest(rows))

    def largest(self, rows: int) -> int:
        """Return the largest candidate on so many rows."""
        if isinstance(self.candidates, tuple):
            return max(self.candidates)
        most = math.ceil(2 * math.sqrt(rows)) if self.most == "auto" else self.most
        return min(max(most, self.least), rows)


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
    found = _validate_clusters(key, candidates)
    stand_in = 2 if found == "auto" else found[-1]  # nothing reads the 2
    return tree | {"method": method | {"clusters": stand_in}, "select_k": group | {"candidates": found}}


def denormalize_clusters(tree: dict[str, Any]) -> dict[str, Any]:
    """Return the inverse of `normalize_clusters`: a dumped tree as a RUN.yaml has it."""
    group = dict(tree.get("select_k") or {})
    candidates = group.pop("candidates", None)
    if candidates is None:
        return tree
    method = tree["method"] | {"clusters": candidates if candidates == "auto" else list(candidates)}
    rest = {key: value for key, value in tree.items() if key != "select_k"}
    return rest | {"method": method} | ({"select_k": group} if group else {})


def _validate_clusters(key: str, value: Any) -> tuple[int, ...] | Literal["auto"]:
    if value == "auto":
        return "auto"
    if not isinstance(value, list | tuple):
        one = "an integer, " if key == "method.clusters" else ""
        raise ValueError(f"{key} = {value!r}: must be {one}auto, or {_LIST}")
    shown = list(value)
    if not shown:
        raise ValueError(f"{key} = []: names no candidate; write auto, or {_LIST}")
    for one in shown:
        if not isinstance(one, int) or isinstance(one, bool):
            raise ValueError(f"{key} = {shown}: {one!r} is no integer; write auto, or {_LIST}")
        if one < 2:
            raise ValueError(f"{key} = {shown}: {one} must be at least 2")
        if shown.count(one) > 1:
            raise ValueError(f"{key} = {shown}: names {one} more than once")
    return tuple(sorted(shown))


# The machine or cluster.

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


def are_disjoint(some: Mapping[str, str], others: Mapping[str, str]) -> bool:
    """Return whether no node can carry both sets of labels."""
    return any(others.get(key, value) != value for key, value in some.items())


def format_labels(labels: Mapping[str, str]) -> str:
    """Return labels in the form market=spot,pool=cpu."""
    return ",".join(f"{key}={value}" for key, value in sorted(labels.items()))


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
                "train on a seeded sample and assign all with `rayclust predict`"
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


# The stages.

MEBIBYTE = 1 << 20


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
    split: Annotated[float, Field(gt=0, lt=1)] | str | tuple[str, ...] | None = None
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


class SpaceFeatures(Config):
    """Transform from the embeddings of one space to features."""

    center: bool = False
    """Subtract the mean embedding of the run."""
    normalize: bool = True
    """End with unit rows."""
    standardize: bool = False
    """Z-score each dimension by the mean and deviation of the run (TEMI's `embed_norm`)."""


class FeaturesConfig(SpaceFeatures):
    """Transform from embeddings to the features that methods see."""

    spaces: dict[str, SpaceFeatures] = Field(default_factory=dict)
    """Of spaces that have settings of their own, by name. Written as `features` of an entry of `encoders`."""

    def of(self, space: str) -> SpaceFeatures:
        """Return the settings of a space: its own, or those of the run."""
        return self.spaces.get(space, self)

    @model_serializer(mode="wrap")
    def _write(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        # Left out where no space has its own: so were the settings of runs of before, whose digests stand.
        return {key: value for key, value in handler(self).items() if key != "spaces" or value}


class SpaceConfig(EncoderConfig):
    """One of several encoders: an encoder, and the space of its rows."""

    space: str = Field(pattern=r"^[a-z0-9_-]+$")
    """Name of the space, of letters a–z, digits, _ and -. By default that of the architecture."""
    features: SpaceFeatures | None = None
    """Features of this space; None takes the run's."""
    embeddings: str | None = None
    """Ready embeddings of this space, in any format that `images.uri` takes for them: the rows with the keys of the
    run's. None encodes the images; the first space of a run of ready embeddings is at `images.uri`."""

    @model_validator(mode="before")
    @classmethod
    def _name_space(cls, tree: Any) -> Any:
        return with_space(tree)


def with_space(tree: Any) -> Any:
    """Return an entry of `encoders` with the name of its space; raise `ValueError` if it names no encoder either."""
    tree = {"name": tree} if isinstance(tree, str) else tree
    if not isinstance(tree, dict) or "space" in tree:
        return tree
    name = str(tree.get("name", "auto"))
    if name in ("auto", "unknown"):
        raise ValueError("space: is missing; an encoder without a name needs one, such as `space: a`")
    architecture = name.partition("/")[2].partition(".")[0] or name
    return {"space": re.sub(r"[^a-z0-9_]+", "-", architecture.lower()).strip("-")} | tree


def normalize_encoders(tree: dict[str, Any]) -> dict[str, Any]:
    """Read a list of one encoder as `encoder`, and copy the features of spaces to `features.spaces`.

    Raises:
        ValueError: both keys are given, or a space's features are written where they are copied to.
    """
    given, features = tree.get("encoders"), tree.get("features")
    if isinstance(features, dict) and features.get("spaces"):
        raise ValueError("features.spaces: write `features` of an entry of `encoders`")
    if not isinstance(given, list | tuple) or not given:
        return {key: value for key, value in tree.items() if key != "encoders"} if given in ([], ()) else tree
    if "encoder" in tree:
        raise ValueError("encoders: is given beside encoder; keep one of them")
    if len(given) == 1:
        entry = dict(given[0]) if isinstance(given[0], dict) else {"name": given[0]}
        if entry.get("embeddings") is not None:
            raise ValueError("encoders.0.embeddings: a run with one space takes ready embeddings from images.uri")
        own = entry.pop("features", None)
        encoder = {key: value for key, value in entry.items() if key not in ("space", "embeddings")}
        rest = {key: value for key, value in tree.items() if key != "encoders"}
        return rest | {"encoder": encoder} | ({} if own is None else {"features": own})
    spaces = dict[str, Any]()
    for entry in given:
        if isinstance(entry, dict) and isinstance(entry.get("features"), dict):
            with suppress(ValueError):  # reported where the entry itself is validated
                spaces[with_space(entry)["space"]] = entry["features"]
    if not spaces or not isinstance(features, dict | None):
        return tree
    return tree | {"features": (features or {}) | {"spaces": spaces}}


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


class AssignConfig(Config):
    """Clusters of rows, and levels above them."""

    levels: tuple[int, ...] = ()
    """Numbers of clusters of coarser levels, finest first: [1000, 50] puts each cluster into one of 1,000 and each of
    those into one of 50, by their prototypes. K itself may stand at the start."""


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
    templates: tuple[str, ...] = ("a photo of a {}",)
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
    flat_rows: int = Field(1_000_000, ge=1)
    """Rows up to which `auto` is flat."""


class EvaluateConfig(Config):
    """Measures of the partition."""

    silhouette_rows: int = Field(5000, ge=0)
    """Rows of the seeded sample on which the silhouette is taken; 0 leaves it out."""
    probe_neighbors: int = Field(20, ge=1)
    """Neighbours that vote in the k-NN probe, where labels exist, each with weight exp(cosine / 0.02)."""
    linear_probe_rows: int = Field(0, ge=0)
    """Rows of the seeded sample on which a linear probe is trained and, the other half, scored; 0 leaves it out. With a
    split it is trained on so many fitted rows, and scored on so many of the test."""


class ReportConfig(Config):
    """The page."""

    thumbnail: int = Field(112, ge=16, le=512)
    """Longer side of a thumbnail, pixels."""
    max_clusters: int = Field(200, ge=1)
    """Clusters shown with thumbnails, largest first; the others are listed in a table."""


class TrackingConfig(Config):
    """Services that show a training while it runs; changes no result."""

    to: tuple[Literal["tensorboard", "wandb", "mlflow"], ...] = ("tensorboard",)
    """tensorboard: event files in `tensorboard/` below the run. wandb, mlflow: need their package, and find server and
    key in their own variables."""
    project: str = "rayclust"
    """Project or experiment that the services file the run under."""


def _with_pixels(tree: dict[str, Any]) -> dict[str, Any]:
    """Return the tree with the encoder and the features of a method that learns from pixels, where they are open."""
    method = tree.get("method")
    if not isinstance(method, dict) or not reads_pixels(method.get("name", "auto")) or "encoders" in tree:
        return tree
    filled = {"encoder": {"name": "pixels", "normalize": False}, "features": {"normalize": False}}
    given = {key: tree[key] for key in filled if isinstance(tree.get(key), dict)}
    if given.get("encoder", {}).get("name") == "auto":
        given["encoder"] = {key: value for key, value in given["encoder"].items() if key != "name"}
    return tree | {key: value | given.get(key, {}) for key, value in filled.items() if key in given or key not in tree}


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
    def _reads_what_the_method_learns_from(self) -> RunConfig:
        name, encoder, features = self.method.name, self.encoder, self.features
        plain = not (encoder.normalize or features.normalize or features.center or features.standardize)
        if reads_pixels(name) and not (encoder.family == "pixels" and plain):
            raise ValueError(
                f"method.name = {name}: learns from pixels: leave `encoder` and `features` out, or set encoder.name: "
                "pixels, encoder.normalize: false and features: {center: false, normalize: false}"
            )
        return self

    @model_validator(mode="after")
    def _is_searchable(self) -> RunConfig:
        if self.neighbors.method == "ivf" and (self.images.split is not None or self.images.test is not None):
            raise ValueError("neighbors.method = ivf: finds no neighbours in one split alone; set it to exact")
        return self

    @model_serializer(mode="wrap")
    def _write(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        tree = denormalize_clusters(handler(self))
        if self.features.spaces:  # they stand in `encoders` as well
            tree["features"] = {key: value for key, value in tree["features"].items() if key != "spaces"}
        return tree

    @model_validator(mode="after")
    def _check_spaces(self) -> RunConfig:
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
            raise ConfigError(f"override {override!r}: write KEY=VALUE, for example method.clusters=20")
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


def _override_value(key: str, text: str) -> Any:
    """Return the value of an override: text as it is given where the key takes text, else what it is as YAML."""
    kinds = _kinds(key.split("."))
    takes_text = str in kinds and kinds <= {str, tuple, type(None)}
    is_quoted = len(text) > 1 and text[0] == text[-1] and text[0] in "'\""
    if takes_text and not is_quoted and not (tuple in kinds and text.startswith("[")):
        return None if type(None) in kinds and text in ("null", "~") else text
    return yaml_value(key, text)


def yaml_value(key: str, text: str) -> Any:
    """Return what an override of a key says as YAML; raise `ConfigError`, in one line, if that is nothing."""
    try:
        return yaml.load(text, _Loader)  # noqa: S506 - a SafeLoader
    except (yaml.YAMLError, ConfigError, ValueError):
        raise ConfigError(f"override {key}: {text!r} is not a YAML value") from None


def _kinds(path: Sequence[str]) -> set[Any]:
    """Return the types of value that a key takes; several methods may share its name."""
    found: set[Any] = {RunConfig}
    for part in path:
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
    return {get_origin(kind) or kind for kind in found}


def _alternatives(annotation: Any) -> set[Any]:
    origin = get_origin(annotation)
    if origin is Annotated:
        return _alternatives(get_args(annotation)[0])
    if origin in (Union, UnionType):
        return {kind for part in get_args(annotation) for kind in _alternatives(part)}
    return {annotation}


class _Loader(yaml.SafeLoader):
    """YAML's safe loader, with the scalars of YAML 1.2: 010 is ten, and 1:30, no and 2024-01-01 are text.

    It refuses a key given twice: the second would silently win.
    """

    yaml_implicit_resolvers = {}  # noqa: RUF012 - none of YAML 1.1's

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
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
        problem = getattr(error, "problem", None) or getattr(error, "reason", None) or "not YAML"
        raise ConfigError(f"{source}{where}: {problem}") from None
    except (ConfigError, RecursionError, ValueError) as error:
        raise ConfigError(f"{source}: {str(error) or 'nested too deeply'}") from None
    if not isinstance(tree, dict):
        found = "nothing" if tree is None else f"a {type(tree).__name__}"
        raise ConfigError(f"{source}: {found} where a mapping of keys is needed, such as `run: …`")
    return tree


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
