"""The report in a real browser: what a person does, how long it takes, and what axe says of it."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from rayclust.runtime import demo
from tests.browser import Page, serious, tab
from tests.report import synthetic
from tests.report.pages import photo
from tests.sealed import Sealed

SOON, LIMITS = 500, {"first paint": 2000}
"""Milliseconds of the page's thread that an answer may take, and what may take others."""
SIZES = [(1440, "light"), (1440, "dark"), (390, "light"), (390, "dark")]
CARDS = "[...document.querySelectorAll('#items .card')]"
FULL = f"{CARDS}.length > 4 && {CARDS}.every((card) => card.querySelectorAll('img').length === 4)"


def set_value(name: str, value: str) -> str:
    """A script that types or chooses in a field."""
    return (
        f"(() => {{ const field = document.querySelector('#{name}, [name={name}]'); field.value = {value!r};"
        "for (const kind of ['input', 'change']) field.dispatchEvent(new Event(kind, { bubbles: true })); })()"
    )


async def worked(page: Page) -> float:
    """Milliseconds of a processor that the page's thread has taken so far."""
    found = (await page.call("Performance.getMetrics"))["metrics"]
    return 1000 * float(next(each["value"] for each in found if each["name"] == "TaskDuration"))


async def happens(page: Page, act: str, done: str) -> None:
    """Do something and wait until a condition holds."""
    await page.run(
        f"""(async () => {{
            const start = performance.now();
            {act};
            while (!({done})) {{
                if (performance.now() - start > 15000) throw new Error('never');
                await new Promise((resolve) => setTimeout(resolve, 2));
            }}
        }})()"""
    )


async def size(page: Page, width: int, height: int, scheme: str = "light") -> None:
    await page.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
    await page.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)


async def looks(page: Page, sizes: Sequence[tuple[int, str]]) -> list[Any]:
    """Faults of the page as it is, at some widths and in some schemes of colours."""
    found = list[Any]()
    for width, scheme in sizes:
        await size(page, width, 900, scheme)
        await page.until("document.documentElement.scrollWidth <= innerWidth")
        await page.until("[...document.querySelectorAll('.chart')].every((one) => one.scrollWidth <= one.clientWidth)")
        found += [(width, scheme, *fault) for fault in await serious(page)]
    await size(page, 1440, 900)
    return found


async def mouse(page: Page, kind: str, x: float, y: float) -> None:
    button = {"button": "left", "buttons": 1, "clickCount": 1} if kind != "mouseMoved" else {}
    await page.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, **button)


async def hover(page: Page, box: list[float]) -> list[int]:
    """Move over the map until a point answers; return where that is."""
    for step in range(200):
        place = [round(box[0] + box[2] * (0.35 + step * 0.0015)), round(box[1] + box[3] / 2)]
        await mouse(page, "mouseMoved", *place)
        if not await page.run("document.getElementById('tip').hidden"):
            return place
    raise AssertionError("no point answers")


@dataclass(frozen=True)
class Walk:
    """What happened while a person looked through a report."""

    page: Page
    times: dict[str, float]
    """Milliseconds of the slowest answer of each kind."""
    faults: list[Any]
    """Of the looks."""


