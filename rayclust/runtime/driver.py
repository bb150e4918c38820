"""Small work in the driver's own process: starting Ray and its workers would take longer than the work.

Which work is small follows from the config and from counts alone. It gets as many threads as a Ray worker has, so that
the results are the same, to the bit, wherever it runs. torch is imported where it is asked: not by a run with nothing
to do, nor by work that needs none.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path

from rayclust.config import RunConfig

OWN = "rayclust-own"
"""Namespace of a cluster that this process has started on its machine: no node will ever join it."""
SMALL = 2**37
"""Products N²·D in the comparison of all rows with each other, up to which a run is small: seconds of one core."""

_GPU_DEVICES = ("nvidia*", "nvhost*", "kfd", "dxg")
"""Files in /dev that are there with a GPU: of NVIDIA, of its boards, of AMD, of Windows below Linux."""

_in_driver: ContextVar[bool] = ContextVar("in_driver", default=False)


def may_use_driver(config: RunConfig) -> bool:
    """Return whether small work of a run may stay in the driver: no cluster, GPU, label or further worker is asked for.

    What `resources.in_driver: never` forbids, and a program that has connected Ray itself, goes to workers.
    """
    resources, ray = config.resources, sys.modules.get("ray")
    if resources.in_driver == "never" or os.environ.get("RAY_ADDRESS") or resources.workers not in ("auto", 1):
        return False
    if resources.min_workers is not None or any(resources.placement.model_dump().values()):
        return False
    if ray is not None and ray.is_initialized() and ray.get_runtime_context().namespace != OWN:
        return False
    return not (sees_gpu() if resources.gpus_per_worker == "auto" else resources.gpus)


def is_small(rows: int, dimension: int) -> bool:
    """Return whether all stages on N rows of width D are small work."""
    return rows * rows * dimension <= SMALL


def has_idle_gpu() -> bool:
    """Return whether this machine has a GPU that torch does not see."""
    return any(Path("/dev").glob("nvidia[0-9]*")) and not sees_gpu()


def sees_gpu() -> bool:
    """Return whether torch sees a GPU in this process; it is not loaded to say so where the machine has none."""
    if "torch" not in sys.modules and not any(next(Path("/dev").glob(kind), None) for kind in _GPU_DEVICES):
        return False
    import torch

    return torch.cuda.is_available()


@contextmanager
def use_driver(is_used: bool) -> Iterator[None]:
    """Say for the block whether what it would send to workers is done in this process."""
    token = _in_driver.set(is_used)
    try:
        yield
    finally:
        _in_driver.reset(token)


def in_driver() -> bool:
    """Return whether the stage under way works in this process."""
    return _in_driver.get()


def cores() -> int:
    """Return the number of cores that this process may use, at least 1; the quota of a container counts."""
    import joblib

    return int(joblib.cpu_count())


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Compute in the block with the threads that Ray gives a worker of so many CPUs; the process's own come back."""
    from threadpoolctl import threadpool_limits

    given, torch = os.environ.get("OMP_NUM_THREADS"), sys.modules.get("torch")
    own = int(given) if given and given.isdecimal() else None
    before, wanted = torch.get_num_threads() if torch else own or cores(), own or count
    # The variable is for libraries that are first loaded in the block, which may be torch.
    os.environ["OMP_NUM_THREADS"] = str(wanted)
    try:
        with threadpool_limits(wanted):
            if torch:
                torch.set_num_threads(wanted)
            yield
    finally:
        if torch := sys.modules.get("torch"):
            torch.set_num_threads(before)
        if given is None:
            del os.environ["OMP_NUM_THREADS"]
