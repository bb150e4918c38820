"""Load a run's encoder on the device that `resources` gives, and compute the stamp of its weights."""

from __future__ import annotations

import time
from contextlib import nullcontext
from dataclasses import replace

import numpy as np
import torch

from rayclust.config import RunConfig
from rayclust.encoders.base import Encoder
from rayclust.encoders.decode import Preprocess
from rayclust.encoders.load import dimension_of, load_encoder
from rayclust.errors import ConfigError
from rayclust.store import storage


def load_run_encoder(config: RunConfig, device: str | None = None) -> Encoder:
    """Load the run's encoder with the run's limits; on a GPU where `resources` gives one, unless a device is named.

    Raises:
        ConfigError: its weights are missing; the message names the file and where to put it.
    """
    if device is None:
        device = "cuda" if config.resources.gpus_per_worker != 0 and torch.cuda.is_available() else "cpu"
    settings = config.encoder
    if settings.name == "unknown":
        raise ConfigError(
            "encoder.name = unknown: the run's rows are ready embeddings; name the encoder that made them to add images"
            " or to search"
        )
    if device == "cpu" and settings.precision == "fp16" and config.resources.gpus_per_worker != 0:
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
    if not config.resources.gpus:
        return "cpu"
    if not torch.cuda.is_available():
        raise ConfigError(
            f"resources.gpus_per_worker = {config.resources.gpus:g}: torch {torch.__version__} sees no CUDA "
            "device in this worker; install a CUDA build and driver on the node, or set it to 0"
        )
    return "cuda"


def encoder_shape(config: RunConfig) -> tuple[Preprocess, int, float]:
    """Load the run's encoder on this machine's CPU; return its preprocessing, its width D and its seconds per image."""
    plain = config.encoder.model_copy(update={"precision": "fp32", "compile": False})
    encoder = load_run_encoder(config.model_copy(update={"encoder": plain}), device="cpu")
    black = np.zeros((1, *encoder.preprocess.shape), np.uint8)
    encoder.encode_images(black)  # only the first call allocates
    started = time.monotonic()
    encoder.encode_images(black)
    return encoder.preprocess, encoder.dimension, time.monotonic() - started


def refuse_other_width(config: RunConfig, width: int) -> None:
    """Raise `ConfigError` if a named encoder cannot have made embeddings of a width: names would be wrong."""
    if config.encoder.family not in ("auto", "unknown"):
        expected = dimension_of(config.encoder)
        if expected not in (None, width):
            raise ConfigError(
                f"encoder.name = {config.encoder.name}: has {expected} values an image, the embeddings of "
                f"images.uri = {config.images.uri} have {width}; name the encoder that made them, or unknown"
            )


def weights_stamp(config: RunConfig) -> str:
    """Return a string that changes with the encoder's weights: a hub tag, or a file's size and time, or its ETag."""
    uri = config.encoder.weights_uri
    if uri is None:
        return str(config.encoder.pretrained)
    found = storage.stat(uri)
    if found is None:
        raise ConfigError(f"encoder.pretrained = {uri}: no such file; give a tag, a path or a URI")
    return found.stamp