async def walk(endpoint: str, path: Path, clusters: int) -> Walk:
    """Do in a report what a person does."""
    times, faults = dict[str, float](), list[Any]()
    async with tab(endpoint, path.as_uri()) as page:
        await size(page, 1440, 900)
        await page.until(FULL)
        paint = "performance.getEntriesByName('first-contentful-paint')"
        await page.until(f"{paint}.length", 1)
        times["first paint"] = await worked(page)

        async def timed(name: str, act: str, done: str) -> None:
            # The first time files are read; every answer counts.
            start = await worked(page)
            await happens(page, act, done)
            times[name] = max(times.get(name, 0.0), await worked(page) - start)

        # 1. Search, filter, sort: all clusters, with their pictures.
        found = "document.getElementById('found').textContent"
        word = synthetic.name_of(clusters - 2)
        await timed(
            "search", set_value("search", f"#{clusters - 2}"), f"{found}.startsWith('1 of ') && {CARDS}.length === 1"
        )
        assert await page.run(f"{CARDS}[0].querySelector('h3').textContent") == word
        await timed("search", set_value("search", ""), f"{found} === '' && {FULL}")
        await timed("filter", set_value("purity-from", "90"), f"{found} !== '' && {FULL}")
        shares = f"{CARDS}.every((card) => parseInt(card.querySelector('.good').textContent) >= 90)"
        assert await page.run(shares)
        await timed("filter", "document.getElementById('ranges').reset()", f"{found} === '' && {FULL}")
        await timed("sort", set_value("sort", "-confidence"), f"{FULL}")
        least = await page.run(
            f"{CARDS}.map((card) => parseInt(card.querySelectorAll('.facts li')[1].textContent) || 0)"
        )
        assert least == sorted(least)
        await timed(
            "sort", set_value("sort", "name"), f"{CARDS}[0].querySelector('h3').textContent === 'amber amber 0'"
        )
        await timed("sort", set_value("sort", "size"), FULL)
        last = f"{CARDS}.some((card) => card.querySelector('.id').textContent === `#${{page.index.id.at(-1)}}`)"
        await timed("scroll", "document.getElementById('list').scrollTop = 1e8", f"{last} && {FULL}")
        assert await page.run(f"{CARDS}.length < 60")  # those in view alone are in the page
        # 2. Levels open downwards.
        await page.run(set_value("level", "1"))
        await page.until(f"{found}.startsWith('{clusters // 100} groups')")
        await page.run(f"{CARDS}[0].querySelector('a').click()")
        await page.until(f"{found}.startsWith('10 groups of 100 of ')")
        await page.run(f"{CARDS}[0].querySelector('a').click()")
        await page.until(f"{found}.startsWith('10 of ')")
        for _ in range(2):
            await page.run("document.getElementById('leave').click()")
        await page.run(set_value("level", "-1"))
        # 3. A cluster's page, a picture, its neighbours.
        near = "document.querySelectorAll('#cluster[open] .near img').length === 5"
        await timed("open", f"{CARDS}[0].querySelector('a').click()", near)
        heads = await page.run("[...document.querySelectorAll('#cluster h3')].map((head) => head.textContent)")
        assert heads == ["Typical", "Borderline", "Outliers", "Nearest clusters"]
        faults += await looks(page, SIZES[1:3])
        large = "document.querySelector('#picture .large img')"
        await timed("enlarge", "document.querySelector('#cluster .tile').click()", f"{large}?.src.startsWith('file:')")
        assert await page.run(f"{large}.naturalWidth") == 320, "the original stands in place of the thumbnail"
        await page.until("document.querySelectorAll('#picture .near img').length", 4)
        faults += await looks(page, SIZES[::3])
        await page.run("document.getElementById('picture').close(); document.getElementById('cluster').close()")
        # 4. The map: hover, click, lasso.
        await page.run("document.getElementById('map').scrollIntoView()")
        await timed("map", "0", "document.getElementById('points').dataset.ready === '1'")
        canvas = "document.getElementById('points')"
        box = await page.run(
            f"(({{ x, y, width, height }}) => [x, y, width, height])({canvas}.getBoundingClientRect())"
        )
        await asyncio.sleep(0.3)
        x, y = await hover(page, box)
        await mouse(page, "mouseMoved", 1, 1)
        await page.until("document.getElementById('tip').hidden")
        move = f"{canvas}.dispatchEvent(new PointerEvent('pointermove', {{ clientX: {x}, clientY: {y} }}))"
        tip = "document.querySelectorAll('#tip img').length === 1 && document.querySelector('#tip span').textContent"
        await timed("hover", move, f"!document.getElementById('tip').hidden && {tip}")
        await page.run("document.getElementById('lasso').click()")
        corners = [(0.2, 0.1), (0.8, 0.1), (0.8, 0.9), (0.2, 0.9)]
        for kind, (right, down) in zip(("mousePressed", *["mouseMoved"] * 3), corners, strict=True):
            await mouse(page, kind, box[0] + box[2] * right, box[1] + box[3] * down)
        start = await worked(page)
        await mouse(page, "mouseReleased", box[0] + box[2] * 0.2, box[1] + box[3] * 0.9)
        await page.until("!document.getElementById('picked').hidden")
        times["lasso"] = await worked(page) - start
        await page.until("document.getElementById('keys').value.includes('\\n')")  # their files are read meanwhile
        said = await page.run("document.querySelector('#picked p').textContent")
        shown = (await page.run("document.getElementById('keys').value")).splitlines()
        # What is saved are all keys, whatever the field shows.
        await page.run("URL.createObjectURL = (blob) => { window.saved = blob; return '#map'; }")
        await page.run("HTMLAnchorElement.prototype.click = () => {}; document.getElementById('save').click()")
        keys = (await page.run("window.saved.text()")).splitlines()
        assert said.startswith(f"{len(keys):,} images of ")
        assert shown == keys[:1000]
        assert all(key.startswith("photos/") for key in keys)
        await page.run("document.getElementById('lasso').click()")
        faults += await looks(page, SIZES)
        return Walk(page, times, faults)


@pytest.mark.parametrize(("clusters", "points"), [(1_000, 20_000), (25_000, 200_000)])
def test_everything_answers_at_once_and_nobody_is_asked(browser: str, tmp_path: Path, clusters: int, points: int):
    (tmp_path / "original.jpg").write_bytes(photo(1, (320, 240)))
    path = synthetic.write(tmp_path, clusters, points, original=str(tmp_path / "original.jpg"))
    assert path.stat().st_size < 5_000_000
    for _ in range(2):  # once more where the processor was slow
        done = asyncio.run(walk(browser, path, clusters))
        assert done.page.errors == []
        assert {asked for asked in done.page.requests if not asked.startswith((tmp_path.as_uri(), "data:"))} == set()
        assert done.faults == []
        slow = {name: taken for name, taken in done.times.items() if taken > LIMITS.get(name, SOON)}
        if not slow:
            break
    assert slow == {}


async def look_at(endpoint: str, path: Path, clusters: int) -> tuple[Page, list[Any]]:
    async with tab(endpoint, path.as_uri()) as page:
        await size(page, 1440, 900)
        await page.until(f"{CARDS}.length === {clusters} && {CARDS}.every((card) => card.querySelector('img'))")
        await page.run("location.hash = '#cluster-0'")
        await page.until("document.querySelectorAll('#cluster[open] .tile img').length >= 8")
        await page.run("document.getElementById('cluster').close()")
        await page.run("document.getElementById('map').scrollIntoView()")
        await page.until("document.getElementById('points').dataset.ready", "1")
        return page, await looks(page, SIZES)


def check_report(endpoint: str, run: Path, clusters: int) -> None:
    page, faults = asyncio.run(look_at(endpoint, run / "report" / "index.html", clusters))
    assert page.errors == []
    assert {asked for asked in page.requests if not asked.startswith((run.as_uri(), "data:"))} == set()
    assert faults == []


def test_a_real_runs_report(browser: str, pictures_run: Sealed):
    check_report(browser, pictures_run.folder, 3)


@pytest.mark.usefixtures("in_process")
def test_the_demos_report(browser: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(demo, "SEEDS", (0,))
    demo.demo(str(tmp_path / "demo"), methods=("kmeans",))
    check_report(browser, tmp_path / "demo" / "run", 10)
