from __future__ import annotations

import os
import subprocess
import sys

import pytest

from rayclust.store import holder
from rayclust.store.holder import SUBMISSION_VARIABLE, birth, machine, myself


def test_this_process_is_near_and_at_work():
    me = myself()
    assert (me.pid, me.machine, me.beat) == (os.getpid(), machine(), 0)
    assert me.is_near
    assert not me.has_ended()
    assert me.token != myself().token


def test_a_line_for_people(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv(SUBMISSION_VARIABLE, raising=False)
    assert str(myself()).startswith(f"process {os.getpid()} on ")
    assert "job" not in str(myself())
    monkeypatch.setenv(SUBMISSION_VARIABLE, "rayclust-photos-1")
    assert ", job rayclust-photos-1, since 20" in str(myself())


def test_a_process_that_was_killed_has_ended_before_and_after_it_is_waited_for():
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    them = myself().model_copy(update={"pid": process.pid, "born": birth(process.pid)})
    assert not them.has_ended()
    process.kill()
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    assert them.has_ended()
    process.wait()
    assert them.has_ended()


def test_a_number_that_came_again_is_another_process():
    assert myself().model_copy(update={"born": "1"}).has_ended()


def test_of_other_machines_nothing_is_known():
    them = myself().model_copy(update={"machine": "elsewhere", "pid": 2**22 + 1})
    assert not them.is_near
    assert not them.has_ended()


def test_where_there_is_no_proc_only_the_number_tells(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(holder.Path, "exists", lambda self: False)
    assert birth(os.getpid()) == ""
    assert birth(2**22 + 1) is None
