"""Kinds of nodes that can be rented, as whoever pays for them says: nothing here is known to rayclust by itself."""

from __future__ import annotations

from pydantic import Field

from rayclust.options import Config


class NodePrice(Config):
    """One kind of node, for what `check` reckons; a run does not depend on it."""

    dollars_per_hour: float = Field(ge=0)
    """What one such node costs, as its provider states it today."""
    cpus: int = Field(ge=1)
    """CPUs of one node."""
    gpus: int = Field(0, ge=0)
    """GPUs of one node."""
    images_per_second: float | None = Field(None, gt=0)
    """Images that one of its GPUs (without GPUs: one of its CPUs) encodes in a second, as an earlier run shows.
    None: as many as on the machine that checks, where that has the like."""
