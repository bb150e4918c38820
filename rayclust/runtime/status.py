"""status: what of a run is sealed, what is missing, how fast it went, and how the clusters are."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from rayclust.config import RunConfig
from rayclust.runtime.api import load_run
from rayclust.runtime.pipeline import SELECT_K, Manifests, stages_of
from rayclust.runtime.progress import duration
from rayclust.store import filesystem
from rayclust.store.layout import Run
from rayclust.store.lease import holder_of
from rayclust.store.manifest import Manifest, Section, read_manifest

MOST = 0.5
"""Share of the time above which a group of workers counts as busy."""


def lines(uri: str) -> Iterator[str]:
    """The state of a run, a line a stage.

    Raises:
        ArtefactError: there is no run.
    """
    config = load_run(uri)
    run, seals = Run(config.run), Manifests(config)
    yield f"{run.uri}: {config.method.name}, {_clusters(config, seals)}, {config.encoder.name}"
    for stage in stages_of(config):
        manifest = read_manifest(run, stage)
        text = _sealed(manifest) if manifest else _unfinished(run, stage)
        outdated = manifest is not None and seals.of(stage) is None
        yield f"  {stage:<10} {text}{', for another config or other inputs: runs again' if outdated else ''}"
    yield from _health(run)
    yield from _driver(run)


def _clusters(config: RunConfig, seals: Manifests) -> str:
    if not config.is_open:
        return f"{config.method.clusters} clusters"
    if seals.of(SELECT_K) is None:
        return "clusters yet to be counted"
    return f"{seals.settled('train').method.clusters} clusters by select-k"


def _sealed(manifest: Manifest) -> str:
    rows = manifest.counts.get("rows")
    text = f"done in {duration(manifest.seconds)}"
    if rows is not None and manifest.seconds:
        text += f", {rows:,} rows, {_rate(manifest, rows)}"
    narrow = bottleneck(manifest.measured)
    if narrow:
        text += f", held up by {narrow}"
    if manifest.extra.get("reason"):
        text += f", {manifest.counts['candidates']} candidates: {manifest.extra['reason']}"
    if manifest.counts.get("rejects"):
        reasons = sorted(manifest.extra["reasons"].items(), key=lambda item: -item[1])
        text += (
            f", {manifest.counts['rejects']:,} rejects (" + ", ".join(f"{n} {reason}" for reason, n in reasons) + ")"
        )
    return text


def _rate(manifest: Manifest, rows: int) -> str:
    """Of the call that sealed the stage: what earlier calls had finished does not make it faster."""
    done = max((part.done for part in manifest.measured), default=0) or rows
    rate = f"{done / manifest.seconds:,.0f} a second"
    return rate if done >= rows else f"{rate} ({done:,.0f} in the call that sealed it)"


def bottleneck(sections: Sequence[Section]) -> str:
    """The busiest of a stage's groups of workers, and what they did for most of it; "" where nothing was measured.

    Groups that work at the same time wait for the busiest of them, and more of its workers would shorten the stage.
    Where even the busiest was idle for most of the time, it waited for places or its own start.

    Args:
        sections: of the stage's manifest.

    Returns:
        Such as "decoding (decoders: 4 workers, busy 93 % of 12 s)"; "starting and waiting, then" stands before it
        below 50 %.
    """
    measured = [part for part in sections if part.busy and part.workers and part.seconds]
    if not measured:
        return ""
    narrow = max(measured, key=lambda part: _busy(part) * part.seconds)
    kind = max(narrow.busy, key=lambda name: narrow.busy[name])
    crew = f"{narrow.workers} worker{'s' if narrow.workers > 1 else ''}"
    idle = "starting and waiting, then " if _busy(narrow) < MOST else ""
    return f"{idle}{kind} ({narrow.name}: {crew}, busy {100 * _busy(narrow):.0f} % of {duration(narrow.seconds)})"


def _busy(section: Section) -> float:
    """Share of the group's time that its workers were busy; rounding may bring it above 1."""
    return min(1.0, sum(section.busy.values()) / (section.workers * section.seconds))


def _unfinished(run: Run, stage: str) -> str:
    folder = run.at("manifests", stage)
    done = sum(found.key.startswith("part-") for found in filesystem.walk(folder, suffixes=(".json",), missing_ok=True))
    return f"not finished, {done} parts done" if done else "not started"


def _health(run: Run) -> Iterator[str]:
    """Occupied clusters, the largest share and the entropy of the shares."""
    assigned = read_manifest(run, "assign")
    if assigned is None:
        return
    sizes = np.array(assigned.extra["sizes"], float)
    shares = sizes[sizes > 0] / sizes.sum()
    entropy = float(-(shares * np.log(shares)).sum())
    yield (
        f"  clusters   {len(shares)} of {len(sizes)} occupied, largest share {shares.max():.1%}, "
        f"entropy {entropy:.2f} of {np.log(len(sizes)):.2f} nats"
    )


def _driver(run: Run) -> Iterator[str]:
    """Who works on the run, or left it without a word."""
    holder = holder_of(run)
    if holder is not None:
        yield f"  {'driver':<10} {holder}{', which has ended' if holder.has_ended() else ''}"
