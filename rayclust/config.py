"""RUN.yaml as a frozen tree: what a whole run is asked to do.

A method's own settings live in the method's file; the encoder's in `encoders/options.py`. `parse` is the one reader. It
refuses what it does not know by full key, with the value, the bound and the nearest known key, in one line.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import yaml
from pydantic import BaseModel, Field, SerializerFunctionWrapHandler, ValidationError, model_serializer, model_validator

from rayclust.candidates import SelectKConfig, open_schema, opened, written
from rayclust.encoders.decode import PIXEL_CEILING
from rayclust.encoders.options import EncoderConfig
from rayclust.errors import ConfigError
from rayclust.language.options import LabelConfig
from rayclust.methods import CONFIGS, AnyMethodConfig
from rayclust.options import Config
from rayclust.prices import NodePrice
from rayclust.refusals import one_line
from rayclust.resources import ResourcesConfig

MEBIBYTE = 1 << 20


class ImagesConfig(Config):
    """Where the images come from and what is refused."""

    uri: str = Field(min_length=1)
    """A folder tree, *.tar shards, *.parquet, a table of embeddings (local or s3://), or `dataset:NAME`."""
    format: Literal["auto", "folder", "webdataset", "parquet", "embeddings"] = "auto"
    """How the images are stored; `auto` looks at the names."""
    labels: str = "auto"
    """auto | none | folder | a column or tar suffix. Used for evaluation only, never to fit."""
    classes: tuple[str, ...] | str | None = None
    """Keep only these classes: a list of names (ImageNet: wnids), or a text file with one a line. None keeps all."""
    shard_size: int = Field(512, ge=1, le=1_000_000)
    """Images per unit of work where the input has no shards of its own (folders, large parquet files)."""
    max_reject_share: float = Field(0.1, ge=0, le=1)
    """Above this share of rejected images the encode stage fails."""
    max_bytes: int = Field(64 * MEBIBYTE, ge=1)
    """Bytes of one encoded image above which it is rejected."""
    max_pixels: int = Field(128_000_000, ge=1, le=PIXEL_CEILING)
    """Pixels of one image above which it is rejected before it is decoded (decompression bombs)."""


class FeaturesConfig(Config):
    """What methods see of the embeddings."""

    center: bool = False
    """Subtract the mean embedding of the run."""
    normalize: bool = True
    """End with unit rows."""
    standardize: bool = False
    """Z-score each dimension by the mean and deviation of the run (TEMI's `embed_norm`)."""


class NeighborsConfig(Config):
    """Nearest neighbours in feature space by cosine."""

    k: int = Field(50, ge=1, le=4096)
    """Neighbours kept per row, the row itself excluded; at most N − 1 are written."""
    method: Literal["auto", "exact", "ivf"] = "auto"
    """exact: all pairs by blocks. ivf: an inverted file with measured recall. auto: ivf above `exact_rows` rows."""
    exact_rows: int = Field(2_000_000, ge=1)
    """Rows up to which `auto` is exact."""
    min_recall: float = Field(0.95, gt=0, le=1)
    """Recall@k that the ivf route must reach on a sample of rows, else the stage fails."""


class AssignConfig(Config):
    """Clusters of rows, and levels above them."""

    levels: tuple[int, ...] = ()
    """Numbers of clusters of coarser levels, finest first: [1000, 50] puts each cluster into one of 1,000 and each of
    those into one of 50, by their prototypes. K itself may stand at the start."""


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
    """Neighbours that vote in the k-NN probe, where labels exist."""
    linear_probe_rows: int = Field(0, ge=0)
    """Rows of the seeded sample on which a linear probe is trained and, the other half, scored; 0 leaves it out."""


class ReportConfig(Config):
    """The page."""

    thumbnail: int = Field(112, ge=16, le=512)
    """Longer side of a thumbnail, pixels."""
    max_clusters: int = Field(200, ge=1)
    """Clusters shown with thumbnails, largest first; the others are listed in a table."""


class TrackingConfig(Config):
    """Who can follow a training while it runs; changes no result."""

    to: tuple[Literal["tensorboard", "wandb", "mlflow"], ...] = ("tensorboard",)
    """tensorboard: event files in `tensorboard/` below the run. wandb, mlflow: need their package, and find server and
    key in their own variables."""
    project: str = "rayclust"
    """Project or experiment that the services file the run under."""


class RunConfig(Config):
    """RUN.yaml."""

    run: str = Field(min_length=1)
    """A folder or an s3:// URI; every artefact of the run lies below it."""
    seed: int = Field(0, ge=0, lt=2**31)
    """Seed of everything random."""
    images: ImagesConfig
    encoder: EncoderConfig = EncoderConfig()
    features: FeaturesConfig = FeaturesConfig()
    neighbors: NeighborsConfig = NeighborsConfig()
    method: AnyMethodConfig
    select_k: SelectKConfig = SelectKConfig()
    assign: AssignConfig = AssignConfig()
    label: LabelConfig = LabelConfig()
    index: IndexConfig = IndexConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    report: ReportConfig = ReportConfig()
    tracking: TrackingConfig = TrackingConfig()
    resources: ResourcesConfig = ResourcesConfig()
    prices: dict[str, NodePrice] = Field(default_factory=dict)
    """Kinds of nodes by name, with what they cost: for what `check` reckons. No price is known without."""

    @model_validator(mode="before")
    @classmethod
    def _open(cls, tree: Any) -> Any:
        return opened(tree) if isinstance(tree, dict) else tree

    @model_validator(mode="after")
    def _divides(self) -> RunConfig:
        if self.is_open and self.resources.rows == "cells":
            raise ValueError("resources.rows = cells: select-k's trials hold all rows, give one number of clusters")
        self.fitted()
        return self

    @model_serializer(mode="wrap")
    def _write(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return written(handler(self))

    @property
    def is_open(self) -> bool:
        """Whether the number of clusters is left to select-k; `method.clusters` is then a stand-in that nobody uses."""
        return self.select_k.candidates is not None

    def fitted(self) -> AnyMethodConfig:
        """The method's settings as training workers take them.

        Raises:
            ConfigError: they ask for what workers that hold a part of the rows cannot do.
        """
        return self.method.dividing_rows() if self.resources.rows == "cells" else self.method

    def closed(self, clusters: int) -> RunConfig:
        """This config with a number of clusters, as if it had been written so."""
        tree = self.model_dump(mode="json", exclude_unset=True)
        tree["method"]["clusters"] = clusters
        return validate(tree)

    @classmethod
    def model_json_schema(cls, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """The schema of what may be written: `method.clusters` may also be open."""
        schema = super().model_json_schema(*args, **kwargs)
        for method in CONFIGS.values():
            open_schema(schema["$defs"][method.__name__])
        return schema


def parse(text: str, overrides: Sequence[str] = (), source: str = "RUN.yaml") -> RunConfig:
    """Reads a run's config.

    Args:
        text: YAML.
        overrides: `KEY=VALUE` items; KEY is dotted, VALUE is YAML. They win over `text`.
        source: what to call `text` in messages.

    Raises:
        ConfigError: the text is not a YAML mapping, or a key or value is refused; one line.
    """
    tree = _read_yaml(text, source)
    for override in overrides:
        _override(tree, override)
    return validate(tree)


def validate(tree: dict[str, Any]) -> RunConfig:
    """The config in a plain tree of dicts, lists and scalars.

    Raises:
        ConfigError: a key or value is refused; one line.
    """
    try:
        return RunConfig.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(one_line(error, known_keys(), tuple(CONFIGS))) from None


class _UniqueKeyLoader(yaml.SafeLoader):
    """YAML's safe loader, refusing a key given twice: the second would silently win."""


def _unique_mapping(loader: yaml.SafeLoader, node: yaml.MappingNode) -> dict[Any, Any]:
    loader.flatten_mapping(node)
    mapping: dict[Any, Any] = {}
    for key_node, value_node in node.value:
        key = loader.construct_object(key_node, deep=True)
        if not isinstance(key, str):
            raise ConfigError(f"line {key_node.start_mark.line + 1}: the key {key!r} is not text")
        if key in mapping:
            raise ConfigError(f"line {key_node.start_mark.line + 1}: the key {key} is given twice")
        mapping[key] = loader.construct_object(value_node, deep=True)
    return mapping


_UniqueKeyLoader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _unique_mapping)


def _read_yaml(text: str, source: str) -> dict[str, Any]:
    try:
        tree = yaml.load(text, _UniqueKeyLoader)  # noqa: S506 - a SafeLoader
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


def _override(tree: dict[str, Any], override: str) -> None:
    key, equals, value = override.partition("=")
    parts = key.split(".")
    if not equals or not all(parts):
        raise ConfigError(f"override {override!r}: write KEY=VALUE, for example method.clusters=20")
    try:
        parsed = yaml.load(value, _UniqueKeyLoader)  # noqa: S506 - a SafeLoader
    except (yaml.YAMLError, ConfigError, ValueError):
        raise ConfigError(f"override {key}: {value!r} is not a YAML value") from None
    node = tree
    for part in parts[:-1]:
        child = node.get(part)
        if not isinstance(child, dict):
            child = {}
        node[part] = child
        node = child
    node[parts[-1]] = parsed


def known_keys() -> list[str]:
    """All dotted keys of RUN.yaml, those of every method among them."""
    keys: list[str] = []

    def visit(model: type[BaseModel], prefix: str) -> None:
        for name, field in model.model_fields.items():
            keys.append(prefix + name)
            if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
                visit(field.annotation, f"{prefix}{name}.")

    visit(RunConfig, "")
    for model in CONFIGS.values():
        visit(model, "method.")
    return list(dict.fromkeys(keys))
