"""Settings of TEMI from the size of the data, without labels."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rayclust.methods.temi import TemiConfig


def auto_settings(count: int, dimension: int, clusters: int, config: TemiConfig) -> dict[str, Any]:
    """Config values for N rows of width D in K clusters; keys that the config sets itself win over them.

    Args:
        count: N.
        dimension: D.
        clusters: K.
        config: what was written.
    """
    return {}
