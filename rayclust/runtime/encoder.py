"""Load a run's encoder on the device that `resources` gives, by the engine that the run has chosen.

torch comes with the first encoder that it computes: not with pixels, nor with a network that OpenVINO computes and that
was converted on this machine before.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from importlib import metadata
from typing import TYPE_CHECKING, TypeVar, cast

import numpy as np

from rayclust.config import RunConfig
from rayclust.encoders import openvino
from rayclust.encoders.base import Encoder
from rayclust.encoders.decode import Preprocess, decode
from rayclust.encoders.load import dimension_of, load_encoder
from rayclust.encoders.pixels import PixelEncoder
from rayclust.encoders.settings import EncoderConfig
from rayclust.errors import ArtefactError, ConfigError
from rayclust.runtime.cluster import sees_gpu
from rayclust.runtime.inputs import weights_stamp
from rayclust.runtime.rows import scratch_folder
from rayclust.store import storage
from rayclust.store.manifest import digest_of, versions
from rayclust.store.run import Run

if TYPE_CHECKING:  # brings torch
    from rayclust.encoders.network import TorchEncoder

logger = logging.getLogger(__name__)

AnyEncoder = TypeVar("AnyEncoder", bound=EncoderConfig)
MEASURED_FROM = 1000
"""Images from which on engines are measured, which takes some seconds."""
WORTH_IT = 1.2
"""OpenVINO is taken where it is so many times as fast as torch; it is far from that bound on most networks."""
_NOT_IN_GRAPH = {"engine", "precision", "normalize", "threads", "compile"}
"""Settings of an encoder that its converted network does not depend on."""


def load_run_encoder(config: RunConfig, device: str | None = None, settings: EncoderConfig | None = None) -> Encoder:
    """Load one of the run's encoders with the run's limits, by default the only one.

    It lies on a GPU where `resources` gives one, unless a device is named.

    Raises:
        ConfigError: its weights are missing; the message names the file and where to put it.
    """
    if device is None:
        device = "cuda" if config.resources.gpus_per_worker != 0 and sees_gpu() else "cpu"
    settings = config.encoder if settings is None else settings
    if settings.name == "unknown":
        key = "encoder.name" if not config.encoders else f"encoders: the name of {getattr(settings, 'space', '')}"
        raise ConfigError(
            f"{key} = unknown: the run's rows are ready embeddings; name the encoder that made them to add images"
            " or to search"
        )
    if device == "cpu" and settings.precision == "fp16" and config.resources.gpus_per_worker != 0:
        # The run's GPUs are elsewhere: one query, or the words, on a machine without.
        settings = settings.model_copy(update={"precision": "fp32"})
    uri, images = settings.weights_uri, config.images
    encoder: Encoder
    is_graph = settings.engine == "openvino" and device == "cpu" and settings.precision != "fp16"
    if is_graph and settings.family != "pixels":
        encoder = _graph_encoder(config, settings)
    elif settings.family == "run":
        # The network that a run has learnt from pixels, without the projector in whose space it was compared. Only such
        # runs need torchvision's networks.
        from rayclust.encoders.network import TorchEncoder
        from rayclust.methods.pixels.base import PixelMethod
        from rayclust.methods.pixels.cpp import CppPixels
        from rayclust.runtime.tensors import read_method

        run = Run(settings.run_uri)
        method = read_method(run.model_folder, "train")
        if not isinstance(method, PixelMethod | CppPixels) or method.channels != 3:
            raise ConfigError(
                f"encoder.pretrained = {settings.pretrained}: its method, {method.config.name}, has no network that "
                "learnt from pixels in colour"
            )
        pixels = PixelEncoder(EncoderConfig.model_validate(storage.read_json(run.config)["encoder"]))
        mean, std = (tuple(moments.tolist()) for moments in (method.mean, method.std))
        encoder = TorchEncoder(method.trunk, settings, pixels.preprocess, mean=mean, std=std, device=device)
    else:
        with storage.local_copy(uri) if uri is not None else nullcontext() as path:
            encoder = load_encoder(settings, weights=path, device=device)
    encoder.preprocess = replace(encoder.preprocess, max_bytes=images.max_bytes, max_pixels=images.max_pixels)
    return encoder


def _graph_encoder(
    config: RunConfig, settings: EncoderConfig, loaded: TorchEncoder | None = None
) -> openvino.GraphEncoder:
    """Read an encoder's network as it was converted before on this machine; else convert it, and keep it for later.

    `loaded` is the encoder that torch computes, where it is there already.
    """

    def load_whole() -> TorchEncoder:
        plain = settings.model_copy(update={"engine": "torch"})
        return cast("TorchEncoder", load_run_encoder(config, "cpu", plain))

    openvino.library()  # or one line says that it is not installed
    made_by = versions() | {"openvino": metadata.version("openvino")}
    fields = EncoderConfig.model_fields.keys() - _NOT_IN_GRAPH
    key = [settings.model_dump(mode="json", include=fields), weights_stamp(config, settings), made_by]
    folder = scratch_folder() / "graphs" / digest_of(key)
    graph = openvino.Graph.read(folder)
    if graph is None:
        converted = (loaded or load_whole()).to_graph()
        converted.write(folder)
        graph = openvino.Graph.read(folder) or converted
    return openvino.GraphEncoder(graph, settings, load_whole)


def worker_device(config: RunConfig) -> str:
    """Return the device of an encode worker, "cpu" or "cuda"; raise `ConfigError` if torch does not see its GPU."""
    if not config.resources.gpus:
        return "cpu"
    if not sees_gpu():
        raise ConfigError(
            f"resources.gpus_per_worker = {config.resources.gpus:g}: torch {metadata.version('torch')} sees no CUDA "
            "device in this worker; install a CUDA build and driver on the node, or set it to 0"
        )
    return "cuda"


def encoding(config: RunConfig) -> tuple[EncoderConfig, ...]:
    """Return those of the run's encoders that encode its images: all but those whose embeddings are ready."""
    return tuple(each for each in config.each_encoder if getattr(each, "embeddings", None) is None)


