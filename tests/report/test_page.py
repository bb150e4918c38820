from __future__ import annotations

import base64
import dataclasses
import hashlib
import math
import re
from functools import lru_cache
from typing import Any

import numpy as np
import pytest

from rayclust.report import charts, page, payload
from rayclust.report.model import (
    Cluster,
    Contingency,
    Curve,
    Drawing,
    Gallery,
    MapPoints,
    MethodResult,
    Picture,
    RejectGroup,
    Retrieval,
    StageTime,
)
from tests.report.pages import HOSTILE, Node, cluster, gallery, html, payloads, picture, read, report, written

LOADING = ("src", "href", "srcset", "poster", "data", "action", "formaction", "xlink:href", "background", "ping")


def hostile(text: str) -> Any:
    """A report that says `text` wherever it can say anything."""
    shown = Picture(key=text, thumbnail=picture(1).thumbnail, uri=text, label=text)
    damaged = dataclasses.replace(shown, thumbnail=text.encode("utf-8", "replace"))
    one = Cluster(
        id=0, size=1, name=text, majority="m" + text, purity=0.5, runners_up=((text, 1.0),), blind=(text, 0.5)
    )
    return report(
        run=text, title=text, encoder=text, clusters=(one,), notes=(text,), config=text, versions={text: text},
        gallery=lambda _: Gallery(typical=(shown,), outliers=(damaged,)),
        points=MapPoints(row=np.arange(2), cluster=np.zeros(2, int), x=np.eye(2)[0], y=np.eye(2)[1], keys=[text, text],
                         title=text, text=text),
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
        Drawing(key="gram", title=name, text=name, svg=heat),
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
    # One script and one style; the other script elements are data, which nothing runs.
    kinds = [node.attributes.get("type", "") for node in root.find("script")]
    assert kinds.count("") == len(root.find("style")) == 1
    assert set(kinds) == {"", "application/json"}
    sources = root.find("style")[0].text + root.find("script", type="")[0].text
    assert not re.search(r"url\(|@import|fetch\(|import\(|XMLHttp|innerHTML|eval\(|WebSocket", " ".join(sources))


def test_the_first_screen_says_what_was_clustered_and_how_well() -> None:
    root = read(usual_page())
    assert root.find("title")[0].words() == "photos · rayclust"
    assert [h.words() for h in root.find("h1")] == ["photos"]
    tiles = {
        tile.find("dt")[0].words(): tile.find("dd")[0].words() for tile in root.find("dl", class_="tiles")[0].children
    }
    assert tiles == {"Images": "60", "Clusters": "3", "ACC": "90.0%", "NMI": "50.0%", "Rejected": "12", "Time": "30 s"}


def test_the_page_is_well_formed_and_asks_nobody() -> None:
    text = usual_page()
    assert text.startswith("<!DOCTYPE html>")
    root = read(text)
    assert_self_contained(root)
    targets = {node.attributes["href"][1:] for node in root.find("a")}
    assert targets <= {node.attributes["id"] for node in root.walk() if "id" in node.attributes}


def test_the_policy_allows_its_own_style_and_script_and_what_that_loads_alone() -> None:
    text = usual_page()
    policy = read(text).find("meta", **{"http-equiv": "Content-Security-Policy"})[0].attributes["content"]
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    assert rules["default-src"] == "'none'"
    assert rules["img-src"] == "data: file:"
    for tag, rule, more in (("style", "style-src", ""), ("script", "script-src", " 'strict-dynamic'")):
        body = re.findall(rf"<{tag}>(.*?)</{tag}>", text, re.DOTALL)
        assert len(body) == 1
        digest = base64.b64encode(hashlib.sha256(body[0].encode()).digest()).decode()
        assert rules[rule] == f"'sha256-{digest}'{more}"


@lru_cache
def plain_page() -> str:
    return html(hostile("plain"))


@lru_cache
def usual_page() -> str:
    return html(report())


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_hostile_strings_stay_text(text: str) -> None:
    files = written(hostile(text))
    shown = files["index.html"].decode()
    root = read(shown)
    assert_self_contained(root)
    plain = plain_page()
    assert [node.tag for node in root.walk()] == [node.tag for node in read(plain).walk()]
    # One config, the keys on the map, and no name at full length.
    assert len(shown) < len(plain) + 100_000 + 60_000 + 2 * len(text)
    # The files beside say the same as data in the page would, and are one call with JSON.
    beside = dict[str, bytes]()
    data = payload.DataFiles(lambda name, content: beside.update({name: content}), room=0)
    ranked = sorted((c for c in hostile(text).clusters if c.size), key=lambda c: (-c.size, c.id))
    payload.add_clusters(hostile(text), ranked, data)
    payload.add_points(hostile(text).points, ranked, data)
    found = payloads(files)
    assert sorted(beside) == [f"data/{name}.js" for name in ("clusters-00000", "keys-00000", "points")]
    assert payloads(files | beside) == found
    assert all(b"<" not in content for content in beside.values())


def test_the_same_report_gives_the_same_page() -> None:
    first = written(report())
    page._environment.cache_clear()
    assert written(report()) == first


def test_scores_stand_side_by_side_and_the_best_is_marked() -> None:
    rows = read(usual_page()).find("table", class_="scores")[0].find("tbody")[0].children
    assert [row.find("td")[0].words() for row in rows] == ["90.0% (best)", "80.0 ± 1.0%"]
    assert [row.find("td")[1].words() for row in rows] == ["50.0%", "60.0% (best)"]


def test_a_run_without_labels_names_or_rejects() -> None:
    data = report(
        classes=None, contingency=None, rejects=(), curves=(), confidence=(), stages=(), versions={}, config="",
        methods=(MethodResult(name="kmeans", metrics={"silhouette": 0.25}),),
        clusters=(Cluster(id=0, size=40), Cluster(id=1, size=0)),
    )  # fmt: skip
    root = read(html(data))
    assert "This run has no labels" in root.find("section", id="scores")[0].words()
    assert "Every input could be used." in root.find("section", id="rejects")[0].words()
    assert "1 of 2 clusters is empty." in root.words()
    assert not root.find("section", id="training")
    assert not root.find("section", id="map")
    assert "Purity" not in root.find("section", id="clusters")[0].words()


def test_a_run_with_nothing_at_all() -> None:
    data = report(images=0, clusters=(), methods=(MethodResult(name="kmeans"),), classes=None, contingency=None,
                  rejects=(), curves=(), confidence=(), run="/")  # fmt: skip
    words = read(html(data)).words()
    assert "This run has no clusters." in words
    assert "No scores were measured." in words


def test_rejects_are_counted_and_cut_short() -> None:
    words = read(usual_page()).find("section", id="rejects")[0].words()
    assert "12 inputs were set aside" in words
    assert "1 of 12 are shown" in words
    assert "s3://b/a.jpg" in words


def test_the_drawing_of_classes_has_its_limits() -> None:
    wide = Contingency(counts=np.ones((61, 3), dtype=int), classes=tuple(map(str, range(61))), clusters=(0, 1, 2))
    section = read(html(report(contingency=wide))).find("section", id="scores")[0]
    assert not section.find("svg")
    assert "With 61 classes and 3 clusters" in section.words()
    assert read(usual_page()).find("section", id="scores")[0].find("svg")


def test_figures_and_searches_have_sections_and_load_nothing() -> None:
    root = read(html(report(drawings=drawings("ship"), retrieval=(retrieval("ship"),))))
    assert_self_contained(root)
    [figures] = root.find("section", id="figures")
    assert [chart.find("figcaption")[0].words() for chart in figures.find("figure", class_="chart")] == ["ship", "ship"]
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
    root = read(html(report(drawings=(gram, choice))))
    assert_self_contained(root)
    [section] = root.find("section", id="choice")
    assert section.find("h2")[0].words() == "Number of clusters"
    assert "12 were chosen" in section.words()
    assert len(root.find("section", id="figures")[0].find("figure", class_="chart")) == 1
    assert "#choice" in {link.attributes["href"] for link in root.find("nav")[0].find("a")}
    assert not read(html(report(drawings=(gram,)))).find("section", id="choice")


# What the script reads


def test_the_list_is_by_size_and_holds_what_clusters_are_found_by() -> None:
    blind = cluster(
        7, 20, name=None, runners_up=(("boat", 0.2), ("raft", 0.1)), blind=("fish", 0.4), nearest=((3, 0.5),)
    )
    named = cluster(3, 20, name="cat", majority="dog", purity=0.5555, parents=(1,))
    nameless = dataclasses.replace(blind, parents=(0,))
    data = report(clusters=(nameless, named, cluster(5, 0)), levels=(2,), contingency=None)
    found = payloads(written(data))
    shown = found["index"]
    assert shown["id"] == [3, 7]
    assert shown["size"] == [20, 20]
    assert [None if word < 0 else shown["words"][word] for word in shown["name"]] == ["cat", None]
    assert [[shown["words"][word] for word in some] for some in shown["runners"]] == [[], ["boat", "raft"]]
    assert shown["purity"] == [555, -1]
    assert (shown["label"], shown["classes"]) == ([0, -1], ["dog"])
    assert shown["levels"] == [{"clusters": 2, "parent": [1, 0]}]
    assert shown["packs"] == [0]
    first, second = found["clusters-00000"]
    assert second["runners"] == [["boat", 0.2], ["raft", 0.1]]
    assert second["blind"] == ["fish", 0.4]
    assert second["nearest"] == [[3, 0.5]]
    assert [each[0] for each in first["typical"] + first["outliers"]] == [f"folder/{i:05d}.jpg" for i in (30, 31, 35)]


def test_a_picture_is_its_record_and_its_thumbnail() -> None:
    shown = picture(10, row=4, label="cat", uri="s3://b/x.jpg", neighbors=((7, 2, 0.98765),))
    data = report(gallery=lambda _: Gallery(typical=(shown,)), clusters=(cluster(0, 1),), contingency=None)
    [[found]] = [each["typical"] for each in payloads(written(data))["clusters-00000"]]
    source, _, body = found[6].partition(",")
    assert found[:6] == ["folder/00010.jpg", 4, 900, "cat", "s3://b/x.jpg", [[7, 2, 0.9877]]]
    assert found[7:] == [43, 32]
    assert source == "data:image/webp;base64"
    assert base64.b64decode(body) == shown.thumbnail


def test_points_lie_where_they_were_and_keys_beside() -> None:
    x, y = np.array([-1.0, 0.0, 1.0]), np.array([0.0, 0.5, 0.25])
    points = MapPoints(row=np.array([4, 5, 9]), cluster=np.array([0, 2, 1]), x=x, y=y, keys=["a", "b", "c"])
    found = payloads(written(report(points=points)))
    assert found["keys-00000"] == {"key": ["a", "b", "c"], "row": [4, 5, 9]}
    kinds = {"x": "<u2", "y": "<u2", "cluster": "<u4"}
    columns = {name: np.frombuffer(base64.b64decode(text), kinds[name]) for name, text in found["points"].items()}
    assert [found["index"]["id"][place] for place in columns["cluster"]] == [0, 2, 1]
    np.testing.assert_allclose(columns["x"] / 65535, [0, 0.5, 1], atol=1e-5)
    np.testing.assert_allclose(columns["y"] / 65535, [0.375, 0.625, 0.5], atol=1e-5)  # one scale, in the middle


def test_many_clusters_lie_in_files_of_a_megabyte_and_the_page_stays_small() -> None:
    asked = list[int]()

    def counted(number: int) -> Gallery:
        asked.append(number)
        return gallery(number)

    clusters = tuple(cluster(k, 9_000 - k, name=f"name {k}", purity=0.5, confidence=0.5) for k in range(9_000))
    files = written(report(clusters=clusters, contingency=None, gallery=counted))
    assert asked == list(range(9_000))
    assert len(files["index.html"]) < 5_000_000
    beside = {name: len(content) for name, content in files.items() if name != "index.html"}
    assert len(beside) > 3
    assert max(beside.values()) < 1.1 * payload.PACK_BYTES
    found = payloads(files)
    firsts = found["index"]["packs"]
    sizes = [len(found[f"clusters-{pack:05d}"]) for pack in range(len(firsts))]
    assert np.cumsum([0, *sizes]).tolist() == [*firsts, 9_000]


@pytest.mark.parametrize(
    ("given", "title"),
    [
        ({"name": "cat", "majority": "dog"}, "cat"),
        ({"runners_up": (("boat", 0.2),), "majority": "dog"}, "boat?"),
        ({"majority": "dog"}, "mostly dog"),
        ({}, "#7"),
    ],
)
def test_a_cluster_without_a_name_is_called_by_the_best_guess(given: dict[str, Any], title: str) -> None:
    assert cluster(7, 1, **given).title == title


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
