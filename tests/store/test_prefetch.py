from __future__ import annotations

import threading
import time

import pytest

from rayclust.store.storage import prefetch


@pytest.mark.parametrize("ahead", [1, 3])
def test_results_come_in_order(ahead: int) -> None:
    def slow_first(item: int) -> int:
        time.sleep(0.02 if item % 3 == 0 else 0)
        return item * item

    assert list(prefetch(slow_first, range(10), ahead)) == [(i, i * i) for i in range(10)]


def test_calls_run_side_by_side() -> None:
    barrier = threading.Barrier(4, timeout=10)
    assert [result for _, result in prefetch(lambda _: barrier.wait() >= 0, range(4), 4)] == [True] * 4


def test_items_are_taken_no_further_than_asked() -> None:
    taken = []

    def items():
        for i in range(100):
            taken.append(i)
            yield i

    results = prefetch(lambda item: item, items(), 4)
    assert next(results) == (0, 0)
    assert len(taken) == 4
    results.close()


def test_more_may_be_held_than_run_at_once() -> None:
    gate, most, lock = threading.Semaphore(2), [], threading.Lock()

    def count(item: int) -> int:
        assert gate.acquire(blocking=False), "a third call runs"
        with lock:
            most.append(item)
        time.sleep(0.01)
        gate.release()
        return item

    results = prefetch(count, range(12), 6, threads=2)
    assert next(results) == (0, 0)
    assert [item for item, _ in results] == list(range(1, 12))
    assert len(most) == 12


@pytest.mark.parametrize("ahead", [1, 4])
def test_an_error_comes_at_its_place(ahead: int) -> None:
    def fail_at_two(item: int) -> int:
        if item == 2:
            raise KeyError(item)
        return item

    results = prefetch(fail_at_two, range(9), ahead)
    assert [next(results), next(results)] == [(0, 0), (1, 1)]
    with pytest.raises(KeyError):
        next(results)
