"""OpenVINO, the extra `cpu`: a torch network as one compiled graph, which CPUs compute faster than torch does."""

from __future__ import annotations

import sys
import threading
import warnings
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from rayclust.encoders.settings import Colour
from rayclust.errors import ConfigError

COSINE = {"f32": 0.99999, "bf16": 0.99}
"""Least cosine of a row to torch's in float32, by the type of the products; below, the graph is refused."""


def is_installed() -> bool:
    """Return whether the extra `cpu` is there; imports nothing."""
    return find_spec("openvino") is not None


class CompiledNetwork:
    """A network from pixels to rows, compiled for passes of one size. May be called from several threads at once.

    Each call computes on `threads` cores whatever else runs, so that a row depends on its image and on these alone.

    Args:
        network: from Float[B 3 H W] to Float[B D], in eval mode, on the CPU.
        shape: B, H, W and 3 of a pass.
        mean: subtracted from the channels, which run from 0 to 1.
        std: what they are then divided by.
        precision: of the products, f32 or bf16. Others would follow from the processor: bf16 where it has AMX.
        threads: of a pass.
        callers: passes at once.

    Raises:
        ConfigError: OpenVINO is not installed, or cannot compile the network.
    """

    def __init__(
        self,
        network: nn.Module,
        shape: tuple[int, ...],
        *,
        mean: Colour,
        std: Colour,
        precision: str = "f32",
        threads: int = 1,
        callers: int = 1,
    ) -> None:
        if not is_installed():
            raise ConfigError(
                "encoder.engine = openvino: is not installed; pip install 'rayclust[cpu]', or set encoder.engine: torch"
            )
        # It reports its imports to its maker unless that module is missing: nothing leaves the machine from here.
        sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
        import openvino

        options = {
            "INFERENCE_PRECISION_HINT": precision,
            "NUM_STREAMS": callers,
            "INFERENCE_NUM_THREADS": callers * threads,
            "ENABLE_CPU_PINNING": False,  # several encoders on one machine would all take its first cores
        }
        example = torch.zeros(shape, dtype=torch.uint8)
        try:
            with warnings.catch_warnings(), torch.inference_mode():
                warnings.simplefilter("ignore")  # of torch's tracer, about branches on shapes, which are fixed here
                graph = openvino.convert_model(_FromPixels(network, mean, std), example_input=example, input=[shape])
            self._compiled: Any = openvino.Core().compile_model(graph, "CPU", options)
        except (RuntimeError, TypeError, ValueError, openvino.tools.ovc.error.Error) as error:
            what = " ".join(str(error).split())[:160]
            raise ConfigError(
                f"encoder.engine = openvino: cannot compile the network ({what}); set encoder.engine: torch"
            ) from error
        self._requests = threading.local()

    def __call__(self, images: NDArray[np.uint8]) -> Tensor:
        """Return Float[B D] of UInt8[B H W 3]."""
        if not hasattr(self._requests, "own"):
            self._requests.own = self._compiled.create_infer_request()
        return torch.from_numpy(np.array(self._requests.own.infer({0: images})[0]))


class _FromPixels(nn.Module):
    """A network behind the scaling of its channels."""

    def __init__(self, network: nn.Module, mean: Colour, std: Colour) -> None:
        super().__init__()
        self.network, self.tower = network, getattr(network, "encode_image", network)
        self.mean, self.std = (torch.tensor(colour).view(1, 3, 1, 1) for colour in (mean, std))

    def forward(self, images: Tensor) -> Tensor:
        x = images.permute(0, 3, 1, 2).to(torch.float32)
        rows: Tensor = self.tower((x / 255 - self.mean) / self.std)
        return rows
