"""The encoder without weights: the pixels themselves."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from rayclust.arrays import unit_rows
from rayclust.encoders.base import Encoder
from rayclust.encoders.decode import Preprocess
from rayclust.encoders.settings import EncoderConfig


class PixelEncoder(Encoder):
    """An image's pixels, from 0 to 1, one after another: row-major, channels last."""

    def __init__(self, config: EncoderConfig) -> None:
        self.name = "pixels"
        self.preprocess = Preprocess(
            config.image_size or 32,
            resize=config.resize or "squash",
            crop_fraction=config.crop_fraction or 1.0,
            grayscale=config.grayscale,
            jpeg_draft=config.jpeg_draft,
        )
        self.mean, self.std = config.mean or (0.0, 0.0, 0.0), config.std or (1.0, 1.0, 1.0)
        self.dimension = int(np.prod(self.preprocess.shape))
        self._normalize = config.normalize

    def _encode(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        mean, std = (np.array(c[: images.shape[3]], np.float32) for c in (self.mean, self.std))
        rows = ((images.astype(np.float32) / np.float32(255) - mean) / std).reshape(len(images), -1)
        return unit_rows(rows) if self._normalize else rows
