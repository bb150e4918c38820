from __future__ import annotations

import base64
import dataclasses
import hashlib
import io
import math
import re
from functools import lru_cache
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pydantic import ValidationError

from rayclust.report import charts, page
from rayclust.report.model import (
    Cluster,
    Contingency,
    Curve,
    Drawing,
    MethodResult,
    Picture,
    RejectGroup,
    Retrieval,
    StageTime,
)
from rayclust.report.page import PageLimits
from tests.report.pages import HOSTILE, Node, cluster, picture, read, report

LOADING = ("src", "href", "srcset", "poster", "data", "action", "formaction", "xlink:href", "background", "ping")


def hostile(text: str) -> Any:
    """A report that says `text` wherever it can say anything."""
    shown = Picture(key=text, thumbnail=picture(1).thumbnail, uri=text, label=text)
    damaged = dataclasses.replace(shown, thumbnail=text.encode("utf-8", "replace"))
    one = Cluster(
        id=0, size=1, name=text, majority="m" + text, purity=0.5, runners_up=((text, 1.0),), blind=(text, 0.5),
        exemplars=(shown,), outliers=(damaged,),
    )  # fmt: skip
    return report(
        run=text, title=text, encoder=text, clusters=(one,), notes=(text,), config=text, versions={text: text},
        methods=(MethodResult(name=text, settings={text: {text: [text]}}, metrics={text: 1.0}),),
        stages=(StageTime(name=text, seconds=1.0, count=2, unit=text),),
        curves=(Curve(title=text, series={text: [1.0, 2.0], "b": [1.0]}, x_label=text),),
        contingency=Contingency(counts=np.array([[1]]), classes=(text,), clusters=(0,)),
        rejects=(RejectGroup(reason=text, count=1, examples=({"key": text, "uri": text, "detail": text},)),),
        drawings=drawings(text), retrieval=(retrieval(text),),
    )  # fmt: skip


def drawings(name: str) -> tuple[Drawing, ...]:
    """A heat-map and a map that say `name`."""
    panels = {name: np.eye(3), f"{name} ": np.eye(3)}
    heat = charts.heatmap(panels, [charts.Group(name, 3)], ceiling=1, title=name)
    dots = charts.scatter(np.eye(2), np.arange(2), {0: name, 1: "b"}, title=name)
    return (
        Drawing(key="gram", title=name, text=name, svg=heat, is_wide=True),
        Drawing(key="map", title=name, text=name, svg=dots),
    )


def retrieval(label: str) -> Retrieval:
    """A query with two hits in either space, the second of another class."""
    hits = ((picture(1, label=label), 0.9), (picture(2, label="other"), 0.5))
    return Retrieval(query=picture(0, label=label), found={"Encoder": hits, "z": hits[::-1]})


def assert_self_contained(root: Node) -> None:
    for node in root.walk():
        for name, value in node.attributes.items():
            assert not name.startswith("on"), f"{node.tag} has {name}"
            assert name != "style"
            if name in LOADING:
                assert value.startswith(("#", "data:image/")), f"{node.tag} loads {value[:60]}"
    assert {"iframe", "object", "embed", "base", "audio", "video", "foreignobject"}.isdisjoint(
        n.tag for n in root.walk()
    )
    assert len(root.find("script")) == len(root.find("style")) == 1
    sources = root.find("style")[0].text + root.find("script")[0].text
    assert not re.search(r"url\(|@import|https?:|fetch\(|import\(|XMLHttp|innerHTML|eval\(", " ".join(sources))


def test_the_first_screen_has_title_headline_numbers_and_named_groups() -> None:
    root = read(usual_page())
    assert root.find("title")[0].words() == "photos · rayclust"
    assert [h.words() for h in root.find("h1")] == ["photos"]
    tiles = {
        tile.find("dt")[0].words(): tile.find("dd")[0].words() for tile in root.find("dl", class_="tiles")[0].children
    }
    assert tiles == {"Images": "60", "Clusters": "3", "ACC": "90.0%", "NMI": "50.0%", "Rejected": "12", "Time": "30 s"}
    cards = root.find("article")
    assert [card.find("h3")[0].words() for card in cards] == ["cat", "truck", "ship"]
    assert [card.find("p", class_="size")[0].words() for card in cards] == ["30 images", "20 images", "10 images"]
    assert [len(card.find("img")) for card in cards] == [3, 3, 3]


def test_the_page_is_well_formed_and_loads_nothing() -> None:
    html = usual_page()
    assert html.startswith("<!DOCTYPE html>")
    root = read(html)
    assert_self_contained(root)
    targets = {node.attributes["href"][1:] for node in root.find("a")}
    assert targets <= {node.attributes["id"] for node in root.walk() if "id" in node.attributes}


