"""From settings to an encoder; above the families, so that `base` need not know them."""

from __future__ import annotations

from pathlib import Path

from rayclust.encoders.base import Encoder
from rayclust.encoders.pixels import PixelEncoder
from rayclust.encoders.settings import EncoderConfig
from rayclust.errors import ConfigError


def load_encoder(config: EncoderConfig, *, weights: Path | None = None, device: str = "cpu") -> Encoder:
    """Build the encoder that the settings describe, with its weights; torch computes it, whatever `engine` is.

    Args:
        config: the settings.
        weights: a local copy of what `config.weights_uri` names; absent where that is a local path itself, or None.
        device: cpu, cuda, cuda:1 …

    Raises:
        ConfigError: unknown name or tag, weights that do not fit, or weights that cannot be had.
        DataError: the file with the weights cannot be read.
    """
    if config.family in ("auto", "unknown"):
        raise ConfigError(f"encoder.name = {config.name}: name the encoder, such as open_clip/ViT-B-32")
    if config.family == "pixels":
        return PixelEncoder(config)
    if weights is None and config.weights_uri is not None:
        if "://" in config.weights_uri:
            raise ConfigError(f"encoder.pretrained = {config.weights_uri}: pass a local copy of it as `weights`")
        weights = Path(config.weights_uri).expanduser()
    # Both libraries take seconds to import: only the one that is needed.
    if config.family == "timm":
        from rayclust.encoders.timm import build_timm

        return build_timm(config, weights, device)
    from rayclust.encoders.clip import build_clip

    return build_clip(config, weights, device)


def dimension_of(config: EncoderConfig) -> int | None:
    """Return the width D of a named encoder's rows, known without its weights; None for an architecture of neither.

    timm's networks are built without memory for their weights.
    """
    if config.family == "pixels":
        return PixelEncoder(config).dimension
    if config.family == "run":
        return None
    if config.family == "open_clip":
        import open_clip

        found = open_clip.get_model_config(config.architecture)
        return int(found["embed_dim"]) if found else None
    import timm
    import torch

    if not timm.is_model(config.architecture):
        return None
    with torch.device("meta"):
        network = timm.create_model(config.architecture, pretrained=False, num_classes=0, **config.options)
    return int(getattr(network, "head_hidden_size", network.num_features))  # type: ignore[arg-type]
