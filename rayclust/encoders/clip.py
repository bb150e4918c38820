"""Encoders of the open_clip library: an image and a text tower in one space."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
from numpy.typing import NDArray
from open_clip.convert import convert_state_dict
from open_clip.model import convert_to_custom_text_state_dict, resize_pos_embed, resize_text_pos_embed
from torch import Tensor, nn
from torch.func import functional_call

from rayclust.encoders.decode import Preprocess
from rayclust.encoders.network import TorchEncoder, network_errors, unknown_architecture
from rayclust.encoders.settings import EncoderConfig
from rayclust.encoders.weights import HubFile, load_into, load_state
from rayclust.errors import ConfigError

logger = logging.getLogger(__name__)

_TEXT_BATCH = 64
_HUB_NAMES = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")
_OPENAI_EXTRAS = {"input_resolution", "context_length", "vocab_size"}


class ClipEncoder(TorchEncoder):
    """Both towers of an open_clip network."""

    has_text = True

    def encode_texts(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Encode phrases, e.g. "a photo of a cat", to Float32[V D]; words past the network's context are cut off.

        Raises:
            ConfigError: the network's tokenizer is not on this machine.
        """
        rows, network = np.empty((len(texts), self.dimension), np.float32), self.network
        is_causal = isinstance(network, open_clip.CLIP) and network.text_pool_type == "argmax"
        with self._inference():
            for start in range(0, len(texts), _TEXT_BATCH):
                tokens = self._tokenize(list(texts[start : start + _TEXT_BATCH])).to(self._device)
                cut = dict[str, Tensor]()
                if len(tokens) == 1 and is_causal and network.attn_mask is not None:
                    # In a causal network that reads its row at the end token, nothing behind that token counts: one
                    # phrase alone, a query, is encoded in the time that its own tokens take.
                    length = int(tokens.argmax(dim=1)) + 1  # the end token has the largest number
                    tokens = tokens[:, :length]
                    cut["network.positional_embedding"] = network.positional_embedding[:length]
                    cut["network.attn_mask"] = network.attn_mask[:length, :length]
                encoded = functional_call(_TextTower(network), cut, (tokens,)) if cut else network.encode_text(tokens)
                rows[start : start + len(tokens)] = self._to_rows(encoded).cpu().numpy()
        return rows

    @cached_property
    def _tokenize(self) -> Callable[[list[str]], Tensor]:
        try:
            tokenizer: Callable[[list[str]], Tensor] = open_clip.get_tokenizer(self._config.architecture)
        except (OSError, ImportError, ValueError, RuntimeError) as error:
            what = " ".join(str(error).split())[:160]
            raise ConfigError(
                f"encoder.name = {self.name}: its tokenizer cannot be loaded ({what}); install transformers and fetch "
                f"it into the hub's cache, or set label.vocabulary: none"
            ) from error
        return tokenizer


class _TextTower(nn.Module):
    """A network whose forward pass is that of its text tower, for `functional_call`."""

    def __init__(self, network: Any) -> None:
        super().__init__()
        self.network = network

    def forward(self, tokens: Tensor) -> Tensor:
        encoded: Tensor = self.network.encode_text(tokens)
        return encoded


