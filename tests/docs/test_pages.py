"""Pages at the top link to files that are there; the site is built with warnings as errors by `make check`."""

from __future__ import annotations

import re
from pathlib import Path

import yaml

import rayclust

ROOT = Path(__file__).resolve().parents[2]


def _slug(heading: str) -> str:
    return re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-")


def test_links_of_the_pages_at_the_top_lead_somewhere():
    links = [
        (page, link)
        for page in ROOT.glob("*.md")
        for link in re.findall(r"\]\((?!https?://)([^)\s]+)\)", page.read_text())
    ]
    assert len(links) > 20
    missing = []
    for page, link in links:
        path, _, anchor = link.partition("#")
        target = ROOT / path if path else page
        headings = re.findall(r"(?m)^#+ (.*)$", target.read_text()) if anchor and target.exists() else []
        if not target.exists() or (anchor and anchor not in map(_slug, headings)):
            missing.append((page.name, link))
    assert missing == []


def test_the_citation_names_the_version():
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == rayclust.__version__


def test_every_page_is_in_the_sites_navigation():
    named = (ROOT / "mkdocs.yml").read_text()
    pages = {path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs").rglob("*.md")}
    assert {page for page in pages if f": {page}\n" not in named} == set()
