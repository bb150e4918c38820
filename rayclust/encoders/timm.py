"""Encoders of the timm library."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
from timm.data.config import resolve_model_data_config
from timm.models import get_pretrained_cfg
from torch import Tensor, nn

from rayclust.encoders.base import TorchEncoder, size_refusal, unknown_architecture
from rayclust.encoders.decode import Preprocess
from rayclust.encoders.folding import folded
from rayclust.encoders.hub import HubFile
from rayclust.encoders.options import EncoderConfig
from rayclust.encoders.torchvision_vit import renamed
from rayclust.encoders.weights import fit, load_state, without_prefix
from rayclust.errors import ConfigError

logger = logging.getLogger(__name__)

_HUB_NAMES = ("model.safetensors", "pytorch_model.bin")
_HEADS = {"head", "head_dist", "fc", "classifier", "heads", "last_linear", "predictor", "projector", "logit_scale"}


class TimmEncoder(TorchEncoder):
    """A timm network without its classifier; pooled features."""

    def _image_tower(self) -> Callable[[Tensor], Tensor]:
        tower: Callable[[Tensor], Tensor] = self._network
        return tower


def build_timm(config: EncoderConfig, weights: Path, device: str) -> TimmEncoder:
    """A timm encoder with weights from a local file.

    Size, colours, filter and crop are those that the architecture's tag declares, unless the config says otherwise.

    Args:
        config: `name` is timm/<architecture> or timm/<architecture>.<tag>.
        weights: the file; names of heads and of other networks in it are ignored.
        device: cpu, cuda …

    Raises:
        ConfigError: unknown architecture, impossible option or image size, or weights that do not fit.
        DataError: the file cannot be read.
    """
    network: Any = _network(config)
    _load(network, config, weights)
    preprocess, colour = _data_config(network, config)
    height, width, _ = preprocess.shape
    try:
        if config.image_size is not None and hasattr(network, "set_input_size"):
            network.set_input_size(img_size=config.image_size)
        network = folded(network.eval(), torch.linspace(-1, 1, 3 * height * width).view(1, 3, height, width))
    except (RuntimeError, AssertionError, ValueError, TypeError, ArithmeticError) as error:
        raise size_refusal(config.name, preprocess.size, error) from error
    return TimmEncoder(network, config, preprocess, colour, device)


def timm_hub_file(config: EncoderConfig) -> HubFile:
    """Where the weights that a tag names are published.

    Raises:
        ConfigError: unknown architecture or tag, or weights that no hub has.
    """
    name = _tagged(config)
    published = get_pretrained_cfg(name)
    if published is None or not (published.hf_hub_id or published.url):
        raise ConfigError(f"encoder.pretrained: timm knows no weights of {config.name}; set it to a path or s3:// URI")
    if not published.hf_hub_id:
        file = str(published.url).rpartition("/")[2]
        raise ConfigError(
            f"encoder.pretrained: the weights of {config.name} are on no hub: fetch {file} from {published.url}, and "
            f"set encoder.pretrained to its path or s3:// URI"
        )
    names = (published.hf_hub_filename,) if published.hf_hub_filename else _HUB_NAMES
    return HubFile(published.hf_hub_id, names, f"timm/{config.architecture}.{published.tag}")


def _tagged(config: EncoderConfig) -> str:
    """<architecture>.<tag>, or the architecture alone, which then means timm's default tag."""
    architecture, tag = config.architecture, config.tag
    if not timm.is_model(architecture):
        raise unknown_architecture(config, timm.list_models())
    if tag is None:
        return architecture
    tags = [name.partition(".")[2] for name in timm.list_models(f"{architecture}.*", pretrained=True)]
    if tag not in tags:
        has = ", ".join(tags) or "none"
        raise ConfigError(f"encoder.pretrained = {tag}: not a tag of timm/{architecture}; it has: {has}")
    return f"{architecture}.{tag}"


def _network(config: EncoderConfig) -> nn.Module:
    name = _tagged(config)
    try:
        with torch.random.fork_rng(devices=[]):
            network: nn.Module = timm.create_model(name, pretrained=False, num_classes=0, **config.options)
    except (TypeError, ValueError, RuntimeError, AssertionError, KeyError) as error:
        what = " ".join(str(error).split())[:200]
        raise ConfigError(f"encoder.options = {config.options}: {config.name} cannot be built so: {what}") from error
    return network


def _load(network: nn.Module, config: EncoderConfig, weights: Path) -> None:
    own = network.state_dict()
    state = without_prefix(renamed(load_state(weights)), own)
    rename: Any = getattr(sys.modules[type(network).__module__], "checkpoint_filter_fn", None)
    if rename is not None and (not own.keys() <= state.keys() or _resized(own, state)):
        try:
            state = dict(rename(state, network))
        except (KeyError, RuntimeError, AttributeError, TypeError, ValueError) as error:
            logger.info("timm could not adapt the names in %s: %s", weights, error)
    state = {key: value for key, value in state.items() if key in own or key.partition(".")[0] not in _HEADS}
    fit(network, state, encoder=config.name, source=config.pretrained or str(weights))


def _resized(own: dict[str, Tensor], state: dict[str, Tensor]) -> bool:
    return any(key in state and state[key].shape != value.shape for key, value in own.items())


def _data_config(
    network: nn.Module, config: EncoderConfig
) -> tuple[Preprocess, tuple[tuple[float, float, float], tuple[float, float, float]]]:
    own = resolve_model_data_config(network)  # type: ignore[no-untyped-call]
    size = config.image_size or tuple(own["input_size"][1:])
    fraction = config.crop_fraction or (1.0 if config.resize else min(own["crop_pct"], 1.0))
    preprocess = Preprocess(
        size,
        resize=config.resize or ("squash" if own["crop_mode"] == "squash" else "crop"),
        interpolation=own["interpolation"] if own["interpolation"] in ("bilinear", "lanczos", "nearest") else "bicubic",
        crop_fraction=fraction,
        jpeg_draft=config.jpeg_draft,
    )
    return preprocess, (config.mean or tuple(own["mean"]), config.std or tuple(own["std"]))
