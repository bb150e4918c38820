"""The encoder around a torch network, and its conversion to OpenVINO's graph."""

from __future__ import annotations

import difflib
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from rayclust.encoders.base import GPU_BATCH, Encoder, encode_in_chunks
from rayclust.encoders.decode import Preprocess
from rayclust.encoders.openvino import COSINE, Graph, GraphEncoder, library, refused
from rayclust.encoders.settings import Colour, EncoderConfig
from rayclust.errors import ConfigError

_NETWORK_ERRORS = (ArithmeticError, AssertionError, ImportError, KeyError, OSError, RuntimeError, TypeError, ValueError)


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
        network = network.eval().requires_grad_(False)
        self.network = network.to(self._device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self._mean, self._std = (torch.tensor(c, device=self._device).view(1, 3, 1, 1) for c in (mean, std))
        self._tower = getattr(self.network, "encode_image", self.network)
        message = f"encoder.image_size = {preprocess.size}: {self.name} does not take it"
        with network_errors(message), self._inference():
            rows = self._forward(np.zeros((1, *preprocess.shape), np.uint8))
        if rows.ndim != 2:
            raise ConfigError(f"encoder.name = {self.name}: gives {tuple(rows.shape[1:])} per image, not one row")
        self.dimension = rows.shape[1]
        if config.compile:
            self._tower = torch.compile(self._tower, dynamic=False)

    def _encode(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        with self._inference():
            return encode_in_chunks(
                images, self._chunk, self.dimension, lambda chunk: self._forward(chunk).cpu().numpy()
            )

    def to_graph(self) -> Graph:
        """Convert the network to OpenVINO's graph, and compare a row with torch's in float32.

        Raises:
            ConfigError: OpenVINO is not installed, cannot compile the network, or gives other rows.
        """
        openvino, shape = library(), (self._chunk, *self.preprocess.shape)
        example = torch.zeros(shape, dtype=torch.uint8)
        try:
            with warnings.catch_warnings(), torch.inference_mode():
                warnings.simplefilter("ignore")  # of torch's tracer, about branches on shapes, which are fixed here
                model = openvino.convert_model(_FromPixels(self), example_input=example, input=[shape])
        except (RuntimeError, TypeError, ValueError, openvino.tools.ovc.error.Error) as error:
            raise refused(error) from error
        graph = Graph(model, self.preprocess, self.mean, self.std, self.has_text)
        # As later processes read it from disk: the last bits of its rows may differ from those of the one in memory.
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as scratch:
            graph.write(Path(scratch) / "graph")
            graph = Graph.read(Path(scratch) / "graph") or graph
        encoder = GraphEncoder(graph, self._config, lambda: self)
        image = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
        rows = torch.from_numpy(encoder.encode_images(image))
        with torch.inference_mode(), torch.autocast("cpu", enabled=False):
            expected = self._tower(self._scaled(torch.from_numpy(image))).float()
            cosine = torch.nn.functional.cosine_similarity(rows, expected).min().item()
        if not cosine >= COSINE[encoder.precision]:
            raise ConfigError(
                f"encoder.engine = openvino: rows of {self.name} have a cosine of {cosine:.6f} to torch's, less than "
                f"{COSINE[encoder.precision]:g}; set encoder.engine: torch"
            )
        return graph

    def _forward(self, images: NDArray[np.uint8]) -> Tensor:
        return self._to_rows(self._tower(self._scaled(torch.from_numpy(images))))

    def _scaled(self, images: Tensor) -> Tensor:
        """Convert UInt8[B H W 3] to what the network takes, Float[B 3 H W]."""
        x = images.to(self._device, non_blocking=True).permute(0, 3, 1, 2)
        x = x.to(torch.float32, memory_format=torch.channels_last)
        return x.div_(255).sub_(self._mean).div_(self._std)

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


class _FromPixels(nn.Module):
    """An encoder's image tower behind the scaling of its channels, without changes in place."""

    def __init__(self, encoder: TorchEncoder) -> None:
        super().__init__()
        self.network, self.mean, self.std = encoder.network, encoder._mean, encoder._std
        self.tower = getattr(self.network, "encode_image", self.network)

    def forward(self, images: Tensor) -> Tensor:
        x = images.permute(0, 3, 1, 2).to(torch.float32)
        rows: Tensor = self.tower((x / 255 - self.mean) / self.std)
        return rows


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
