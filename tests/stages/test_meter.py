from __future__ import annotations

import os

import pytest

from rayclust.runtime import progress


def test_what_workers_are_busy_with_adds_up_by_kind():
    with progress.collect_timings() as found, progress.timed_section("decoders", unit="images") as measured:
        measured.add("reading", 1.0, "a:1")
        measured.add("decoding", 2.0, "a:1")
        progress.current_timing("decoders").add("decoding", 4.0, "b:1")
        measured.done += 7
    [sealed] = [part.sealed() for part in found]
    assert sealed.busy == {"decoding": 6.0, "reading": 1.0}
    assert (sealed.name, sealed.workers, sealed.done, sealed.unit) == ("decoders", 2, 7, "images")


def test_a_known_number_of_workers_counts_those_that_did_nothing():
    with progress.collect_timings() as found, progress.timed_section("writers", 3) as measured:
        measured.add("writing", 1.0, "")
    assert found[0].sealed().workers == 3


def test_one_of_the_same_name_goes_on(monkeypatch: pytest.MonkeyPatch):
    ticks = iter([0.0, 2.0, 10.0, 13.0])
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(ticks))
    with progress.collect_timings() as found:
        for _ in range(2):
            with progress.timed_section("parts") as measured:
                measured.add("working", 1.0, "a:1")
    assert len(found) == 1
    assert found[0].sealed().seconds == 5.0
    assert found[0].sealed().busy == {"working": 2.0}


def test_outside_of_a_stage_nothing_is_kept():
    with progress.timed_section("parts") as measured:
        measured.add("working", 1.0, "a:1")
    with progress.collect_timings() as found:
        pass
    assert found == []


def test_a_worker_is_named_by_machine_and_process():
    assert progress.worker_name().endswith(f":{os.getpid()}")
