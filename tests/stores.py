"""A store of checkpoints in memory."""

from __future__ import annotations

from typing import Any

from torch import Tensor


class MemoryStore:
    """Keeps every checkpoint; stops the training after the one whose number is `stop_after`."""

    def __init__(self, stop_after: int | None = None) -> None:
        self.kept: list[tuple[dict[str, Tensor], dict[str, Any]]] = []
        self.stop_after = stop_after

    def save(self, step: int, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        self.kept.append((tensors, {**state, "history": list(state["history"])}))
        if len(self.kept) == self.stop_after:
            raise KeyboardInterrupt

    def latest(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        return self.kept[-1] if self.kept else None
