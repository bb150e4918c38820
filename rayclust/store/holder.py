"""Who works on a run: a process, told apart from all others on all machines, and known to have ended where it has."""

from __future__ import annotations

import os
import platform
import socket
import uuid
from datetime import UTC, datetime
from pathlib import Path

from pydantic import Field

from rayclust.settings import Config

SUBMISSION_VARIABLE = "RAYCLUST_SUBMISSION"
"""Environment variable with the id of the job that a driver runs as."""


class Holder(Config):
    """A process that works on a run."""

    token: str
    """Of this one taking of the run."""
    host: str
    """Name of the machine, for people."""
    machine: str
    """Tells boots of machines and containers apart: a process id means something within one."""
    pid: int
    """Of the process."""
    born: str
    """When it began, in the machine's own count: its number may come again."""
    submission: str | None = None
    """Id of the job, where it is one."""
    since: str
    """Time of taking by the holder's clock, for people; nothing compares it."""
    beat: int = Field(0, ge=0)
    """Renewals so far."""

    def __str__(self) -> str:
        """As a person is told of it."""
        job = f", job {self.submission}" if self.submission else ""
        return f"process {self.pid} on {self.host}{job}, since {self.since}"

    @property
    def is_near(self) -> bool:
        """Whether it is or was a process of this machine, of which `has_ended` knows."""
        return self.machine == machine()

    def has_ended(self) -> bool:
        """Whether it was a process of this machine and is no more."""
        return self.is_near and birth(self.pid) != self.born


def myself() -> Holder:
    """This process, about to take a run."""
    return Holder(
        token=uuid.uuid4().hex,
        host=socket.gethostname(),
        machine=machine(),
        pid=os.getpid(),
        born=birth(os.getpid()) or "",
        submission=os.environ.get(SUBMISSION_VARIABLE),
        since=datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S UTC"),
    )


def machine() -> str:
    """This boot of this machine and its space of process ids; elsewhere than on Linux the host."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}/{Path('/proc/self/ns/pid').stat().st_ino}"
    except OSError:
        return f"{platform.node()}/{uuid.getnode():x}"


def birth(pid: int) -> str | None:
    """When a process began; None where there is none, "" where the machine does not tell."""
    if not Path("/proc/self/stat").exists():
        return "" if _exists(pid) else None
    try:
        state, *rest = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if state == "Z" else rest[18]  # of a killed one that nobody has waited for, only the number is left


def _exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except PermissionError:
        return True
    except (ProcessLookupError, OverflowError):
        return False
    return True
