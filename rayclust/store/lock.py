"""The lock of a run: one command works on it at a time, whose process is named in `lease.json` and renews it.

A command that finds another owner there watches the file until it is renewed, by no clock but its own. A lock that is
not renewed is taken over; so is, at once, that of a process that this machine has no more.
"""

from __future__ import annotations

import logging
import os
import platform
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

from pydantic import Field, ValidationError

from rayclust.errors import DataError, HeldError
from rayclust.settings import Config
from rayclust.store import storage
from rayclust.store.failures import names, without_secrets
from rayclust.store.run import Run

logger = logging.getLogger(__name__)

SUBMISSION_VARIABLE = "RAYCLUST_SUBMISSION"
"""Environment variable with the id of the job that a command runs as."""
RENEW_SECONDS = 5.0
"""Time between two renewals."""
LOST_SECONDS = 30.0
"""An owner that is not seen to renew for so long has lost the run: several renewals, and a slow network."""

_CLOCK = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_REALTIME)
"""A clock that goes on while the machine sleeps, where there is one."""


class LockOwner(Config):
    """A process that works on a run; as text, for messages."""

    token: str
    """Of this one taking of the run."""
    host: str
    """Name of the machine, for people."""
    machine: str
    """As `machine_id` gives it: a process id means something within one."""
    pid: int
    """Of the process."""
    born: str
    """As `process_start_time` gives it: a process id may come again."""
    submission: str | None = None
    """Id of the job, where it is one."""
    since: str
    """Time of taking by the owner's clock, for people; nothing compares it."""
    beat: int = Field(0, ge=0)
    """Renewals so far."""

    def __str__(self) -> str:
        job = f", job {self.submission}" if self.submission else ""
        return f"process {self.pid} on {self.host}{job}, since {self.since}"

    def has_ended(self) -> bool:
        """Return whether it was a process of this machine and is no more."""
        return self.machine == machine_id() and process_start_time(self.pid) != self.born


def machine_id() -> str:
    """Return this boot of this machine and its space of process ids; elsewhere than on Linux the host."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}/{Path('/proc/self/ns/pid').stat().st_ino}"
    except OSError:
        return f"{platform.node()}/{uuid.getnode():x}"


def process_start_time(pid: int) -> str | None:
    """Return when a process began; None where there is none, "" where it is unknown."""
    if not Path("/proc/self/stat").exists():
        try:
            os.kill(pid, 0)
        except PermissionError:
            return ""
        except (ProcessLookupError, OverflowError):
            return None
        return ""
    try:
        state, *rest = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if state == "Z" else rest[18]  # of a killed one that nobody has waited for, only the number is left


class RunLock:
    """One process's hold of a run, from `acquire` to `release`."""

    def __init__(self, run: Run) -> None:
        self._run, self._uri = run, run.lease
        self.owner = LockOwner(
            token=uuid.uuid4().hex,
            host=socket.gethostname(),
            machine=machine_id(),
            pid=os.getpid(),
            born=process_start_time(os.getpid()) or "",
            submission=os.environ.get(SUBMISSION_VARIABLE),
            since=datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S UTC"),
        )
        """This process, as others see it once it has taken the run."""
        self._version: str | None = None
        self._lost_to: str | None = None
        self._renewed = 0.0
        self._renewing = threading.Lock()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._renew_regularly, name="lock", daemon=True)

    def acquire(self) -> None:
        """Acquire the lock, as `run_lock`; where another process had it, watch first whether that still works."""
        while self._version is None:
            found = storage.read_versioned(self._uri)
            if found is None or _is_abandoned(self._uri, found):
                self._version = storage.put_if_match(self._uri, self._content(), found[1] if found else None)
        self._renewed = time.clock_gettime(_CLOCK)
        self._thread.start()

    def release(self) -> None:
        """Release the lock."""
        self._ended.set()
        self._thread.join()
        try:
            found = storage.read_versioned(self._uri)
            if found is not None and found[1] == self._version:
                storage.remove(self._uri)
        except DataError as error:  # others will see that it is not renewed
            logger.debug("lock: not released: %s", error)

    def check(self) -> None:
        """Make sure that the run is still held: a machine that slept may wake up to a run that another has taken.

        Raises:
            HeldError: another has it.
            DataError: the storage cannot be read or written.
        """
        if time.clock_gettime(_CLOCK) - self._renewed > LOST_SECONDS / 2:
            self._renew()
        if self._lost_to is not None:
            raise HeldError(
                f"{self._run.uri}: this process stood still for longer than {LOST_SECONDS:g} s and the run was taken "
                f"over by {self._lost_to}; wait for it to end"
            )

    def _content(self) -> bytes:
        return storage.canonical_json(self.owner.model_dump(mode="json")).encode()

    def _renew_regularly(self) -> None:
        while not self._ended.wait(RENEW_SECONDS) and self._lost_to is None:
            try:
                self._renew()
            except DataError as error:  # others see the last renewal for a while yet
                logger.debug("lock: not renewed: %s", error)

    def _renew(self) -> None:
        with self._renewing:
            self.owner = self.owner.model_copy(update={"beat": self.owner.beat + 1})
            version = storage.put_if_match(self._uri, self._content(), self._version)
            if version is not None:
                self._version, self._renewed = version, time.clock_gettime(_CLOCK)
                return
            # The next renewal goes on from no file, or from an older one of this process.
            found = storage.read_versioned(self._uri)
            owner = _parse(found[0]) if found else None
            if found and (owner is None or owner.token != self.owner.token):
                self._lost_to = str(owner or "another process")
            else:
                self._version = found[1] if found else None


