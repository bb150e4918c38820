"""Reports of any number of clusters, without a run: `python -m tests.report.synthetic 25000 FOLDER`."""

from __future__ import annotations

import sys
from functools import lru_cache
from pathlib import Path

import numpy as np

from rayclust.report import model, page, thumbnails
from tests.report.pages import photo

WORDS = (
    "amber",
    "basil",
    "cedar",
    "dune",
    "elk",
    "fern",
    "gull",
    "hazel",
    "iris",
    "jade",
    "kelp",
    "lark",
    "moss",
    "newt",
)
POOL = 97


@lru_cache(POOL)
def small(number: int) -> bytes:
    return thumbnails.thumbnail(photo(number, (80, 64)), 64)


def name_of(cluster: int) -> str:
    return f"{WORDS[cluster % 14]} {WORDS[cluster // 14 % 14]} {cluster // 196}"


def synthetic(clusters: int, points: int = 3000, pictures: int = 4, original: str = "") -> model.ReportData:
    """A report of named clusters in two coarser levels, some without names, with labels and a map."""
    rng = np.random.default_rng(0)
    sizes = np.sort(rng.zipf(1.5, clusters).clip(max=5000) + 9)[::-1].tolist()
    purity, confidence = rng.random((2, clusters)).tolist()
    levels = tuple(k for k in (clusters // 10, clusters // 100) if k > 1)

    def picture(cluster: int, place: int) -> model.Picture:
        row, other = 10 * cluster + place, (cluster + 1) % clusters
        near = [(10 * cluster + each, cluster, 0.9) for each in range(pictures) if each != place]
        return model.Picture(
            key=f"photos/{row:07d}.jpg",
            thumbnail=small((7 * cluster + place) % POOL),
            confidence=0.9 - 0.1 * place,
            row=row,
            label=WORDS[(cluster + place // 3) % 14],
            uri=original or f"s3://bucket/photos/{row:07d}.jpg",
            neighbors=(*near, (10 * other, other, 0.5)),
        )

    def gallery(cluster: int) -> model.Gallery:
        shown = [picture(cluster, place) for place in range(pictures)]
        return model.Gallery(typical=tuple(shown[:-2]), borderline=tuple(shown[-2:-1]), outliers=tuple(shown[-1:]))

    found = tuple(
        model.Cluster(
            id=k,
            size=sizes[k],
            name=None if k % 50 == 49 else name_of(k),
            score=0.3,
            majority=WORDS[k % 14],
            runners_up=((f"{WORDS[(k + 1) % 14]} next", 0.25), (WORDS[(k + 2) % 14], 0.2)),
            purity=purity[k],
            confidence=confidence[k],
            nearest=tuple(((k + 1 + i) % clusters, 0.8 - 0.1 * i) for i in range(5)),
            parents=tuple(k % level for level in levels),
        )
        for k in range(clusters)
    )
    of = rng.integers(0, clusters, points)
    centers = rng.normal(size=(clusters, 2))
    x, y = (centers[of] + 0.04 * rng.normal(size=(points, 2))).T
    rows = 10 * of + rng.integers(0, 4, points)
    keys = [f"photos/{row:07d}.jpg" for row in rows.tolist()]
    reject = {"key": "a.jpg", "uri": "s3://b/a.jpg", "detail": "cut"}
    return model.ReportData(
        run="runs/photos",
        title="photos",
        images=int(sum(sizes)),
        encoder="pixels",
        dimension=64,
        classes=14,
        methods=(model.MethodResult(name="kmeans", metrics={"nmi": 0.5}),),
        clusters=found,
        gallery=gallery,
        levels=levels,
        points=model.MapPoints(row=rows, cluster=of, x=x, y=y, keys=keys, text="Neighbours are alike."),
        stages=(model.StageTime(name="encode", seconds=30.0, count=60, workers=4, busy=90.0),),
        rejects=(model.RejectGroup(reason="truncated", count=1, examples=(reject,)),),
    )


def write(folder: Path, clusters: int, points: int = 3000, original: str = "") -> Path:
    """Write the page of a synthetic report; return it."""

    def put(name: str, content: bytes) -> None:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)

    page.write(synthetic(clusters, points, original=original), put)
    return folder / "index.html"


if __name__ == "__main__":
    write(Path(sys.argv[2]), int(sys.argv[1]), int(sys.argv[3]) if len(sys.argv) > 3 else 3000)
