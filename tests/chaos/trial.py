"""One trial: a small run that has the accidents of a seed, is run again, and must end with the undisturbed bytes."""

from __future__ import annotations

import random
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from rayclust.config import RunConfig, validate
from rayclust.errors import RayclustError
from rayclust.runtime.pipeline import run_all
from tests.chaos.faults import CHANGES, Fault, Killed, artefacts, damage, storage_with
from tests.stages.in_process import without_ray
from tests.stages.runs import tree, write_folder, write_tars

KILLS = ("before", "after", "torn")
KINDS = (*KILLS, "full")
LAST = "assign"
"""Stage that a trial ends with: all that come before are in it."""

_FAST = {"workers": 1, "checkpoint_seconds": 0.000001}
_GROUPS: dict[str, dict[str, Any]] = {
    "choice": {"method": {"name": "kmeans", "clusters": [2, 3, 5]}, "select_k": {"seeds": 1}},
    "temi": {
        "method": {"name": "temi", "clusters": 3, "preset": "none", "heads": 2, "steps": 12, "batch_size": 16},
        "neighbors": {"method": "ivf"},
        "resources": _FAST,
    },
    "numbered": {"method": {"name": "kmeans", "clusters": 3}, "images": {"max_reject_share": 0.5}},
}


@dataclass(frozen=True)
class Work:
    """A run that is put to trial."""

    name: str
    folder: Path
    expected: dict[str, bytes]
    """Artefacts of the undisturbed run."""
    changes: int
    """Operations of the undisturbed run that change the storage."""

    def config(self, run: Path | str) -> RunConfig:
        """The same work somewhere else."""
        source = self.folder / ("tars" if self.name == "numbered" else "images")
        return validate(tree(str(run), str(source), **_GROUPS[self.name]))


@contextmanager
def prepared(folder: Path) -> Iterator[list[Work]]:
    """All kinds of work, each done once without accidents; within, stages work in this process."""
    write_folder(folder / "images", 18, size=10)
    write_tars(folder / "tars", shards=3, per_shard=9)
    for shard in sorted((folder / "tars").iterdir())[:2]:  # what is rejected makes the rows of later parts move
        _break_one(shard)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAYCLUST_SCRATCH", str(folder / "scratch"))
        without_ray(patch)
        yield [_done(Work(name, folder, {}, 0)) for name in _GROUPS]


def _break_one(shard: Path) -> None:
    data = bytearray(shard.read_bytes())
    start = data.index(b"\x89PNG")
    data[start : start + 64] = bytes(64)
    shard.write_bytes(data)


def _done(work: Work) -> Work:
    run = work.folder / f"undisturbed-{work.name}"
    with storage_with(None) as recorder:
        run_all(work.config(run), stop_after=LAST)
    return Work(work.name, work.folder, artefacts(str(run)), recorder.count)


def try_seed(works: list[Work], seed: int, run: Path) -> tuple[str, list[str]]:
    """Accidents, one after the other, then a run to the end.

    Returns:
        What happened, and the artefacts that are missing, too many or other than they should be.
    """
    draw = random.Random(seed)
    work = draw.choice(works)
    happened = [work.name]
    for _ in range(draw.choice((1, 1, 2, 3))):
        fault = Fault(draw.choice(KINDS), draw.randrange(work.changes))
        happened.append(f"{fault.kind} {fault.at} of {work.changes}: {suffer(work, run, fault)}")
        if draw.random() < 0.4:
            happened.append(damage(run, draw))
    return "; ".join(happened), finish(work, run)


def suffer(work: Work, run: Path, fault: Fault) -> str:
    """Runs until the accident; says how it ended."""
    with storage_with(fault):
        try:
            run_all(work.config(run), stop_after=LAST)
        except Killed:
            return "killed"
        except RayclustError as error:
            return f"ended with {str(error)[-60:]}" if "\n" not in str(error) else f"more than a line: {error}"
        finally:
            (run / "lease.json").unlink(missing_ok=True)  # the next process sees that its holder is no more
    return "done"


def finish(work: Work, run: Path) -> list[str]:
    """Runs to the end and compares; what differs."""
    run_all(work.config(run), stop_after=LAST)
    found = artefacts(str(run))
    differing = [name for name in {*found, *work.expected} if found.get(name) != work.expected.get(name)]
    if not differing:
        shutil.rmtree(run)
    return sorted(differing)


__all__ = ["CHANGES", "KINDS", "Work", "finish", "prepared", "suffer", "try_seed"]
