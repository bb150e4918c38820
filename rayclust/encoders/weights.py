"""Weights of networks: from files and from the hub."""

from __future__ import annotations

import logging
import urllib.error
import urllib.request
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import huggingface_hub
from huggingface_hub import constants
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, LocalEntryNotFoundError
from torch import Tensor, nn

from rayclust.encoders.tensors import load_tensors
from rayclust.errors import ConfigError, DataError

logger = logging.getLogger(__name__)

HUB_TIMEOUT = 5.0
"""Seconds to wait for the hub to answer at all, before giving up with one line."""
# Where training scripts keep the weights that papers evaluate: the averaged copy before the trained one.
_NESTS = ("state_dict_ema", "model_ema", "teacher", "target_encoder", "state_dict", "model_state_dict", "model", "net")
_AVERAGED = ("ema", "teacher", "target", "momentum")


def load_state(path: Path | str) -> dict[str, Tensor]:
    """Read the weights in a file by name, out of whatever a training script wrapped around them.

    The prefix `module.` of parallel training is left out.

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
    """Select the part of a checkpoint that is one network of it, under that network's own names.

    Args:
        state: weights by name, e.g. `backbone.blocks.0.…`.
        wanted: the network's own names, e.g. `blocks.0.…`.

    Returns:
        What lies under the prefix that fits most names; of two that fit alike, the averaged copy (teacher, momentum).
        `state` itself when no prefix fits any.
    """
    # 1. Prefixes under which the checkpoint holds one of the first names.
    prefixes = {""} | {key[: -len(name)] for name in list(wanted)[:3] for key in state if key.endswith("." + name)}
    # 2. The one with most names, averaged copies and short prefixes before others.
    best = max(
        prefixes, key=lambda p: (sum(p + name in state for name in wanted), any(a in p for a in _AVERAGED), -len(p), p)
    )
    return {key[len(best) :]: value for key, value in state.items() if key.startswith(best)}


def load_into(network: nn.Module, state: Mapping[str, Tensor], *, encoder: str, source: str) -> None:
    """Load weights into a network, all of them or none.

    Args:
        network: changed in place.
        state: weights by name; counters of batches may be absent.
        encoder: `encoder.name`, for the message.
        source: `encoder.pretrained`, for the message.

    Raises:
        ConfigError: names or shapes differ; one line with the first of them.
    """
    expected = network.state_dict()
    state = {**{k: v for k, v in expected.items() if k.endswith("num_batches_tracked")}, **state}
    differences = {
        "missing": [key for key in expected if key not in state],
        "not wanted": [key for key in state if key not in expected],
        "of another shape": [
            f"{key} {tuple(state[key].shape)} instead of {tuple(value.shape)}"
            for key, value in expected.items()
            if key in state and state[key].shape != value.shape
        ],
    }
    problems = [
        f"{what}: {', '.join(names[:3])}" + (f" and {len(names) - 3} more" if len(names) > 3 else "")
        for what, names in differences.items()
        if names
    ]
    if problems:
        raise ConfigError(f"encoder.pretrained = {source}: does not fit {encoder}: {'; '.join(problems)}")
    network.load_state_dict(state)


@dataclass(frozen=True)
class HubFile:
    """Weights published in a repository on the Hugging Face Hub."""

    repository: str
    """owner/name."""
    names: tuple[str, ...]
    """File names, the best first; one of them is there."""
    name: str
    """`encoder.name` with the tag in it: so what else the tag decides, such as colours, holds for a local copy too."""

    def path(self) -> Path:
        """Find the file in the hub's cache on this machine, which asks nobody, or fetch it.

        Raises:
            ConfigError: it is not here and cannot be fetched; one line with what to fetch and where to put it.
        """
        for name in self.names:
            cached = huggingface_hub.try_to_load_from_cache(self.repository, name)
            if isinstance(cached, str):
                return Path(cached)
        reason = "the hub cannot be reached"
        for name in self.names if hub_answers() else ():
            try:
                with suppress(Exception):  # the size is for the reader; the download has its own errors
                    url = huggingface_hub.hf_hub_url(self.repository, name)
                    size = huggingface_hub.get_hf_file_metadata(url, timeout=HUB_TIMEOUT).size or 0
                    logger.info("%s: downloading %.0f MB of weights, once", self.name, size / 1e6)
                return Path(huggingface_hub.hf_hub_download(self.repository, name))
            except (EntryNotFoundError, LocalEntryNotFoundError) as error:
                reason = type(error).__name__
            except (HfHubHTTPError, OSError, ValueError) as error:
                reason = " ".join(str(error).split())[:120]
                break
        raise ConfigError(
            f"encoder.pretrained: the weights of {self.name} are not on this machine and {reason}: fetch "
            f"{self.names[0]} from the Hugging Face repository {self.repository} on a machine that can, then set "
            f"encoder.name: {self.name} and encoder.pretrained: <its path or s3:// URI>"
        )


def hub_answers() -> bool:
    """Tell whether the hub (or the mirror that HF_ENDPOINT names) answers within `HUB_TIMEOUT` seconds.

    Asked before the hub's own client, which tries a dead connection six times over half a minute.
    """
    if constants.HF_HUB_OFFLINE:
        return False
    try:
        request = urllib.request.Request(constants.ENDPOINT, method="HEAD")  # noqa: S310 - the user's own endpoint
        with urllib.request.urlopen(request, timeout=HUB_TIMEOUT):  # noqa: S310
            return True
    except urllib.error.HTTPError:
        return True
    except (OSError, ValueError):
        return False
