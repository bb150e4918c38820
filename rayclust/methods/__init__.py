"""Clustering methods, one paper a file, found by name."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field

from rayclust.errors import ConfigError
from rayclust.methods.base import BaseMethodConfig, Export, Method
from rayclust.methods.cpp import Cpp, CppConfig
from rayclust.methods.kmeans import KMeans, KMeansConfig
from rayclust.methods.spectral import SpectralClustering, SpectralConfig
from rayclust.methods.temi import Temi, TemiConfig

METHODS: dict[str, tuple[type[Any], type[Any]]] = {
    "kmeans": (KMeansConfig, KMeans),
    "temi": (TemiConfig, Temi),
    "cpp": (CppConfig, Cpp),
    "spectral": (SpectralConfig, SpectralClustering),
}
"""Each method's config and class by name. A class is built from (config, dimension, count, seed)."""

CONFIGS: dict[str, type[BaseMethodConfig]] = {name: config for name, (config, _) in METHODS.items()}
"""Each method's config by the name that RUN.yaml gives it."""

AnyMethodConfig = Annotated[KMeansConfig | TemiConfig | CppConfig | SpectralConfig, Field(discriminator="name")]
"""Any method's config, told apart by `name`: the type of a config's field."""


def has_own_space(name: str) -> bool:
    """Whether the method of that name learns a space of its own, i.e. says what `represent` gives."""
    return METHODS[name][1].represent is not Method.represent


def build(config: BaseMethodConfig, dimension: int, count: int, seed: int) -> Method:
    """The method that a config asks for, not yet fitted.

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
    method: Method = METHODS[config.name][1](config, dimension, count, seed)
    return method


def load(export: Export) -> Method:
    """A fitted method from its export, ready to assign."""
    settings = export.settings
    config = CONFIGS[settings["config"]["name"]].model_validate(settings["config"])
    method = build(config, settings["dimension"], settings["count"], seed=0)
    method.load_exported(export.tensors)
    return method.eval()
