"""Clustering methods, one paper a file, found by name."""

from __future__ import annotations

from functools import reduce
from operator import or_
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field

from rayclust.errors import ConfigError
from rayclust.methods.base import BaseMethodConfig, Method, MethodState, Recuttable
from rayclust.methods.cpp import Cpp
from rayclust.methods.kmeans import KMeans
from rayclust.methods.kmeans import KMeansConfig as KMeansConfig
from rayclust.methods.spectral import SpectralClustering
from rayclust.methods.temi import Temi
from rayclust.methods.temi import TemiConfig as TemiConfig

METHODS: dict[str, type[Any]] = {
    "kmeans": KMeans,
    "temi": Temi,
    "cpp": Cpp,
    "spectral": SpectralClustering,
}
"""Each method's class by the name that RUN.yaml gives it. It is built from (config, dimension, count, seed)."""

CONFIGS: dict[str, type[BaseMethodConfig]] = {name: method.config_type for name, method in METHODS.items()}
"""Each method's config by name."""

if TYPE_CHECKING:
    AnyMethodConfig = BaseMethodConfig
else:
    AnyMethodConfig = Annotated[reduce(or_, CONFIGS.values()), Field(discriminator="name")]
    """Any method's config, discriminated by `name`: the type of a config's field."""


def has_transform(name: str) -> bool:
    """Return whether the method of that name learns a space of its own; see `base.Transform`."""
    return hasattr(METHODS[name], "transform")


def is_recuttable(name: str) -> bool:
    """Return whether one fit of the method of that name serves other numbers of clusters; see `base.Recuttable`."""
    return issubclass(METHODS[name], Recuttable)


def build(config: BaseMethodConfig, dimension: int, count: int, seed: int) -> Method:
    """Build the method that a config asks for, not yet fitted.

    Args:
        config: of one of the classes in `CONFIGS`.
        dimension: D, the width of the rows.
        count: N, the rows of all workers.
        seed: of everything random in the method.

    Raises:
        ConfigError: there are not more rows than 1, or fewer than clusters.
    """
    if count < config.clusters:
        raise ConfigError(f"method.clusters = {config.clusters}: must be at most the number of rows, {count}")
    method: Method = METHODS[config.name](config, dimension, count, seed)
    return method


def load(state: MethodState) -> Method:
    """Build a fitted method from its state."""
    method: Method = METHODS[state.settings["config"]["name"]].from_state(state)
    return method
