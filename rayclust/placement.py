"""Which nodes of a cluster do what, by the labels that the nodes carry."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated

from pydantic import Field, StringConstraints

from rayclust.options import Config

_WORD = r"[A-Za-z0-9]([A-Za-z0-9_.\-]{0,61}[A-Za-z0-9])?"
_Key = Annotated[str, StringConstraints(pattern=rf"^([a-z0-9.\-]{{1,253}}/)?{_WORD}$")]
_Value = Annotated[str, StringConstraints(pattern=rf"^{_WORD}$")]
Labels = dict[_Key, _Value]
"""Label and value, as `ray start --labels` and cluster files write them; a node must carry all of them."""


class PlacementConfig(Config):
    """Labels that the nodes of each kind of work must carry; {} is any node. Changes no result."""

    decode: Labels = Field(default_factory=dict)
    """Actors that read and decode images."""
    encode: Labels = Field(default_factory=dict)
    """Actors that encode."""
    train: Labels = Field(default_factory=dict)
    """Training workers."""
    trials: Labels = Field(default_factory=dict)
    """select-k's trials."""
    tasks: Labels = Field(default_factory=dict)
    """All other work: writers, neighbours, assignments, names, indexes, measures."""


def carries(node: Mapping[str, str], wanted: Mapping[str, str]) -> bool:
    """Whether a node's labels are all that is wanted."""
    return all(node.get(key) == value for key, value in wanted.items())


def are_apart(some: Mapping[str, str], others: Mapping[str, str]) -> bool:
    """Whether no node can carry both."""
    return any(others.get(key, value) != value for key, value in some.items())


def shown(labels: Mapping[str, str]) -> str:
    """Labels as a person reads them: pool=cpu,market=spot."""
    return ",".join(f"{key}={value}" for key, value in sorted(labels.items()))
