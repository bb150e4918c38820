"""A training frozen between two steps: named tensors and JSON, no pickles."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from rayclust.errors import ArtefactError
from rayclust.methods.base import Method

METHOD, OPTIMIZER, SUMS = "method.", "optimizer.", "sums."


class CheckpointStore(Protocol):
    """Keeps checkpoints of one training."""

    def save(self, step: int, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        """Keeps a checkpoint; called by every worker at the same step with equal content, so that one may write.

        Args:
            step: steps done.
            tensors: on the CPU, contiguous, sharing no memory with the training.
            state: JSON.
        """

    def latest(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """The newest whole checkpoint, the same on every worker, or None."""


@dataclass(frozen=True)
class Every:
    """When checkpoints are due: whichever comes first. The end of a training is always kept."""

    epochs: int | None = 1
    """Epochs between two; None does not count them."""
    seconds: float | None = None
    """Seconds between two, looked at every few steps; None has no clock."""


def pack(method: Method, optimizer: torch.optim.Optimizer, sums: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """All tensors of a training under flat names.

    Args:
        method: its `state_dict`, buffers included.
        optimizer: the state of each parameter by its position; numbers become float64 tensors.
        sums: an unfinished epoch's metrics.

    Returns:
        Copies on the CPU.
    """
    tensors = {METHOD + name: value for name, value in method.state_dict().items()}
    for position, entries in optimizer.state_dict()["state"].items():
        for key, value in entries.items():
            tensors[f"{OPTIMIZER}{position}.{key}"] = _as_tensor(value)
    tensors.update({SUMS + name: value for name, value in sums.items()})
    return {name: value.detach().to("cpu", copy=True).contiguous() for name, value in tensors.items()}


def unpack(tensors: Mapping[str, Tensor], method: Method, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Puts packed tensors back into a method and its optimiser.

    Returns:
        The unfinished epoch's sums.

    Raises:
        ArtefactError: the checkpoint is of another method or other sizes.
    """
    try:
        method.load_state_dict(_below(tensors, METHOD))
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise ArtefactError(f"checkpoint does not fit the method: {reason}; remove it or restore the config") from error
    state: dict[int, dict[str, Tensor]] = {}
    for name, value in _below(tensors, OPTIMIZER).items():
        position, _, key = name.partition(".")
        state.setdefault(int(position), {})[key] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    return _below(tensors, SUMS)


def _as_tensor(value: Any) -> Tensor:
    return value if isinstance(value, Tensor) else torch.tensor(float(value), dtype=torch.float64)


def _below(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
