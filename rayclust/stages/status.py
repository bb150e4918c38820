"""status: what of a run is sealed, what is missing, how fast it went."""

from __future__ import annotations

from dataclasses import dataclass

from rayclust.stages.pipeline import STAGES
from rayclust.store import filesystem
from rayclust.store.layout import Run
from rayclust.store.manifest import Manifest, read_manifest


@dataclass(frozen=True)
class StageStatus:
    """One stage of a run."""

    stage: str
    manifest: Manifest | None
    """None where the stage is not sealed."""
    finished_parts: int
    """Units of work that are done, in a stage that works unit by unit."""

    @property
    def rate(self) -> float | None:
        """Rows per second of the run that sealed it; None when not sealed."""
        if self.manifest is None or not self.manifest.seconds:
            return None
        return self.manifest.counts.get("rows", 0) / self.manifest.seconds


def status(run: Run) -> list[StageStatus]:
    """Every stage in order."""
    return [StageStatus(name, read_manifest(run, name), _finished_parts(run, name)) for name in STAGES]


def _finished_parts(run: Run, stage: str) -> int:
    folder = run.at("manifests", stage)
    markers = filesystem.walk(folder, suffixes=(".json",), missing_ok=True)
    return sum(found.key.startswith("part-") for found in markers)