def build_clip(config: EncoderConfig, weights: Path | None, device: str) -> ClipEncoder:
    """Build an open_clip encoder with weights from a local file, or with published ones.

    Size, colours and filter are those that the tag declares, or for a file without a tag those on which all tags of the
    architecture agree, else OpenAI's. QuickGELU is on where the tag was trained with it, and for OpenAI's own weights;
    for any other file the architecture's name decides (ViT-L-14-quickgelu).

    Args:
        config: `name` is open_clip/<architecture>.
        weights: the file; None takes those that the tag names from the hub.
        device: cpu, cuda, cuda:1 …

    Raises:
        ConfigError: unknown architecture or tag, impossible option or image size, or weights that do not fit or cannot
            be had.
        DataError: the file cannot be read.
    """
    published = _published(config)
    if weights is None:
        repository, _, file = published["hf_hub"].rpartition("/")
        names = (file.rpartition(".")[0] + ".safetensors", file) if file else _HUB_NAMES
        weights = HubFile(repository, names, f"open_clip/{config.architecture}.{published['tag']}").path()
    state = load_state(weights)
    from_openai = state.keys() >= _OPENAI_EXTRAS
    message = f"encoder.options = {config.options}: {config.name} cannot be built so"
    # No log lines meanwhile: open_clip logs to the root logger, which is configured by that unless it has a handler.
    handler, disabled = logging.NullHandler(), logging.root.manager.disable
    logging.root.addHandler(handler)
    logging.disable(logging.CRITICAL)
    try:
        with network_errors(message):
            network: Any = open_clip.create_model(
                config.architecture,
                load_weights=False,
                pretrained_text=False,
                force_quick_gelu=from_openai or bool(published.get("quick_gelu")),
                force_image_size=config.image_size,
                device="cpu",
                **config.options,
            )
    finally:
        logging.disable(disabled)
        logging.root.removeHandler(handler)
    state = {k: v for k, v in state.items() if k not in _OPENAI_EXTRAS and not k.endswith("attn_mask")}
    try:
        state = _converted(network, state)
    except (AssertionError, KeyError, RuntimeError) as error:
        logger.info("open_clip could not adapt the names in %s: %s", weights, error)
    load_into(network, state, encoder=config.name, source=config.pretrained or str(weights))
    preprocess = Preprocess(
        config.image_size or network.visual.image_size,
        resize=config.resize or ("squash" if published.get("resize_mode") == "squash" else "crop"),
        interpolation="bilinear" if published.get("interpolation") == "bilinear" else "bicubic",
        crop_fraction=config.crop_fraction or 1.0,
        jpeg_draft=config.jpeg_draft,
    )
    mean = config.mean or tuple(published.get("mean") or open_clip.OPENAI_DATASET_MEAN)
    std = config.std or tuple(published.get("std") or open_clip.OPENAI_DATASET_STD)
    return ClipEncoder(network, config, preprocess, mean=mean, std=std, device=device)


def _published(config: EncoderConfig) -> dict[str, Any]:
    """Return what open_clip declares about the weights: of the tag, or what all tags of the architecture agree on."""
    architecture, tag = config.architecture, config.tag
    if architecture not in open_clip.list_models():
        raise unknown_architecture(config, open_clip.list_models())
    tags = open_clip.list_pretrained_tags_by_model(architecture)
    if tag is None and config.weights_uri is not None:
        known = [open_clip.get_pretrained_cfg(architecture, each) for each in tags]
        shared = ("mean", "std", "interpolation", "resize_mode")
        return {key: known[0][key] for key in shared if known and all(k.get(key) == known[0].get(key) for k in known)}
    has = ", ".join(tags)
    if tag is not None:
        tag = tag.lower().replace("-", "_")
    elif "openai" in tags or len(tags) == 1:
        tag = "openai" if "openai" in tags else tags[0]
    else:
        raise ConfigError(f"encoder.pretrained: {config.name} needs a file or one of: {has or 'no tags exist'}")
    if tag not in tags:
        raise ConfigError(f"encoder.pretrained = {config.tag}: not a tag of {config.name}; it has: {has or 'none'}")
    return {"tag": tag, **open_clip.get_pretrained_cfg(architecture, tag)}


def _converted(network: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Convert weights to the network's own names and image size, as open_clip's own loader would."""
    expected = network.state_dict()
    state = convert_state_dict(network, state)
    if "positional_embedding" in state and "positional_embedding" not in expected:
        state = convert_to_custom_text_state_dict(state)
    for key in {"logit_scale", "logit_bias"} & expected.keys():
        state[key] = state.get(key, expected[key]).reshape(expected[key].shape)
    if "text.transformer.embeddings.position_ids" not in expected:
        state.pop("text.transformer.embeddings.position_ids", None)
    resize_pos_embed(state, network)
    resize_text_pos_embed(state, network)
    return state
