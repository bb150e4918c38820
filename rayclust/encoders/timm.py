"""Encoders of the timm library: networks without their classifier, with pooled features.

docs/methods.md lists the backbones of the TEMI paper under these names.
"""

from __future__ import annotations

import copy
import logging
import re
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import timm
import torch
from timm.data.config import resolve_model_data_config
from timm.models import get_pretrained_cfg
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from rayclust.encoders.decode import Preprocess
from rayclust.encoders.network import TorchEncoder, network_errors, unknown_architecture
from rayclust.encoders.settings import EncoderConfig
from rayclust.encoders.weights import HubFile, load_into, load_state, without_prefix
from rayclust.errors import ConfigError

logger = logging.getLogger(__name__)

FOLDING_TOLERANCE = 1e-4
"""Largest relative change of the output that folding may make; larger means that it was not the same function."""
_HUB_NAMES = ("model.safetensors", "pytorch_model.bin")
_HEADS = {"head", "head_dist", "fc", "classifier", "heads", "last_linear", "predictor", "projector", "logit_scale"}
# Names of torchvision's and SWAG's vision transformers, and timm's for the same.
_FROM_TORCHVISION = (
    (r"^conv_proj\.", "patch_embed.proj."),
    (r"^class_token$", "cls_token"),
    (r"^encoder\.pos_embedding$", "pos_embed"),
    (r"^encoder\.ln\.", "norm."),
    (r"^encoder\.layers\.(?:encoder_)?layer_(\d+)\.", r"blocks.\1."),
    (r"\.ln_([12])\.", r".norm\1."),
    (r"\.self_attention\.in_proj_", ".attn.qkv."),
    (r"\.self_attention\.out_proj\.", ".attn.proj."),
    (r"\.mlp\.(?:linear_1|0)\.", ".mlp.fc1."),
    (r"\.mlp\.(?:linear_2|3)\.", ".mlp.fc2."),
)


def build_timm(config: EncoderConfig, weights: Path | None, device: str) -> TorchEncoder:
    """Build a timm encoder with weights from a local file, or with published ones.

    Size, colours, filter and crop are those that the architecture's tag declares, unless the config says otherwise.

    Args:
        config: `name` is timm/<architecture> or timm/<architecture>.<tag>.
        weights: the file; names of heads and of other networks in it are ignored. None takes those that the tag names
            from the hub.
        device: cpu, cuda, cuda:1 …

    Raises:
        ConfigError: unknown architecture or tag, impossible option or image size, or weights that do not fit or cannot
            be had.
        DataError: the file cannot be read.
    """
    # 1. <architecture>.<tag>, or the architecture alone, which then means timm's default tag.
    name, tag = config.architecture, config.tag
    if not timm.is_model(name):
        raise unknown_architecture(config, timm.list_models())
    if tag is not None:
        tags = [each.partition(".")[2] for each in timm.list_models(f"{name}.*", pretrained=True)]
        if tag not in tags:
            has = ", ".join(tags) or "none"
            raise ConfigError(f"encoder.pretrained = {tag}: not a tag of timm/{name}; it has: {has}")
        name = f"{name}.{tag}"
    if weights is None:
        weights = _published_weights(config, name)
    # 2. The network.
    message = f"encoder.options = {config.options}: {config.name} cannot be built so"
    with network_errors(message):
        network: Any = timm.create_model(name, pretrained=False, num_classes=0, **config.options)
    # 3. The file's weights under the network's own names, without heads.
    expected = network.state_dict()
    state = without_prefix(from_torchvision(load_state(weights)), expected)
    fits = expected.keys() <= state.keys() and all(state[key].shape == value.shape for key, value in expected.items())
    # timm's own conversion of names, and of position embeddings to another image size.
    convert: Any = getattr(sys.modules[type(network).__module__], "checkpoint_filter_fn", None)
    if convert is not None and not fits:
        try:
            state = dict(convert(state, network))
        except (KeyError, RuntimeError, AttributeError, TypeError, ValueError) as error:
            logger.info("timm could not adapt the names in %s: %s", weights, error)
    state = {key: value for key, value in state.items() if key in expected or key.partition(".")[0] not in _HEADS}
    load_into(network, state, encoder=config.name, source=config.pretrained or str(weights))
    # 4. How it sees images.
    declared = resolve_model_data_config(network)  # type: ignore[no-untyped-call]
    resampling = declared["interpolation"]
    preprocess = Preprocess(
        config.image_size or tuple(declared["input_size"][1:]),
        resize=config.resize or ("squash" if declared["crop_mode"] == "squash" else "crop"),
        interpolation=resampling if resampling in ("bilinear", "lanczos", "nearest") else "bicubic",
        crop_fraction=config.crop_fraction or (1.0 if config.resize else min(declared["crop_pct"], 1.0)),
        jpeg_draft=config.jpeg_draft,
    )
    height, width, _ = preprocess.shape
    with network_errors(f"encoder.image_size = {preprocess.size}: {config.name} does not take it"):
        if config.image_size is not None and hasattr(network, "set_input_size"):
            network.set_input_size(img_size=config.image_size)
        example = torch.linspace(-1, 1, 3 * height * width).view(1, 3, height, width)
        network = fold_batch_norms(network.eval(), example)
    mean, std = config.mean or tuple(declared["mean"]), config.std or tuple(declared["std"])
    return TorchEncoder(network, config, preprocess, mean=mean, std=std, device=device)


