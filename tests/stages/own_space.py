"""k-means with a space of its own, for tests of stages that a method with one goes through.

The classes stand for k-means in the registry. Were k-means itself changed, `isinstance` would go on taking it for what
it was found to be once.
"""

from __future__ import annotations

import pytest
import torch

from rayclust.methods import METHODS
from rayclust.methods.kmeans import KMeans
from rayclust.methods.settings import KMeansConfig


class OneDirection(KMeans):
    """Its space is one direction: rows of colour 0 lie on one side, all others on the other."""

    width = 1

    def transform(self, x: torch.Tensor) -> torch.Tensor:
        return torch.sign(x[:, :1])


class Flipped(KMeans):
    """Its space is the features turned round."""

    width = 192

    def transform(self, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.normalize(x.flip(1), dim=1)


class AllAlike(OneDirection):
    """To it all rows belong together."""

    def membership(self, x: torch.Tensor) -> torch.Tensor:
        return torch.full((len(x), len(x)), 1 / len(x))


class EachAlone(OneDirection):
    """To it each row is by itself but for a little."""

    def membership(self, x: torch.Tensor) -> torch.Tensor:
        return torch.eye(len(x)) + 1e-3


def use(method: type[KMeans], monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a class stand for k-means, as a method with a space of its own."""
    monkeypatch.setitem(METHODS, "kmeans", f"{__name__}:{method.__name__}")
    monkeypatch.setattr(KMeansConfig, "has_own_space", True)
