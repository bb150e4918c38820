"""The screenshots of docs/, of a run over photographs that anybody may show.

    python benchmarks/readme_picture.py --data DATA --out docs/clusters.jpg --work WORK
    python -m tests.report.screenshots WORK docs

The explorer compares that run with one of more clusters, which is made beside it.
"""

from __future__ import annotations

import asyncio
import base64
import subprocess
import sys
from pathlib import Path

from tests.browser import Page, chromium, tab

WIDTH, HEIGHT, QUALITY = 1280, 800, 82
OTHER = 13
"""Clusters of the run to compare with."""


async def shoot(page: Page, path: Path, ready: str) -> None:
    """Write what is on the screen once a condition holds."""
    await page.until(ready)
    await page.until("[...document.images].every((image) => image.complete)")
    await asyncio.sleep(0.5)  # fonts and canvases
    shot = await page.call("Page.captureScreenshot", format="jpeg", quality=QUALITY)
    path.write_bytes(base64.b64decode(shot["data"]))


async def report(endpoint: str, page_file: Path, out: Path) -> None:
    """The list of clusters, a cluster and the map of a report."""
    async with tab(endpoint, page_file.as_uri()) as page:
        await page.call(
            "Emulation.setDeviceMetricsOverride", width=WIDTH, height=HEIGHT, deviceScaleFactor=1, mobile=False
        )
        await shoot(page, out / "report.jpg", "document.querySelectorAll('.card img').length > 12")
        await page.run("document.querySelector('.card a').click()")
        await shoot(
            page, out / "report_cluster.jpg", "document.querySelectorAll('#cluster[open] .near img').length > 1"
        )
        await page.run("document.getElementById('cluster').close(); document.getElementById('map').scrollIntoView()")
        await shoot(page, out / "report_map.jpg", "document.getElementById('points').dataset.ready === '1'")


async def explorer(endpoint: str, url: str, out: Path) -> None:
    """A cluster and the comparison with another run."""
    async with tab(endpoint, url) as page:
        await page.call(
            "Emulation.setDeviceMetricsOverride", width=WIDTH, height=HEIGHT, deviceScaleFactor=1, mobile=False
        )
        await page.until("document.querySelectorAll('.card').length > 2")
        await page.run("document.querySelector('.card a').click()")
        await shoot(page, out / "explore.jpg", "document.querySelectorAll('.tile img').length > 12")
        await page.run("location.hash = '#/compare'")
        await shoot(page, out / "explore_compare.jpg", "document.querySelector('.flows svg') !== null")


def main() -> None:
    """Take all of them."""
    work, out = map(Path, sys.argv[1:])
    rayclust = [sys.executable, "-m", "rayclust"]
    changes = [f"run={work / 'other'}", f"method.clusters={OTHER}"]
    subprocess.run([*rayclust, "run", str(work / "run" / "RUN.yaml"), *changes], check=True)
    line = [*rayclust, "explore", str(work / "run"), "--against", str(work / "other"), "--port", "0"]
    with (
        chromium(work) as endpoint,
        subprocess.Popen(line, stdout=subprocess.PIPE, text=True) as server,
    ):
        assert server.stdout is not None
        url = next(said.strip() for said in server.stdout if said.startswith("http"))
        asyncio.run(report(endpoint, work / "run" / "report" / "index.html", out))
        asyncio.run(explorer(endpoint, url, out))
        server.terminate()


if __name__ == "__main__":
    main()
