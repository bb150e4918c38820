"""Work ahead in threads while results are taken in order: what hides the latency of object storage."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def prefetch(function: Callable[[Item], Result], items: Iterable[Item], ahead: int) -> Iterator[tuple[Item, Result]]:
    """Yield `(item, function(item))` in order of `items`, with at most `ahead` calls under way or waiting to be taken.

    Args:
        function: may be called from several threads at once; what it raises comes out at its item's place.
        items: taken lazily.
        ahead: bound on calls and on results held; 1 calls in the caller's thread, one by one.
    """
    if ahead <= 1:
        for item in items:
            yield item, function(item)
        return
    pool = ThreadPoolExecutor(ahead, thread_name_prefix="prefetch")
    running: deque[tuple[Item, Future[Result]]] = deque()
    try:
        for item in items:
            running.append((item, pool.submit(function, item)))
            if len(running) == ahead:
                first, result = running.popleft()
                yield first, result.result()
        while running:
            first, result = running.popleft()
            yield first, result.result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
