"""Weights and tables of tensors from files, without running code that a file might carry."""

from __future__ import annotations

import argparse
import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from rayclust.encoders.options import is_hub_tag
from rayclust.encoders.torchscript import is_torchscript, read_torchscript
from rayclust.errors import ConfigError, DataError

__all__ = ["fit", "is_hub_tag", "load_state", "load_tensors", "without_prefix"]

# Where training scripts keep the weights that papers evaluate: the averaged copy before the trained one.
_NESTS = ("state_dict_ema", "model_ema", "teacher", "target_encoder", "state_dict", "model_state_dict", "model", "net")
_AVERAGED = ("ema", "teacher", "target", "momentum")


def load_tensors(path: Path | str) -> Any:
    """What a file of tensors holds: safetensors, or torch's own format read without unpickling code.

    Args:
        path: a local file; its name does not matter.

    Returns:
        A tensor, or dicts and lists of tensors and plain values, on the CPU.

    Raises:
        DataError: the file is missing, damaged, of another format, or holds objects that only code can build.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            head = file.read(16)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error}); check the path") from error
    if len(head) > 8 and head[8:9] == b"{":
        return _safetensors(path)
    if not head.startswith((b"PK", b"\x80")):
        what = f"starts with {head.hex(' ')}" if head else "is empty"
        raise DataError(f"{path}: {what}: neither a safetensors nor a torch file")
    return read_torchscript(path) if is_torchscript(path) else _torch_file(path)


def load_state(path: Path | str) -> dict[str, Tensor]:
    """The weights in a file by name, out of whatever a training script wrapped around them.

    Args:
        path: a local file, see `load_tensors`.

    Returns:
        Tensors by name, without the prefix `module.` of parallel training.

    Raises:
        DataError: as `load_tensors`, or the file holds no named tensors.
    """
    state = load_tensors(path)
    while isinstance(state, Mapping):
        nested = next((state[key] for key in _NESTS if isinstance(state.get(key), Mapping)), None)
        if nested is None:
            break
        state = nested
    tensors = {k: v for k, v in state.items() if isinstance(v, Tensor)} if isinstance(state, Mapping) else {}
    if not tensors:
        raise DataError(f"{path}: holds no weights by name, but {type(state).__name__}")
    return {key.removeprefix("module."): value for key, value in tensors.items()}


def without_prefix(state: dict[str, Tensor], wanted: Mapping[str, Any]) -> dict[str, Tensor]:
    """The part of a checkpoint that is one network of it, under that network's own names.

    Args:
        state: weights by name, e.g. `backbone.blocks.0.…`.
        wanted: the network's own names, e.g. `blocks.0.…`.

    Returns:
        What lies under the prefix that fits most names; of two that fit alike, the averaged copy (teacher, momentum).
        `state` itself when no prefix fits any.
    """
    prefixes = {""}
    for name in list(wanted)[:3]:
        prefixes |= {key[: -len(name)] for key in state if key.endswith("." + name)}
    rank = {
        p: (sum(p + name in state for name in wanted), any(a in p for a in _AVERAGED), -len(p), p) for p in prefixes
    }
    best = max(prefixes, key=lambda prefix: rank[prefix])
    return {key[len(best) :]: value for key, value in state.items() if key.startswith(best)}


def fit(network: nn.Module, state: Mapping[str, Tensor], *, encoder: str, source: str) -> None:
    """Loads weights into a network, all of them or none.

    Args:
        network: changed in place.
        state: weights by name; counters of batches may be absent.
        encoder: `encoder.name`, for the message.
        source: `encoder.pretrained`, for the message.

    Raises:
        ConfigError: names or shapes differ; one line with the first of them.
    """
    own = network.state_dict()
    state = {**{k: v for k, v in own.items() if k.endswith("num_batches_tracked")}, **state}
    troubles = [
        _listed("missing", [key for key in own if key not in state]),
        _listed("not wanted", [key for key in state if key not in own]),
        _listed(
            "of another shape",
            [
                f"{key} {tuple(state[key].shape)} instead of {tuple(value.shape)}"
                for key, value in own.items()
                if key in state and state[key].shape != value.shape
            ],
        ),
    ]
    if any(troubles):
        found = "; ".join(filter(None, troubles))
        raise ConfigError(f"encoder.pretrained = {source}: does not fit {encoder}: {found}")
    network.load_state_dict(state)


def _listed(what: str, names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"{what}: {', '.join(names[:3])}{more}" if names else ""


def _safetensors(path: Path) -> dict[str, Tensor]:
    try:
        tensors: dict[str, Tensor] = load_file(path)
    except (safetensors.SafetensorError, OSError, ValueError) as error:
        raise DataError(f"{path}: damaged safetensors file ({error}); fetch it again") from error
    return tensors


def _torch_file(path: Path) -> Any:
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise DataError(
            f"{path}: holds {_objects(path)}, which are not read; save its tensors alone, as safetensors"
        ) from error
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        what = " ".join(str(error).split())[:120]
        raise DataError(f"{path}: damaged torch file ({what}); fetch it again") from error


def _objects(path: Path) -> str:
    try:
        names = sorted(torch.serialization.get_unsafe_globals_in_checkpoint(str(path)))
    except (RuntimeError, ValueError, OSError, pickle.UnpicklingError):
        names = []
    return f"objects of {', '.join(names[:3])}" if names else "objects other than tensors"
