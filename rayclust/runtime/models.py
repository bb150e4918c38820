"""Load a run's encoder and its fitted method, and save the latter."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import replace
from functools import lru_cache

import numpy as np
import safetensors.torch
import torch

from rayclust.config import RunConfig
from rayclust.encoders.base import Encoder
from rayclust.encoders.decode import Preprocess
from rayclust.encoders.load import load_encoder
from rayclust.errors import ArtefactError, ConfigError
from rayclust.methods import load
from rayclust.methods.base import Method, MethodState, Transform
from rayclust.runtime.artefacts import Outputs, put_bytes, put_json
from rayclust.store import storage
from rayclust.store.manifest import read_manifest, read_unchanged
from rayclust.store.run import Run


def load_run_encoder(config: RunConfig, device: str | None = None) -> Encoder:
    """Load the run's encoder with the run's limits.

    Args:
        config: of the run.
        device: None takes a GPU where `resources` gives one, else the CPU.

    Raises:
        ConfigError: its weights are missing; the message says what to fetch and where to put it.
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
    """Return the device of an encode worker, "cpu" or "cuda".

    Raises:
        ConfigError: torch does not see the GPU of the worker; the CPU would take hours at a GPU's price.
    """
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
    """Return what changes with the encoder's weights: a hub tag, or the stamp of a file (size and time, or ETag).

    Raises:
        ConfigError: there is no such file.
    """
    uri = config.encoder.weights_uri
    if uri is None:
        return str(config.encoder.pretrained)
    found = storage.stat(uri)
    if found is None:
        raise ConfigError(f"encoder.pretrained = {uri}: no such file; give a tag, a path or a URI")
    return found.stamp


def save_method(run: Run, state: MethodState, folder: str) -> Outputs:
    """Write a fitted method to a folder below the run: safetensors and JSON, never a pickle."""
    tensors = {name: tensor.contiguous() for name, tensor in state.tensors.items()}
    weights = put_bytes(run, storage.join(folder, "weights.safetensors"), safetensors.torch.save(tensors))
    return weights | put_json(run, storage.join(folder, "config.json"), state.settings)


@lru_cache(2)
def load_method(uri: str, digest: str) -> Method:
    """Load the fitted method of a run; the two most recent stay in memory.

    Args:
        uri: of the run.
        digest: content digest of its train stage, so that a new model is read anew.

    Raises:
        ArtefactError: the model is missing or damaged.
    """
    sealed = read_manifest(Run(uri), "train")
    digests = {path: written.digest for path, written in sealed.outputs.items()} if sealed else {}
    return read_method(Run(uri).model_folder, "train", digests)


def read_method(folder: str, stage: str, digests: Mapping[str, str] | None = None) -> Method:
    """Load the fitted method in a folder.

    Args:
        folder: URI.
        stage: name of the stage that writes the folder, for messages.
        digests: SHA-256 by path of the files as they were written; None compares nothing.

    Raises:
        ArtefactError: the model is missing or damaged.
    """
    config, weights = (storage.join(folder, name) for name in ("config.json", "weights.safetensors"))
    known = {path.rpartition("/")[2]: digest for path, digest in (digests or {}).items()}
    settings = storage.parse_json(read_unchanged(config, known.get("config.json"), stage), config)
    data = read_unchanged(weights, known.get("weights.safetensors"), stage)
    try:
        return load(MethodState(settings, safetensors.torch.load(data)))
    except (safetensors.SafetensorError, KeyError, ValueError) as error:
        raise ArtefactError(f"{folder}: the model is damaged ({error}); run {stage} again with --force") from error


def transform_rows(method: Method, features: np.ndarray, block: int = 4096) -> np.ndarray:
    """Return Float32[B d], rows in the method's own space.

    Args:
        method: fitted, with a space of its own.
        features: Float32[B D].
        block: rows transformed at once.
    """
    if not isinstance(method, Transform):
        raise ConfigError(f"method.name = {method.config.name}: has no space of its own")
    with torch.inference_mode():
        rows = [method.transform(part).float().numpy() for part in torch.from_numpy(features).split(block)]
    return np.concatenate(rows) if rows else np.zeros((0, method.width), np.float32)
