"""TEMI's published settings, and the way to the ones chosen for a data set."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rayclust.methods.base import Plan
from rayclust.methods.temi_auto import auto_settings

if TYPE_CHECKING:
    from rayclust.methods.temi_config import TemiConfig

OVERCLUSTERED_ROWS = 200
"""Rows per cluster below which a partition counts as much finer than the classes (ImageNet at 25,000 has 51)."""
IMAGENET_ROWS = 1_500
"""Rows per cluster up to which a set counts as ImageNet or one of its subsets (1,281 a class; CIFAR-10 has 5,000)."""
IMAGENET_MIN_ROWS = 50_000
"""Rows above which a set can be ImageNet or a subset of it (IN50 has 64,000; CIFAR-100 50,000 at 500 a class)."""
TINY_ROWS = 6_000
"""Rows up to which the paper's STL-10 settings hold (5,000 images, 800 epochs)."""

SHORT_STEPS = 3_000
"""Steps below which heads start from k-means: random ones do not settle in them. On the sets that were published on,
all trainings are longer."""


def preset_values(config: TemiConfig, count: int, dimension: int) -> dict[str, Any]:
    """The settings that the config's preset stands for.

    Args:
        config: whose `preset` and `clusters` are read.
        count: N.
        dimension: D.

    Returns:
        Config keys and values; empty for `none`.
    """
    if config.preset == "auto":
        return auto_settings(count, dimension, config.clusters, config)
    if config.preset == "readme":
        return _started(config, count, _readme(count, config.clusters))
    if config.preset == "paper":
        return _started(config, count, _paper(count, config.clusters))
    return {}


def _started(config: TemiConfig, count: int, values: dict[str, Any]) -> dict[str, Any]:
    """With the start that the number of steps asks for; `warm_start: none` is the published one for every number."""
    written = {key: getattr(config, key) for key in config.model_fields_set}
    steps = Plan.of(type(config).model_validate({**values, **written, "preset": "none"}), count).steps
    return values if steps >= SHORT_STEPS else {**values, "warm_start": "kmeans"}


def _is_imagenet_like(count: int, clusters: int) -> bool:
    return count > IMAGENET_MIN_ROWS and count / clusters <= IMAGENET_ROWS


def _is_overclustered(count: int, clusters: int) -> bool:
    return clusters >= 1_000 and count / clusters < OVERCLUSTERED_ROWS


def _published(count: int, clusters: int) -> dict[str, Any]:
    """What both columns share."""
    return {
        "learning_rate": 1e-4,
        "min_learning_rate": 1e-4,
        "weight_decay": 1e-4,
        "final_weight_decay": 1e-4,
        "teacher_momentum": 0.996,
        "final_teacher_momentum": 0.996,
        "neighbors": 25 if _is_imagenet_like(count, clusters) else 50,
        "warmup_epochs": 20,
    }


def _readme(count: int, clusters: int) -> dict[str, Any]:
    """The example commands of the published program: 16 heads, 100 epochs, batch 1024 (128 when over-clustering)."""
    fine = _is_overclustered(count, clusters)
    return {
        **_published(count, clusters),
        "heads": 16,
        "epochs": 100,
        "batch_size": 128 if fine else 1024,
        "beta": 1.0 if fine else 0.6,
    }


def _paper(count: int, clusters: int) -> dict[str, Any]:
    """The paper's Table 10: 50 heads, 200 epochs (800 on STL-10), batch 512 (1024 on ImageNet).

    β is 0.55 for CIFAR-20 and 0.6 elsewhere; a set is taken for CIFAR-20 by its 20 clusters of at least 2,000 rows.
    """
    imagenet = _is_imagenet_like(count, clusters)
    coarse = clusters == 20 and count / clusters >= 2_000
    beta = 1.0 if _is_overclustered(count, clusters) else 0.55 if coarse else 0.6
    return {
        **_published(count, clusters),
        "heads": 50,
        "epochs": 800 if count <= TINY_ROWS else 200,
        "batch_size": 1024 if imagenet else 512,
        "warmup_epochs": 10 if imagenet else 20,
        "beta": beta,
    }
