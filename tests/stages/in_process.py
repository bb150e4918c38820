"""Stages work in this process, whatever there is to do and whether or not Ray runs here."""

from __future__ import annotations

import math

import pytest

from rayclust.methods.settings import BaseMethodConfig
from rayclust.runtime import cluster
from rayclust.stages import train


class _Always:
    """In the place of the variable that says whether work stays in the driver."""

    def get(self) -> bool:
        return True

    def set(self, is_used: bool) -> None:
        pass

    def reset(self, token: None) -> None:
        pass


def without_ray(patch: pytest.MonkeyPatch, threads: int = 1) -> None:
    """Makes every stage do its work in this process, for as long as the patch lasts; train has so many threads."""
    patch.setattr(cluster, "_in_driver", _Always())
    patch.setattr(cluster, "may_use_driver", lambda config: True)
    patch.setattr(BaseMethodConfig, "fast_rows", math.inf)
    patch.setattr(train, "cores", lambda: threads)
