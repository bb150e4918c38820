"""The encoder of a run and its fitted method, from where they are stored."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from rayclust.config import RunConfig
from rayclust.encoders.base import Encoder
from rayclust.encoders.decode import Preprocess
from rayclust.encoders.load import is_hub_tag, load_encoder, preprocess_for
from rayclust.errors import ArtefactError, ConfigError
from rayclust.methods import Export, Method, load
from rayclust.stages.outputs import Outputs, put_bytes, put_json
from rayclust.store import filesystem
from rayclust.store.layout import Run

logger = logging.getLogger(__name__)


def run_preprocess(config: RunConfig) -> Preprocess:
    """How the run's encoder wants its images, with the run's limits; needs no weights."""
    images = config.images
    return preprocess_for(config.encoder, max_bytes=images.max_bytes, max_pixels=images.max_pixels)


def load_run_encoder(config: RunConfig) -> Encoder:
    """The run's encoder, on a GPU where `resources` gives one, else on the CPU.

    Raises:
        ConfigError: its weights are not to be had; the line says what to fetch and where to put it.
    """
    device = torch.device("cuda" if config.resources.gpus_per_worker and torch.cuda.is_available() else "cpu")
    if device.type == "cpu":
        # As many threads everywhere: sums in another order would change last bits with the number of workers.
        torch.set_num_threads(config.encoder.threads)
    with _weights(config) as path:
        return load_encoder(config.encoder, weights=path, device=device)


def weights_stamp(config: RunConfig) -> str:
    """What changes when the encoder's weights do: a hub tag, or a file's size and time or ETag."""
    if not _from_file(config):
        return str(config.encoder.pretrained)
    found = filesystem.stat(str(config.encoder.pretrained))
    if found is None:
        raise ConfigError(
            f"encoder.pretrained = {config.encoder.pretrained}: no such file; give a tag, a path or a URI"
        )
    return found.stamp


def _from_file(config: RunConfig) -> bool:
    return config.encoder.pretrained is not None and not is_hub_tag(config.encoder)


@contextmanager
def _weights(config: RunConfig) -> Iterator[Path | None]:
    if not _from_file(config):
        yield None
        return
    with filesystem.local_copy(str(config.encoder.pretrained)) as path:
        yield path


def save_method(run: Run, export: Export) -> Outputs:
    """Writes a fitted method: safetensors and JSON, never a pickle."""
    tensors = {name: tensor.contiguous() for name, tensor in export.tensors.items()}
    weights = put_bytes(run, filesystem.join(run.model_folder, "weights.safetensors"), safetensors.torch.save(tensors))
    return weights | put_json(run, filesystem.join(run.model_folder, "config.json"), export.settings)


@cache
def load_method(uri: str, digest: str) -> Method:
    """The fitted method of the run at `uri`; `digest` is its train stage's, so that a new model is read anew.

    Raises:
        ArtefactError: the model is missing or damaged.
    """
    folder = Run(uri).model_folder
    settings: dict[str, Any] = filesystem.read_json(filesystem.join(folder, "config.json"))
    data = filesystem.read_bytes(filesystem.join(folder, "weights.safetensors"))
    try:
        return load(Export(settings, safetensors.torch.load(data))).eval()
    except (safetensors.SafetensorError, KeyError, ValueError) as error:
        raise ArtefactError(f"{folder}: the model is damaged ({error}); run train again with --force") from error
