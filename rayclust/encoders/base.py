"""The encoder: its settings, its protocol, and a base class for encoders built on a torch network."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import PurePath
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field, model_validator
from torch import Tensor, nn

from rayclust.encoders.decode import Preprocess
from rayclust.errors import ConfigError, ShapeError
from rayclust.settings import Config

Colour = tuple[float, float, float]
"""One value each for red, green and blue."""
GPU_BATCH = 256
"""Images per pass through a network on a GPU, where the settings leave it open."""
_WEIGHT_SUFFIXES = {".safetensors", ".pt", ".pth", ".bin", ".ckpt", ".tar", ".th", ".torch"}


class EncoderConfig(Config):
    """What turns one image, or one phrase, into one row."""

    name: str = "open_clip/ViT-L-14"
    """open_clip/<architecture>, timm/<architecture>, or pixels, which needs no weights. `.<tag>` may follow, as in
    open_clip/ViT-L-14.openai: published weights, or, with a file in `pretrained`, how such weights see images."""
    pretrained: str | None = None
    """A tag of published weights (openai, laion2b_s32b_b82k, dino …), or a path or URI of a file with weights,
    safetensors or a torch file of tensors. Absent: `openai` for open_clip, the architecture's own default for timm."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Passed to the model's constructor, e.g. `pad_type: same`."""
    image_size: int | tuple[int, int] | None = None
    """Side of the square, or [height, width], pixels. Absent: the model's own; 32 for pixels."""
    resize: Literal["crop", "squash"] | None = None
    """crop: the shorter side to the size, then the centre. squash: both sides to the size. Absent: the model's own."""
    crop_fraction: float | None = Field(None, gt=0, le=1)
    """For crop: the share of the shorter side that is kept. Absent: the model's own, or 1 where `resize` is given."""
    mean: Colour | None = None
    """Subtracted from red, green and blue, which run from 0 to 1. Absent: the model's own; 0 for pixels."""
    std: Colour | None = None
    """What red, green and blue are then divided by; not 0. Absent: the model's own; 1 for pixels."""
    normalize: bool = True
    """Whether rows have length 1."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Of the network's products. auto: bf16 on GPUs that have it, else fp16; fp32 on CPUs."""
    compile: bool = False
    """Compile the network with torch.compile: slow to start, faster afterwards; worth it from some 100,000 images."""
    batch_size: int | None = Field(None, ge=1)
    """Images per pass through the network. Absent: 256 on a GPU; 1 on a CPU, which is the fastest there. A row's last
    bits may depend on it; short passes are filled up, so they do not depend on how many images there are."""
    threads: int = Field(1, ge=1)
    """CPU threads of one encoder. A row's last bits may depend on it."""
    grayscale: bool = False
    """pixels only: one channel instead of three."""
    jpeg_draft: bool = False
    """Decode large JPEGs at reduced size: five times faster on photographs of 12 megapixels; rows move a little (cosine
    0.996 to 0.9996)."""

    @model_validator(mode="after")
    def _check(self) -> EncoderConfig:
        family, _, architecture = self.name.partition("/")
        if self.name != "pixels" and (family not in ("open_clip", "timm") or not architecture):
            raise ValueError(f"name = {self.name}: must be open_clip/<architecture>, timm/<architecture> or pixels")
        if self.weights_uri is None and self.pretrained and self.tag != self.pretrained:
            raise ValueError(f"pretrained = {self.pretrained}: contradicts the tag in name = {self.name}")
        if self.grayscale and self.name != "pixels":
            raise ValueError(f"grayscale = true: only pixels can do without colour, not {self.name}")
        if self.std is not None and 0 in self.std:
            raise ValueError(f"std = {list(self.std)}: must not hold 0")
        sides = (self.image_size,) if isinstance(self.image_size, int) else self.image_size or ()
        if any(not 1 <= side <= 16384 for side in sides):
            raise ValueError(f"image_size = {self.image_size}: must be from 1 to 16384")
        return self

    @property
    def family(self) -> str:
        """open_clip, timm or pixels."""
        return self.name.partition("/")[0]

    @property
    def architecture(self) -> str:
        """The name without its family and tag."""
        return self.name.partition("/")[2].partition(".")[0]

    @property
    def tag(self) -> str | None:
        """The tag of published weights: the one in `name`, else `pretrained` unless that is a file."""
        return self.name.partition("/")[2].partition(".")[2] or (None if self.weights_uri else self.pretrained)

    @property
    def weights_uri(self) -> str | None:
        """Path or URI of the weights; None where they come from a hub, or where none are needed.

        `pretrained` names a file where it has a slash or the suffix of a file of weights.
        """
        given = self.pretrained
        if given is None or self.family == "pixels":
            return None
        looks_like_path = "/" in given or "\\" in given or given.startswith(("~", "."))
        return given if looks_like_path or PurePath(given).suffix.lower() in _WEIGHT_SUFFIXES else None


