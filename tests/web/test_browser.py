"""The page in a real browser, headless, by the DevTools protocol."""

from __future__ import annotations

import asyncio
import csv
import threading
import time
import urllib.request
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import uvicorn

from rayclust.config import RunConfig, validate
from rayclust.errors import DataError
from rayclust.export.rows import RunRows
from rayclust.runtime.api import load_run
from rayclust.runtime.pipeline import run_all
from rayclust.web.app import serve
from tests.browser import Page, serious, tab
from tests.stages.in_process import without_ray
from tests.stages.runs import tree


@contextmanager
def served(config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Serve a run from a thread; the value is its address."""
    servers, shown = list[uvicorn.Server](), list[str]()

    class Server(uvicorn.Server):
        def __init__(self, settings: uvicorn.Config) -> None:
            super().__init__(settings)
            servers.append(self)

    monkeypatch.setattr(uvicorn, "Server", Server)
    thread = threading.Thread(
        target=serve, args=(config,), kwargs={"host": "127.0.0.1", "port": 0, "show": shown.append, "against": config}
    )
    thread.start()
    try:
        deadline = time.monotonic() + 60
        while not (servers and servers[0].started):
            assert time.monotonic() < deadline
            assert thread.is_alive()
            time.sleep(0.02)
        yield shown[0]
    finally:
        servers[0].should_exit = True
        thread.join(timeout=20)


Walk = Callable[[Page], Coroutine[Any, Any, None]]


async def walk(page: Page) -> None:
    """Do in the page what a person does."""
    # 1. All clusters; the filter leaves one.
    await page.until("document.querySelectorAll('.card').length", 3)
    field = "document.querySelector('[name=query]')"
    await page.run(f"{field}.value = 'blue'; {field}.dispatchEvent(new Event('input'))")
    await page.until("document.querySelectorAll('.card').length", 1)
    # 2. All its images, and one of them with its neighbours.
    await page.run("document.querySelector('.card a').click()")
    await page.until("document.querySelectorAll('.tile img').length", 8)
    await page.until("[...document.querySelectorAll('.tile img')].every(image => image.naturalWidth > 0)")
    await page.run("document.querySelector('.tile button').click()")
    await page.until("document.querySelectorAll('dialog[open] .near img').length", 5)
    await page.run("document.querySelector('dialog button').click()")
    # 3. A new name, which the list then shows.
    field = "document.querySelector('[name=name]')"
    await page.run(f"{field}.value = '<b>the sea</b>'; {field}.form.requestSubmit()")
    await page.until("document.querySelector('main h2')?.textContent", "<b>the sea</b>")
    await page.run("location.hash = '#/'")
    await page.until("document.querySelector('.card b')?.textContent", "<b>the sea</b>")
    # 4. Two others as one.
    field = "document.querySelector('[name=query]')"
    await page.run(f"{field}.value = ''; {field}.dispatchEvent(new Event('input'))")
    await page.until("document.querySelectorAll('.card').length", 3)
    others = "[...document.querySelectorAll('.card')].filter(card => !card.textContent.includes('sea'))"
    await page.run(f"{others}.forEach(card => card.querySelector('input').click())")
    await page.run("document.querySelector('[name=merge]').click()")
    await page.until("document.querySelectorAll('.tile img').length", 16)
    # 5. Beside the run as it was: what was two clusters is one; a band leads to its images.
    await page.run("location.hash = '#/compare'")
    await page.until("document.querySelectorAll('.flows a').length", 3)
    await page.until("document.querySelector('[data-facts]').textContent.includes('66.7% of the images')")
    assert await serious(page) == []
    follow = "new MouseEvent('click', { bubbles: true, cancelable: true })"
    await page.run(f"document.querySelector('.flows a').dispatchEvent({follow})")
    await page.until("document.querySelectorAll('.tile img').length", 8)
    await page.until("document.querySelector('main h2').textContent.startsWith('8 images in ')")
    # 6. On the map the lasso takes all; they are shown and saved.
    await page.run("location.hash = '#/map'")
    await page.until("document.getElementById('points')?.dataset.ready", "1")
    assert await serious(page) == []
    await page.run("document.getElementById('points').scrollIntoView({ block: 'center' })")
    await page.run("document.getElementById('lasso').click()")
    box = "document.getElementById('points').getBoundingClientRect()"
    left, top, width, height = await page.run(f"(({{ x, y, width, height }}) => [x, y, width, height])({box})")
    corners = [(0, 0), (1, 0), (1, 1), (0, 1)]
    kinds = ["mousePressed", "mouseMoved", "mouseMoved", "mouseMoved", "mouseReleased"]
    for kind, (x, y) in zip(kinds, [*corners, corners[-1]], strict=True):
        place = {"x": left + 12 + x * (width - 24), "y": top + 12 + y * (height - 24)}
        await page.call("Input.dispatchMouseEvent", type=kind, button="left", buttons=1, clickCount=1, **place)
    await page.until(
        "document.querySelector('#picked [role=status]').textContent.startsWith('24 images of 2 clusters')"
    )
    await page.run("document.querySelector('[name=look]').click()")
    await page.until("document.querySelector('main h2').textContent", "24 images in the lasso")
    await page.until("document.querySelectorAll('.tile img').length >= 12")
    # 7. On a telephone nothing is wider than the screen.
    await page.call("Emulation.setDeviceMetricsOverride", width=390, height=800, deviceScaleFactor=1, mobile=False)
    await page.until("document.documentElement.scrollWidth <= innerWidth")
    await page.run("location.hash = '#/'")
    await page.until("document.querySelectorAll('.card').length", 2)
    await page.until("document.documentElement.scrollWidth <= innerWidth")
    assert await serious(page) == []
    await page.run("location.hash = '#/compare'")
    await page.until("document.querySelectorAll('.flows a').length", 3)
    await page.until("document.documentElement.scrollWidth <= innerWidth")


def in_browser(endpoint: str, config: RunConfig, folder: Path, walk: Walk) -> None:
    """Walk through a run's page, beside itself as another run; nothing may fail there, or ask elsewhere."""

    async def done(url: str) -> Page:
        async with tab(endpoint, url) as page:
            await page.call("Browser.setDownloadBehavior", behavior="allow", downloadPath=str(folder))
            await walk(page)
            return page

    with pytest.MonkeyPatch.context() as patch, served(config, patch) as url:
        page = asyncio.run(done(url))
    assert page.errors == []
    assert page.requests
    assert {asked for asked in page.requests if not asked.startswith((url, f"blob:{url}"))} == set()


def test_the_persons_walk_in_a_browser(
    browser: str, config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    in_browser(browser, config, tmp_path, walk)


def test_a_person_who_has_never_seen_it_takes_home_a_table_of_photographs(
    browser: str, shared_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Three classes of real photographs by a real encoder: find, rename, merge, save a selection, take a CSV home."""
    # 1. The run.
    rows = pq.read_table(shared_data / "imagenette_val3k" / "images.parquet", columns=["image", "label"])
    rows = rows.take([300 * label + i for label in (0, 4, 8) for i in range(15)])
    (tmp_path / "photographs").mkdir()
    pq.write_table(rows, tmp_path / "photographs" / "images.parquet")
    weights = shared_data / "encoder" / "mobilenetv2_100_a.safetensors"
    encoder = {"name": "timm/mobilenetv2_100", "pretrained": str(weights), "image_size": 96, "resize": "squash"}
    encoder |= {"options": {"pad_type": "same"}, "mean": [0.5] * 3, "std": [0.5] * 3}
    given = tree(str(tmp_path / "run"), str(tmp_path / "photographs"))
    monkeypatch.setenv("RAYCLUST_SCRATCH", str(tmp_path / "scratch"))
    with pytest.MonkeyPatch.context() as patch:
        without_ray(patch)
        run_all(validate(given | {"encoder": encoder}))

    async def walk(page: Page) -> None:
        # 2. Every image of the first cluster, by scrolling.
        await page.until("document.querySelectorAll('.card').length", 3)
        await page.run("document.querySelector('.card a').click()")
        await page.until("document.querySelectorAll('.tile img').length > 0")
        size = int((await page.run("document.querySelector('[data-facts]').textContent")).split(" · ")[1].split()[0])
        seen = set[str]()
        for _ in range(20):
            await page.until("[...document.querySelectorAll('.tile')].every(tile => tile.querySelector('img'))")
            seen.update(await page.run("[...document.querySelectorAll('.tile img')].map(image => image.alt)"))
            await page.run("scrollBy(0, innerHeight)")
        assert len(seen) == size
        # 3. A name; a selection under one as well.
        field = "document.querySelector('[name=name]')"
        await page.run(f"{field}.value = 'chosen'; {field}.form.requestSubmit()")
        await page.until("document.querySelector('main h2').textContent", "chosen")
        await page.run("window.prompt = () => 'to check'; scrollTo(0, 0)")
        await page.until("document.querySelectorAll('.tile input').length > 1")
        await page.run("[...document.querySelectorAll('.tile input')].slice(0, 2).forEach(box => box.click())")
        await page.run("document.querySelector('[name=save]').click()")
        await page.until("document.getElementById('status').textContent", "2 images saved as to check")
        await page.run("location.hash = '#/selections'")
        await page.until("document.querySelector('main li a')?.textContent", "to check")
        await page.run("document.querySelector('main li a').click()")
        await page.until("document.querySelectorAll('.tile img').length", 2)
        # 4. The two others as one, and their table.
        await page.run("location.hash = '#/'")
        await page.until("document.querySelectorAll('.card').length", 3)
        others = "[...document.querySelectorAll('.card')].filter(card => !card.textContent.includes('chosen'))"
        await page.run(f"{others}.forEach(card => card.querySelector('input').click())")
        await page.run("document.querySelector('[name=merge]').click()")
        await page.until("document.querySelector('main h2')?.textContent.startsWith('Cluster')")
        await page.until(f"document.querySelector('[data-facts]').textContent.includes('{45 - size} images')")
        await page.run("document.querySelector('[name=csv]').click()")
        await page.until("document.getElementById('status').textContent.endsWith('.csv is saved')")
        # 5. How the run came about: after the edits only its report has to be made again.
        await page.run("location.hash = '#/progress'")
        states = "[...document.querySelectorAll('tbody td:nth-child(2)')].map(cell => cell.textContent)"
        await page.until(f"{states}.filter(state => state !== 'done').join()", "outdated")
        deadline = time.monotonic() + 10
        while not list(tmp_path.glob("cluster-*.csv")) and time.monotonic() < deadline:
            await asyncio.sleep(0.05)

    in_browser(browser, validate(given | {"encoder": encoder}), tmp_path, walk)
    [file] = tmp_path.glob("cluster-*.csv")
    with file.open(newline="") as opened:
        table = list(csv.DictReader(opened))
    shown = RunRows(load_run(str(tmp_path / "run"))).table(0)
    assert sorted(row["key"] for row in table) == sorted(
        row["key"] for row in shown.to_pylist() if row["name"] != "chosen"
    )
    assert len({row["cluster"] for row in table}) == 1


def test_it_is_served_where_it_says_and_a_taken_port_is_one_line(config: RunConfig, monkeypatch: pytest.MonkeyPatch):
    with served(config, monkeypatch) as url:
        with urllib.request.urlopen(f"{url}api/run", timeout=10) as answer:  # noqa: S310 - loopback
            assert b'"images":24' in answer.read()
        port = int(url.rstrip("/").rpartition(":")[2])
        with pytest.raises(DataError, match=f"--port {port}: cannot listen there"):
            serve(config, host="127.0.0.1", port=port, show=print)
