"""From settings to an encoder.

Stands above the families, so that `base` need not know them. open_clip and timm take seconds to import and the pixels
encoder needs neither: they are imported where they are used.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from rayclust.encoders.base import Encoder
from rayclust.encoders.decode import Preprocess
from rayclust.encoders.pixels import PixelEncoder
from rayclust.encoders.settings import EncoderConfig
from rayclust.errors import ConfigError


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
    return _builder(config.family)(config, weights or weights_path(config), device)


def encoder_shape(config: EncoderConfig) -> tuple[Preprocess, int]:
    """Find what an encoder takes and how wide its rows are, without its weights.

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
        encoder = _builder(config.family)(config, None, "meta")
    return encoder.preprocess, encoder.dimension


def weights_path(config: EncoderConfig) -> Path:
    """Find the weights on this machine; fetch published ones if need be.

    Args:
        config: not of the pixels encoder, which has none.

    Raises:
        ConfigError: unknown architecture or tag, a URI, or published weights that cannot be fetched.
    """
    if config.weights_uri is not None:
        if "://" in config.weights_uri:
            raise ConfigError(f"encoder.pretrained = {config.weights_uri}: pass a local copy of it as `weights`")
        return Path(config.weights_uri).expanduser()
    if config.family == "timm":
        from rayclust.encoders.timm import timm_hub_file

        return timm_hub_file(config).path()
    from rayclust.encoders.clip import clip_hub_file

    return clip_hub_file(config).path()


def _builder(family: str) -> Callable[[EncoderConfig, Path | None, str], Encoder]:
    if family == "timm":
        from rayclust.encoders.timm import build_timm

        return build_timm
    from rayclust.encoders.clip import build_clip

    return build_clip
