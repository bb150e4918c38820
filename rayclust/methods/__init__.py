"""Clustering methods, one paper a file, found by name."""

from __future__ import annotations

import pkgutil
from collections.abc import Mapping
from functools import reduce
from operator import or_
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import BeforeValidator, Field, GetJsonSchemaHandler, SerializeAsAny, TypeAdapter
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, PydanticKnownError

from rayclust.errors import ConfigError
from rayclust.methods.settings import BaseMethodConfig
from rayclust.settings import closest

if TYPE_CHECKING:  # they bring torch
    from rayclust.methods.base import Method, MethodState, Rows

METHODS = {
    "auto": "rayclust.methods.auto:Auto",
    "kmeans": "rayclust.methods.kmeans:KMeans",
    "temi": "rayclust.methods.temi_start:StartedTemi",
    "cpp": "rayclust.methods.cpp:Cpp",
    "gmm": "rayclust.methods.gmm:Gmm",
    "tac": "rayclust.methods.tac:Tac",
    "turtle": "rayclust.methods.turtle:Turtle",
    "consensus": "rayclust.methods.consensus:Consensus",
    "spectral": "rayclust.methods.spectral:SpectralClustering",
    "cpp_pixels": "rayclust.methods.pixels.cpp:CppPixels",
    "propos": "rayclust.methods.pixels.propos:ProPos",
    "byol": "rayclust.methods.pixels.byol:Byol",
    "simsiam": "rayclust.methods.pixels.simsiam:SimSiam",
    "simclr": "rayclust.methods.pixels.simclr:SimClr",
    "moco": "rayclust.methods.pixels.moco:MoCo",
    "pcl": "rayclust.methods.pixels.pcl:Pcl",
    "cc": "rayclust.methods.pixels.cc:Cc",
}
"""Each method's class by the name that RUN.yaml gives it; imported when it is first asked for. It is built from
(config, dimension, count, seed)."""
CONFIGS = {
    "auto": "rayclust.methods.settings:AutoConfig",
    "kmeans": "rayclust.methods.settings:KMeansConfig",
    "temi": "rayclust.methods.temi_settings:TemiConfig",
    "cpp": "rayclust.methods.cpp_settings:CppConfig",
    "gmm": "rayclust.methods.settings:GmmConfig",
    "tac": "rayclust.methods.tac_settings:TacConfig",
    "turtle": "rayclust.methods.turtle_settings:TurtleConfig",
    "consensus": "rayclust.methods.settings:ConsensusConfig",
    "spectral": "rayclust.methods.settings:SpectralConfig",
    "cpp_pixels": "rayclust.methods.pixels.settings:CppPixelsConfig",
    "propos": "rayclust.methods.pixels.settings:ProPosConfig",
    "byol": "rayclust.methods.pixels.settings:ByolConfig",
    "simsiam": "rayclust.methods.pixels.settings:SimSiamConfig",
    "simclr": "rayclust.methods.pixels.settings:SimClrConfig",
    "moco": "rayclust.methods.pixels.settings:MoCoConfig",
    "pcl": "rayclust.methods.pixels.settings:PclConfig",
    "cc": "rayclust.methods.pixels.settings:CcConfig",
}
"""Each method's config by the same name, read without the method and its torch; of a method that is not listed here the
method's own `config_type`."""


def find(name: str) -> type[Any]:
    """Return the class of the method of that name."""
    found: type[Any] = pkgutil.resolve_name(METHODS[name])
    return found


def config_type(name: str) -> type[BaseMethodConfig]:
    """Return the config of the method of that name."""
    found: type[BaseMethodConfig] = pkgutil.resolve_name(CONFIGS[name]) if name in CONFIGS else find(name).config_type
    return found


def config_types() -> dict[str, type[BaseMethodConfig]]:
    """Return each method's config by name; imports them all."""
    return {name: config_type(name) for name in METHODS}


def _read(value: Any) -> Any:
    """Validate a method's settings by the config that their `name` asks for."""
    if not isinstance(value, dict):
        if isinstance(value, BaseMethodConfig):
            return value
        raise PydanticKnownError("model_attributes_type")
    name = value.get("name", "auto")
    if not isinstance(name, str) or name not in METHODS:
        raise ValueError(f"name = {name!r}: must be one of {', '.join(sorted(METHODS))}{closest(str(name), METHODS)}")
    return config_type(name).model_validate({"name": name} | value)


class _Union:
    """JSON schema of a method's settings: that of any method, discriminated by `name`."""

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        any_config: Any = reduce(or_, config_types().values())
        return handler(TypeAdapter(Annotated[any_config, Field(discriminator="name")]).core_schema)


if TYPE_CHECKING:
    AnyMethodConfig = BaseMethodConfig
else:
    AnyMethodConfig = Annotated[SerializeAsAny[BaseMethodConfig], BeforeValidator(_read), _Union()]
    """Any method's config, found by its `name`: the type of a config's field."""


def reads_pixels(name: Any) -> bool:
    """Return whether that is the name of a method that learns from pixels."""
    return isinstance(name, str) and name in METHODS and config_type(name).reads_pixels


def is_recuttable(name: str) -> bool:
    """Return whether one fit of the method of that name serves other numbers of clusters; see `base.Recuttable`."""
    from rayclust.methods.base import Recuttable

    return issubclass(find(name), Recuttable)


def build(config: BaseMethodConfig, dimension: int | Mapping[str, int], count: int, seed: int) -> Method:
    """Build the method that a config asks for, not yet fitted.

    Args:
        config: of one of the methods in `METHODS`.
        dimension: D, the width of the rows; of each space by its name where the method's `spaces` is None.
        count: N, the rows of all workers.
        seed: of everything random in the method.

    Raises:
        ConfigError: there are not more rows than 1, or fewer than clusters.
    """
    if count < config.clusters:
        raise ConfigError(f"method.clusters = {config.clusters}: must be at most the number of rows, {count}")
    method: Method = find(config.name)(config, dimension, count, seed)
    return method


def build_for(rows: Rows, config: BaseMethodConfig, seed: int) -> Method:
    """Build the method that a config asks for, for rows in one space or several; see `build`."""
    takes_each = find(config.name).spaces is None
    return build(config, dict(rows.dimensions) if takes_each else rows.dimension, rows.count, seed)


def load(state: MethodState) -> Method:
    """Build a fitted method from its state.

    Raises:
        KeyError: settings are missing.
        ValueError: settings are not valid, or tensors are missing.
    """
    settings = state.settings
    kind = find(settings["config"]["name"])
    method: Method = kind(
        kind.config_type.model_validate(settings["config"]), settings["dimension"], settings["count"], seed=0
    )
    method.load_tensors(dict(state.tensors))
    return method.eval()
