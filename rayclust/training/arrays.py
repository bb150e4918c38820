"""A method fitted to rows in memory, in one call."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from rayclust.methods import build
from rayclust.methods.base import BaseMethodConfig, Method
from rayclust.training.loop import Trainer
from rayclust.training.pairs import ArrayRows


def fit_arrays(
    x: Tensor | np.ndarray,
    neighbors: Tensor | np.ndarray | None,
    config: BaseMethodConfig,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> Method:
    """Builds a method and fits it.

    Args:
        x: Float[N D], in feature space.
        neighbors: Int[N M], nearest first, −1 where a row has fewer; None for a method that draws no pairs.
        config: the method's settings.
        seed: of everything random.
        device: where to compute.

    Returns:
        The fitted method, on `device`.

    Raises:
        ShapeError: an argument is not a matrix, or the two do not have one length.
        DataError: the method needs neighbours and there are none.
        ConfigError: there are fewer rows than clusters.
    """
    rows = ArrayRows(x, neighbors)
    method = build(config, rows.dimension, rows.count, seed)
    method.fit(rows, Trainer(seed, device))
    return method.eval()
