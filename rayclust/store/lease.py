"""A run is worked on by one driver at a time, whose name stands in a small file below it, renewed every few seconds.

Whoever finds another's name watches the file until it is renewed, by no clock but its own. A name that stands still has
lost its driver and is taken over; so is, at once, that of a process that this machine has no more.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from pydantic import ValidationError

from rayclust.errors import DataError, HeldError
from rayclust.store import filesystem, swap
from rayclust.store.holder import Holder, myself
from rayclust.store.layout import Run

logger = logging.getLogger(__name__)

BEAT_SECONDS = 5.0
"""Time between two renewals."""
LOST_SECONDS = 30.0
"""A lease that is not seen to change for so long has lost its driver: several renewals, and a slow network."""


class Lease:
    """One process's hold of a run, from `take` to `release`."""

    def __init__(self, run: Run) -> None:
        self._run, self._uri = run, run.lease
        self._holder = myself()
        self._stamp: str | None = None
        self._lost_to: str | None = None
        self._renewed = 0.0
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="lease", daemon=True)

    def take(self) -> None:
        """Takes the run; waits, where another had it, for as long as it takes to see whether that one still works.

        Raises:
            HeldError: it does.
            DataError: the storage cannot be read or written.
        """
        while self._stamp is None:
            found = swap.read(self._uri)
            if found is None or _is_abandoned(self._uri, found):
                self._stamp = swap.swap(self._uri, found[1] if found else None, self._content())
        self._renewed = _now()
        self._thread.start()

    def release(self) -> None:
        """Lets go of the run."""
        self._ended.set()
        self._thread.join()
        try:
            found = swap.read(self._uri)
            if found is not None and found[1] == self._stamp:
                filesystem.remove(self._uri)
        except DataError as error:  # others will see it stand still
            logger.debug("lease: not released: %s", error)

    def check(self) -> None:
        """Makes sure that the run is still held: a machine that slept may wake up to a run that another has taken.

        Raises:
            HeldError: another has it.
            DataError: the storage cannot be read or written.
        """
        if _now() - self._renewed > LOST_SECONDS / 2:
            self._renew()
        if self._lost_to is not None:
            raise HeldError(
                f"{self._run.uri}: this process stood still for longer than {LOST_SECONDS:g} s and the run was taken "
                f"over by {self._lost_to}; wait for it to end"
            )

    def _content(self) -> bytes:
        return filesystem.canonical_json(self._holder.model_dump(mode="json")).encode()

    def _beat(self) -> None:
        while not self._ended.wait(BEAT_SECONDS) and self._lost_to is None:
            try:
                self._renew()
            except DataError as error:  # others see the last beat for a while yet
                logger.debug("lease: not renewed: %s", error)

    def _renew(self) -> None:
        with self._lock:
            self._holder = self._holder.model_copy(update={"beat": self._holder.beat + 1})
            stamp = swap.swap(self._uri, self._stamp, self._content())
            if stamp is None:
                self._look()
            else:
                self._stamp, self._renewed = stamp, _now()

    def _look(self) -> None:
        """Finds out who has the run; the next renewal goes on from nobody, or from an older beat of ours."""
        found = swap.read(self._uri)
        holder = _parsed(found[0]) if found else None
        if found and (holder is None or holder.token != self._holder.token):
            self._lost_to = str(holder or "another process")
        else:
            self._stamp = found[1] if found else None


_held: dict[str, tuple[Lease, int]] = {}
"""What this process holds, and how many contexts deep."""
_guard = threading.RLock()


@contextmanager
def held(run: Run) -> Iterator[Lease]:
    """Holds the run for as long as the context lasts; the process that holds it may enter again.

    Raises:
        HeldError: another process works on the run.
        DataError: the storage cannot be read or written.
    """
    with _guard:
        lease, depth = _held.get(run.uri) or (Lease(run), 0)
        if depth == 0:
            lease.take()
        _held[run.uri] = (lease, depth + 1)
    try:
        yield lease
    finally:
        with _guard:
            depth = _held[run.uri][1] - 1
            _held[run.uri] = (lease, depth)
            if depth == 0:
                del _held[run.uri]
                lease.release()


def holder_of(run: Run) -> Holder | None:
    """Whoever stands in the run's lease, at work or not; None where nobody does."""
    found = swap.read(run.lease)
    return _parsed(found[0]) if found else None


def _is_abandoned(uri: str, found: tuple[bytes, str]) -> bool:
    """Looks after another's lease: True when it is there for the taking, False when it has gone.

    Raises:
        HeldError: its holder is at work.
    """
    holder = _parsed(found[0])
    if holder is not None and holder.has_ended():
        logger.info("the run's last driver, %s, has ended without letting go: taken over", holder)
        return True
    if holder is not None and holder.is_near:
        raise HeldError(_line(uri, holder))
    logger.info("the run is held by %s: watching whether it still works", holder or "an unknown process")
    deadline = time.monotonic() + LOST_SECONDS
    while time.monotonic() < deadline:
        time.sleep(BEAT_SECONDS / 4)
        now = swap.read(uri)
        if now is None:
            return False
        if now[1] != found[1]:
            raise HeldError(_line(uri, _parsed(now[0])))
    logger.info("the run's last driver has not been seen at work for %g s: taken over", LOST_SECONDS)
    return True


def _line(uri: str, holder: Holder | None) -> str:
    run = uri.rpartition("/")[0]
    return f"{run}: is worked on by {holder or 'another process'}; wait for it to end, or stop it first"


def _parsed(data: bytes) -> Holder | None:
    try:
        return Holder.model_validate_json(data)
    except ValidationError:
        return None


def _now() -> float:
    """Seconds on a clock that goes on while the machine sleeps, where it has one."""
    return time.clock_gettime(time.CLOCK_BOOTTIME) if hasattr(time, "CLOCK_BOOTTIME") else time.time()
