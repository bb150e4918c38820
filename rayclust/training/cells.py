"""Removed: rows are no longer divided by cells; these names stay importable until their callers go."""

from typing import Any

Tally: Any = None
at_hand: Any = None
holders: Any = None
places_of: Any = None
summed: Any = None
tally: Any = None
