"""The encoder without weights: the pixels themselves."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from rayclust.arrays import unit_rows
from rayclust.encoders.base import no_text_tower
from rayclust.encoders.decode import Preprocess
from rayclust.encoders.settings import Colour, EncoderConfig
from rayclust.errors import ShapeError


class PixelEncoder:
    """An image's pixels, from 0 to 1, one after another: row-major, channels last."""

    has_text = False

    def __init__(self, config: EncoderConfig) -> None:
        self.name = "pixels"
        self.preprocess = Preprocess(
            config.image_size or 32,
            resize=config.resize or "squash",
            crop_fraction=config.crop_fraction or 1.0,
            grayscale=config.grayscale,
            jpeg_draft=config.jpeg_draft,
        )
        self.mean: Colour = config.mean or (0.0, 0.0, 0.0)
        self.std: Colour = config.std or (1.0, 1.0, 1.0)
        self.dimension = int(np.prod(self.preprocess.shape))
        self._normalize = config.normalize

    def encode_images(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Flatten images to rows.

        Args:
            images: UInt8[B H W C], from `decode` with this encoder's `preprocess`.

        Returns:
            Float32[B H·W·C]; unit rows unless `normalize` is off, and a black image stays zero.

        Raises:
            ShapeError: other type, axes or size.
        """
        if images.dtype != np.uint8 or images.shape[1:] != self.preprocess.shape:
            raise ShapeError(
                f"images are {images.dtype} {images.shape}: uint8 (B, *{self.preprocess.shape}) are needed"
            )
        channels = self.preprocess.shape[2]
        mean, std = (np.array(c[:channels], np.float32) for c in (self.mean, self.std))
        rows = ((images.astype(np.float32) / np.float32(255) - mean) / std).reshape(len(images), -1)
        return unit_rows(rows) if self._normalize else rows

    def encode_texts(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Raise: pixels have no text tower."""
        raise no_text_tower(self.name)
