"""Published weights: found in the local cache, or fetched, or asked for in one line."""

from __future__ import annotations

import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path

import huggingface_hub
from huggingface_hub import constants
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, LocalEntryNotFoundError

from rayclust.errors import ConfigError

PATIENCE = 5.0
"""Seconds to wait for the hub to answer at all, before giving up with one line."""


@dataclass(frozen=True)
class HubFile:
    """Weights published in a repository on the Hugging Face Hub."""

    repository: str
    """owner/name."""
    names: tuple[str, ...]
    """File names, the best first; one of them is there."""
    name: str
    """`encoder.name` with the tag in it: so what else the tag decides, such as colours, holds for a local copy too."""

    def cached(self) -> Path | None:
        """The file in the hub's cache on this machine, if any; asks nobody."""
        for name in self.names:
            path = huggingface_hub.try_to_load_from_cache(self.repository, name)
            if isinstance(path, str):
                return Path(path)
        return None

    def path(self) -> Path:
        """The file on this machine, fetched if need be.

        Raises:
            ConfigError: it is not here and cannot be fetched; one line with what to fetch and where to put it.
        """
        here = self.cached()
        if here is not None:
            return here
        if not hub_answers():
            raise self._refusal("the hub cannot be reached")
        for name in self.names:
            try:
                return Path(huggingface_hub.hf_hub_download(self.repository, name))
            except (EntryNotFoundError, LocalEntryNotFoundError) as error:
                reason = type(error).__name__
            except (HfHubHTTPError, OSError, ValueError) as error:
                raise self._refusal(" ".join(str(error).split())[:120]) from error
        raise self._refusal(reason)

    def _refusal(self, reason: str) -> ConfigError:
        return ConfigError(
            f"encoder.pretrained: the weights of {self.name} are not on this machine and {reason}: fetch "
            f"{self.names[0]} from the Hugging Face repository {self.repository} on a machine that can, then set "
            f"encoder.name: {self.name} and encoder.pretrained: <its path or s3:// URI>"
        )


def hub_answers() -> bool:
    """Whether the hub (or the mirror that HF_ENDPOINT names) says anything within `PATIENCE` seconds.

    Asked before the hub's own client, which tries a dead connection six times over half a minute.
    """
    if constants.HF_HUB_OFFLINE:
        return False
    try:
        request = urllib.request.Request(constants.ENDPOINT, method="HEAD")  # noqa: S310 - the user's own endpoint
        with urllib.request.urlopen(request, timeout=PATIENCE):  # noqa: S310
            return True
    except urllib.error.HTTPError:
        return True
    except (OSError, ValueError):
        return False
