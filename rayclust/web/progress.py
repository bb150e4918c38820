"""How far a run is, and how its training goes, while it works."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Any

import numpy as np

from rayclust.report.charts import curve
from rayclust.runtime.api import load_run
from rayclust.runtime.status import facts
from rayclust.store import storage
from rayclust.store.run import Run

POINTS = 300
"""Points of a curve."""
NO_CURVES = {"seconds", "chosen"}
"""Metrics of a training that say nothing over its steps."""
_HEADER = struct.Struct("<QI")
_FOOTER = 4
"""Bytes of the checksum behind a record."""


def progress(run_uri: str) -> dict[str, Any]:
    """Return the state of a run, as `status.facts` does, with `curves`: name and drawing, as SVG, of each.

    Curves are the metrics of the training in `tensorboard/`, which come some seconds late; {} where none are written.
    """
    run, curves = Run(load_run(run_uri).run), dict[str, dict[int, float]]()
    files = sorted(storage.walk(run.at("tensorboard"), missing_ok=True), key=lambda file: file.key)
    fit = storage.read_json(run.tracking)["id"] if storage.exists(run.tracking) else ""
    for file in files:  # one for each time that the training was resumed; later steps replace earlier ones
        if fit not in file.key:  # of another fit
            continue
        for name, step, value in _scalars(storage.read_bytes(file.uri)):
            curves.setdefault(name, {})[step] = value
    drawn = dict[str, str]()
    for name, values in curves.items():
        steps = np.array([step for step in sorted(values) if np.isfinite(values[step])])
        if "/" in name or name in NO_CURVES or len(steps) < 2:  # one of many heads, or no curve
            continue
        at = np.linspace(steps[0], steps[-1], POINTS)
        series = {name: np.interp(at, steps, [values[step] for step in steps.tolist()]).tolist()}
        title = f"{name} {values[int(steps[-1])]:.4g} at step {steps[-1]:,}"
        drawn[title] = curve(series, title, "step", start=float(at[0]), step=float(at[1] - at[0]))
    return facts(run.uri) | {"curves": drawn}


def _scalars(data: bytes) -> Iterator[tuple[str, int, float]]:
    """Yield name, step and value of the scalars in an event file; its end may be missing.

    Records stand behind each other: length, checksum of the length, an `Event`, checksum of it.
    """
    from tensorboardX.proto.event_pb2 import Event

    at = 0
    while at + _HEADER.size <= len(data):
        length, _ = _HEADER.unpack_from(data, at)
        start = at + _HEADER.size
        at = start + length + _FOOTER
        if at > len(data):
            return
        event = Event.FromString(data[start : start + length])
        for value in event.summary.value:
            yield value.tag, event.step, value.simple_value
