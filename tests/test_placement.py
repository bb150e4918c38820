from __future__ import annotations

import pytest

from rayclust.config import PlacementConfig, are_disjoint, format_labels, has_labels, validate
from rayclust.errors import ConfigError
from tests.stages.runs import tree


def test_a_node_must_carry_every_label_that_is_wanted():
    node = {"pool": "gpu", "market": "spot", "ray.io/node-id": "1"}
    assert has_labels(node, {})
    assert has_labels(node, {"pool": "gpu", "market": "spot"})
    assert not has_labels(node, {"pool": "cpu"})
    assert not has_labels(node, {"pool": "gpu", "zone": "a"})


def test_work_is_apart_where_no_node_can_carry_both_labels():
    assert are_disjoint({"pool": "cpu"}, {"pool": "gpu", "market": "spot"})
    assert not are_disjoint({"pool": "cpu"}, {"market": "spot"})
    assert not are_disjoint({}, {"pool": "gpu"})


def test_labels_are_shown_in_one_order():
    assert (
        format_labels({"pool": "cpu", "market": "spot"})
        == format_labels({"market": "spot", "pool": "cpu"})
        == "market=spot,pool=cpu"
    )


def test_by_default_any_node_will_do():
    assert all(getattr(PlacementConfig(), name) == {} for name in PlacementConfig.model_fields)


@pytest.mark.parametrize(
    "labels", [{"pool": ""}, {"": "cpu"}, {"po ol": "cpu"}, {"pool": "in(a, b)"}, {"pool": "!cpu"}]
)
def test_what_no_node_can_carry_is_refused(labels: dict[str, str]):
    with pytest.raises(ConfigError, match=r"resources\.placement\.decode"):
        validate(tree("/run", "/images", resources={"placement": {"decode": labels}}))


def test_an_unknown_kind_of_work_is_refused_with_the_nearest():
    with pytest.raises(ConfigError, match=r"resources\.placement\.decoder.*decode"):
        validate(tree("/run", "/images", resources={"placement": {"decoder": {"pool": "cpu"}}}))
