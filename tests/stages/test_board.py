from __future__ import annotations

from rayclust.stages.train import MetricsActor


def test_the_newest_row_is_read_any_number_of_times():
    board = MetricsActor()
    assert board.read() is None
    board.post({"step": 1})
    board.post({"step": 2})
    assert board.read() == board.read() == {"step": 2}