def test_the_policy_allows_its_own_style_and_script_alone() -> None:
    html = usual_page()
    policy = read(html).find("meta", **{"http-equiv": "Content-Security-Policy"})[0].attributes["content"]
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    assert rules["default-src"] == "'none'"
    assert rules["img-src"] == "data:"
    for tag, rule in (("style", "style-src"), ("script", "script-src")):
        body = re.findall(rf"<{tag}>(.*?)</{tag}>", html, re.DOTALL)
        assert len(body) == 1
        digest = base64.b64encode(hashlib.sha256(body[0].encode()).digest()).decode()
        assert rules[rule] == f"'sha256-{digest}'"


@lru_cache
def plain_page() -> str:
    return page.render(hostile("plain"))


@lru_cache
def usual_page() -> str:
    return page.render(report())


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_hostile_strings_stay_text(text: str) -> None:
    html = page.render(hostile(text))
    root = read(html)
    html.encode()
    assert_self_contained(root)
    plain = plain_page()
    assert [node.tag for node in root.walk()] == [node.tag for node in read(plain).walk()]
    assert len(html) < len(plain) + 100_000 + 60_000  # one config, and no name at full length


def test_names_are_isolated_from_the_direction_of_the_page() -> None:
    root = read(page.render(report(clusters=(cluster(0, 1, name="שלום"),), contingency=None)))
    assert root.find("h3")[0].find("bdi")[0].words() == "שלום"


def test_the_same_report_gives_the_same_page() -> None:
    first = page.render(report())
    page._environment.cache_clear()
    assert page.render(report()) == first


def test_scores_stand_side_by_side_and_the_best_is_marked() -> None:
    rows = read(usual_page()).find("table", class_="scores")[0].find("tbody")[0].children
    assert [row.find("td")[0].words() for row in rows] == ["90.0% (best)", "80.0 ± 1.0%"]
    assert [row.find("td")[1].words() for row in rows] == ["50.0%", "60.0% (best)"]


def test_labels_show_what_a_picture_really_is_only_where_it_differs() -> None:
    shown = (picture(1, label="dog"), picture(2, label="cat"))
    data = report(clusters=(cluster(0, 2, majority="dog", purity=0.5, exemplars=shown, outliers=()),), contingency=None)
    captions = [node.words() for node in read(page.render(data)).find("article")[0].find("figcaption")]
    assert captions == ["00001.jpg 90% sure", "00002.jpg 90% sure labelled cat"]


def test_pictures_say_their_key_and_their_size() -> None:
    images = read(usual_page()).find("img")
    assert images[0].attributes["alt"] == "folder/00010.jpg"
    assert (images[0].attributes["width"], images[0].attributes["height"]) == ("43", "32")
    heads, _, bodies = zip(*(image.attributes["src"].partition(",") for image in images), strict=True)
    assert set(heads) == {"data:image/webp;base64"}
    assert base64.b64decode(bodies[0]) == picture(10).thumbnail


def test_a_run_without_labels_names_or_rejects() -> None:
    data = report(
        classes=None, contingency=None, rejects=(), curves=(), confidence=(), stages=(), versions={}, config="",
        methods=(MethodResult(name="kmeans", metrics={"silhouette": 0.25}),),
        clusters=(Cluster(id=0, size=40), Cluster(id=1, size=0)),
    )  # fmt: skip
    root = read(page.render(data))
    assert root.find("article")[0].find("h3")[0].words() == "Cluster 0"
    assert "This run has no labels" in root.find("section", id="scores")[0].words()
    assert "Every input could be used." in root.find("section", id="rejects")[0].words()
    assert "1 of 2 clusters is empty." in root.words()
    assert not root.find("section", id="training")
    assert "Purity" not in root.find("table", id="rows")[0].words()


def test_a_run_with_nothing_at_all() -> None:
    data = report(images=0, clusters=(), methods=(MethodResult(name="kmeans"),), classes=None, contingency=None,
                  rejects=(), curves=(), confidence=(), run="/")  # fmt: skip
    words = read(page.render(data)).words()
    assert "This run has no clusters." in words
    assert "No scores were measured." in words


def test_rejects_are_counted_and_cut_short() -> None:
    words = read(usual_page()).find("section", id="rejects")[0].words()
    assert "12 inputs were set aside" in words
    assert "1 of 12 are shown" in words
    assert "s3://b/a.jpg" in words


def test_the_drawing_of_classes_has_its_limits() -> None:
    wide = Contingency(counts=np.ones((61, 3), dtype=int), classes=tuple(map(str, range(61))), clusters=(0, 1, 2))
    section = read(page.render(report(contingency=wide))).find("section", id="scores")[0]
    assert not section.find("svg")
    assert "With 61 classes and 3 clusters" in section.words()
    assert read(usual_page()).find("section", id="scores")[0].find("svg")