@runtime_checkable
class Encoder(Protocol):
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
    has_text: bool
    """Whether `encode_texts` works."""

    def encode_images(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Encode pixels, UInt8[B H W C], to Float32[B D]; equal images in equal order give equal bytes."""

    def encode_texts(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Encode phrases to Float32[V D].

        Raises:
            ConfigError: the encoder has no text tower.
        """


class TorchEncoder:
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
        *,
        mean: Colour,
        std: Colour,
        device: str,
    ) -> None:
        """Prepare a network whose weights are loaded, and find its dimension by a pass over one black image.

        Args:
            network: what the subclass will call.
            config: precision, chunk size, threads.
            preprocess: what the network takes.
            mean: of the three channels, which run from 0 to 1.
            std: standard deviation of the three channels.
            device: cpu, cuda, cuda:1 …; meta, which computes shapes alone.

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
        half = {"bf16": torch.bfloat16, "fp16": torch.float16} if self._device.type != "meta" else {}
        self._dtype = half.get(precision, torch.float32)
        self._chunk = config.batch_size or (1 if self._device.type == "cpu" else GPU_BATCH)
        network = network.eval().requires_grad_(False)
        self._network = network.to(self._device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self._mean, self._std = (torch.tensor(c, device=self._device).view(1, 3, 1, 1) for c in (mean, std))
        self._tower = self._image_tower()
        message = f"encoder.image_size = {preprocess.size}: {self.name} does not take it"
        with network_errors(message), self._inference():
            rows = self._forward(np.zeros((1, *preprocess.shape), np.uint8))
        if rows.ndim != 2:
            raise ConfigError(f"encoder.name = {self.name}: gives {tuple(rows.shape[1:])} per image, not one row")
        self.dimension = rows.shape[1]
        if config.compile and self._device.type != "meta":
            self._tower = torch.compile(self._tower, dynamic=False)

    def _image_tower(self) -> Callable[[Tensor], Tensor]:
        """Return the function from Float[B 3 H W], normalised colours, to Float[B D]: the network, or a part of it."""
        tower: Callable[[Tensor], Tensor] = self._network
        return tower

    def encode_images(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Encode images, chunk by chunk from the first.

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
        with self._inference():
            for start in range(0, len(images), self._chunk):
                chunk = images[start : start + self._chunk]
                filled = np.zeros((self._chunk, *chunk.shape[1:]), np.uint8)
                filled[: len(chunk)] = chunk
                rows[start : start + len(chunk)] = self._forward(filled)[: len(chunk)].cpu().numpy()
        return rows

    def encode_texts(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Raise: only open_clip's networks have a text tower."""
        raise no_text_tower(self.name)

    def _forward(self, images: NDArray[np.uint8]) -> Tensor:
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
        threads = torch.get_num_threads()
        torch.set_num_threads(self._config.threads)
        try:
            with ExitStack() as settings:
                settings.enter_context(torch.inference_mode())
                if self._device.type == "cuda":
                    settings.enter_context(
                        torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False)
                    )
                if self._dtype != torch.float32:
                    settings.enter_context(torch.autocast(self._device.type, self._dtype))
                yield
        finally:
            torch.set_num_threads(threads)


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
    except (
        TypeError,
        ValueError,
        RuntimeError,
        AssertionError,
        ArithmeticError,
        KeyError,
        OSError,
        ImportError,
    ) as error:
        what = " ".join(str(error).split())[:200]
        raise ConfigError(f"{message}: {what}") from error


def unknown_architecture(config: EncoderConfig, known: Sequence[str]) -> ConfigError:
    """Return the error for a name that a library does not have, with similar ones that it has."""
    begun = [name for name in known if name.startswith(config.architecture)]
    near = (begun or difflib.get_close_matches(config.architecture, known))[:3]
    hint = f"; near: {', '.join(near)}" if near else ""
    return ConfigError(f"encoder.name = {config.name}: {config.family} has no such architecture{hint}")


def no_text_tower(name: str) -> ConfigError:
    """Return the error for phrases given to an encoder of images alone."""
    return ConfigError(
        f"encoder.name = {name}: has no text tower; take an open_clip one, or set label.vocabulary: none"
    )
