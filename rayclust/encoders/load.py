"""From settings to an encoder."""

from __future__ import annotations

from pathlib import Path

from rayclust.encoders.base import Encoder
from rayclust.encoders.hub import HubFile
from rayclust.encoders.options import EncoderConfig
from rayclust.encoders.pixels import PixelEncoder
from rayclust.errors import ConfigError

# open_clip and timm take seconds to import, and the pixels encoder needs neither: they are imported where used.


def load_encoder(config: EncoderConfig, *, weights: Path | None = None, device: str = "cpu") -> Encoder:
    """The encoder that the settings describe, with its weights.

    Args:
        config: the settings.
        weights: a local copy of what `config.weights_uri` names; absent where that is a local path itself, or None.
        device: cpu, cuda, cuda:1 …

    Returns:
        An encoder, ready to use.

    Raises:
        ConfigError: unknown name or tag, weights that do not fit, or weights that are nowhere to be had.
        DataError: the file with the weights cannot be read.
    """
    if config.family == "pixels":
        return PixelEncoder(config)
    if weights is None:
        weights = _local(config)
    if config.family == "timm":
        from rayclust.encoders.timm import build_timm

        return build_timm(config, weights, device)
    from rayclust.encoders.clip import build_clip

    return build_clip(config, weights, device)


def hub_file(config: EncoderConfig) -> HubFile | None:
    """Where published weights are; None when the weights are a file of the user's, or when none are needed.

    Raises:
        ConfigError: unknown architecture or tag.
    """
    if config.family == "pixels" or config.weights_uri is not None:
        return None
    if config.family == "timm":
        from rayclust.encoders.timm import timm_hub_file

        return timm_hub_file(config)
    from rayclust.encoders.clip import clip_hub_file

    return clip_hub_file(config)


def _local(config: EncoderConfig) -> Path:
    published = hub_file(config)
    if published is not None:
        return published.path()
    uri = str(config.weights_uri)
    if "://" in uri:
        raise ConfigError(f"encoder.pretrained = {uri}: pass a local copy of it as `weights`")
    return Path(uri).expanduser()