def test_huge_runs_keep_to_their_limits() -> None:
    pictures = tuple(picture(i) for i in range(6))
    clusters = tuple(
        Cluster(id=k, size=25_000 - k, name=f"name {k}", exemplars=pictures if k < 300 else ()) for k in range(25_000)
    )
    data = report(clusters=clusters, contingency=None, images=300_000_000)
    html = page.render(data, PageLimits(bytes=2_000_000))
    assert len(html.encode()) <= 2_000_000
    root = read(html)
    assert len(root.find("article")) == 200
    assert len(root.find("table", id="rows")[0].find("tr")) == 1 + 2_000_000 // 2 // 400
    assert "The 200 largest of 25,000 clusters are shown with pictures." in root.words()
    assert "The 2,500 largest of 25,000 clusters are listed;" in root.words()


def test_the_budget_drops_pictures_and_says_so() -> None:
    rng = np.random.default_rng(0)
    noise = [picture(i, thumbnail=_noise(rng)) for i in range(60)]
    clusters = tuple(cluster(k, 9, exemplars=tuple(noise[5 * k : 5 * k + 5]), outliers=()) for k in range(12))
    data = report(clusters=clusters, contingency=None)
    full, small = page.render(data), page.render(data, PageLimits(bytes=200_000))
    assert len(full.encode()) > 300_000
    assert 150_000 < len(small.encode()) <= 200_000
    root = read(small)
    left_out = 60 - len(root.find("img"))
    assert left_out > 0
    assert f"{left_out} pictures are left out" in root.words()
    assert all(card.find("img") for card in root.find("article"))


