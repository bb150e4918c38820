"""Tiny networks with random weights, and files of their weights."""

from __future__ import annotations

import json
import logging
from contextlib import suppress
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import numpy as np
import open_clip
import pytest
import timm
import torch

from rayclust.encoders.load import load_encoder
from rayclust.encoders.settings import EncoderConfig
from rayclust.encoders.weights import HubFile

TINY_CLIP = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 32, "patch_size": 8, "head_width": 16},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
}


@cache
def tiny_clip() -> Any:
    """An open_clip network under the name tiny-clip; there is no file of weights for it."""
    folder = Path(mkdtemp())
    (folder / "tiny-clip.json").write_text(json.dumps(TINY_CLIP))
    open_clip.add_model_config(folder)
    torch.manual_seed(0)
    disabled = logging.root.manager.disable
    logging.disable(logging.CRITICAL)  # open_clip warns that the weights are random
    try:
        return open_clip.create_model("tiny-clip").eval()
    finally:
        logging.disable(disabled)


def tiny_timm(name: str = "test_vit", **options: Any) -> Any:
    torch.manual_seed(1)
    return timm.create_model(name, num_classes=0, **options).eval()


class _Asked(Exception):  # noqa: N818 - ends the building of an encoder
    pass


def hub_file(config: EncoderConfig) -> HubFile:
    """The weights that an encoder asks the hub for."""
    asked = list[HubFile]()

    def record(file: HubFile) -> Path:
        asked.append(file)
        raise _Asked

    with pytest.MonkeyPatch.context() as patch, suppress(_Asked):
        patch.setattr(HubFile, "path", record)
        load_encoder(config)
    return asked[0]


def noise(count: int, side: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, side, side, 3), np.uint8)


def seen(images: np.ndarray, mean: Any, std: Any) -> torch.Tensor:
    """Images as a network takes them, the plain way."""
    x = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255
    return (x - torch.tensor(mean).view(1, 3, 1, 1)) / torch.tensor(std).view(1, 3, 1, 1)