class RunEncoders:
    """The encoders of a run that encode its images.

    Args:
        config: of the run.
        device: see `load_run_encoder`.
        loaded: encoders on that device that are there already, by the digest of their settings; see `with_engines`.

    Raises:
        ConfigError: weights are missing.
    """

    def __init__(
        self, config: RunConfig, device: str | None = None, loaded: Mapping[str, Encoder] | None = None
    ) -> None:
        known = loaded or {}
        self.encoders = tuple(
            known.get(_digest(settings)) or load_run_encoder(config, device, settings) for settings in encoding(config)
        )
        self.preprocesses = tuple(dict.fromkeys(encoder.preprocess for encoder in self.encoders))
        """Each kind of pixels once: encoders with one preprocessing share them."""
        self.dimension = sum(encoder.dimension for encoder in self.encoders)
        """ΣD."""

    def decode(self, data: bytes) -> list[np.ndarray]:
        """Decode one image file to UInt8[H W C] pixels for each preprocessing; raise `Undecodable` where that fails."""
        return [decode(data, preprocess) for preprocess in self.preprocesses]

    def encode(self, pixels: Sequence[np.ndarray]) -> np.ndarray:
        """Encode images.

        Args:
            pixels: UInt8[B H W C] for each preprocessing.

        Returns:
            Float32[B ΣD], the encoders' rows side by side.
        """
        seen = dict(zip(self.preprocesses, pixels, strict=True))
        rows = [encoder.encode_images(seen[encoder.preprocess]) for encoder in self.encoders]
        return rows[0] if len(rows) == 1 else np.concatenate(rows, axis=1)


def encoder_shape(config: RunConfig, settings: EncoderConfig | None = None) -> tuple[Preprocess, int, float]:
    """Load an encoder on this machine's CPU and measure its speed; the encoder is not kept.

    Returns:
        Its preprocessing, its width D and its seconds per image.
    """
    settings = config.encoder if settings is None else settings
    plain = settings.model_copy(update={"precision": "fp32", "compile": False})
    encoder = load_run_encoder(config, "cpu", plain)
    return encoder.preprocess, encoder.dimension, seconds_per_image(encoder)


