"""A real browser, headless, driven by the DevTools protocol."""

from __future__ import annotations

import asyncio
import re
import shutil
import subprocess
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import aiohttp
import axe_core_python

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
AXE = Path(axe_core_python.__file__).with_name("axe.min.js")
WITHOUT = "there is no Chromium on this machine"
"""Why a test skips where `CHROMIUM` is None."""


@contextmanager
def chromium(folder: Path) -> Iterator[str]:
    """Start the browser with its profile below a folder; the value is the address of its protocol."""
    line = [str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
    line += ["--remote-debugging-port=0", f"--user-data-dir={folder / 'profile'}", "about:blank"]
    with subprocess.Popen(line, stderr=subprocess.PIPE, text=True) as browser:
        try:
            assert browser.stderr is not None
            yield next(found[1] for said in browser.stderr if (found := re.search(r"listening on (ws://\S+)", said)))
        finally:
            browser.terminate()


class Page:
    """A tab, driven by its protocol; keeps what went wrong in it and what it asked for."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self._socket, self._number, self._session = socket, 0, ""
        self.errors, self.requests = list[Any](), list[str]()

    async def call(self, method: str, **values: Any) -> Any:
        self._number += 1
        message = {"id": self._number, "method": method, "params": values}
        await self._socket.send_json(message | ({"sessionId": self._session} if self._session else {}))
        while (found := await self._socket.receive_json(timeout=60)).get("id") != self._number:
            kind, event = found.get("method"), found.get("params", {})
            if kind == "Runtime.exceptionThrown" or event.get("entry", {}).get("level") == "error":
                self.errors.append(event)
            if kind == "Network.requestWillBeSent":
                self.requests.append(event["request"]["url"])
        assert "error" not in found, found
        return found["result"]

    async def open(self, url: str) -> None:
        target = (await self.call("Target.createTarget", url="about:blank"))["targetId"]
        self._session = (await self.call("Target.attachToTarget", targetId=target, flatten=True))["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            await self.call(f"{domain}.enable")
        await self.call("Performance.enable", timeDomain="threadTicks")
        await self.call("Page.bringToFront")  # one behind others is not painted
        await self.call("Page.navigate", url=url)

    async def run(self, script: str) -> Any:
        found = await self.call("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    async def until(self, script: str, wanted: Any = True) -> None:
        deadline = time.monotonic() + 20
        while (found := await self.run(script)) != wanted:
            assert time.monotonic() < deadline, f"{script}: {found!r} instead of {wanted!r}"
            await asyncio.sleep(0.05)


@asynccontextmanager
async def tab(endpoint: str, url: str) -> AsyncIterator[Page]:
    """Open an address in a tab of its own, which is closed afterwards."""
    async with aiohttp.ClientSession() as session, session.ws_connect(endpoint, max_msg_size=0) as socket:
        page = Page(socket)
        await page.open(url)
        yield page
        await page.call("Page.close")


async def serious(page: Page) -> list[tuple[str, str]]:
    """What axe finds that is serious: rule and element."""
    if await page.run("typeof axe") == "undefined":
        await page.run(AXE.read_text() + "; 0")
    found = await page.run("axe.run(document, { resultTypes: ['violations'] }).then((found) => found.violations)")
    return [
        (each["id"], node["html"][:200])
        for each in found
        if each["impact"] in ("serious", "critical")
        for node in each["nodes"]
    ]
