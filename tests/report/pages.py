"""Reports and a reader of pages for the tests of this folder."""

from __future__ import annotations

import io
import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from html.parser import HTMLParser
from typing import Any
from xml.etree import ElementTree as ET

import numpy as np
from PIL import Image

from rayclust.report import model, page, thumbnails

VOID = {"meta", "link", "img", "input", "br", "hr"}
SVG = "{http://www.w3.org/2000/svg}"
HOSTILE = (
    "<script>alert(1)</script>",
    "\"><img src=x onerror='alert(1)'>",
    "javascript:alert(1)",
    "</style></svg></title><!-- -->",
    "{{ 7 * 7 }}{% raw %}",
    "$\\frac{$ a & b $",
    "שלום ‮gpj.exe",
    "👩‍👩‍👧 Ω ﷽",
    "\x00\x1b[31m\ud800",
    "https://evil.example/x.png",
    "x" * 100_000,
)


def chart(text: str) -> ET.Element:
    """The tree of a chart; fails when it is not XML, or a number in it is not finite."""
    text.encode()
    root = ET.fromstring(text)  # noqa: S314 - our own text
    for node in root.iter():
        written = [node.attrib[name] for name in ("x", "y", "width", "height", "d") if name in node.attrib]
        assert not re.search("nan|inf", " ".join(written))
    assert all(math.isfinite(float(root.attrib[name])) for name in ("width", "height"))
    return root


def shapes(root: ET.Element, tag: str) -> list[ET.Element]:
    return list(root.iter(SVG + tag))


def words(root: ET.Element) -> list[str]:
    return [node.text or "" for node in shapes(root, "text")]


def tips(root: ET.Element) -> list[str]:
    """Tooltips of shapes; of one shape, its own."""
    nested = [shape for shape in root.iter() if shape.tag != f"{SVG}svg"]
    return [title.text or "" for shape in nested for title in shape if title.tag == f"{SVG}title"]


def points(path: ET.Element) -> list[tuple[float, float]]:
    """Where a path starts and goes, dots of no length once."""
    return [(float(x), float(y)) for x, y in re.findall(r"[ML](\S+?) ([-\d.]+)", path.attrib["d"])]


def box(path: ET.Element) -> tuple[float, float, float, float]:
    """Left, top, right and bottom of a bar."""
    xs, ys = zip(*points(path), strict=True)
    return min(xs), min(ys), max(xs), max(ys)


@dataclass
class Node:
    tag: str
    attributes: dict[str, str]
    text: list[str] = field(default_factory=list)
    children: list[Node] = field(default_factory=list)

    def find(self, tag: str, **attributes: str) -> list[Node]:
        """All nodes below with that tag ("" for any) and those attributes; `class_` asks for one of the classes."""
        return [node for node in self.walk() if node._fits(tag, attributes)]

    def walk(self) -> Iterator[Node]:
        for child in self.children:
            yield child
            yield from child.walk()

    def words(self) -> str:
        return " ".join(" ".join(part) for part in ([*self.text], *[node.text for node in self.walk()]) if part)

    def _fits(self, tag: str, attributes: dict[str, str]) -> bool:
        if tag and self.tag != tag:
            return False
        for name, value in attributes.items():
            given = self.attributes.get(name.rstrip("_"), "")
            if value not in (given.split() if name == "class_" else [given]):
                return False
        return True


