"""An epoch of SimCLR on small images: our views and step against torchvision's transforms in a DataLoader.

Claims, at 32 pixels with the network `small`: an epoch is at least 1.5 times as fast as the loop that the papers'
programs have, with the same network, loss, optimiser and precision; and the E-step's k-means takes under 5 % of an
epoch, as it goes on from the centres of the epoch before. Printed beside it: k-means from ten new starts, and the
E-step's other part, one pass of all images through the network.

    python benchmarks/pixels_step.py [--threads 2] [--rows 2560] [--rounds 5] [--batch 128]

The plain loop: a DataLoader of PIL images (as many workers as threads, persistent), two views each by
RandomResizedCrop, flip, ColorJitter, RandomGrayscale, ToTensor and Normalize; then the network, the loss, SGD. Epochs
of both take turns. Images are random; their values do not change the work.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from PIL import Image
from temi_step import processor
from torch import Tensor
from torch.nn import functional
from torchvision import transforms

from rayclust.clustering import kmeans
from rayclust.clustering.settings import KMeansOptions
from rayclust.methods import build
from rayclust.methods.base import Batch
from rayclust.methods.pixels.settings import SimClrConfig
from rayclust.methods.pixels.simclr import SimClr
from rayclust.methods.settings import EMBEDDINGS
from rayclust.training.loop import Stepper
from rayclust.training.sampling import ArrayRows, batch_order

SIDE = 32


class Photos(torch.utils.data.Dataset[tuple[Tensor, Tensor]]):
    """Two views of each image, made one image at a time."""

    def __init__(self, pixels: np.ndarray) -> None:
        self.images = [Image.fromarray(each) for each in pixels]
        jitter = transforms.RandomApply([transforms.ColorJitter(0.4, 0.4, 0.4, 0.1)], p=0.8)
        crop, flip = transforms.RandomResizedCrop(SIDE), transforms.RandomHorizontalFlip()
        grey = transforms.RandomGrayscale(p=0.2)
        normalize = transforms.Normalize((0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
        self.view = transforms.Compose([crop, flip, jitter, grey, transforms.ToTensor(), normalize])

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, place: int) -> tuple[Tensor, Tensor]:
        return self.view(self.images[place]), self.view(self.images[place])


def plain_epoch(method: SimClr, loader: torch.utils.data.DataLoader[tuple[Tensor, Tensor]], lr: float) -> float:
    """Train an epoch as the papers' programs do; return its seconds."""
    optimizer = torch.optim.SGD(method.parameters(), lr=lr, momentum=0.9, weight_decay=5e-4)
    started = time.perf_counter()
    for first, second in loader:
        with method.autocast():
            z = [functional.normalize(method.embedder(view).float(), dim=1) for view in (first, second)]
        both = torch.cat(z)
        logits = (both @ both.T).fill_diagonal_(-torch.inf)
        loss = functional.cross_entropy(logits, torch.arange(len(both)).roll(len(first)))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return time.perf_counter() - started


def our_epoch(stepper: Stepper, x: Tensor, epoch: int) -> float:
    """Train an epoch on rows in memory; return its seconds."""
    plan = stepper.plan
    started = time.perf_counter()
    order = batch_order(len(x), 0, epoch)
    for number, rows in enumerate(order.split(plan.batch_size)):
        stepper.step(Batch({EMBEDDINGS: x[rows][None]}, rows, epoch * plan.steps_per_epoch + number, epoch))
    return time.perf_counter() - started


def seconds_of(work: Callable[[], object]) -> float:
    """Return the seconds that a call takes."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def main() -> None:
    """Print seconds of an epoch of either, and of the E-step."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rows", type=int, default=2560)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batch", type=int, default=128)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    print(f"{processor()}; {arguments.threads} threads, Python {platform.python_version()}, torch {torch.__version__}")
    pixels = np.random.default_rng(0).integers(0, 256, (arguments.rows, SIDE, SIDE, 3)).astype(np.uint8)
    x = torch.from_numpy(pixels.reshape(arguments.rows, -1).astype(np.float32) / 255)
    config = SimClrConfig(clusters=10, backbone="small", batch_size=arguments.batch, epochs=1000, warmup_epochs=0)
    plain, ours = (build(config, x.shape[1], len(x), 0).train() for _ in range(2))
    assert isinstance(plain, SimClr)
    assert isinstance(ours, SimClr)
    loader = torch.utils.data.DataLoader(
        Photos(pixels), arguments.batch, shuffle=True, drop_last=True, num_workers=arguments.threads,
        persistent_workers=True,
    )  # fmt: skip
    stepper = Stepper(ours)
    times: dict[str, list[float]] = {"plain": [], "ours": [], "E-step": [], "k-means": [], "anew": []}
    ours._rows = ArrayRows(x)
    options = KMeansOptions(clusters=config.clusters, restarts=config.restarts)
    for epoch in range(arguments.rounds + 1):
        found = {"plain": plain_epoch(plain, loader, 0.025), "ours": our_epoch(stepper, x, epoch)}
        z, before = ours.eval().transform(x), ours.centers.clone() if epoch else None
        ours.train()
        # Bound now: the loop's next round has other rows.
        found["anew"] = seconds_of(partial(kmeans.fit, partial(list, [z]), options))
        found["k-means"] = seconds_of(partial(kmeans.fit, partial(list, [z]), options, init=before))
        found["E-step"] = seconds_of(ours.e_step)
        for name, seconds in found.items() if epoch else ():  # the first round warms up
            times[name].append(seconds)
    print(f"{arguments.rows} images of {SIDE} pixels, batch {arguments.batch}; seconds of an epoch, min / median / max")
    for name, some in times.items():
        print(f"  {name:<8} {min(some):6.2f} / {statistics.median(some):6.2f} / {max(some):6.2f}")
    ratios = [a / b for a, b in zip(times["plain"], times["ours"], strict=True)]
    shares = {
        name: [a / b for a, b in zip(times[name], times["ours"], strict=True)] for name in ("k-means", "E-step", "anew")
    }
    print(f"ours is {statistics.median(ratios):.1f} times as fast as the plain loop (1.5 claimed), median over rounds")
    goes_on, whole, anew = (statistics.median(shares[name]) for name in ("k-means", "E-step", "anew"))
    print(
        f"the E-step's k-means takes {goes_on:.1%} of an epoch (5 % claimed), from ten new starts {anew:.1%}; ", end=""
    )
    print(f"the whole E-step {whole:.1%}")


if __name__ == "__main__":
    main()
