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
        Copies on the CPU, of the whole method where workers hold parts of it: the same whatever those parts are.
    """
    tensors = {METHOD + name: value for name, value in method.state_dict().items()}
    tensors |= {OPTIMIZER + name: value for name, value in steps.state().items()}
    tensors |= {SUMS + name: value for name, value in sums.items()}
    packed = {}
    for name in sorted(tensors):  # one after another: the whole of all of them may not fit where the parts do
        whole = method.whole({name.partition(".")[2]: tensors[name].detach()})
        packed[name] = next(iter(whole.values())).to("cpu", copy=True).contiguous()
    return packed


def unpack(tensors: Mapping[str, Tensor], method: Method, steps: Steps) -> dict[str, Tensor]:
    """Puts packed tensors back into a method and its optimiser.

    Returns:
        The unfinished epoch's sums.

    Raises:
        ArtefactError: the checkpoint is of another method or other sizes.
    """
    try:
        method.load_state_dict(method.part(_below(tensors, METHOD)))
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise ArtefactError(f"checkpoint does not fit the method: {reason}; remove it or restore the config") from error
    steps.load(method.part(_below(tensors, OPTIMIZER)))
    return method.part(_below(tensors, SUMS))


def _below(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