_held: dict[str, tuple[RunLock, int]] = {}
"""By URI of a run, the lock that this process holds and the depth of its contexts."""
_guard = threading.RLock()


@contextmanager
def run_lock(run: Run) -> Iterator[RunLock]:
    """Hold the lock of a run while the context lasts; the process that holds it may enter again.

    Raises:
        HeldError: another process works on the run.
        DataError: the storage cannot be read or written.
    """
    with _guard:
        lock, depth = _held.get(run.uri) or (RunLock(run), 0)
        if depth == 0:
            lock.acquire()
        _held[run.uri] = (lock, depth + 1)
    try:
        yield lock
    finally:
        with _guard:
            depth = _held[run.uri][1] - 1
            _held[run.uri] = (lock, depth)
            if depth == 0:
                del _held[run.uri]
                lock.release()


def lock_owner(run: Run) -> LockOwner | None:
    """Return the owner that stands in the run's lock, at work or not; None where there is none."""
    found = storage.read_versioned(run.lease)
    return _parse(found[0]) if found else None


def check_conditional_puts(uri: str) -> None:
    """Make sure that the storage of a run refuses a conditional put that it must refuse; leave nothing behind.

    Raises:
        DataError: it does not, so that two commands could work on one run at once; or it cannot be written.
    """
    probe = storage.join(uri, f".rayclust-{uuid.uuid4().hex}.tmp")
    try:
        refuses = storage.put_if_match(probe, b"first", None) and not storage.put_if_match(probe, b"second", None)
    except DataError as error:
        if not names(error) & {"NotImplemented", "501"}:
            raise
        refuses = False
    finally:
        storage.remove(probe)
    if not refuses:
        scheme, _, path = uri.partition("://")
        endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or ""
        store = f"{scheme}://{path.partition('/')[0]}"
        store += f" at {without_secrets(endpoint)}" if endpoint and scheme == "s3" else ""
        raise DataError(
            f"run = {uri}: the store {store} ignores If-None-Match, so two commands could work on one run at once; "
            "use a store with conditional writes, or a local folder"
        )


def _is_abandoned(uri: str, found: tuple[bytes, str]) -> bool:
    """Watch another's lock; return True when it may be taken over, False when it has gone.

    Raises:
        HeldError: its owner is at work.
    """
    # 1. A process of this machine either has ended or is at work.
    owner = _parse(found[0])
    if owner is not None and owner.has_ended():
        logger.info("the run's last driver, %s, has ended without letting go: taken over", owner)
        return True
    is_at_work = owner is not None and owner.machine == machine_id()
    if not is_at_work:
        logger.info("the run is held by %s: watching whether it still works", owner or "an unknown process")
    # 2. Another machine's renews the lock in time, or is lost.
    deadline = time.monotonic() + LOST_SECONDS
    while not is_at_work and time.monotonic() < deadline:
        time.sleep(RENEW_SECONDS / 4)
        now = storage.read_versioned(uri)
        if now is None:
            return False
        if now[1] != found[1]:
            owner, is_at_work = _parse(now[0]), True
    if is_at_work:
        run, process = uri.rpartition("/")[0], owner or "another process"
        raise HeldError(f"{run}: is worked on by {process}; wait for it to end, or stop it first")
    logger.info("the run's last driver has not been seen at work for %g s: taken over", LOST_SECONDS)
    return True


def _parse(data: bytes) -> LockOwner | None:
    try:
        return LockOwner.model_validate_json(data)
    except ValidationError:
        return None
