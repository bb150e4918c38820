"""What an encoder is, and what encoders built on a torch network share."""

from __future__ import annotations

import difflib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from rayclust.encoders.decode import Preprocess
from rayclust.encoders.options import EncoderConfig
from rayclust.errors import ConfigError, ShapeError

Colour = tuple[float, float, float]
GPU_BATCH, TEXT_BATCH = 256, 64


@runtime_checkable
class Encoder(Protocol):
    """Images, and phrases where it has a text tower, to rows of one space."""

    name: str
    """As in `encoder.name`."""
    dimension: int
    """D."""
    preprocess: Preprocess
    """How files become the pixels that `encode_images` takes; replace its limits as you like."""
    mean: Colour
    """Subtracted from channels that run from 0 to 1."""
    std: Colour
    """What channels are then divided by."""
    has_text: bool
    """Whether `encode_texts` works."""

    def encode_images(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Pixels, UInt8[B H W C], to Float32[B D]; the same images in the same order give the same bytes."""

    def encode_texts(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Phrases to Float32[V D].

        Raises:
            ConfigError: the encoder has no text tower.
        """


class TorchEncoder(ABC):
    """An encoder around a network: chunks, precision, threads and unit rows.

    The network always sees chunks of one size, the last one filled up with black: library kernels choose their order of
    summation by shape, so that the same image in a smaller batch would differ in its last bits. On a CPU the chunk is
    one image: then a row depends on its image alone, to the bit, and it also is the fastest, as activations stay in
    cache. In larger chunks the place in the chunk may show in the last bit: cut them at the same places every time.
    """

    has_text = False

    def __init__(
        self,
        network: nn.Module,
        config: EncoderConfig,
        preprocess: Preprocess,
        colour: tuple[Colour, Colour],
        device: str,
    ) -> None:
        """Readies a network whose weights are loaded.

        Args:
            network: what the subclass will call.
            config: precision, chunk size, threads.
            preprocess: what the network takes.
            colour: mean and standard deviation of the three channels, which run from 0 to 1.
            device: cpu, cuda, cuda:1 …

        Raises:
            ConfigError: the network does not take images of that size.
        """
        self.name, self.preprocess, (self.mean, self.std) = config.name, preprocess, colour
        self._device = torch.device(device)
        self._config = config
        self._dtype = _precision(config.precision, self._device)
        self._rows = config.batch_size or (1 if self._device.type == "cpu" else GPU_BATCH)
        network = network.eval().requires_grad_(False)
        self._network = network.to(self._device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self._colour = [torch.tensor(c, device=self._device).view(1, 3, 1, 1) for c in colour]
        self._tower = self._image_tower()
        self.dimension = self._probe()
        if config.compile:
            self._tower = torch.compile(self._tower, dynamic=False)

    @abstractmethod
    def _image_tower(self) -> Callable[[Tensor], Tensor]:
        """What gives Float[B D] of Float[B 3 H W], normalised colours."""

    def _probe(self) -> int:
        try:
            with self._computing():
                rows = self._forward(np.zeros((1, *self.preprocess.shape), np.uint8))
        except (RuntimeError, AssertionError, ValueError, TypeError, ArithmeticError) as error:
            raise size_refusal(self.name, self.preprocess.size, error) from error
        if rows.ndim != 2:
            raise ConfigError(f"encoder.name = {self.name}: gives {tuple(rows.shape[1:])} per image, not one row")
        return rows.shape[1]

    def encode_images(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Rows of images, chunk by chunk from the first.

        Args:
            images: UInt8[B H W 3], from `decode` with this encoder's `preprocess`.

        Returns:
            Float32[B D]; unit rows unless `normalize` is off.

        Raises:
            ShapeError: other type, axes or size.
        """
        if images.dtype != np.uint8 or images.shape[1:] != self.preprocess.shape:
            wanted = ", ".join(map(str, self.preprocess.shape))
            raise ShapeError(f"images are {images.dtype} {images.shape}: uint8 (B, {wanted}) are needed")
        rows = np.empty((len(images), self.dimension), np.float32)
        with self._computing():
            for start in range(0, len(images), self._rows):
                chunk = images[start : start + self._rows]
                filled = np.zeros((self._rows, *chunk.shape[1:]), np.uint8)
                filled[: len(chunk)] = chunk
                rows[start : start + len(chunk)] = self._forward(filled)[: len(chunk)].cpu().numpy()
        return rows

    def encode_texts(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Refused: only open_clip's networks have a text tower."""
        raise ConfigError(
            f"encoder.name = {self.name}: has no text tower; take an open_clip one, or set label.vocabulary: none"
        )

    def _forward(self, images: NDArray[np.uint8]) -> Tensor:
        x = torch.from_numpy(images).to(self._device, non_blocking=True).permute(0, 3, 1, 2)
        x = x.to(torch.float32, memory_format=torch.channels_last)
        x = x.div_(255).sub_(self._colour[0]).div_(self._colour[1])
        with self._autocast():
            return self._finished(self._tower(x))

    def _finished(self, rows: Tensor) -> Tensor:
        rows = rows.float()
        return unit_rows(rows) if self._config.normalize else rows

    def _autocast(self) -> AbstractContextManager[Any]:
        if self._dtype == torch.float32:
            return nullcontext()
        return torch.autocast(self._device.type, self._dtype)

    @contextmanager
    def _computing(self) -> Iterator[None]:
        """Inference with fixed threads and repeatable kernels; the process's own settings come back afterwards."""
        threads = torch.get_num_threads()
        torch.set_num_threads(self._config.threads)
        kernels: AbstractContextManager[Any] = nullcontext()
        if self._device.type == "cuda":
            kernels = torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False)
        try:
            with torch.inference_mode(), kernels:
                yield
        finally:
            torch.set_num_threads(threads)


def unit_rows(rows: Tensor) -> Tensor:
    """Float[B D] divided by its rows' lengths; a zero row stays zero."""
    return torch.nn.functional.normalize(rows, dim=1, eps=torch.finfo(rows.dtype).tiny)


def size_refusal(name: str, size: int | tuple[int, int], error: Exception) -> ConfigError:
    """The error for an image size at which a network fails."""
    what = " ".join(str(error).split())[:200]
    return ConfigError(f"encoder.image_size = {size}: {name} does not take it: {what}")


def unknown_architecture(config: EncoderConfig, known: Sequence[str]) -> ConfigError:
    """The error for a name that a library does not have, with those that are near."""
    begun = [name for name in known if name.startswith(config.architecture)]
    near = (begun or difflib.get_close_matches(config.architecture, known))[:3]
    hint = f"; near: {', '.join(near)}" if near else ""
    return ConfigError(f"encoder.name = {config.name}: {config.family} has no such architecture{hint}")


def _precision(wanted: str, device: torch.device) -> torch.dtype:
    if wanted == "auto":
        if device.type != "cuda":
            return torch.float32
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
    if wanted == "fp16" and device.type == "cpu":
        raise ConfigError("encoder.precision = fp16: only for GPUs; use bf16 or fp32 on a CPU")
    return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[wanted]
