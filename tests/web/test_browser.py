"""The page in a real browser, headless, by the DevTools protocol."""

from __future__ import annotations

import asyncio
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import aiohttp
import pytest
import uvicorn

from rayclust.config import RunConfig
from rayclust.errors import DataError
from rayclust.web.app import serve
from tests.browser import CHROMIUM, WITHOUT, Page, chromium


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
        target=serve, args=(config,), kwargs={"host": "127.0.0.1", "port": 0, "show": shown.append}
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


async def walk(url: str, endpoint: str) -> Page:
    """Do in the page what a person does."""
    async with aiohttp.ClientSession() as session, session.ws_connect(endpoint, max_msg_size=0) as socket:
        page = Page(socket)
        await page.open(url)
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
        # 5. On a telephone nothing is wider than the screen.
        await page.call("Emulation.setDeviceMetricsOverride", width=390, height=800, deviceScaleFactor=1, mobile=False)
        await page.until("document.documentElement.scrollWidth <= innerWidth")
        await page.run("location.hash = '#/'")
        await page.until("document.querySelectorAll('.card').length", 2)
        await page.until("document.documentElement.scrollWidth <= innerWidth")
        return page


@pytest.mark.skipif(CHROMIUM is None, reason=WITHOUT)
def test_the_persons_walk_in_a_browser(config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with served(config, monkeypatch) as url, chromium(tmp_path) as endpoint:
        page = asyncio.run(walk(url, endpoint))
    assert page.errors == []
    assert page.requests
    assert {asked for asked in page.requests if not asked.startswith(url)} == set()


def test_it_is_served_where_it_says_and_a_taken_port_is_one_line(config: RunConfig, monkeypatch: pytest.MonkeyPatch):
    with served(config, monkeypatch) as url:
        with urllib.request.urlopen(f"{url}api/run", timeout=10) as answer:  # noqa: S310 - loopback
            assert b'"images":24' in answer.read()
        port = int(url.rstrip("/").rpartition(":")[2])
        with pytest.raises(DataError, match=f"--port {port}: cannot listen there"):
            serve(config, host="127.0.0.1", port=port, show=print)
