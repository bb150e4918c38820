"""An epoch on small images: SimCLR against torchvision's transforms in a DataLoader, BYOL against lightly, E-steps.

Claims, at 32 pixels with the network `small`: an epoch of SimCLR is at least 1.5 times as fast as the loop that the
papers' programs have, with the same network, loss, optimiser and precision; so is one of BYOL beside lightly's parts in
the same loop; and the E-step of ProPos, after every epoch, takes under 5 % of it with `e_step_rows: views`, as
`preset: short` has it (with `images`, as published, it takes 7 to 9 %: see the report).

    python benchmarks/pixels_step.py [--threads 2] [--rows 2560] [--rounds 5] [--batch 128] [--backbone small]
        [--parts propos simclr byol views]

The plain loop: a DataLoader of PIL images (as many workers as threads, persistent), two views each by
RandomResizedCrop, flip, ColorJitter, RandomGrayscale, ToTensor and Normalize; then the network, the loss, SGD. Epochs
of both take turns. ProPos learns stripes of ten directions at random places, periods and colours (`benchmarks/gpu.py`
does the same on a GPU). Beside its E-step: the pass through the network as training holds it, and k-means. With one
thread seconds are those of CPU, of a loader without workers: they hold on a machine that others use as well. BYOL needs
lightly (`pip install lightly`), which is no dependency; `views`, SimCLR's views of a batch alone by our transforms,
kornia's and torchvision's, needs kornia (`pip install kornia`), which is none either.
"""

from __future__ import annotations

import argparse
import math
import platform
import statistics
import time
from collections.abc import Callable

import numpy as np
import torch
from PIL import Image
from temi_step import processor
from torch import Tensor
from torch.nn import functional
from torchvision import transforms
from torchvision.transforms import v2

from rayclust.clustering import kmeans
from rayclust.methods import build
from rayclust.methods.base import Batch
from rayclust.methods.pixels.augment import SIMCLR, draw, random_view
from rayclust.methods.pixels.base import PixelMethod
from rayclust.methods.pixels.byol import Byol
from rayclust.methods.pixels.propos import ProPos
from rayclust.methods.pixels.settings import ByolConfig, PixelConfig, ProPosConfig, SimClrConfig
from rayclust.methods.settings import EMBEDDINGS
from rayclust.metrics.external import nmi
from rayclust.settings import KMeansOptions
from rayclust.training.loop import Stepper
from rayclust.training.sampling import ArrayRows, batch_order

SIDE = 32
View = Callable[[Image.Image], Tensor]


def now() -> float:
    """Return seconds: of CPU where one thread does all the work of this process, else of the clock."""
    is_alone = torch.get_num_threads() == 1 and not torch.cuda.is_available()
    return time.process_time() if is_alone else time.perf_counter()


class Photos(torch.utils.data.Dataset[tuple[Tensor, Tensor]]):
    """Two views of each image, made one image at a time."""

    def __init__(self, pixels: np.ndarray, view: View) -> None:
        self.images, self.view = [Image.fromarray(each) for each in pixels], view

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, place: int) -> tuple[Tensor, Tensor]:
        return self.view(self.images[place]), self.view(self.images[place])


