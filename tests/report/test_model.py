from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from rayclust.errors import ConfigError, ShapeError
from rayclust.report.model import Cluster, Contingency
from tests.report.pages import cluster, report


def test_a_cluster_without_a_name_or_a_guess_is_called_by_its_number() -> None:
    assert Cluster(id=7, size=1).title == "#7"
    assert Cluster(id=7, size=1, name="boat").title == "boat"


def test_the_first_method_made_the_clusters_and_rejects_are_summed() -> None:
    data = report()
    assert data.methods[0].name == "temi"
    assert data.rejected == 12
    assert report(rejects=()).rejected == 0


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"methods": ()}, r"report\.methods is empty"),
        ({"clusters": (cluster(1, 2), cluster(1, 3))}, "id 1 is given twice"),
        ({"clusters": (cluster(1, -2),)}, "cluster 1 has size -2: must be at least 0"),
    ],
)
def test_impossible_reports_are_refused(changes: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        report(**changes)


def test_a_contingency_table_matches_its_names() -> None:
    counts = np.zeros((2, 3), dtype=np.int64)
    Contingency(counts=counts, classes=("a", "b"), clusters=(0, 1, 2))
    with pytest.raises(ShapeError, match="2 rows for 1 classes"):
        Contingency(counts=counts, classes=("a",), clusters=(0, 1, 2))
    with pytest.raises(ShapeError, match="width 3: 2 is needed"):
        Contingency(counts=counts, classes=("a", "b"), clusters=(0, 1))


def test_reports_are_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        report().images = 3  # type: ignore[misc]
