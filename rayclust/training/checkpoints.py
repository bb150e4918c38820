"""A training frozen between two steps: named tensors and JSON, no pickles."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from rayclust.errors import ArtefactError
from rayclust.methods.base import CheckpointStore, Every, Method, Steps

__all__ = ["CheckpointStore", "Every", "pack", "unpack"]

METHOD, OPTIMIZER, SUMS = "method.", "optimizer.", "sums."


def pack(method: Method, steps: Steps, sums: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """All tensors of a training under flat names.

    Args:
        method: its `state_dict`, buffers included.
        steps: the optimiser's state.
        sums: an unfinished epoch's metrics.

    Returns:
        Copies on the CPU.
    """
    tensors = {METHOD + name: value for name, value in method.state_dict().items()}
    tensors |= {OPTIMIZER + name: value for name, value in steps.state().items()}
    tensors |= {SUMS + name: value for name, value in sums.items()}
    return {name: value.detach().to("cpu", copy=True).contiguous() for name, value in tensors.items()}


def unpack(tensors: Mapping[str, Tensor], method: Method, steps: Steps) -> dict[str, Tensor]:
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
    steps.load(_below(tensors, OPTIMIZER))
    return _below(tensors, SUMS)


def _below(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
