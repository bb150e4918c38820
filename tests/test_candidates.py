"""What an open number of clusters is read as; the refusals are with the config's."""

from __future__ import annotations

from typing import Any, get_args

import pytest

from rayclust.config import Rule, SelectKConfig, denormalize_clusters, normalize_clusters
from rayclust.metrics.selection import CRITERIA, RULES


def test_every_rule_that_choices_are_made_by_can_be_asked_for():
    assert set(get_args(Rule)) == {*RULES, *CRITERIA}


def test_auto_tries_up_to_twice_the_root_of_the_rows():
    config = SelectKConfig(candidates="auto")
    assert [config.largest(rows) for rows in (2, 3, 100, 1797, 10_000)] == [2, 3, 20, 85, 200]
    assert SelectKConfig(candidates="auto", most=50).largest(10_000) == 50
    assert SelectKConfig(candidates="auto", most=50).largest(30) == 30
    assert SelectKConfig(candidates="auto", least=20).largest(25) == 20
    assert SelectKConfig(candidates=(5, 80)).largest(1_000_000) == 80


def test_a_list_is_tried_as_it_is_and_auto_begins_with_a_grid():
    assert SelectKConfig(candidates=(3, 9)).first(100) == (3, 9)
    grid = SelectKConfig(candidates="auto", least=4, most=40).first(1000)
    assert (grid[0], grid[-1]) == (4, 40)
    assert list(grid) == sorted(set(grid))
    assert SelectKConfig(candidates="auto").first(2) == (2,)


TREES: dict[str, dict[str, Any]] = {
    "a number": {"method": {"name": "kmeans", "clusters": 4}},
    "a number as text": {"method": {"clusters": "4"}},
    "no number": {"method": {"name": "kmeans"}},
    "a method that is none": {"method": "kmeans"},
    "a group that is none": {"method": {"clusters": "auto"}, "select_k": 3},
    "nothing": {},
}


@pytest.mark.parametrize("name", TREES)
def test_what_leaves_nothing_open_is_left_as_it_is(name: str):
    assert normalize_clusters(TREES[name]) == TREES[name]


def test_a_number_is_written_as_it_is():
    tree = {"method": {"clusters": 4}, "select_k": {"seeds": 3}}
    assert denormalize_clusters(tree) == tree


def test_candidates_are_sorted_and_stood_in_for_by_their_largest():
    tree = {"method": {"name": "kmeans", "clusters": [9, 3]}, "seed": 1}
    read = normalize_clusters(tree)
    assert read == {
        "method": {"name": "kmeans", "clusters": 9},
        "select_k": {"candidates": (3, 9)},
        "seed": 1,
    }
    assert tree["method"] == {"name": "kmeans", "clusters": [9, 3]}, "the tree given was changed"
    assert denormalize_clusters(read) == {"method": {"name": "kmeans", "clusters": [3, 9]}, "seed": 1}


def test_other_settings_of_the_group_stay():
    tree = {"method": {"clusters": "auto"}, "select_k": {"seeds": 5}}
    assert denormalize_clusters(normalize_clusters(tree)) == tree


def test_the_stability_of_one_fit_cannot_choose():
    with pytest.raises(ValueError, match=r"rule = stability: needs select_k\.seeds of at least 2"):
        SelectKConfig(rule="stability", seeds=1)
