"""Report the state of a run, a line a stage: done, under way or missing, rates, rejects, health of the clusters."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from rayclust.errors import ArtefactError
from rayclust.report.formats import duration
from rayclust.runtime.api import load_run
from rayclust.runtime.pipeline import SELECT_K, Manifests, stages_of
from rayclust.store import storage
from rayclust.store.lock import lock_owner
from rayclust.store.manifest import AssignOutputs, Manifest, Section, read_manifest
from rayclust.store.run import Run

BUSY_SHARE = 0.5
"""Share of the time above which a group of workers counts as busy."""
RATED_SECONDS, SLOW_SECONDS = 1.0, 5.0
"""Time that a stage must have taken before its rate, and what held it up, say anything."""


def facts(uri: str) -> dict[str, Any]:
    """Return the state of the run at a URI as plain data; raise `ArtefactError` if there is none.

    Returns:
        run, method, clusters (None while select-k has not chosen), encoder; `stages`, in order, each with its state
        (done, outdated, unfinished or missing) and a `summary` in words, of a complete one seconds, counts, rejects by
        reason and what held it up, of another one parts and `progress` (`progress.json`, and `checkpoint`, the last
        step of a training);
        `occupied`, `largest_share` and `entropy` in nats once rows are assigned; `driver`, who works on the run, and
        whether that has ended; `next`, the command that goes on, None where nothing is left or somebody works on it.
    """
    config = load_run(uri)
    run, manifests = Run(config.run), Manifests(config)
    try:
        begun = storage.read_json(run.progress)
    except (storage.MissingError, ArtefactError):
        begun = {}
    has_choice = not config.needs_selection or manifests.of(SELECT_K) is not None
    found: dict[str, Any] = {
        "run": run.uri,
        "method": config.method.name,
        "clusters": manifests.resolved("train").method.clusters if has_choice else None,
        "by_select_k": config.needs_selection,
        "encoder": " + ".join(encoder.name for encoder in config.each_encoder),
        "stages": [],
    }
    for stage in stages_of(config):
        manifest = read_manifest(run, stage)
        if manifest is None:
            marks = storage.walk(run.at("manifests", stage), suffixes=(".json",), missing_ok=True)
            done = sum(mark.key.startswith("part-") for mark in marks)
            progress = dict(begun) if begun.get("stage") == stage else None
            if progress and stage == "train":
                saved = storage.walk(run.at("checkpoints"), suffixes=("state.json",), missing_ok=True)
                steps = [int(file.key.split("/")[-2].rpartition("-")[2]) for file in saved]
                progress |= {"checkpoint": max(steps)} if steps else {}
            state = "unfinished" if done or progress else "missing"
            found["stages"].append({"stage": stage, "state": state, "parts_done": done, "progress": progress})
            continue
        found["stages"].append(
            {
                "stage": stage,
                "state": "outdated" if manifests.of(stage) is None else "done",
                "seconds": manifest.seconds,
                "counts": manifest.counts,
                "reasons": manifest.extra.get("reasons", {}),
                "held_up_by": bottleneck(manifest.measured) or None,
                "summary": describe_manifest(manifest),
            }
        )
    # Occupied clusters, the largest share, and the entropy of the shares.
    assigned = read_manifest(run, "assign")
    if assigned is not None:
        sizes = np.array(assigned.outputs_of(AssignOutputs).sizes, float)
        shares = sizes[sizes > 0] / sizes.sum()
        found |= {"occupied": len(shares), "sized": len(sizes), "largest_share": float(shares.max())}
        found["entropy"] = float(-(shares * np.log(shares)).sum())
    holder = lock_owner(run)
    found |= {"driver": holder and str(holder), "driver_ended": holder is not None and holder.has_ended()}
    is_at_work = holder is not None and not found["driver_ended"]
    first_open = next((each["stage"] for each in found["stages"] if each["state"] != "done"), None)
    for each in found["stages"]:
        if each["state"] in ("unfinished", "missing"):
            each["summary"] = _describe_unfinished(each, is_at_work and each["stage"] == first_open)
    # A run that was started in one line has no RUN.yaml but the config that it keeps.
    config_file = uri if uri.lower().endswith((".yaml", ".yml")) else run.config
    found["next"] = None if first_open is None or is_at_work else f"rayclust run {config_file}"
    return found


def lines(uri: str) -> Iterator[str]:
    """Yield the state of the run at a URI, a line a stage; raise `ArtefactError` if there is none."""
    found = facts(uri)
    clusters = f"{found['clusters']} clusters" + " by select-k" * found["by_select_k"]
    if found["clusters"] is None:
        clusters = "clusters yet to be counted"
    name = found["encoder"]
    encoder = "encoder unknown: no names, no search by text or image" if name == "unknown" else name
    yield f"{found['run']}: {found['method']}, {clusters}, {encoder}"
    for stage in found["stages"]:
        outdated = ", for another config or other inputs: runs again" if stage["state"] == "outdated" else ""
        yield f"  {stage['stage']:<10} {stage['summary']}{outdated}"
    if "occupied" in found:
        empty = found["sized"] - found["occupied"]
        yield (
            f"  clusters   {found['occupied']} of {found['sized']} have images, the largest holds "
            f"{found['largest_share']:.1%} of all" + (f"; {empty} are empty" if empty else "")
        )
    if found["next"]:
        yield f"  {'next':<10} {found['next']}"
    if found["driver"]:
        yield f"  {'driver':<10} {found['driver']}{', which has ended' if found['driver_ended'] else ''}"


def _describe_unfinished(stage: dict[str, Any], is_under_way: bool) -> str:
    """Return how far a stage is, or was when it was interrupted."""
    parts, progress = stage["parts_done"], stage["progress"]
    kept = [f"{parts} {'part is' if parts == 1 else 'parts are'} finished"] if parts else []
    if not progress:
        state = "under way" if is_under_way else "not finished" if parts else "not started"
        return ": ".join([state, *kept])
    done, total, rate = progress["done"], progress["total"], progress["per_second"]
    text = f"{done:,} of {total:,} {progress['unit']} ({done / total:.0%})" if total else f"{done:,} {progress['unit']}"
    text += f", {progress['note']}" if progress["note"] else ""
    if is_under_way:
        left = f", about {duration((total - done) / rate)} left" if total and rate else ""
        return f"under way: {text}, {rate:,.3g} a second{left}"
    if "checkpoint" in progress:
        kept.append(f"the last checkpoint is that of step {progress['checkpoint']:,}")
    return "; ".join([f"stopped at {text}", *kept])


def describe_manifest(manifest: Manifest) -> str:
    """Return time, rate, bottleneck, choice and rejects of a complete stage, in one line."""
    rows, counts = manifest.counts.get("rows"), manifest.counts
    text = f"done in {duration(manifest.seconds)}"
    if rows is not None:
        text += f", {rows:,} rows"
    if rows is not None and manifest.seconds >= RATED_SECONDS:
        # The rate is that of the call that completed the stage: what earlier calls had finished makes it no faster.
        done = max((part.done for part in manifest.measured), default=0) or rows
        text += f", {done / manifest.seconds:,.0f} a second"
        text += "" if done >= rows else f" ({done:,.0f} in the call that finished it)"
    if manifest.seconds >= SLOW_SECONDS and (slowest := bottleneck(manifest.measured)):
        text += f", held up by {slowest}"
    if manifest.extra.get("reason"):
        text += f", {counts['candidates']} candidates: {manifest.extra['reason']}"
    if counts.get("rejects"):
        reasons = sorted(manifest.extra["reasons"].items(), key=lambda item: -item[1])
        text += f", {counts['rejects']:,} rejects ({', '.join(f'{n} {reason}' for reason, n in reasons)})"
    return text


def bottleneck(sections: Sequence[Section]) -> str:
    """Return the busiest of a stage's groups of workers and what it did for most of the time.

    Groups that work at the same time wait for the busiest of them, and more of its workers would shorten the stage.
    Where even the busiest was idle for most of the time, it waited for resources or its own start.

    Returns:
        Such as "decoding (decoders: 4 workers, busy 93 % of 12 s)"; "starting and waiting, then" stands before it
        below 50 %; "" if nothing was measured.
    """
    measured = [part for part in sections if part.busy and part.workers and part.seconds]
    if not measured:
        return ""
    # Rounding may bring a share above 1.
    busy = {part.name: min(1.0, sum(part.busy.values()) / (part.workers * part.seconds)) for part in measured}
    slowest = max(measured, key=lambda part: busy[part.name] * part.seconds)
    kind = max(slowest.busy, key=lambda name: slowest.busy[name])
    workers = f"{slowest.workers} worker{'s' if slowest.workers > 1 else ''}"
    idle = "starting and waiting, then " if busy[slowest.name] < BUSY_SHARE else ""
    share, taken = busy[slowest.name], duration(slowest.seconds)
    return f"{idle}{kind} ({slowest.name}: {workers}, busy {100 * share:.0f} % of {taken})"