def _noise(rng: np.random.Generator) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(rng.integers(0, 256, (40, 40, 3), dtype=np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def test_search_text_holds_names_and_numbers() -> None:
    cards = read(usual_page()).find("article")
    assert cards[0].attributes["data-text"] == "cat #1 dog boat"
    assert cards[0].attributes["data-purity"] == "0.55"


def test_figures_and_searches_have_sections_and_load_nothing() -> None:
    root = read(page.render(report(drawings=drawings("ship"), retrieval=(retrieval("ship"),))))
    assert_self_contained(root)
    [figures] = root.find("section", id="figures")
    assert [chart.find("figcaption")[0].words() for chart in figures.find("figure", class_="chart")] == ["ship", "ship"]
    assert len(figures.find("figure", class_="broad")) == 1
    assert all(node.attributes["href"].startswith("data:image/png;base64,") for node in figures.find("image"))
    [search] = root.find("section", id="retrieval")
    assert [head.words() for head in search.find("h3")] == ["Image", "Encoder", "z"]
    assert len(search.find("img")) == 5
    assert [caption.words() for caption in search.find("figcaption", class_="other")] == ["other 0.50"] * 2
    links = {link.attributes["href"] for link in root.find("nav")[0].find("a")}
    assert {"#figures", "#retrieval"} <= links


def test_the_choice_of_the_number_has_a_section_of_its_own() -> None:
    gram, places = drawings("ship")
    choice = Drawing(key=page.CHOICE, title="Criteria", text="12 were chosen", svg=places.svg)
    root = read(page.render(report(drawings=(gram, choice))))
    assert_self_contained(root)
    [section] = root.find("section", id="choice")
    assert section.find("h2")[0].words() == "Number of clusters"
    assert "12 were chosen" in section.words()
    assert len(root.find("section", id="figures")[0].find("figure", class_="chart")) == 1
    assert "#choice" in {link.attributes["href"] for link in root.find("nav")[0].find("a")}
    assert not read(page.render(report(drawings=(gram,)))).find("section", id="choice")


def test_names_without_the_classes_stand_beside() -> None:
    root = read(page.render(report(clusters=(cluster(0, 10, name="tench", blind=("fish", 0.4)),))))
    assert "Without class names" in root.find("table", id="rows")[0].words()
    assert "fish" in root.find("article")[0].words()
    assert "Without class names" not in read(usual_page()).words()


# What fits on a page

TINY = b"\x00" * 300


def bare(number: int, size: int, exemplars: int = 4, outliers: int = 4) -> object:
    kinds = [
        tuple(Picture(key=f"{k}{i}", thumbnail=TINY) for i in range(n)) for k, n in (("e", exemplars), ("o", outliers))
    ]
    return cluster(number, size, exemplars=kinds[0], outliers=kinds[1])


def kept(selection: page.Selection) -> list[list[str]]:
    return [[p.key for p in c.exemplars + c.outliers if p.thumbnail] for c in selection.cards]


def test_featured_are_the_largest_filled_clusters() -> None:
    assert page.featured([5, 0, 9, 5, 1]) == [2, 0, 3, 4]
    assert page.featured([5, 0, 9, 5, 1], PageLimits(cards=2)) == [2, 0]
    assert page.featured([]) == []


def test_featured_agrees_with_the_cards_of_the_page() -> None:
    sizes = [3, 0, 7, 7, 2, 9]
    data = report(clusters=tuple(cluster(k, size) for k, size in enumerate(sizes)), contingency=None)
    limits = PageLimits(cards=3)
    assert [card.id for card in page.select(data, limits).cards] == page.featured(sizes, limits)


def test_selection_caps_cards_rows_pictures_and_rejects() -> None:
    groups = tuple(
        RejectGroup(reason=f"r{i}", count=i, examples=({"key": "k", "uri": "", "detail": ""},) * 5) for i in range(1, 6)
    )
    data = report(clusters=tuple(bare(k, k) for k in range(9)), rejects=groups, contingency=None)
    limits = PageLimits(cards=3, rows=5, exemplars=2, outliers=1, rejects=2, reasons=3)
    shown = page.select(data, limits)
    assert [card.id for card in shown.cards] == [8, 7, 6]
    assert [row.id for row in shown.rows] == [8, 7, 6, 5, 4]
    assert kept(shown) == [["e0", "e1", "o0"]] * 3
    assert sum(map(len, kept(shown))) == 9
    assert [(group.reason, len(group.examples)) for group in shown.rejects] == [("r5", 2), ("r4", 2), ("r3", 2)]
    assert shown.other_reasons == 2


def test_rows_leave_half_of_the_page_to_other_things() -> None:
    data = report(clusters=tuple(bare(k, 1, 0, 0) for k in range(600)), contingency=None)
    rows = page.select(data, PageLimits(bytes=200_000)).rows
    assert len(rows) == 100_000 // page.ROW_BYTES


def test_every_cluster_gets_its_first_pictures_before_any_gets_more() -> None:
    data = report(clusters=(bare(0, 2), bare(1, 1)), contingency=None)
    selection = page.select(data, PageLimits())
    each = page.TAG_BYTES + len(base64.b64encode(TINY))
    fitted = page.fit_pictures(selection, 9 * each)
    assert kept(fitted) == [["e0", "e1", "e2", "e3", "o0"], ["e0", "e1", "e2", "e3"]]
    assert fitted.dropped_pictures == 16 - 9
    assert kept(page.fit_pictures(selection, 3 * each)) == [["e0", "e1"], ["e0"]]
    assert page.fit_pictures(selection, 16 * each).dropped_pictures == 0


def test_pictures_left_out_keep_their_keys() -> None:
    selection = page.select(report(), PageLimits())
    empty = page.fit_pictures(selection, -1)
    assert kept(empty) == [[], [], []]
    keys = [[p.key for p in card.exemplars + card.outliers] for card in empty.cards]
    assert keys == [[p.key for p in card.exemplars + card.outliers] for card in selection.cards]


def test_limits_are_bounded() -> None:
    for key, value in {"cards": -1, "bytes": 10, "unknown": 1}.items():
        with pytest.raises(ValidationError):
            PageLimits(**{key: value})


# Scores

TEMI = MethodResult(name="temi", metrics={"own": 3.0, "nmi": 0.5, "accuracy": 0.9, "coding_length": 7.0, "ari": None})
KMEANS = MethodResult(name="kmeans", metrics={"nmi": 0.6, "accuracy": math.nan, "coding_length": 6.0})


def test_known_scores_come_first_in_their_order_and_absent_ones_are_left_out() -> None:
    assert [score.key for score in page.columns([KMEANS, TEMI])] == ["accuracy", "nmi", "coding_length", "own"]
    assert page.columns([MethodResult(name="x")]) == []


def test_the_best_needs_two_numbers_and_a_better_end() -> None:
    best = {score.key: page.best(score, [TEMI, KMEANS]) for score in page.columns([TEMI, KMEANS])}
    assert best == {"accuracy": None, "nmi": 0.6, "coding_length": 6.0, "own": None}


def test_shares_are_percent_and_spread_stands_beside() -> None:
    accuracy, silhouette = (next(s for s in page.SCORES if s.key == key) for key in ("accuracy", "silhouette"))
    assert accuracy.write(0.926) == "92.6%"
    assert accuracy.write(0.926, 0.002) == "92.6 ± 0.2%"
    assert silhouette.write(-0.1234) == "-0.1234"
    assert silhouette.write(0.5, 0.01) == "0.5 ± 0.01"
    assert accuracy.write(None, 0.1) == "–"
