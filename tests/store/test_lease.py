"""Two drivers and one run."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from rayclust.errors import DataError, HeldError
from rayclust.store import filesystem, lease, swap
from rayclust.store.holder import myself
from rayclust.store.layout import Run
from rayclust.store.lease import Lease, held, holder_of

BEAT, LOST = 0.2, 2.0

DRIVER = """
import sys
from rayclust.store import holder, lease
from rayclust.store.layout import Run
uri, machine, lease.BEAT_SECONDS, lease.LOST_SECONDS = sys.argv[1], sys.argv[2], 0.2, 2.0
if machine:
    lease.myself = lambda me=holder.myself: me().model_copy(update={"machine": machine})
with lease.held(Run(uri)):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "BEAT_SECONDS", BEAT)
    monkeypatch.setattr(lease, "LOST_SECONDS", LOST)


@contextmanager
def driver(uri: str, machine: str = "") -> Iterator[subprocess.Popen[str]]:
    """Another process that holds the run, on this machine or as if on another."""
    line = [sys.executable, "-c", DRIVER, uri, machine]
    with subprocess.Popen(line, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def end(process: subprocess.Popen[str]) -> None:
    assert process.stdin is not None
    process.stdin.close()
    assert process.wait(timeout=30) == 0


def test_the_second_is_told_who_holds_the_run_and_gets_it_afterwards(place: str):
    run = Run(place)
    with driver(place) as first:
        with pytest.raises(HeldError) as caught, held(run):
            pass
        assert str(caught.value).startswith(f"{place}: is worked on by process {first.pid} on ")
        assert "\n" not in str(caught.value)
        end(first)
    assert not filesystem.exists(run.lease)
    with held(run):
        holder = holder_of(run)
        assert holder is not None
        assert not holder.has_ended()
    assert holder_of(run) is None


def test_a_killed_driver_of_this_machine_is_replaced_at_once(place: str):
    with driver(place) as first:
        first.kill()
        first.wait()
        started = time.monotonic()
        with held(Run(place)):
            assert time.monotonic() - started < LOST


def test_a_driver_elsewhere_is_watched_and_its_beat_believed(place: str):
    with driver(place, machine="elsewhere") as first:
        with pytest.raises(HeldError, match=f"process {first.pid}"), held(Run(place)):
            pass
        end(first)


def test_a_killed_driver_elsewhere_is_replaced_when_it_was_seen_to_stand_still(place: str):
    with driver(place, machine="elsewhere") as first:
        first.kill()
        first.wait()
        started = time.monotonic()
        with held(Run(place)):
            assert time.monotonic() - started >= LOST


def test_a_driver_elsewhere_that_ends_while_it_is_watched_leaves_the_run(place: str):
    with driver(place, machine="elsewhere") as first:
        first.kill()
        first.wait()
        threading.Timer(LOST / 3, lambda: filesystem.remove(Run(place).lease)).start()
        started = time.monotonic()
        with held(Run(place)):
            assert time.monotonic() - started < LOST


def test_clocks_that_differ_by_years_change_nothing(place: str):
    stale = myself().model_copy(update={"machine": "elsewhere", "since": "2001-01-01 00:00:00 UTC"})
    content = filesystem.canonical_json(stale.model_dump(mode="json")).encode()
    filesystem.write_bytes(Run(place).lease, content)
    stop = threading.Event()

    def beat() -> None:
        for number in range(1, 1000):
            if stop.wait(BEAT):
                return
            renewed = stale.model_copy(update={"beat": number})
            filesystem.write_json(Run(place).lease, renewed.model_dump(mode="json"))

    thread = threading.Thread(target=beat)
    thread.start()
    try:
        with pytest.raises(HeldError, match="since 2001-01-01"), held(Run(place)):
            pass
    finally:
        stop.set()
        thread.join()


def test_of_two_that_find_a_dead_lease_one_takes_it(tmp_path: Path):
    run = Run(str(tmp_path))
    dead = myself().model_copy(update={"born": "1"})
    filesystem.write_json(run.lease, dead.model_dump(mode="json"))
    found = swap.read(run.lease)
    assert found is not None
    leases = [Lease(run), Lease(run)]
    stamps = [swap.swap(run.lease, found[1], one._content()) for one in leases]
    assert sum(stamp is not None for stamp in stamps) == 1


def test_a_damaged_lease_is_watched_and_replaced(tmp_path: Path):
    run = Run(str(tmp_path))
    filesystem.write_bytes(run.lease, b"{")
    assert holder_of(run) is None
    with held(run):
        assert holder_of(run) is not None


def test_the_same_process_may_enter_again_and_lets_go_at_the_end(tmp_path: Path):
    run = Run(str(tmp_path))
    with held(run) as outer:
        with held(run) as inner:
            assert inner is outer
        assert filesystem.exists(run.lease)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(RuntimeError, match="inside"), held(run):
        raise RuntimeError("inside")
    assert list(tmp_path.iterdir()) == []


def test_it_is_renewed_for_as_long_as_it_is_held(place: str):
    with held(Run(place)):
        first = holder_of(Run(place))
        time.sleep(4 * BEAT)
        later = holder_of(Run(place))
        assert first is not None
        assert later is not None
        assert later.token == first.token
        assert later.beat > first.beat


def test_a_holder_that_stood_still_and_was_replaced_is_told_before_it_seals(tmp_path: Path):
    run = Run(str(tmp_path))
    with held(run) as mine:
        mine.check()
        theirs = myself()
        filesystem.write_json(run.lease, theirs.model_dump(mode="json"))
        mine._renewed -= LOST  # as after a sleep of the machine, before the thread has looked
        with pytest.raises(HeldError, match=f"taken over by process {theirs.pid}"):
            mine.check()
    assert holder_of(run) == theirs


def test_a_lease_that_somebody_removed_is_made_again(tmp_path: Path):
    run = Run(str(tmp_path))
    with held(run) as mine:
        filesystem.remove(run.lease)
        time.sleep(4 * BEAT)
        mine.check()
        assert holder_of(run) is not None
    assert not filesystem.exists(run.lease)


def test_storage_that_is_away_for_a_while_is_no_reason_to_stop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    run = Run(str(tmp_path))
    real = swap.swap

    def away(uri: str, stamp: str | None, data: bytes) -> str | None:
        raise DataError("away")

    with held(run) as mine:
        monkeypatch.setattr(swap, "swap", away)
        time.sleep(2 * BEAT)
        monkeypatch.setattr(swap, "swap", real)
        time.sleep(4 * BEAT)
        mine.check()
        holder = holder_of(run)
        assert holder is not None
        assert holder.beat > 0