def torchvision_view() -> View:
    """Return SimCLR's view of a small image, of torchvision's transforms."""
    jitter = transforms.RandomApply([transforms.ColorJitter(0.4, 0.4, 0.4, 0.1)], p=0.8)
    crop, flip = transforms.RandomResizedCrop(SIDE), transforms.RandomHorizontalFlip()
    normalize = transforms.Normalize((0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
    view: View = transforms.Compose(
        [crop, flip, jitter, transforms.RandomGrayscale(p=0.2), transforms.ToTensor(), normalize]
    )
    return view


def plain_epoch(
    loss_of: Callable[[Tensor, Tensor], Tensor],
    parameters: list[Tensor],
    loader: torch.utils.data.DataLoader[tuple[Tensor, Tensor]],
) -> float:
    """Train an epoch as the papers' programs do; return its seconds."""
    optimizer = torch.optim.SGD(parameters, lr=0.025, momentum=0.9, weight_decay=5e-4)
    started = now()
    for first, second in loader:
        loss = loss_of(first, second)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return now() - started


def our_epoch(stepper: Stepper, x: Tensor, epoch: int) -> tuple[float, float]:
    """Train an epoch on rows in memory; return its seconds and its mean loss."""
    plan = stepper.plan
    started = now()
    order, losses = batch_order(len(x), 0, epoch).to(x.device), []
    for number, rows in enumerate(order.split(plan.batch_size)[: plan.steps_per_epoch]):
        batch = Batch({EMBEDDINGS: x[rows][None]}, rows, epoch * plan.steps_per_epoch + number, epoch)
        losses.append(stepper.step(batch)["loss"])
    loss = float(torch.stack(losses).mean())  # waits for a GPU
    return now() - started, loss


def stripes(count: int) -> tuple[Tensor, Tensor]:
    """Return stripes as rows Float32[N D], with noise, and which of ten directions they have."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(count) % 10
    period, phase, *colors = torch.rand((8, count), generator=generator)
    angle, grid = labels * math.pi / 10, torch.arange(SIDE)
    along = angle.cos()[:, None, None] * grid + angle.sin()[:, None, None] * grid[:, None]
    share = ((2 * math.pi * (along / (4 + 4 * period[:, None, None]) + phase[:, None, None])).sin() > 0).float()
    first, second = torch.stack(colors, 1).view(count, 2, 1, 1, 3).unbind(1)
    images = share[..., None] * first + (1 - share[..., None]) * second
    images += 0.05 * torch.randn(images.shape, generator=generator)
    return images.clamp_(0, 1).flatten(1), labels


def propos_epochs(backbone: str, rows: int, batch: int, rounds: int, device: str, e_step_rows: str = "images") -> None:
    """Print images per second of ProPos' steps and E-steps, their shares, the loss and the NMI, epoch by epoch."""
    x, labels = stripes(rows)
    settings = {"clusters": 10, "backbone": backbone, "batch_size": batch, "epochs": rounds + 2, "warmup_epochs": 1}
    settings["e_step_rows"] = e_step_rows
    method = build(ProPosConfig.model_validate(settings), x.shape[1], rows, 0).to(device).train()
    assert isinstance(method, ProPos)
    x = x.to(device)
    method._rows = ArrayRows(x)
    method._start()
    stepper, shares = Stepper(method), []
    print(f"ProPos, {backbone}, {rows} images of {SIDE} pixels, batch {batch}, {device}; images/s")
    print(f"E-steps of {e_step_rows}")
    print("  epoch     steps    E-step  as trained   k-means   E-step's share     loss   NMI", flush=True)
    options = KMeansOptions(clusters=method.config.clusters)
    for epoch in range(rounds + 1):
        training, loss = our_epoch(stepper, x, epoch)
        whole = seconds_of(method.e_step)
        method.eval()
        with method.autocast():
            started = now()
            z = method.transform(x)
            float(z[0, 0])
        plain = now() - started
        method.train()
        cut = seconds_of(lambda z=z: kmeans.fit(lambda: [z], options, init=method.centers).inertia)
        shares.append(whole / training)
        rates = "".join(f"{rows / seconds:10.0f}" for seconds in (training, whole, plain, cut))
        agreement = nmi(labels.numpy(), method.labels.cpu().numpy())
        print(f"  {epoch:>5}{rates}{whole / training:16.1%}{loss:12.4f}{agreement:6.2f}", flush=True)
    print(
        f"the E-step takes {statistics.median(shares[1:]):.1%} of an epoch's steps, median without the first",
        flush=True,
    )


def seconds_of(work: Callable[[], object]) -> float:
    """Return the seconds that a call takes."""
    started = now()
    work()
    return now() - started


def main() -> None:
    """Print ProPos' epochs, then SimCLR's and BYOL's beside those of plain loops."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rows", type=int, default=2560)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--backbone", default="small")
    parser.add_argument(
        "--parts", nargs="+", choices=("propos", "simclr", "byol", "views"), default=["propos", "simclr"]
    )
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    print(f"{processor()}; {arguments.threads} threads, Python {platform.python_version()}, torch {torch.__version__}")
    if "propos" in arguments.parts:
        for rows in ("images", "views"):
            propos_epochs(arguments.backbone, arguments.rows, arguments.batch, arguments.rounds, "cpu", rows)
    if "simclr" in arguments.parts:
        against(arguments, SimClrConfig, plain_simclr)
    if "byol" in arguments.parts:
        against(arguments, ByolConfig, lightly_byol)
    if "views" in arguments.parts:
        views_alone(arguments.batch, arguments.rounds)


def views_alone(batch: int, rounds: int) -> None:
    """Print microseconds an image of SimCLR's view of a batch: ours, kornia's, and torchvision's image by image."""
    import kornia

    x, seeds = torch.rand((batch, 3, SIDE, SIDE)), iter(range(1_000_000))
    jitter, crop = (0.4, 0.4, 0.4, 0.1), {"scale": (0.08, 1.0)}
    of_batches = kornia.augmentation.AugmentationSequential(
        kornia.augmentation.RandomResizedCrop((SIDE, SIDE), **crop), kornia.augmentation.RandomHorizontalFlip(),
        kornia.augmentation.ColorJitter(*jitter, p=0.8), kornia.augmentation.RandomGrayscale(p=0.2),
    )  # fmt: skip
    of_images = v2.Compose(
        [
            v2.RandomResizedCrop(SIDE, **crop, antialias=True), v2.RandomHorizontalFlip(),
            v2.RandomApply([v2.ColorJitter(*jitter)], 0.8), v2.RandomGrayscale(0.2),
        ]
    )  # fmt: skip
    makers: dict[str, Callable[[], Tensor]] = {
        "ours": lambda: random_view(x, SIMCLR[0], draw(batch, next(seeds))),
        f"kornia {kornia.__version__}": lambda: of_batches(x),
        "torchvision v2, image by image": lambda: torch.stack([of_images(image) for image in x]),
    }
    times: dict[str, list[float]] = {name: [] for name in makers}
    for number in range(rounds + 1):
        for name, make in makers.items():
            seconds = seconds_of(lambda make=make: [make() for _ in range(10)])
            times[name] += [seconds] if number else []  # the first round warms up
    print(f"SimCLR's view of {batch} images of {SIDE} pixels; microseconds an image, min / median / max")
    for name, some in times.items():
        low, middle, high = (1e5 * value / batch for value in (min(some), statistics.median(some), max(some)))
        print(f"  {name:<32} {low:6.0f} / {middle:6.0f} / {high:6.0f}")


def plain_simclr(method: PixelMethod) -> tuple[Callable[[Tensor, Tensor], Tensor], View]:
    """Return SimCLR's loss of two views by a method's network, and torchvision's view."""

    def loss_of(first: Tensor, second: Tensor) -> Tensor:
        with method.autocast():
            z = [functional.normalize(method.embedder(view).float(), dim=1) for view in (first, second)]
        both = torch.cat(z)
        logits = (both @ both.T).fill_diagonal_(-torch.inf)
        return functional.cross_entropy(logits, torch.arange(len(both)).roll(len(first)))

    return loss_of, torchvision_view()


def lightly_byol(method: PixelMethod) -> tuple[Callable[[Tensor, Tensor], Tensor], View]:
    """Return BYOL's loss of two views by a method's networks with lightly's loss and moving average, and its view."""
    from lightly.loss import NegativeCosineSimilarity
    from lightly.models.utils import update_momentum
    from lightly.transforms.simclr_transform import SimCLRViewTransform

    assert isinstance(method, Byol)
    criterion = NegativeCosineSimilarity()

    def loss_of(first: Tensor, second: Tensor) -> Tensor:
        update_momentum(method.online, method.target, m=0.996)
        with method.autocast():
            p0, p1 = (method.predictor(method.online(view)) for view in (first, second))
            with torch.no_grad():
                z0, z1 = (method.target(view) for view in (first, second))
        loss: Tensor = 0.5 * (criterion(p0.float(), z1.float()) + criterion(p1.float(), z0.float()))
        return loss

    return loss_of, SimCLRViewTransform(input_size=SIDE, cj_strength=0.5, gaussian_blur=0.0)


def against(
    arguments: argparse.Namespace,
    config_type: type[PixelConfig],
    plain_parts: Callable[[PixelMethod], tuple[Callable[[Tensor, Tensor], Tensor], View]],
) -> None:
    """Print seconds of an epoch of a plain loop and of ours in turns, with the same network, loss and optimiser."""
    pixels = np.random.default_rng(0).integers(0, 256, (arguments.rows, SIDE, SIDE, 3)).astype(np.uint8)
    x = torch.from_numpy(pixels.reshape(arguments.rows, -1).astype(np.float32) / 255)
    settings = {"clusters": 10, "backbone": arguments.backbone, "batch_size": arguments.batch}
    config = config_type.model_validate(settings | {"epochs": 1000, "warmup_epochs": 0})
    plain, ours = (build(config, x.shape[1], len(x), 0).train() for _ in range(2))
    assert isinstance(plain, PixelMethod)
    loss_of, view = plain_parts(plain)
    workers = arguments.threads if arguments.threads > 1 else 0
    loader = torch.utils.data.DataLoader(
        Photos(pixels, view), arguments.batch, shuffle=True, drop_last=True, num_workers=workers,
        persistent_workers=workers > 0,
    )  # fmt: skip
    stepper, parameters = Stepper(ours), [p for p in plain.parameters() if p.requires_grad]
    times: dict[str, list[float]] = {"plain": [], "ours": []}
    for epoch in range(arguments.rounds + 1):
        found = {"plain": plain_epoch(loss_of, parameters, loader), "ours": our_epoch(stepper, x, epoch)[0]}
        for name, seconds in found.items() if epoch else ():  # the first round warms up
            times[name].append(seconds)
    print(f"{config.name}, {arguments.rows} images, batch {arguments.batch}; seconds of an epoch, min / median / max")
    for name, some in times.items():
        print(f"  {name:<8} {min(some):6.2f} / {statistics.median(some):6.2f} / {max(some):6.2f}")
    ratios = [a / b for a, b in zip(times["plain"], times["ours"], strict=True)]
    beside = "lightly's parts in a DataLoader loop" if plain_parts is lightly_byol else "the plain loop"
    print(f"ours is {statistics.median(ratios):.1f} times as fast as {beside} (1.5 claimed), median over rounds")


if __name__ == "__main__":
    main()
