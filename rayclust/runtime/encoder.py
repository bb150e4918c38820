"""Load a run's encoder on the device that `resources` gives, and compute the stamp of its weights."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace

import torch

from rayclust.config import RunConfig
from rayclust.encoders.base import Encoder
from rayclust.encoders.decode import Preprocess
from rayclust.encoders.load import load_encoder
from rayclust.errors import ConfigError
from rayclust.store import storage


def load_run_encoder(config: RunConfig, device: str | None = None) -> Encoder:
    """Load the run's encoder with the run's limits; on a GPU where `resources` gives one, unless a device is named.

    Raises:
        ConfigError: its weights are missing; the message names the file and where to put it.
    """
    if device is None:
        device = "cuda" if config.resources.gpus_per_worker and torch.cuda.is_available() else "cpu"
    settings = config.encoder
    if device == "cpu" and settings.precision == "fp16" and config.resources.gpus_per_worker:
        # The run's GPUs are elsewhere: one query, or the words, on a machine without.
        settings = settings.model_copy(update={"precision": "fp32"})
    uri = settings.weights_uri
    with storage.local_copy(uri) if uri is not None else nullcontext() as path:
        encoder = load_encoder(settings, weights=path, device=device)
    images = config.images
    encoder.preprocess = replace(encoder.preprocess, max_bytes=images.max_bytes, max_pixels=images.max_pixels)
    return encoder


def worker_device(config: RunConfig) -> str:
    """Return the device of an encode worker, "cpu" or "cuda"; raise `ConfigError` if torch does not see its GPU."""
    if not config.resources.gpus_per_worker:
        return "cpu"
    if not torch.cuda.is_available():
        raise ConfigError(
            f"resources.gpus_per_worker = {config.resources.gpus_per_worker:g}: torch {torch.__version__} sees no CUDA "
            "device in this worker; install a CUDA build and driver on the node, or set it to 0"
        )
    return "cuda"


def encoder_shape(config: RunConfig) -> tuple[Preprocess, int]:
    """Return the preprocessing of the run's encoder and the width D of its rows, found on this machine's CPU."""
    plain = config.encoder.model_copy(update={"precision": "fp32", "compile": False})
    encoder = load_run_encoder(config.model_copy(update={"encoder": plain}), device="cpu")
    return encoder.preprocess, encoder.dimension


def weights_stamp(config: RunConfig) -> str:
    """Return a string that changes with the encoder's weights: a hub tag, or a file's size and time, or its ETag."""
    uri = config.encoder.weights_uri
    if uri is None:
        return str(config.encoder.pretrained)
    found = storage.stat(uri)
    if found is None:
        raise ConfigError(f"encoder.pretrained = {uri}: no such file; give a tag, a path or a URI")
    return found.stamp
