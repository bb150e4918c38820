"""Spectral clustering of many codes: memory, time, and agreement with the exact route.

Claim: N = 200,000 codes of width 128 go to labels for K = 100 below 4 GB on 2 cores; where all rows can be solved at
once too, labels from a sample agree with theirs (ARI at least 0.95) on codes that have clusters.

    python benchmarks/spectral_scale.py [--rows 200000] [--clusters 100] [--sites 15000] [--agreement] [--data PATH]

Codes are rows of random four-dimensional subspaces with noise, handed over in blocks that are made anew at each pass.
`--agreement` compares on 10,000 of them and on the features below --data instead.
"""

from __future__ import annotations

import argparse
import os
import platform
import resource
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from rayclust.clustering.spectral import Spectral, partition
from rayclust.metrics.external import accuracy, ari
from rayclust.settings import SpectralOptions

BLOCK = 10_000
FILES = {
    "imagenette-a": ("imagenette_val3k/features_mnv2a_f16.npy", "imagenette_val3k/labels.npy"),
    "cifar10": ("cifar10_test/features_mnv2a_f16.npy", "cifar10_test/labels.npy"),
}


class Planted:
    """Codes in blocks, each from its own seed, so that they need not be held."""

    def __init__(self, rows: int, clusters: int, width: int, noise: float) -> None:
        self.rows, self.clusters, self.noise = rows, clusters, noise
        bases = np.linalg.qr(np.random.default_rng(0).normal(size=(clusters, width, 4)))[0]
        self.bases = torch.from_numpy(bases.astype(np.float32))

    def labels(self) -> np.ndarray:
        """Which subspace each row is from."""
        return np.arange(self.rows) % self.clusters

    def __call__(self) -> Iterator[torch.Tensor]:
        """Float[B d]s."""
        for start in range(0, self.rows, BLOCK):
            random = torch.Generator().manual_seed(start)
            own = torch.arange(start, min(start + BLOCK, self.rows)) % self.clusters
            inside = torch.nn.functional.normalize(torch.randn((len(own), 4), generator=random), dim=1)
            codes = torch.empty((len(own), self.bases.shape[1]))
            for k in range(self.clusters):
                codes[own == k] = inside[own == k] @ self.bases[k].T
            codes += self.noise / codes.shape[1] ** 0.5 * torch.randn(codes.shape, generator=random)
            yield torch.nn.functional.normalize(codes, dim=1)


def peak() -> float:
    """Most memory that the process has had, in GB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def assigned(found: Spectral, blocks: Planted, clusters: int) -> np.ndarray:
    """Labels of all rows, block by block."""
    return np.concatenate([found.assign(block, clusters).argmax(1).numpy() for block in blocks()])


def scale(arguments: argparse.Namespace) -> None:
    """The large run."""
    blocks = Planted(arguments.rows, arguments.clusters, 128, 0.5)
    before = peak()
    options = SpectralOptions(temperature=0.1, dense_rows=arguments.sites)
    start = time.perf_counter()
    found = partition(blocks, arguments.clusters, options)
    solved = time.perf_counter()
    found.labels(arguments.clusters)
    clustered = time.perf_counter()
    labels = assigned(found, blocks, arguments.clusters)
    done = time.perf_counter()
    print(f"{arguments.rows:,} codes × 128, K = {arguments.clusters}, {arguments.sites:,} sites")
    print(f"eigenvectors {solved - start:.1f} s, k-means {clustered - solved:.1f} s, assign {done - clustered:.1f} s")
    print(f"codes to labels {done - start:.1f} s, peak memory {peak():.2f} GB, of it {before:.2f} GB before the start")
    print(f"ACC against the subspaces {100 * accuracy(blocks.labels(), labels):.2f} %")


def compare(name: str, codes: torch.Tensor, labels: np.ndarray, clusters: int, temperature: float) -> None:
    """One row of the table of agreement."""
    exact = partition(lambda: [codes], clusters, SpectralOptions(temperature=temperature))
    whole = exact.labels(clusters).numpy()
    again = exact.labels(clusters, seed=1).numpy()
    cells = [name, f"{len(codes):,}", str(clusters), f"{temperature:g}"]
    cells += [f"{100 * accuracy(labels, whole):.1f}", f"{ari(whole, again):.3f}"]
    for sites in (len(codes) // 4, len(codes) // 2):
        options = SpectralOptions(temperature=temperature, dense_rows=sites)
        own = partition(lambda: [codes], clusters, options).assign(codes, clusters).argmax(1).numpy()
        cells.append(f"{ari(whole, own):.3f} ({100 * accuracy(labels, own):.1f})")
    options = SpectralOptions(temperature=temperature, dense_rows=len(codes) // 4, beyond="tiles")
    own = partition(lambda: [codes], clusters, options).assign(codes, clusters).argmax(1).numpy()
    cells.append(f"{ari(whole, own):.3f} ({100 * accuracy(labels, own):.1f})")
    print(f"| {' | '.join(cells)} |", flush=True)


def agreement(arguments: argparse.Namespace) -> None:
    """Sample and tiles against all rows at once, where all run."""
    routes = "ARI (ACC), sites N/4 | ARI (ACC), N/2 | ARI (ACC), tiles"
    print(f"| codes | N | K | η | ACC of all rows | ARI, other k-means seed | {routes} |")
    print("|---|---|---|---|---|---|---|---|---|")
    for clusters, noise in ((10, 0.5), (100, 0.3), (100, 0.5)):
        blocks = Planted(10_000, clusters, 128, noise)
        compare(f"subspaces, noise {noise}", torch.cat(list(blocks())), blocks.labels(), clusters, 0.1)
    for name, (features, labels) in FILES.items():
        if not (arguments.data / features).exists():
            continue
        x = torch.from_numpy(np.load(arguments.data / features).astype(np.float32))
        codes = torch.nn.functional.normalize(x - x.mean(0), dim=1)
        for temperature in (0.175, 0.1):
            compare(name, codes, np.load(arguments.data / labels), 10, temperature)


def main() -> None:
    """Prints the machine, then one of the two tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=200_000)
    parser.add_argument("--clusters", type=int, default=100)
    parser.add_argument("--sites", type=int, default=15_000)
    parser.add_argument("--agreement", action="store_true")
    parser.add_argument("--data", type=Path, default=Path(__file__).resolve().parents[2] / "shared" / "data")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    print(
        f"{platform.machine()}, {arguments.threads} threads, Python {platform.python_version()}, "
        f"torch {torch.__version__}"
    )
    print(f"python benchmarks/spectral_scale.py{' --agreement' if arguments.agreement else ''}\n")
    (agreement if arguments.agreement else scale)(arguments)


if __name__ == "__main__":
    main()
