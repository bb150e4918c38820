"""Where a worker posts its newest row of metrics for the driver to show."""

from __future__ import annotations

from typing import Any


class Board:
    """Where worker 0 posts its newest row of metrics; a Ray actor."""

    def __init__(self) -> None:
        self._row: dict[str, Any] | None = None

    def post(self, row: dict[str, Any]) -> None:
        """Takes a row."""
        self._row = row

    def read(self) -> dict[str, Any] | None:
        """The newest row."""
        return self._row