def seconds_per_image(encoder: Encoder, clock: Callable[[], float] = time.monotonic) -> float:
    """Measure the seconds that one image takes an encoder, the least of three, by a clock."""
    black, times = np.zeros((1, *encoder.preprocess.shape), np.uint8), list[float]()
    encoder.encode_images(black)  # only the first call allocates
    for _ in range(3):
        started = clock()
        encoder.encode_images(black)
        times.append(clock() - started)
    return min(times)


def _digest(settings: EncoderConfig) -> str:
    return digest_of(settings.model_dump(mode="json"))


def with_engines(
    config: RunConfig,
    run: Run,
    count: int,
    *,
    is_begun: bool,
    callers: int = 1,
    loaded: dict[str, Encoder] | None = None,
) -> RunConfig:
    """Return the config with each encoder's engine: the one that has made the run's rows, else the fastest here.

    The choice is kept below the run, by the encoder's settings, so that all rows come from one engine.

    Args:
        config: of the run.
        run: it.
        count: images to encode. For fewer than `MEASURED_FROM` torch is done before another engine would begin.
        is_begun: some rows are there already; without a choice that was kept, torch has made them.
        callers: threads that will encode at once.
        loaded: gets the encoders that were measured, for `RunEncoders`: compiling one takes seconds.
    """
    uri = run.at("manifests", "encode", "engines.json")
    if config.resources.gpus:
        return config
    try:
        kept = dict(storage.read_json(uri))
    except (storage.MissingError, ArtefactError):
        kept = {}

    may_choose = count >= MEASURED_FROM and not is_begun and openvino.is_installed()

    def resolved(settings: AnyEncoder) -> AnyEncoder:
        if settings.engine != "auto" or getattr(settings, "embeddings", None) is not None:
            return settings
        key = _digest(settings)
        if key not in kept and may_choose and not settings.compile and settings.family != "pixels":
            encoder = _fastest_engine(config, settings, callers)
            kept[key] = "openvino" if isinstance(encoder, openvino.GraphEncoder) else "torch"
            storage.write_json(uri, kept)
            if loaded is not None:
                loaded[_digest(settings.model_copy(update={"engine": kept[key]}))] = encoder
        return settings.model_copy(update={"engine": kept.get(key, "torch")})

    if config.encoders:
        return config.model_copy(update={"encoders": tuple(map(resolved, config.encoders))})
    return config.model_copy(update={"encoder": resolved(config.encoder)})


def with_run_engines(config: RunConfig) -> RunConfig:
    """Return the config with OpenVINO where it is installed here and has made the run's rows; else unchanged."""
    found = with_engines(config, Run(config.run), 0, is_begun=True) if openvino.is_installed() else config
    return found if any(encoder.engine == "openvino" for encoder in found.each_encoder) else config


def _fastest_engine(config: RunConfig, settings: EncoderConfig, callers: int) -> Encoder:
    """Return the encoder with OpenVINO if that is worth it on this machine, else with torch."""
    encoder = load_run_encoder(config, "cpu", settings)
    try:
        graph = _graph_encoder(config, settings, cast("TorchEncoder", encoder))
    except ConfigError as error:
        logger.info("encode: torch computes %s: %s", settings.name, error)
        return encoder
    graph.preprocess, graph.callers = encoder.preprocess, callers
    # CPU seconds: other programs change them less.
    ratio = seconds_per_image(encoder, time.process_time) / seconds_per_image(graph, time.process_time)
    engine = "openvino" if ratio >= WORTH_IT else "torch"
    logger.info("encode: %s computes %s; OpenVINO takes 1/%.1f of torch's time here", engine, settings.name, ratio)
    return graph if engine == "openvino" else encoder


def refuse_other_width(config: RunConfig, width: int, settings: EncoderConfig | None = None) -> None:
    """Raise `ConfigError` if a named encoder cannot have made embeddings of a width: names would be wrong."""
    settings = config.each_encoder[0] if settings is None else settings
    if settings.family not in ("auto", "unknown"):
        expected = dimension_of(settings)
        if expected not in (None, width):
            source = f"images.uri = {config.images.uri}"
            if getattr(settings, "embeddings", None) is not None:
                source = f"encoders: embeddings = {settings.embeddings}"  # type: ignore[attr-defined]
            raise ConfigError(
                f"encoder.name = {settings.name}: has {expected} values an image, the embeddings of "
                f"{source} have {width}; name the encoder that made them, or unknown"
            )
