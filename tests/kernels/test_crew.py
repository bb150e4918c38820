from __future__ import annotations

import threading

import pytest
import torch

from rayclust.kernels.crew import Crew


@pytest.mark.parametrize("size", [1, 3])
def test_every_piece_is_done_once_by_threads_that_compute_alone(size: int):
    before, lock, done = torch.get_num_threads(), threading.Lock(), list[tuple[int, int, int]]()

    def work(piece: int, member: int) -> None:
        with lock:
            done.append((piece, member, torch.get_num_threads()))

    crew = Crew(size)
    crew.each(work, 100)
    crew.each(work, 0)
    assert sorted(piece for piece, _, _ in done) == list(range(100))
    assert {member for _, member, _ in done} <= set(range(size))
    assert {threads for _, _, threads in done} == {1 if size > 1 else before}
    assert torch.get_num_threads() == before


def test_gradients_are_off_and_errors_come_out():
    def work(piece: int, member: int) -> None:
        assert not torch.is_grad_enabled()
        raise ValueError(f"piece {piece}")

    for size in (1, 2):
        with pytest.raises(ValueError, match="piece"):
            Crew(size).each(work, 3)