def _published_weights(config: EncoderConfig, name: str) -> Path:
    """Return the file of the weights that a network is published with, fetched if need be."""
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
    return HubFile(published.hf_hub_id, names, f"timm/{config.architecture}.{published.tag}").path()


def from_torchvision(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename the weights of a vision transformer of torchvision or SWAG to timm's names; leave all others.

    SWAG's position embedding [1+P, 1, D] becomes [1, 1+P, D].
    """
    if "encoder.pos_embedding" not in state or "conv_proj.weight" not in state:
        return state
    result = {}
    for key, value in state.items():
        name = key
        for pattern, replacement in _FROM_TORCHVISION:
            name = re.sub(pattern, replacement, name)
        result[name] = value.transpose(0, 1) if name == "pos_embed" and value.shape[1] == 1 else value
    return result


def fold_batch_norms(network: nn.Module, example: Tensor) -> nn.Module:
    """Fold batch norms into the convolutions before them: half the passes over memory.

    Neighbours in a module need not be neighbours in its forward pass, so the result is compared on an example. On one
    CPU thread mobilenetv2_100 gains 30 %.

    Args:
        network: in eval mode; not changed.
        example: Float[1 3 H W].

    Returns:
        A network in eval mode with the same outputs to `FOLDING_TOLERANCE`, or `network` itself where that cannot be.
    """
    if not any(isinstance(module, nn.BatchNorm2d) for module in network.modules()):
        return network
    folded = copy.deepcopy(network)
    for module in list(folded.modules()):
        for (place, conv), (name, norm) in pairwise(list(module.named_children())):
            # Each norm that follows a convolution by name.
            if not isinstance(conv, nn.Conv2d) or not isinstance(norm, nn.BatchNorm2d):
                continue
            if norm.num_features == conv.out_channels and norm.running_mean is not None and norm.affine:
                setattr(module, place, fuse_conv_bn_eval(conv, norm))
                # timm's norms carry the activation that follows.
                rest = [getattr(norm, part, None) for part in ("drop", "act")]
                kept = [part for part in rest if isinstance(part, nn.Module) and not isinstance(part, nn.Identity)]
                setattr(module, name, nn.Sequential(*kept))
    with torch.inference_mode():
        before, after = network(example), folded(example)
    if (after - before).norm() <= FOLDING_TOLERANCE * before.norm():
        return folded
    logger.info("batch norms are left as they are: folding would change the output")
    return network
