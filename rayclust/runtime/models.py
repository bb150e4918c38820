"""Save and load the fitted method of a run."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache

import numpy as np
import safetensors.torch
import torch

from rayclust.errors import ArtefactError, ConfigError
from rayclust.features import SpaceTransforms
from rayclust.methods import load
from rayclust.methods.base import Method, MethodState, Transform
from rayclust.store import storage
from rayclust.store.manifest import Outputs, put_bytes, put_json, read_manifest, read_unchanged
from rayclust.store.run import Run

BLOCK = 4096
"""Rows that are mapped at once."""


def save_method(run: Run, state: MethodState, folder: str) -> Outputs:
    """Write a fitted method to a folder below the run: safetensors and JSON, never a pickle."""
    tensors = {name: tensor.contiguous() for name, tensor in state.tensors.items()}
    weights = put_bytes(run, storage.join(folder, "weights.safetensors"), safetensors.torch.save(tensors))
    return weights | put_json(run, storage.join(folder, "config.json"), state.settings)


@lru_cache(2)
def load_method(uri: str, digest: str) -> Method:
    """Load the fitted method of the run at a URI; the two most recent stay in memory.

    The content digest of its train stage lets a new model be read anew. Raise `ArtefactError` if it is damaged.
    """
    manifest = read_manifest(Run(uri), "train")
    digests = {path: written.digest for path, written in manifest.outputs.items()} if manifest else {}
    return read_method(Run(uri).model_folder, "train", digests)


def read_method(folder: str, stage: str, digests: Mapping[str, str] | None = None) -> Method:
    """Load the fitted method in the folder at a URI, which `stage` writes.

    `digests` are SHA-256 by path, as the files were written; None compares nothing. Raise `ArtefactError` if one is
    missing or damaged.
    """
    config, weights = (storage.join(folder, name) for name in ("config.json", "weights.safetensors"))
    known = {path.rpartition("/")[2]: digest for path, digest in (digests or {}).items()}
    settings = storage.read_json(config, read_unchanged(config, known.get("config.json"), stage))
    data = read_unchanged(weights, known.get("weights.safetensors"), stage)
    try:
        return load(MethodState(settings, safetensors.torch.load(data)))
    except (safetensors.SafetensorError, KeyError, ValueError) as error:
        raise ArtefactError(f"{folder}: the model is damaged ({error}); run {stage} again with --force") from error


def method_inputs(
    method: Method, transform: SpaceTransforms, embeddings: np.ndarray
) -> np.ndarray | dict[str, np.ndarray]:
    """Return features of Float[B ΣD] embeddings as `method.predict_proba` takes them: side by side, or by space."""
    return transform.split(embeddings) if method.spaces is None else transform(embeddings)


def transform_rows(method: Method, features: np.ndarray) -> np.ndarray:
    """Return Float32[B d], rows in the method's own space, from features Float32[B D], block by block."""
    if not isinstance(method, Transform):
        raise ConfigError(f"method.name = {method.config.name}: has no space of its own")
    with torch.inference_mode():
        rows = [method.transform(part).float().numpy() for part in torch.from_numpy(features).split(BLOCK)]
    return np.concatenate(rows) if rows else np.zeros((0, method.width), np.float32)
