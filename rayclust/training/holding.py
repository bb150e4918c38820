"""Where a worker keeps its rows so that batches can be taken by index: on the GPU, pinned, or as they come."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

SHARE = 0.5
"""Share of the free memory, a GPU's or a worker's part of the node's, that one tensor may take."""
_CGROUP = Path("/sys/fs/cgroup")
_MEMORY = Path("/proc/meminfo")

Place = Literal["gpu", "pinned", "mapped"]


def place_for(size: int, gpu_free: int, host_free: int) -> Place:
    """Where so many bytes go: to the first place of which they take no more than `SHARE`.

    `mapped` leaves them where they are, which for the rows of a run is a file mapped into memory.
    """
    if size <= SHARE * gpu_free:
        return "gpu"
    return "pinned" if size <= SHARE * host_free else "mapped"


def held(x: Tensor, device: torch.device) -> Tensor:
    """The tensor where batches for `device` can be taken from it by index."""
    if device.type != "cuda" or x.device == device:
        return x
    free, _ = torch.cuda.mem_get_info(device)
    place = place_for(x.numel() * x.element_size(), free, host_free())
    if place == "gpu":
        return x.to(device)
    return x.pin_memory() if place == "pinned" else x


def taken(x: Tensor, rows: Tensor, device: torch.device) -> Tensor:
    """x[rows] on `device`: by way of pinned memory where it goes to a GPU, so that the copy does not wait.

    Args:
        x: Float[N D], from `held`.
        rows: Int64[B], on the device of `x`.
        device: where to.
    """
    if device.type != "cuda" or x.device.type == "cuda":
        return x.index_select(0, rows).to(device)
    chosen = torch.empty((len(rows), x.shape[1]), dtype=x.dtype, pin_memory=True)
    torch.index_select(x, 0, rows, out=chosen)
    return chosen.to(device, non_blocking=True)


def host_free() -> int:
    """Bytes of memory for this worker: its part of what the node, or the container's limit, has left; 0 if unknown."""
    left = [found for found in (_available(), _below_limit()) if found is not None]
    return min(left, default=0) // max(1, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def _available() -> int | None:
    try:
        lines = _MEMORY.read_text().splitlines()
    except OSError:
        return None
    found = [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")]
    return found[0] if found else None


def _below_limit() -> int | None:
    """What is left of the control group's limit, if there is one; page cache that can be given back counts as left."""
    try:
        limit, used = (_CGROUP / "memory.max").read_text().strip(), int((_CGROUP / "memory.current").read_text())
        stat = dict(line.split() for line in (_CGROUP / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        return None
    return None if limit == "max" else max(0, int(limit) - used + int(stat.get("inactive_file", 0)))
