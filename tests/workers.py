"""Functions run on some processes that form a gloo group."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

mp.set_forkserver_preload(["pytest", "tests.workers", "rayclust.estimators", "rayclust.methods.pixels.backbones"])


def on_two_workers(function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """What `function(rank, 2, *arguments)` returns on each of two workers; a failure of either is raised here."""
    return on_workers(2, function, *arguments)


def on_workers(count: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """As `on_two_workers`, on `count` of them."""
    with tempfile.TemporaryDirectory() as folder:
        # Forked from one process of the session, which has imported torch and forks on request: that takes seconds.
        torch.save((function, arguments), Path(folder) / "work.pt")  # tensors as arguments would be shared memory
        mp.start_processes(_work, (count, folder), nprocs=count, start_method="forkserver")
        return [torch.load(Path(folder) / f"{rank}.pt", weights_only=False) for rank in range(count)]


def _work(rank: int, world: int, folder: str) -> None:
    torch.set_num_threads(1)
    function, arguments = torch.load(Path(folder) / "work.pt", weights_only=False)
    dist.init_process_group("gloo", init_method=f"file://{folder}/group", rank=rank, world_size=world)
    torch.save(function(rank, world, *arguments), Path(folder) / f"{rank}.pt")
    dist.barrier()  # none leaves while another still waits for what it sends
    # Gloo's threads may abort a process whose peer has closed its sockets first, in whatever order groups are taken
    # down. The result is on disk by now: the process ends before that.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
