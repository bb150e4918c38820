from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from rayclust.runtime import progress
from rayclust.runtime.cluster import run_remotely
from rayclust.runtime.progress import FIRST_LINE, LOG_INTERVAL, MetricsActor, Progress, duration
from rayclust.store import storage
from rayclust.store.run import Run


class Clock:
    """Time that passes when a test says so."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(progress, "time", clock)
    return clock


@pytest.fixture
def lines(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> pytest.LogCaptureFixture:
    monkeypatch.setattr(logging.getLogger("rayclust"), "propagate", True)
    caplog.set_level(logging.INFO, "rayclust.runtime.progress")
    return caplog


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [
        (0, "0.0 s"), (3.24, "3.2 s"), (59.4, "59 s"), (60, "1 min 00 s"), (250, "4 min 10 s"), (3599, "59 min 59 s"),
        (3600, "1 h 00 min"), (7512, "2 h 05 min"), (360_000, "100 h 00 min"),
    ],
)  # fmt: skip
def test_durations_read_as_a_person_says_them(seconds: float, shown: str):
    assert duration(seconds) == shown


def test_the_rate_leaves_out_what_an_earlier_run_did(clock: Clock):
    shown = Progress("encode", "images", total=1000, done=400)
    clock.now += 20
    shown.advance(100)
    assert shown.rate() == 5
    shown.show_metrics({"step": 600})
    assert shown.rate() == 10


def test_a_log_gets_one_line_every_interval_with_rate_note_and_time_left(clock: Clock, lines: pytest.LogCaptureFixture):
    with Progress("encode", "images", total=10_000, done=4000) as shown:
        for _ in range(int(LOG_INTERVAL) + 4):
            clock.now += 1
            shown.advance(100, "3 rejects")
    assert lines.messages == ["encode: 4,500 of 10,000 images, 100 images/s, 3 rejects, 55 s left"], (
        "the first is early"
    )
    clock.now += 1
    shown.advance()
    assert len(lines.messages) == 2


def test_without_a_total_or_a_rate_no_time_left_is_made_up(clock: Clock, lines: pytest.LogCaptureFixture):
    shown = Progress("train", "steps")
    clock.now += LOG_INTERVAL
    shown.show_metrics({"step": 60, "loss": 1.5})
    clock.now += LOG_INTERVAL
    shown.show_metrics({"step": 60, "steps": 120, "loss": 1.5})
    resumed = Progress("assign", "rows", total=10, done=10)
    clock.now += LOG_INTERVAL
    resumed.advance(0)
    assert lines.messages == [
        "train: 60 steps, 2 steps/s, loss 1.5000",
        "train: 60 of 120 steps, 1 steps/s, loss 1.5000, 1 min 00 s left",
        "assign: 10 of 10 rows, 0 rows/s",
    ]


def test_a_terminal_gets_a_bar_and_no_lines(clock: Clock, lines: pytest.LogCaptureFixture, monkeypatch):
    monkeypatch.setattr(progress.sys.stderr, "isatty", lambda: True)
    with Progress("encode", "images", total=10) as shown:
        assert shown._bar is not None
        clock.now += 2 * LOG_INTERVAL
        shown.advance(4, "1 reject")
        [task] = shown._bar.tasks
        assert (task.completed, task.total) == (4, 10)
        assert "1 reject" in task.fields["note"]
    assert lines.messages == []


def test_a_stage_keeps_what_it_has_done_in_the_run_until_it_ends(clock: Clock, tmp_path: Path):
    run = Run(str(tmp_path))
    with progress.keep_progress(run):
        shown = Progress("encode", "images", total=1000, done=400)
        clock.now += FIRST_LINE - 1
        shown.advance(100)
        assert not (tmp_path / "progress.json").exists(), "a short stage writes nothing"
        clock.now += 1
        shown.advance(0, "2 rejects", rejects=2)
        assert storage.read_json(run.progress) == {
            "stage": "encode", "unit": "images", "note": "2 rejects",
            "done": 500, "total": 1000, "per_second": 20.0, "rejects": 2,
        }  # fmt: skip
    assert not (tmp_path / "progress.json").exists()

    def interrupted() -> None:
        with progress.keep_progress(run), Progress("train", "steps") as shown:
            shown.show_metrics({"step": 7})
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert storage.read_json(run.progress)["done"] == 7
    with Progress("predict", "images") as shown:  # outside of a stage nothing is kept
        clock.now += LOG_INTERVAL
        shown.advance(1)
    assert storage.read_json(run.progress)["stage"] == "train"


def test_rays_metrics_get_what_is_measured(clock: Clock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    sent = dict[str, tuple[float, dict[str, str]]]()

    class Gauge:
        def __init__(self, name: str, description: str, tag_keys: tuple[str, ...]) -> None:
            self.name, self.tag_keys = name, tag_keys

        def set(self, value: float, tags: dict[str, str]) -> None:
            assert set(tags) == set(self.tag_keys)
            sent[self.name] = value, tags

    monkeypatch.setitem(sys.modules, "ray", SimpleNamespace(is_initialized=lambda: True))
    monkeypatch.setitem(sys.modules, "ray.util", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "ray.util.metrics", SimpleNamespace(Gauge=Gauge))
    progress._gauge.cache_clear()
    with progress.keep_progress(Run(str(tmp_path))):
        shown = Progress("train", "steps")
        clock.now += 10
        shown.show_metrics({"step": 50, "loss": 0.5})
    progress._gauge.cache_clear()
    assert {name: value for name, (value, _) in sent.items()} == {
        "rayclust_done": 50, "rayclust_per_second": 5, "rayclust_loss": 0.5,
    }  # fmt: skip
    assert sent["rayclust_loss"][1] == {"run": str(tmp_path), "stage": "train", "unit": "steps"}


def test_what_workers_are_busy_with_adds_up_by_kind():
    with (
        progress.context_value(progress.stage_timings, []) as found,
        progress.timed_section("decoders", unit="images") as measured,
    ):
        measured.add("reading", 1.0, "a:1")
        measured.add("decoding", 2.0, "a:1")
        with progress.timed_section("decoders") as again:
            again.add("decoding", 4.0, "b:1")
        measured.done += 7
    [sealed] = [part.section() for part in found]
    assert sealed.busy == {"decoding": 6.0, "reading": 1.0}
    assert (sealed.name, sealed.workers, sealed.done, sealed.unit) == ("decoders", 2, 7, "images")


def test_a_known_number_of_workers_counts_those_that_did_nothing():
    with progress.context_value(progress.stage_timings, []) as found, progress.timed_section("writers", 3) as measured:
        measured.add("writing", 1.0, "")
    assert found[0].section().workers == 3


def test_one_of_the_same_name_goes_on(monkeypatch: pytest.MonkeyPatch):
    ticks = iter([0.0, 2.0, 10.0, 13.0])
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(ticks))
    with progress.context_value(progress.stage_timings, []) as found:
        for _ in range(2):
            with progress.timed_section("parts") as measured:
                measured.add("working", 1.0, "a:1")
    assert len(found) == 1
    assert found[0].section().seconds == 5.0
    assert found[0].section().busy == {"working": 2.0}


def test_outside_of_a_stage_nothing_is_kept():
    with progress.timed_section("parts") as measured:
        measured.add("working", 1.0, "a:1")
    with progress.context_value(progress.stage_timings, []) as found:
        pass
    assert found == []


def test_a_worker_is_named_by_machine_and_process():
    assert progress.worker_name().endswith(f":{os.getpid()}")


def test_the_newest_row_is_read_any_number_of_times():
    metrics = MetricsActor()
    assert metrics.latest() is None
    metrics.report({"step": 1})
    metrics.report({"step": 2})
    assert metrics.latest() == metrics.latest() == {"step": 2}


@pytest.mark.ray
def test_rows_of_metrics_come_from_the_worker_that_a_task_runs_in(ray_session: None, tmp_path: Path):
    shown = tmp_path / "shown"

    class Watching(Progress):
        def show_metrics(self, row: dict[str, Any]) -> None:
            shown.write_text(str(row["step"]))

    def train(report: Callable[[dict[str, Any]], None]) -> None:
        for step in range(600):
            report({"step": step})
            if shown.exists():
                return
            time.sleep(0.1)

    with progress.watch_metrics(Watching("train", "steps")) as report:
        run_remotely(train, report)
    assert shown.exists()
