"""The encoder: the base class of all, and one around a torch network."""

from __future__ import annotations

import difflib
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from rayclust.encoders import openvino
from rayclust.encoders.decode import Preprocess
from rayclust.encoders.settings import Colour, EncoderConfig
from rayclust.errors import ConfigError, ShapeError

GPU_BATCH = 256
"""Images per pass through a network on a GPU, where the settings leave it open."""
_NETWORK_ERRORS = (ArithmeticError, AssertionError, ImportError, KeyError, OSError, RuntimeError, TypeError, ValueError)


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


class TorchEncoder(Encoder):
    """An encoder around a network: chunks, precision, threads and unit rows.

    The network always sees chunks of one size, the last one filled up with black: library kernels choose their order of
    summation by shape, so that the same image in a smaller batch would differ in its last bits. On a CPU the chunk is
    one image: then a row depends on its image alone, to the bit, and it also is the fastest, as activations stay in
    cache. In larger chunks the place in the chunk may show in the last bit: cut them at the same places every time.
    """

    def __init__(
        self,
        network: nn.Module,
        config: EncoderConfig,
        preprocess: Preprocess,
        *,
        mean: Colour,
        std: Colour,
        device: str,
    ) -> None:
        """Prepare a network whose weights are loaded, and find its dimension by a pass over one black image.

        Args:
            network: from Float[B 3 H W] to Float[B D], in `encode_image` where it has two towers, else when called.
            config: precision, chunk size, threads.
            preprocess: what the network takes.
            mean: subtracted from the three channels, which run from 0 to 1.
            std: what they are then divided by.
            device: cpu, cuda, cuda:1 …

        Raises:
            ConfigError: the network does not take images of that size, or the device not that precision.
        """
        self.name, self.preprocess, self.mean, self.std = config.name, preprocess, mean, std
        self._device = torch.device(device)
        self._config = config
        if config.precision == "fp16" and self._device.type == "cpu":
            raise ConfigError("encoder.precision = fp16: only for GPUs; use bf16 or fp32 on a CPU")
        precision = config.precision
        if precision == "auto" and self._device.type == "cuda":
            precision = "bf16" if torch.cuda.is_bf16_supported() else "fp16"
        self._dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision, torch.float32)
        self._chunk = config.batch_size or (1 if self._device.type == "cpu" else GPU_BATCH)
        self.engine = "openvino" if config.engine == "openvino" and self._device.type == "cpu" else "torch"
        """What computes; may be changed."""
        self._compiled: openvino.CompiledNetwork | None = None
        self._compiling = threading.Lock()
        network = network.eval().requires_grad_(False)
        self._network = network.to(self._device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self._mean, self._std = (torch.tensor(c, device=self._device).view(1, 3, 1, 1) for c in (mean, std))
        self._tower = getattr(self._network, "encode_image", self._network)
        message = f"encoder.image_size = {preprocess.size}: {self.name} does not take it"
        with network_errors(message), self._inference():
            rows = self._forward(np.zeros((1, *preprocess.shape), np.uint8))
        if rows.ndim != 2:
            raise ConfigError(f"encoder.name = {self.name}: gives {tuple(rows.shape[1:])} per image, not one row")
        self.dimension = rows.shape[1]
        if config.compile:
            self._tower = torch.compile(self._tower, dynamic=False)

    @property
    def image_tower(self) -> nn.Module:
        """The network without a text tower: normalised images Float[B 3 H W] to Float[B D]."""
        tower: nn.Module = getattr(self._network, "visual", self._network)
        return tower

    def _encode(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Encode images, chunk by chunk from the first."""
        with self._compiling:
            if self.engine == "openvino" and self._compiled is None:
                self._compile()
        rows = np.empty((len(images), self.dimension), np.float32)
        with self._inference():
            for start in range(0, len(images), self._chunk):
                chunk = images[start : start + self._chunk]
                filled = np.zeros((self._chunk, *chunk.shape[1:]), np.uint8)
                filled[: len(chunk)] = chunk
                rows[start : start + len(chunk)] = self._forward(filled)[: len(chunk)].cpu().numpy()
        return rows

    def _compile(self) -> None:
        """Compile the network, and compare a row with torch's in float32; raise `ConfigError` where they differ."""
        precision = "bf16" if self._dtype == torch.bfloat16 else "f32"
        shape = (self._chunk, *self.preprocess.shape)
        compiled = openvino.CompiledNetwork(
            self._network,
            shape,
            mean=self.mean,
            std=self.std,
            precision=precision,
            threads=self._config.threads,
            callers=self.callers,
        )
        image = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
        with torch.inference_mode(), torch.autocast("cpu", enabled=False):
            x = torch.from_numpy(image).permute(0, 3, 1, 2).float()
            expected = self._tower(x.div_(255).sub_(self._mean).div_(self._std)).float()
            cosine = torch.nn.functional.cosine_similarity(compiled(image), expected).min().item()
        if not cosine >= openvino.COSINE[precision]:
            raise ConfigError(
                f"encoder.engine = openvino: rows of {self.name} have a cosine of {cosine:.6f} to torch's, less than "
                f"{openvino.COSINE[precision]:g}; set encoder.engine: torch"
            )
        self._compiled = compiled

    def measure_engines(self) -> dict[str, float]:
        """Measure the seconds of a pass with torch and with OpenVINO, the best of three; `engine` stays as it is.

        Raises:
            ConfigError: OpenVINO is not installed, cannot compile the network, or gives other rows.
        """
        images, before, found = np.zeros((self._chunk, *self.preprocess.shape), np.uint8), self.engine, {}
        for self.engine in ("torch", "openvino"):
            self._encode(images)  # only the first call allocates
            times = [time.monotonic()]
            for _ in range(3):
                self._encode(images)
                times.append(time.monotonic())
            found[self.engine] = min(np.diff(times).tolist())
        self.engine = before
        return found

    def _forward(self, images: NDArray[np.uint8]) -> Tensor:
        if self.engine == "openvino" and self._compiled is not None:
            return self._to_rows(self._compiled(images))
        x = torch.from_numpy(images).to(self._device, non_blocking=True).permute(0, 3, 1, 2)
        x = x.to(torch.float32, memory_format=torch.channels_last)
        x = x.div_(255).sub_(self._mean).div_(self._std)
        return self._to_rows(self._tower(x))

    def _to_rows(self, output: Tensor) -> Tensor:
        """Convert Float[B D] to float32, and to unit rows if so configured; a zero row stays zero."""
        rows = output.float()
        if not self._config.normalize:
            return rows
        return torch.nn.functional.normalize(rows, dim=1, eps=torch.finfo(rows.dtype).tiny)

    @contextmanager
    def _inference(self) -> Iterator[None]:
        """Set precision, threads and deterministic kernels, no gradients; restore the process's settings afterwards."""
        with ExitStack() as settings:
            settings.callback(torch.set_num_threads, torch.get_num_threads())
            torch.set_num_threads(self._config.threads)
            settings.enter_context(torch.inference_mode())
            if self._device.type == "cuda":
                settings.enter_context(
                    torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False)
                )
            if self._dtype != torch.float32:
                settings.enter_context(torch.autocast(self._device.type, self._dtype))
            yield


@contextmanager
def network_errors(message: str) -> Iterator[None]:
    """Convert errors of a network to one line; leave the process's random state as it was.

    Args:
        message: setting, value and what does not work; the network's own words follow.

    Raises:
        ConfigError: the network failed.
    """
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    except _NETWORK_ERRORS as error:
        raise ConfigError(f"{message}: {' '.join(str(error).split())[:200]}") from error


def unknown_architecture(config: EncoderConfig, known: Sequence[str]) -> ConfigError:
    """Return the error for a name that a library does not have, with similar ones that it has."""
    begun = [name for name in known if name.startswith(config.architecture)]
    near = (begun or difflib.get_close_matches(config.architecture, known))[:3]
    hint = f"; near: {', '.join(near)}" if near else ""
    return ConfigError(f"encoder.name = {config.name}: {config.family} has no such architecture{hint}")
