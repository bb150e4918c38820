"""The encoder: the base class of all, without torch, so that what needs no network of torch's need not load it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from rayclust.encoders.decode import Preprocess
from rayclust.encoders.settings import Colour
from rayclust.errors import ConfigError, ShapeError

GPU_BATCH = 256
"""Images per pass through a network on a GPU, where the settings leave it open."""


class Encoder(ABC):
    """Images, and phrases where it has a text tower, to rows of one space."""

    name: str
    """As in `encoder.name`."""
    dimension: int
    """D."""
    preprocess: Preprocess
    """How files become the pixels that `encode_images` takes; its limits may be replaced."""
    mean: Colour
    """Subtracted from channels that run from 0 to 1."""
    std: Colour
    """What channels are then divided by."""
    has_text = False
    """Whether `encode_texts` works."""
    callers = 1
    """Threads that will call `encode_images` at once; set before the first call."""

    def encode_images(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Encode images; equal images in equal order give equal bytes.

        Args:
            images: UInt8[B H W C], from `decode` with this encoder's `preprocess`.

        Returns:
            Float32[B D]; unit rows unless `normalize` is off, and a row of zeros stays zero.

        Raises:
            ShapeError: other type, axes or size.
        """
        if images.dtype != np.uint8 or images.shape[1:] != self.preprocess.shape:
            wanted = ", ".join(map(str, self.preprocess.shape))
            raise ShapeError(f"images are {images.dtype} {images.shape}: uint8 (B, {wanted}) are needed")
        return self._encode(images)

    @abstractmethod
    def _encode(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Encode images whose shape has been checked."""

    def encode_texts(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Encode phrases to Float32[V D], in the space of the images' rows.

        Raises:
            ConfigError: the encoder has no text tower.
        """
        raise ConfigError(
            f"encoder.name = {self.name}: has no text tower; take an open_clip one, or set label.vocabulary: none"
        )


def encode_in_chunks(
    images: NDArray[np.uint8], size: int, dimension: int, forward: Callable[[NDArray[np.uint8]], NDArray[np.float32]]
) -> NDArray[np.float32]:
    """Encode images in chunks of one size from the first, the last one filled up with black.

    Args:
        images: UInt8[B H W C].
        size: of a chunk.
        dimension: D.
        forward: from UInt8[size H W C] to Float32[size D].

    Returns:
        Float32[B D].
    """
    rows = np.empty((len(images), dimension), np.float32)
    for start in range(0, len(images), size):
        chunk = images[start : start + size]
        filled = np.zeros((size, *chunk.shape[1:]), np.uint8)
        filled[: len(chunk)] = chunk
        rows[start : start + len(chunk)] = forward(filled)[: len(chunk)]
    return rows
