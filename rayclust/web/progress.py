"""How far a run is, and how its training goes, while it works."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Any

import numpy as np

from rayclust.runtime.api import load_run
from rayclust.runtime.status import facts
from rayclust.store import storage
from rayclust.store.run import Run

POINTS = 300
"""Most points of a curve."""
NO_CURVES = {"seconds", "chosen"}
"""Metrics of a training that say nothing over its steps."""
_HEADER = struct.Struct("<QI")
_FOOTER = 4
"""Bytes of the checksum behind a record."""


def progress(run_uri: str) -> dict[str, Any]:
    """Return the state of a run, as `status.facts` does, with `curves`: name → [[step, value], …].

    Curves are the metrics of the training in `tensorboard/`, which come some seconds late; {} where none are written.
    """
    run, curves = Run(load_run(run_uri).run), dict[str, dict[int, float]]()
    files = sorted(storage.walk(run.at("tensorboard"), missing_ok=True), key=lambda file: file.key)
    for file in files:  # one for each time that the training was resumed; later steps replace earlier ones
        for name, step, value in _scalars(storage.read_bytes(file.uri)):
            curves.setdefault(name, {})[step] = value
    found: dict[str, list[list[float]]] = {}
    for name, values in curves.items():
        if "/" in name or name in NO_CURVES or len(values) < 2:  # one of many heads, or no curve
            continue
        steps = np.array(sorted(values))
        shown = steps[np.unique(np.linspace(0, len(steps) - 1, POINTS).round().astype(int))]
        found[name] = [[int(step), values[int(step)]] for step in shown if np.isfinite(values[int(step)])]
    return facts(run.uri) | {"curves": found}


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
