from __future__ import annotations

import pytest

from rayclust.config import validate
from rayclust.errors import ConfigError
from rayclust.placement import PlacementConfig, are_apart, carries, shown
from tests.stages.runs import tree


def test_a_node_must_carry_every_label_that_is_wanted():
    node = {"pool": "gpu", "market": "spot", "ray.io/node-id": "1"}
    assert carries(node, {})
    assert carries(node, {"pool": "gpu", "market": "spot"})
    assert not carries(node, {"pool": "cpu"})
    assert not carries(node, {"pool": "gpu", "zone": "a"})


def test_work_is_apart_where_no_node_can_carry_both_labels():
    assert are_apart({"pool": "cpu"}, {"pool": "gpu", "market": "spot"})
    assert not are_apart({"pool": "cpu"}, {"market": "spot"})
    assert not are_apart({}, {"pool": "gpu"})


def test_labels_are_shown_in_one_order():
    assert (
        shown({"pool": "cpu", "market": "spot"}) == shown({"market": "spot", "pool": "cpu"}) == "market=spot,pool=cpu"
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
