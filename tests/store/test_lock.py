"""Two commands and one run."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from botocore.exceptions import ClientError

from rayclust.errors import DataError, HeldError
from rayclust.store import lock, storage
from rayclust.store.lock import (
    SUBMISSION_VARIABLE,
    LockOwner,
    RunLock,
    check_conditional_puts,
    lock_owner,
    machine_id,
    process_start_time,
    run_lock,
)
from rayclust.store.run import Run
from tests.store.inputs import s3_connection

RENEW, LOST = 0.2, 1.5

COMMAND = """
import sys
from rayclust.store import lock
from rayclust.store.run import Run
uri, machine, lock.RENEW_SECONDS, lock.LOST_SECONDS = sys.argv[1], sys.argv[2], 0.2, 1.5
if machine:
    lock.machine_id = lambda: machine
with lock.run_lock(Run(uri)):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "RENEW_SECONDS", RENEW)
    monkeypatch.setattr(lock, "LOST_SECONDS", LOST)


@contextmanager
def command(uri: str, machine: str = "") -> Iterator[subprocess.Popen[str]]:
    """Another process that holds the run, on this machine or as if on another."""
    line = [sys.executable, "-c", COMMAND, uri, machine]
    with subprocess.Popen(line, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def end(process: subprocess.Popen[str]) -> None:
    assert process.stdin is not None
    process.stdin.close()
    assert process.wait(timeout=30) == 0


def this_process() -> LockOwner:
    return RunLock(Run("nowhere")).owner


def write_owner(run: Run, owner: LockOwner) -> None:
    storage.write_json(run.lease, owner.model_dump(mode="json"))


# Owners.


def test_this_process_is_local_and_at_work() -> None:
    me = this_process()
    assert (me.pid, me.machine, me.beat) == (os.getpid(), machine_id(), 0)
    assert not me.has_ended()
    assert me.token != this_process().token


def test_a_line_for_people(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(SUBMISSION_VARIABLE, raising=False)
    assert str(this_process()).startswith(f"process {os.getpid()} on ")
    assert "job" not in str(this_process())
    monkeypatch.setenv(SUBMISSION_VARIABLE, "rayclust-photos-1")
    assert ", job rayclust-photos-1, since 20" in str(this_process())


def test_a_process_that_was_killed_has_ended_before_and_after_it_is_waited_for() -> None:
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    born = process_start_time(process.pid)
    owner = this_process().model_copy(update={"pid": process.pid, "born": born})
    assert not owner.has_ended()
    process.kill()
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    assert owner.has_ended()
    process.wait()
    assert owner.has_ended()


def test_a_number_that_came_again_is_another_process() -> None:
    assert this_process().model_copy(update={"born": "1"}).has_ended()


def test_of_other_machines_nothing_is_known() -> None:
    owner = this_process().model_copy(update={"machine": "elsewhere", "pid": 2**22 + 1})
    assert owner.machine != machine_id()
    assert not owner.has_ended()


def test_where_there_is_no_proc_only_the_number_tells(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock.Path, "exists", lambda self: False)
    assert process_start_time(os.getpid()) == ""
    assert process_start_time(2**22 + 1) is None


# The lock.


def test_the_second_is_told_the_owner_and_gets_the_run_afterwards(place: str) -> None:
    run = Run(place)
    with command(place) as first:
        with pytest.raises(HeldError) as caught, run_lock(run):
            pass
        assert str(caught.value).startswith(f"{place}: is worked on by process {first.pid} on ")
        assert "\n" not in str(caught.value)
        end(first)
    assert not storage.exists(run.lease)
    with run_lock(run):
        owner = lock_owner(run)
        assert owner is not None
        assert not owner.has_ended()
    assert lock_owner(run) is None


def test_a_killed_owner_on_this_machine_is_replaced_at_once(place: str) -> None:
    with command(place) as first:
        first.kill()
        first.wait()
        started = time.monotonic()
        with run_lock(Run(place)):
            assert time.monotonic() - started < LOST


def test_an_owner_elsewhere_is_watched_and_replaced_when_it_was_not_seen_to_renew(place: str) -> None:
    with command(place, machine="elsewhere") as first:
        with pytest.raises(HeldError, match=f"process {first.pid}"), run_lock(Run(place)):
            pass
        first.kill()
        first.wait()
        started = time.monotonic()
        with run_lock(Run(place)):
            assert time.monotonic() - started >= LOST


def test_an_owner_elsewhere_that_ends_while_it_is_watched_leaves_the_run(tmp_path: Path) -> None:
    run = Run(str(tmp_path))
    write_owner(run, this_process().model_copy(update={"machine": "elsewhere"}))
    threading.Timer(LOST / 3, lambda: storage.remove(run.lease)).start()
    started = time.monotonic()
    with run_lock(run):
        assert time.monotonic() - started < LOST


def test_clocks_that_differ_by_years_change_nothing(tmp_path: Path) -> None:
    run = Run(str(tmp_path))
    owner = this_process().model_copy(update={"machine": "elsewhere", "since": "2001-01-01 00:00:00 UTC"})
    write_owner(run, owner)
    stop = threading.Event()

    def renew() -> None:
        for number in range(1, 1000):
            if stop.wait(RENEW):
                return
            write_owner(run, owner.model_copy(update={"beat": number}))

    thread = threading.Thread(target=renew)
    thread.start()
    try:
        with pytest.raises(HeldError, match="since 2001-01-01"), run_lock(run):
            pass
    finally:
        stop.set()
        thread.join()


def test_of_two_that_find_a_dead_owner_one_takes_the_run(tmp_path: Path) -> None:
    run = Run(str(tmp_path))
    write_owner(run, this_process().model_copy(update={"born": "1"}))
    found = storage.read_versioned(run.lease)
    assert found is not None
    versions = [storage.put_if_match(run.lease, each._content(), found[1]) for each in (RunLock(run), RunLock(run))]
    assert sum(version is not None for version in versions) == 1


def test_a_damaged_lock_is_watched_and_replaced(tmp_path: Path) -> None:
    run = Run(str(tmp_path))
    storage.write_bytes(run.lease, b"{")
    assert lock_owner(run) is None
    with run_lock(run):
        assert lock_owner(run) is not None


def test_the_same_process_may_enter_again_and_lets_go_at_the_end(tmp_path: Path) -> None:
    run = Run(str(tmp_path))
    with run_lock(run) as outer:
        with run_lock(run) as inner:
            assert inner is outer
        assert storage.exists(run.lease)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(RuntimeError, match="inside"), run_lock(run):
        raise RuntimeError("inside")
    assert list(tmp_path.iterdir()) == []


def test_it_is_renewed_for_as_long_as_it_is_held(place: str) -> None:
    with run_lock(Run(place)):
        first = lock_owner(Run(place))
        time.sleep(4 * RENEW)
        later = lock_owner(Run(place))
        assert first is not None
        assert later is not None
        assert later.token == first.token
        assert later.beat > first.beat


def test_a_lock_on_any_other_store(tmp_path: Path) -> None:
    run = Run("memory://bucket/locked")
    with run_lock(run):
        time.sleep(2 * RENEW)
        owner = lock_owner(run)
        assert owner is not None
        assert owner.beat > 0
    assert lock_owner(run) is None


def test_an_owner_that_stood_still_and_was_replaced_fails_at_the_check(tmp_path: Path) -> None:
    run = Run(str(tmp_path))
    with run_lock(run) as mine:
        mine.check()
        theirs = this_process()
        write_owner(run, theirs)
        mine._renewed -= LOST  # as after a sleep of the machine, before the thread has looked
        with pytest.raises(HeldError, match=f"taken over by process {theirs.pid}"):
            mine.check()
    assert lock_owner(run) == theirs


def test_a_lock_that_somebody_removed_is_made_again(tmp_path: Path) -> None:
    run = Run(str(tmp_path))
    with run_lock(run) as mine:
        storage.remove(run.lease)
        time.sleep(4 * RENEW)
        mine.check()
        assert lock_owner(run) is not None
    assert not storage.exists(run.lease)


def test_storage_that_is_away_for_a_while_is_no_reason_to_stop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(str(tmp_path))
    real = storage.put_if_match

    def away(uri: str, data: bytes, version: str | None) -> str | None:
        raise DataError("away")

    with run_lock(run) as mine:
        monkeypatch.setattr(storage, "put_if_match", away)
        time.sleep(2 * RENEW)
        monkeypatch.setattr(storage, "put_if_match", real)
        time.sleep(4 * RENEW)
        mine.check()
        owner = lock_owner(run)
        assert owner is not None
        assert owner.beat > 0


# Stores that ignore conditions.


def test_a_store_that_refuses_what_it_must_is_good(place: str) -> None:
    check_conditional_puts(f"{place}/deep/run")
    check_conditional_puts("memory://bucket/run")
    assert list(storage.walk(place, missing_ok=True)) == []


@pytest.mark.parametrize("is_silent", [True, False])
def test_a_store_that_ignores_conditions_is_refused_by_name(
    is_silent: bool, s3_bucket: str, s3_endpoint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    connection = s3_connection()
    real = connection._call_s3

    async def without_conditions(name: str, *arguments: Any, **request: Any) -> Any:
        if not is_silent and "IfNoneMatch" in request:
            raise OSError("not implemented") from ClientError({"Error": {"Code": "NotImplemented"}}, name)
        return await real(name, *arguments, **{key: request[key] for key in request if not key.startswith("If")})

    monkeypatch.setattr(connection, "_call_s3", without_conditions)
    with pytest.raises(DataError, match=f"the store {s3_bucket} at {s3_endpoint} ignores If-None-Match") as caught:
        check_conditional_puts(f"{s3_bucket}/run")
    assert "\n" not in str(caught.value)
    assert list(storage.walk(s3_bucket)) == []


def test_a_bucket_that_is_not_there_is_said_so(s3_endpoint: str) -> None:
    with pytest.raises(DataError, match="no-such-bucket-here exists"):
        check_conditional_puts("s3://no-such-bucket-here/run")
