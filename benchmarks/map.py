"""Maps of real features: neighbours and classes that stay together, and time, for PaCMAP here and for what others have.

Claim: the map of 3,000 rows by `clustering/pacmap.py` keeps as many classes together as t-SNE does, to two points, in
a third of its time or less; t-SNE keeps more of the nearest neighbours.

    python benchmarks/map.py FOLDER [--seeds 3]

The folder has `features_mnv2a_f16.npy` and `labels.npy`. Rows are centred and scaled to unit length. `neighbours` is
the share of the ten nearest rows (by cosine) that are among the ten nearest on the map, `classes` the share of the ten
nearest on the map that have a row's own class; both are means over rows, and over seeds. `sample` lays out a quarter of
the rows and places the others among their nearest five. Seconds are CPU time of one thread; the authors' package
(`pacmap`) is left out where it is not installed, and its first call, which compiles, stands in brackets.
"""

from __future__ import annotations

import argparse
import platform
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from sklearn.decomposition import PCA
from sklearn.manifold import TSNE

from rayclust.clustering.pacmap import CANDIDATES, near_pairs, place, planar_map
from rayclust.search.knn import RunningTopK


def nearest(
    queries: torch.Tensor, rows: torch.Tensor, k: int, own: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Exact neighbours by cosine."""
    best = RunningTopK(queries, own, k)
    best.update(rows, torch.arange(len(rows)))
    return best.result()


def here(x: torch.Tensor, seed: int) -> np.ndarray:
    """PaCMAP of all rows as the stage does it."""
    ids = torch.arange(len(x))
    return planar_map(x, *nearest(x, x, near_pairs(len(x)) + CANDIDATES, ids), seed)


def sampled(x: torch.Tensor, seed: int) -> np.ndarray:
    """PaCMAP of a quarter of the rows, the others placed."""
    drawn = np.sort(np.random.default_rng(seed).choice(len(x), len(x) // 4, replace=False))
    some = x[drawn]
    laid_out = torch.from_numpy(here(some, seed))
    places = place(laid_out, *nearest(x, some, 5, None))
    places[drawn] = laid_out
    return places.numpy()


def tsne(x: torch.Tensor, seed: int) -> np.ndarray:
    """t-SNE of 50 principal components, as earlier versions drew the map."""
    rows = PCA(50, svd_solver="covariance_eigh").fit_transform(x.double().numpy())
    start = rows[:, :2] / rows[:, 0].std() * 1e-4
    return TSNE(2, init=start, random_state=seed, max_iter=500, angle=0.8, n_jobs=1).fit_transform(rows)


def package(x: torch.Tensor, seed: int) -> np.ndarray:
    """The authors' package with its own defaults."""
    import pacmap

    return pacmap.PaCMAP(n_components=2, random_state=seed).fit_transform(x.numpy())


def measures(x: torch.Tensor, labels: np.ndarray, flat: np.ndarray) -> np.ndarray:
    """Shares of neighbours and of classes that stay together."""
    ids = torch.arange(len(x))
    near = nearest(x, x, 10, ids)[0].numpy()
    distance = torch.cdist(
        torch.from_numpy(np.asarray(flat, np.float64)), torch.from_numpy(np.asarray(flat, np.float64))
    )
    on_map = distance.fill_diagonal_(np.inf).topk(10, dim=1, largest=False)[1].numpy()
    kept = (near[:, :, None] == on_map[:, None, :]).any(2).mean()
    return np.array([kept, (labels[on_map] == labels[:, None]).mean()])


def main() -> None:
    """Print a line for each kind of map."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seeds", type=int, default=3)
    given = parser.parse_args()
    torch.set_num_threads(1)
    features = torch.from_numpy(np.load(given.folder / "features_mnv2a_f16.npy").astype(np.float32))
    labels = np.load(given.folder / "labels.npy")
    x = torch.nn.functional.normalize(features - features.mean(0), dim=1)
    print(f"{platform.machine()}, Python {platform.python_version()}, torch {torch.__version__}, one thread")
    print(
        f"{given.folder.name}: {len(x):,} × {x.shape[1]}\n\n| map | neighbours | classes | seconds |\n|---|---|---|---|"
    )
    kinds: dict[str, Callable[[torch.Tensor, int], np.ndarray]] = {
        "PaCMAP, all rows": here,
        "PaCMAP, a sample of a quarter": sampled,
        "t-SNE, 500 steps": tsne,
        "the package pacmap": package,
    }
    for name, make in kinds.items():
        found, seconds, first = [], [], ""
        try:
            if make is package:
                started = time.process_time()
                make(x, 0)
                first = f" (first {time.process_time() - started:.1f})"
            for seed in range(given.seeds):
                started = time.process_time()
                flat = make(x, seed)
                seconds.append(time.process_time() - started)
                found.append(measures(x, labels, flat))
        except ModuleNotFoundError:
            continue
        kept, classes = np.mean(found, axis=0)
        print(f"| {name} | {kept:.3f} | {classes:.3f} | {np.mean(seconds):.1f}{first} |", flush=True)


if __name__ == "__main__":
    main()
