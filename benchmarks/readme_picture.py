"""The picture on README's first screen: named clusters of a real run, with pixels that anybody may show.

Takes crops of ten photographs of things that come with scikit-learn (CC BY 2.0: china.jpg by danielbuechele, flower.jpg
by vultilion) and scikit-image (CC0, public domain or without known restrictions: see the docstrings of `skimage.data`),
runs `rayclust quick` on them, and draws each cluster with name, size and most typical crops. Nothing is chosen by hand
but the photographs and K. The encoder and the words are those of the folder of shared data: a small network that
was trained on ImageNet, and ImageNet's classes with all that WordNet has above them.

    pip install scikit-image
    python benchmarks/readme_picture.py --data DATA --out docs/clusters.jpg
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib import pyplot as plt
from PIL import Image

import rayclust as rc

PHOTOS = {
    "sklearn/datasets/images": ("china.jpg", "flower.jpg"),
    "skimage/data": (
        *("astronaut.png", "camera.png", "chelsea.png", "coffee.png", "coins.png", "hubble_deep_field.jpg"),
        *("retina.jpg", "rocket.jpg"),
    ),
}
"""By package and folder."""
CLUSTERS = 10
CROPS, SIDE, SHOWN = 60, 192, 7
"""Crops of each photograph, side of a crop in pixels, and crops of each cluster in the picture."""


def _photographs() -> list[Path]:
    """Return the photographs' paths in the packages that bring them."""
    found = []
    for place, names in PHOTOS.items():
        package, _, folder = place.partition("/")
        spec = find_spec(package)
        if spec is None or not spec.submodule_search_locations:
            raise SystemExit("pip install scikit-image: most of the photographs come with it")
        found += [Path(spec.submodule_search_locations[0]) / folder / name for name in names]
    return found


def write_crops(folder: Path) -> None:
    """Write seeded square crops of every photograph, of 40 to 80 % of its shorter side, half of them mirrored."""
    rng = np.random.default_rng(0)
    for path in _photographs():
        photo = Image.open(path).convert("RGB")
        for number in range(CROPS):
            side = int(min(photo.size) * rng.uniform(0.4, 0.8))
            left, top = (int(rng.integers(0, length - side + 1)) for length in photo.size)
            crop = photo.crop((left, top, left + side, top + side)).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
            if rng.random() < 0.5:
                crop = crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
            crop.save(folder / f"{path.stem}-{number:02d}.jpg", quality=92)


def draw(run: rc.runtime.results.RunTables, path: Path) -> None:
    """Draw the clusters in two columns, largest first."""
    mpl.use("Agg")
    clusters = run.frame("clusters").sort_values("size", ascending=False, kind="stable")
    rows = (len(clusters) + 1) // 2
    widths = [1.0] * SHOWN + [0.3] + [1.0] * SHOWN
    figure, axes = plt.subplots(
        rows, len(widths), figsize=(12, 1.04 * rows), dpi=110, gridspec_kw={"width_ratios": widths}
    )
    for axis in axes.flat:
        axis.axis("off")
    for place, cluster in enumerate(clusters.itertuples()):
        row, first = place // 2, (place % 2) * (SHOWN + 1)
        for column, image in enumerate(run.images(list(cluster.exemplars)[:SHOWN])):
            axes[row, first + column].imshow(image)
        axes[row, first].set_title(f"{cluster.name}  ·  {cluster.size} images", loc="left", fontsize=10, pad=3)
    figure.subplots_adjust(0.005, 0.005, 0.995, 0.96, 0.03, 0.28)
    figure.savefig(path, pil_kwargs={"quality": 85})


def main() -> None:
    """Make the crops, run rayclust on them, draw."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", required=True, type=Path, help="the folder of shared data: encoder/ and vocab/")
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--work", type=Path, help="where crops and run are left; else they are removed")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        work = given.work or Path(scratch)
        (work / "photos").mkdir(parents=True, exist_ok=True)
        write_crops(work / "photos")
        settings = {
            "encoder.pretrained": given.data / "encoder" / "mobilenetv2_100_a.safetensors",
            "encoder.options": "{pad_type: same}",
            "encoder.image_size": 160,
            "encoder.resize": "squash",
            "encoder.mean": "[0.5, 0.5, 0.5]",
            "encoder.std": "[0.5, 0.5, 0.5]",
            "images.labels": "none",
            "label.vocabulary": given.data / "vocab" / "synsets_a.parquet",
        }
        command = [sys.executable, "-m", "rayclust", "quick", str(work / "photos"), "--out", str(work / "run")]
        command += ["--clusters", str(CLUSTERS), "--encoder", "timm/mobilenetv2_100"]
        subprocess.run(command + [f"{key}={value}" for key, value in settings.items()], check=True)
        draw(rc.load(str(work / "run")), given.out)


if __name__ == "__main__":
    main()
