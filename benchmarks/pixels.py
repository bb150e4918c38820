"""Methods that learn from pixels, in minutes on a CPU, against k-means of the pixels themselves.

Claims: on real photographs of 32 × 32 pixels each method is at least 3 points of NMI above k-means on raw pixels in the
mean over 3 seeds, and none collapses; ProPos is above SimCLR and BYOL.

    python benchmarks/pixels.py [--data ../shared/data] [--sets NAME ...] [--methods NAME ...]
        [--rows 3000] [--epochs 20] [--seeds 0 1 2] [--keep FILE]
        [--settings JSON]

imagenette: 3,000 photographs of ten classes; cifar10: 3,000 of its test split, JPEGs. Images are squashed to
the size and given as values from 0 to 1; labels only score. All methods have the network `small`, `preset: short` and
the same number of epochs; the last step counts. The preset's optimiser, rate and temperature were chosen among a few on
imagenette, one seed, by labels as well; cifar10 had no part in it. What FILE has of a call that was cut short with the
same rows and epochs is not trained again.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import sklearn
import sklearn.cluster
import torch

from rayclust.encoders.decode import decode
from rayclust.encoders.pixels import PixelEncoder
from rayclust.encoders.settings import EncoderConfig
from rayclust.methods import find
from rayclust.metrics.external import accuracy, nmi
from rayclust.training.loop import fit_arrays

SETS = {"imagenette": "imagenette_val3k", "cifar10": "cifar10_test"}
METHODS = ("propos", "byol", "simsiam", "simclr", "moco", "pcl", "cc")


def read(folder: Path, rows: int, side: int) -> tuple[np.ndarray, np.ndarray]:
    """Return images as Float32[N side·side·3] and their classes, the same share of every class."""
    labels = np.load(folder / "labels.npy")
    chosen = np.sort(np.random.default_rng(0).permutation(len(labels))[:rows])
    encoder = PixelEncoder(EncoderConfig(name="pixels", image_size=side, normalize=False))
    images = pq.read_table(folder / "images.parquet", columns=["image"])["image"].take(chosen).to_pylist()
    pixels = np.stack([decode(image, encoder.preprocess) for image in images])
    return np.concatenate([encoder.encode_images(part) for part in np.array_split(pixels, 20)]), labels[chosen]


def scores(labels: np.ndarray, found: np.ndarray) -> tuple[float, ...]:
    """Return ACC and NMI, %."""
    return 100 * float(accuracy(labels, found)), 100 * float(nmi(labels, found))


def main() -> None:
    """Print a table for each set."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path(__file__).resolve().parents[2] / "shared" / "data")
    parser.add_argument("--sets", nargs="+", choices=SETS, default=list(SETS))
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--rows", type=int, default=3000)
    parser.add_argument("--side", type=int, default=32)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--keep", type=Path)
    parser.add_argument("--settings", default="", help="of the methods beside the preset, as {KEY: VALUE, ...}")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    print(f"{platform.machine()}, {arguments.threads} threads, Python {platform.python_version()}, ", end="")
    print(f"torch {torch.__version__}, scikit-learn {sklearn.__version__}")
    print(f"{arguments.rows} images of {arguments.side} pixels, {arguments.epochs} epochs, seeds {arguments.seeds}\n")
    print(
        "| set | method | ACC, % | NMI, % | feature deviation · √d | seconds |\n|---|---|---|---|---|---|", flush=True
    )
    for name in arguments.sets:
        x, labels = read(arguments.data / SETS[name], arguments.rows, arguments.side)
        clusters = len(np.unique(labels))
        found = [
            scores(labels, sklearn.cluster.KMeans(clusters, n_init=10, random_state=seed).fit_predict(x))
            for seed in arguments.seeds
        ]
        print(f"| {name} | k-means of pixels | {cells(found)} | | |", flush=True)
        for method in arguments.methods:
            found = [fitted_scores(arguments, name, method, seed, x, labels) for seed in arguments.seeds]
            spread, seconds = np.mean(found, axis=0)[2:]
            row = f"{method} {arguments.settings}".rstrip()
            print(f"| {name} | {row} | {cells(found)} | {spread:.2f} | {seconds:.0f} |", flush=True)


def fitted_scores(
    arguments: argparse.Namespace, name: str, method: str, seed: int, x: np.ndarray, labels: np.ndarray
) -> tuple[float, ...]:
    """Train a method; return ACC and NMI in %, the features' deviation times √d, and the seconds of the training."""
    key = f"{name} {method} seed {seed}, {len(x)} rows of {x.shape[1]}, {arguments.epochs} epochs{arguments.settings}"
    lines = arguments.keep.read_text().splitlines() if arguments.keep and arguments.keep.exists() else []
    kept: dict[str, tuple[float, ...]] = dict(map(json.loads, lines))
    if key not in kept:
        settings = {"name": method, "clusters": len(np.unique(labels)), "preset": "short", "backbone": "small"}
        more = json.loads(arguments.settings or "{}") | {"epochs": arguments.epochs}
        config = find(method).config_type.model_validate(settings | more)
        started = time.perf_counter()
        fitted = fit_arrays(x, None, config, seed)
        seconds, z = time.perf_counter() - started, fitted.transform(torch.from_numpy(x))
        found = fitted.predict_proba(torch.from_numpy(x)).argmax(1).numpy()
        kept[key] = *scores(labels, found), float(z.std(0).mean()) * z.shape[1] ** 0.5, seconds
        if arguments.keep:
            with arguments.keep.open("a") as file:
                file.write(json.dumps([key, kept[key]]) + "\n")
    return kept[key]


def cells(found: list[tuple[float, ...]]) -> str:
    """Return mean and deviation of ACC and of NMI, the first two of each, as two cells."""
    mean, spread = np.mean(found, axis=0)[:2], np.std(found, axis=0)[:2]
    return " | ".join(f"{m:.1f}±{s:.1f}" for m, s in zip(mean, spread, strict=True))


if __name__ == "__main__":
    main()
