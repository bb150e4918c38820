"""Settings of TEMI from the size of the data, without labels.

The published settings count epochs of sets of 50,000 rows and more. On 3,000 rows they give 1,000 steps, in which
random heads do not settle. Here steps are counted, and heads start from k-means, so that a few hundred steps do.
docs/methods.md has the numbers behind each choice.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rayclust.methods.temi_config import TemiConfig

STEPS_PER_CLUSTER = 30
"""Steps of a training that starts warm, for each cluster; twice as many change little."""
FEWEST_STEPS = 200
PUBLISHED_EPOCHS = 200
PUBLISHED_RATE = 2e-4
"""The published learning rate at batch 512."""
PUBLISHED_STEPS = 3_000
"""Steps from which the published rate and momentum are kept; shorter trainings move faster."""
FASTEST = 10.0
"""Times the published rate, and at the same time parts of the published horizon of the teacher, at most."""
START_OPERATIONS = 2e12
"""Multiplications that a warm start may take: some ten seconds of a laptop."""
START_LIMIT = 2e13
"""Multiplications of one k-means partition above which heads start from chance."""
MOST_RESTARTS, FEWEST_RESTARTS = 64, 4
FINE_ROWS, FINE_CLUSTERS = 200, 1_000
"""Rows per cluster below which, and clusters from which, a partition counts as finer than classes."""


def auto_settings(count: int, dimension: int, clusters: int, config: TemiConfig) -> dict[str, Any]:
    """Config values for N rows of width D in K clusters; keys that the config sets itself win over them.

    Args:
        count: N.
        dimension: D.
        clusters: K.
        config: what was written; its batch size and steps are heeded by what depends on them.
    """
    restarts = _restarts(count, dimension, clusters)
    batch = min(config.batch_size if "batch_size" in config.model_fields_set else _batch(count), max(2, count))
    steps = config.steps or _steps(count, clusters, batch, warm=restarts > 0)
    speed = min(FASTEST, max(1.0, PUBLISHED_STEPS / steps))
    rate = PUBLISHED_RATE * speed * 256 / batch
    momentum = 1.0 - 0.004 * min(speed, 5.0)
    columns = neighbors_for(count, clusters)
    return {
        "heads": 16,
        "steps": steps,
        "batch_size": max(2, batch),
        "learning_rate": rate,
        "min_learning_rate": rate,
        "warmup_steps": max(1, min(steps // 15, 20_000)),
        "teacher_momentum": momentum,
        "final_teacher_momentum": momentum,
        "beta": _beta(count, clusters, warm=restarts > 0),
        "neighbors": columns,
        "freeze_last_layer": 0 if restarts else 1,
        "warm_start": "kmeans" if restarts else "none",
        "start_restarts": max(1, restarts),
        "start_neighbors": min(10, columns),
        "start_rounds": 2,
        "selection": "modularity",
    }


def neighbors_for(count: int, clusters: int) -> int:
    """√(N / K), between 3 and 50: enough to walk through a cluster, too few to leave it."""
    return max(1, min(round(min(50.0, max(3.0, math.sqrt(count / clusters)))), count - 1))


def _beta(count: int, clusters: int, warm: bool) -> float:
    """As published from random heads, 1 for partitions finer than classes; warm heads need less push to evenness."""
    if clusters >= FINE_CLUSTERS and count / clusters < FINE_ROWS:
        return 1.0
    return 0.8 if warm else 0.6


def _batch(count: int) -> int:
    """A quarter of the rows, as a power of 2 between 64 and 512; 1024 from 200,000 rows, as published for ImageNet."""
    if count >= 200_000:
        return 1024
    return max(64, min(512, 1 << max(0, (count // 4).bit_length() - 1)))


def _steps(count: int, clusters: int, batch: int, warm: bool) -> int:
    """As published from random heads; fewer from warm ones, in proportion to the clusters."""
    published = max(FEWEST_STEPS, PUBLISHED_EPOCHS * max(1, count // batch))
    if not warm:
        return max(published, PUBLISHED_STEPS)
    return max(FEWEST_STEPS, min(published, STEPS_PER_CLUSTER * clusters))


def _restarts(count: int, dimension: int, clusters: int) -> int:
    """k-means partitions to choose from; 0 where one of them takes too long."""
    rows = min(count, max(65_536, 64 * clusters))
    operations = 25.0 * rows * clusters * dimension
    if operations > START_LIMIT:
        return 0
    return max(FEWEST_RESTARTS, min(MOST_RESTARTS, int(START_OPERATIONS / operations)))
