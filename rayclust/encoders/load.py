"""From settings to an encoder.

Stands above the families, so that `base` need not know them. open_clip and timm take seconds to import and the pixels
encoder needs neither: they are imported where they are used.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from rayclust.encoders.base import Encoder
from rayclust.encoders.decode import Preprocess
from rayclust.encoders.pixels import PixelEncoder
from rayclust.encoders.settings import EncoderConfig
from rayclust.errors import ConfigError

if TYPE_CHECKING:
    from rayclust.encoders.weights import HubFile


def load_encoder(config: EncoderConfig, *, weights: Path | None = None, device: str = "cpu") -> Encoder:
    """Build the encoder that the settings describe, with its weights.

    Args:
        config: the settings.
        weights: a local copy of what `config.weights_uri` names; absent where that is a local path itself, or None.
        device: cpu, cuda, cuda:1 …

    Returns:
        An encoder, ready to use.

    Raises:
        ConfigError: unknown name or tag, weights that do not fit, or weights that cannot be had.
        DataError: the file with the weights cannot be read.
    """
    if config.family == "pixels":
        return PixelEncoder(config)
    build, published = _family(config.family)
    if weights is None and config.weights_uri is None:
        weights = published(config).path()
    elif weights is None:
        if "://" in str(config.weights_uri):
            raise ConfigError(f"encoder.pretrained = {config.weights_uri}: pass a local copy of it as `weights`")
        weights = Path(str(config.weights_uri)).expanduser()
    return build(config, weights, device)


def encoder_shape(config: EncoderConfig) -> tuple[Preprocess, int]:
    """Return an encoder's preprocessing and dimension, without its weights.

    The network is built on torch's meta device: that takes a fraction of a second and no memory, whatever its size.

    Args:
        config: the settings; precision and `compile` do not matter.

    Returns:
        The encoder's `preprocess`, and its dimension D.

    Raises:
        ConfigError: unknown name or tag, or an impossible option or image size.
    """
    if config.family == "pixels":
        encoder: Encoder = PixelEncoder(config)
    else:
        encoder = _family(config.family)[0](config, None, "meta")
    return encoder.preprocess, encoder.dimension


def _family(
    name: str,
) -> tuple[Callable[[EncoderConfig, Path | None, str], Encoder], Callable[[EncoderConfig], HubFile]]:
    """Return the function that builds a family's encoder, and the one that looks up published weights."""
    if name == "timm":
        from rayclust.encoders.timm import build_timm, timm_hub_file

        return build_timm, timm_hub_file
    from rayclust.encoders.clip import build_clip, clip_hub_file

    return build_clip, clip_hub_file