class _Reader(HTMLParser):
    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.root = Node("document", {})
        self.open = [self.root]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        node = Node(tag, {name: value or "" for name, value in attrs})
        assert len(node.attributes) == len(attrs), f"{tag} has an attribute twice"
        self.open[-1].children.append(node)
        if tag not in VOID:
            self.open.append(node)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.open[-1].children.append(Node(tag, {name: value or "" for name, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        assert self.open[-1].tag == tag, f"</{tag}> closes <{self.open[-1].tag}>"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        if data.strip():
            self.open[-1].text.append(data.strip())


def read(html: str) -> Node:
    """The tree of a page; fails when an element is not closed or an id is given twice."""
    reader = _Reader()
    reader.feed(html)
    reader.close()
    assert len(reader.open) == 1, f"<{reader.open[-1].tag}> is never closed"
    ids = [node.attributes["id"] for node in reader.root.walk() if "id" in node.attributes]
    assert len(ids) == len(set(ids))
    return reader.root


def photo(seed: int, size: tuple[int, int] = (64, 48), form: str = "JPEG") -> bytes:
    """A picture of smooth noise."""
    small = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(small).resize(size).save(buffer, form)
    return buffer.getvalue()


@lru_cache
def small(number: int) -> bytes:
    return thumbnails.thumbnail(photo(number), 32)


def picture(number: int, **changes: Any) -> model.Picture:
    given: dict[str, Any] = {
        "key": f"folder/{number:05d}.jpg",
        "thumbnail": changes["thumbnail"] if "thumbnail" in changes else small(number % 60),
        "confidence": 0.9,
    }
    return model.Picture(**given | changes)


def cluster(number: int, size: int, **changes: Any) -> model.Cluster:
    return model.Cluster(id=number, size=size, **changes)


def gallery(number: int) -> model.Gallery:
    """Two typical images of a cluster and an outlier."""
    shown = [picture(10 * number + i, row=10 * number + i) for i in (0, 1, 5)]
    return model.Gallery(typical=(shown[0], shown[1]), outliers=(shown[2],))


def written(data: model.ReportData) -> dict[str, bytes]:
    """The files of a page."""
    files = dict[str, bytes]()
    page.write(data, lambda name, content: files.update({name: content}))
    return files


def html(data: model.ReportData) -> str:
    return written(data)["index.html"].decode()


def payloads(files: dict[str, bytes]) -> dict[str, Any]:
    """What the page's script reads, by name, wherever it lies."""
    found = {
        node.attributes["id"].removeprefix("data-"): json.loads(node.text[0])
        for node in read(files["index.html"].decode()).find("script", type="application/json")
    }
    for name, content in files.items():
        if beside := re.fullmatch(r'rayclust\("([\w-]+)",(.*)\);\n', content.decode(), re.DOTALL):
            assert name == f"data/{beside[1]}.js"
            found[beside[1]] = json.loads(beside[2])
    return found


def report(**changes: Any) -> model.ReportData:
    """Three named clusters with labels, two methods, curves and rejects; `changes` replace parts of it."""
    named = {"score": 0.31, "runners_up": (("boat", 0.2),), "confidence": 0.75}
    given: dict[str, Any] = {
        "run": "s3://bucket/runs/photos",
        "images": 60,
        "encoder": "open_clip/ViT-L-14",
        "dimension": 768,
        "classes": 3,
        "methods": (
            model.MethodResult(
                name="temi", settings={"clusters": 3, "heads": {"count": 16}}, metrics={"accuracy": 0.9, "nmi": 0.5}
            ),
            model.MethodResult(name="kmeans", metrics={"accuracy": 0.8, "nmi": 0.6}, spread={"accuracy": 0.01}),
        ),
        "clusters": (
            cluster(0, 10, name="ship", majority="ship", purity=0.95, **named),
            cluster(1, 30, name="cat", majority="dog", purity=0.55, **named),
            cluster(2, 20, name="truck", majority="truck", purity=0.2, **named),
        ),
        "gallery": gallery,
        "stages": (model.StageTime(name="encode", seconds=30.0, count=60),),
        "versions": {"rayclust": "0.1.0"},
        "config": "seed: 0\nrun: photos\n",
        "curves": (model.Curve(title="Loss", series={"loss": [3.0, 2.0, 1.5]}),),
        "confidence": (0, 5, 55),
        "contingency": model.Contingency(
            counts=np.array([[9, 1, 0], [1, 29, 16], [0, 0, 4]]), classes=("ship", "dog", "truck"), clusters=(0, 1, 2)
        ),
        "candidates": (
            {"name": "k-means", "chosen": False, "evidence": {"Modularity": 0.71}},
            {"name": "consensus", "chosen": True, "evidence": {"Modularity": 0.8125}},
        ),
        "rejects": (
            model.RejectGroup(
                reason="truncated", count=12, examples=({"key": "a.jpg", "uri": "s3://b/a.jpg", "detail": "cut"},)
            ),
        ),
    }
    return model.ReportData(**given | changes)
