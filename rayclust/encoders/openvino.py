"""OpenVINO, the extra `cpu`: a network as one compiled graph, which CPUs compute faster than torch does.

torch is needed to convert a network (`TorchEncoder.to_graph`), not to read a graph or compute it.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rayclust.arrays import unit_rows
from rayclust.encoders.base import Encoder, encode_in_chunks
from rayclust.encoders.decode import Preprocess
from rayclust.encoders.settings import Colour, EncoderConfig
from rayclust.errors import ConfigError

COSINE = {"f32": 0.99999, "bf16": 0.99}
"""Least cosine of a row to torch's in float32, by the type of the products; below, the graph is refused."""
_FACTS, _GRAPH = "encoder.json", "graph.xml"


def is_installed() -> bool:
    """Return whether the extra `cpu` is there; imports nothing."""
    return find_spec("openvino") is not None


def library() -> Any:
    """Import OpenVINO; raise `ConfigError` where it is not installed."""
    if not is_installed():
        raise ConfigError(
            "encoder.engine = openvino: is not installed; pip install 'rayclust[cpu]', or set encoder.engine: torch"
        )
    # It reports its imports to its maker unless that module is missing: nothing leaves the machine from here.
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
    import openvino

    return openvino


@dataclass(frozen=True)
class Graph:
    """A network for passes of one size, and what else an encoder has to know of it."""

    model: Any
    """OpenVINO's: UInt8[B H W 3] to Float[B D], the scaling of channels included."""
    preprocess: Preprocess
    mean: Colour
    std: Colour
    has_text: bool
    """Whether there is a text tower besides, which is not in the graph."""

    def write(self, folder: Path) -> None:
        """Write to a folder, whole or not at all; one that is there, or a disk without space, is no error."""
        with suppress(OSError, RuntimeError):
            folder.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=folder.parent, ignore_cleanup_errors=True) as scratch:
                whole = Path(scratch) / "graph"
                library().save_model(self.model, whole / _GRAPH, compress_to_fp16=False)
                facts = {name: value for name, value in vars(self).items() if name not in ("model", "preprocess")}
                (whole / _FACTS).write_text(json.dumps(facts | {"preprocess": asdict(self.preprocess)}))
                whole.rename(folder)

    @classmethod
    def read(cls, folder: Path) -> Graph | None:
        """Read what `write` wrote; None where there is nothing, or it is damaged, which is then removed."""
        if not (folder / _FACTS).exists():
            return None
        try:
            facts = json.loads((folder / _FACTS).read_text())
            size = facts["preprocess"].pop("size")
            preprocess = Preprocess(size if isinstance(size, int) else tuple(size), **facts["preprocess"])
            model = library().Core().read_model(folder / _GRAPH)
            return cls(model, preprocess, tuple(facts["mean"]), tuple(facts["std"]), facts["has_text"])
        except (OSError, RuntimeError, ValueError, KeyError, TypeError):
            shutil.rmtree(folder, ignore_errors=True)
            return None


class GraphEncoder(Encoder):
    """An encoder whose network OpenVINO computes. May be called from several threads at once.

    Each call computes on `threads` cores whatever else runs, so that a row depends on its image and on these alone.

    Args:
        graph: the network.
        config: precision of the products, chunk size, threads. Precision is float32 unless it is bf16; otherwise it
            would follow from the processor.
        load_whole: loads the encoder with its text tower; called with the first phrases.

    Raises:
        ConfigError: OpenVINO cannot compile the network; only the first call finds out.
    """

    def __init__(self, graph: Graph, config: EncoderConfig, load_whole: Callable[[], Encoder]) -> None:
        self.graph, self.name, self.has_text = graph, config.name, graph.has_text
        self.preprocess, self.mean, self.std = graph.preprocess, graph.mean, graph.std
        self.dimension = int(graph.model.output(0).shape[1])
        self.precision = "bf16" if config.precision == "bf16" else "f32"
        self._config, self._whole = config, cache(load_whole)
        self._compiled: Any = None
        self._compiling, self._requests = threading.Lock(), threading.local()

    def encode_texts(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Encode phrases by the text tower, which torch computes."""
        return self._whole().encode_texts(texts) if self.has_text else super().encode_texts(texts)

    def _encode(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        with self._compiling:
            if self._compiled is None:
                options = {
                    "INFERENCE_PRECISION_HINT": self.precision,
                    "NUM_STREAMS": self.callers,
                    "INFERENCE_NUM_THREADS": self.callers * self._config.threads,
                    "ENABLE_CPU_PINNING": False,  # several encoders on one machine would all take its first cores
                }
                try:
                    self._compiled = library().Core().compile_model(self.graph.model, "CPU", options)
                except (RuntimeError, TypeError, ValueError) as error:
                    raise refused(error) from error
        return encode_in_chunks(images, self._config.batch_size or 1, self.dimension, self._forward)

    def _forward(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        if not hasattr(self._requests, "own"):
            self._requests.own = self._compiled.create_infer_request()
        rows: NDArray[np.float32] = self._requests.own.infer({0: images})[0]
        return unit_rows(rows) if self._config.normalize else rows


def refused(error: Exception) -> ConfigError:
    """Return the error for a network that OpenVINO does not take."""
    what = " ".join(str(error).split())[:160]
    return ConfigError(f"encoder.engine = openvino: cannot compile the network ({what}); set encoder.engine: torch")
