from __future__ import annotations

import dataclasses

import pytest
from pydantic import ValidationError

from rayclust.report import budget
from rayclust.report.contents import Picture, Reject, RejectGroup
from tests.report.pages import cluster, report

TINY = b"\x00" * 300


def bare(number: int, size: int, exemplars: int = 4, outliers: int = 4) -> object:
    kinds = [
        tuple(Picture(key=f"{k}{i}", thumbnail=TINY) for i in range(n)) for k, n in (("e", exemplars), ("o", outliers))
    ]
    return cluster(number, size, exemplars=kinds[0], outliers=kinds[1])


def kept(selection: budget.Selection) -> list[list[str]]:
    return [[p.key for p in c.exemplars + c.outliers if p.thumbnail] for c in selection.cards]


def test_featured_are_the_largest_filled_clusters() -> None:
    assert budget.featured([5, 0, 9, 5, 1]) == [2, 0, 3, 4]
    assert budget.featured([5, 0, 9, 5, 1], budget.PageLimits(cards=2)) == [2, 0]
    assert budget.featured([]) == []


def test_featured_agrees_with_the_cards_of_the_page() -> None:
    sizes = [3, 0, 7, 7, 2, 9]
    data = report(clusters=tuple(cluster(k, size) for k, size in enumerate(sizes)), contingency=None)
    limits = budget.PageLimits(cards=3)
    assert [card.id for card in budget.select(data, limits).cards] == budget.featured(sizes, limits)


def test_selection_caps_cards_rows_pictures_and_rejects() -> None:
    groups = tuple(
        RejectGroup(reason=f"r{i}", count=i, examples=tuple(Reject(key=str(j)) for j in range(5))) for i in range(1, 6)
    )
    data = report(clusters=tuple(bare(k, k) for k in range(9)), rejects=groups, contingency=None)
    limits = budget.PageLimits(cards=3, rows=5, exemplars=2, outliers=1, rejects=2, reasons=3)
    shown = budget.select(data, limits)
    assert [card.id for card in shown.cards] == [8, 7, 6]
    assert [row.id for row in shown.rows] == [8, 7, 6, 5, 4]
    assert kept(shown) == [["e0", "e1", "o0"]] * 3
    assert shown.pictures == 9
    assert [(group.reason, len(group.examples)) for group in shown.rejects] == [("r5", 2), ("r4", 2), ("r3", 2)]
    assert shown.other_reasons == 2


def test_rows_leave_half_of_the_page_to_other_things() -> None:
    data = report(clusters=tuple(bare(k, 1, 0, 0) for k in range(600)), contingency=None)
    rows = budget.select(data, budget.PageLimits(bytes=200_000)).rows
    assert len(rows) == 100_000 // budget.ROW_BYTES


def test_every_cluster_gets_its_first_pictures_before_any_gets_more() -> None:
    data = report(clusters=(bare(0, 2), bare(1, 1)), contingency=None)
    selection = budget.select(data, budget.PageLimits())
    each = budget._encoded_size(Picture(key="k", thumbnail=TINY))
    fitted = budget.fit_pictures(selection, 9 * each)
    assert kept(fitted) == [["e0", "e1", "e2", "e3", "o0"], ["e0", "e1", "e2", "e3"]]
    assert fitted.dropped_pictures == 16 - 9
    assert kept(budget.fit_pictures(selection, 3 * each)) == [["e0", "e1"], ["e0"]]
    assert budget.fit_pictures(selection, 16 * each).dropped_pictures == 0
    assert budget.fit_pictures(selection, -1).pictures == 0


def test_pictures_left_out_keep_their_keys() -> None:
    selection = budget.select(report(), budget.PageLimits())
    empty = budget.without_pictures(selection)
    assert empty.pictures == 0
    keys = [[p.key for p in card.exemplars + card.outliers] for card in empty.cards]
    assert keys == [[p.key for p in card.exemplars + card.outliers] for card in selection.cards]


def test_limits_are_bounded() -> None:
    for key, value in {"cards": -1, "bytes": 10, "unknown": 1}.items():
        with pytest.raises(ValidationError):
            budget.PageLimits(**{key: value})
    assert dataclasses.is_dataclass(budget.Selection)
