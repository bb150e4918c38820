"""A few threads, each computing alone: the way to keep all cores busy on many small independent pieces."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch


class Crew:
    """Threads that take pieces of work one after another.

    Operators inside a piece do not split over threads: they would wait for each other many times a millisecond.

    Args:
        size: how many; 1 works in the caller's thread.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self._pool = ThreadPoolExecutor(size, thread_name_prefix="crew") if size > 1 else None
        if self._pool is not None:
            outside = torch.get_num_threads()
            list(self._pool.map(_stand_alone, [threading.Barrier(size)] * size))
            # The count is one of the calling thread and, for threads to come, one of the process: put that back.
            torch.set_num_threads(outside)

    def each(self, work: Callable[[int, int], None], count: int) -> None:
        """Calls `work(piece, member)` for every piece in 0 … count − 1, in any order.

        Args:
            work: gets the piece and which thread has it, in 0 … size − 1.
            count: number of pieces.

        Raises:
            Exception: whatever a piece raised first.
        """
        pieces = iter(range(count))  # one iterator: each piece goes to whoever asks next

        def take(member: int) -> None:
            with torch.no_grad():
                for piece in pieces:
                    work(piece, member)

        if self._pool is None:
            take(0)
        else:
            list(self._pool.map(take, range(self.size)))


def _stand_alone(barrier: threading.Barrier) -> None:
    torch.get_num_threads()  # a thread takes the process's count when it first asks for one: get that over with
    barrier.wait()
    torch.set_num_threads(1)
    barrier.wait()
