"""TEMI beside the published program itself: the same first weights, pairs and steps, head by head.

    python benchmarks/temi_parity.py PROGRAM [--data ../shared/data] [--seed 0] [--steps 1000] [--report FILE]
    python benchmarks/temi_parity.py --own SEED ... [--report FILE]

Claim: from the program's own weights and pairs, every head's accuracy here is within a point of the program's after
every hundredth step, and the same head is kept. PROGRAM is a checkout of the published program (arXiv 2303.17896), of
which the heads, the loss, the schedule and the parameter groups are run as they are. Rows are imagenette's by encoder
a, float32, minus their mean, of length 1; settings are those of its README but for the batch of 512 and the 200 epochs
of the run in ../shared/data/README.md: 16 heads from chance, 50 neighbours, β 0.6, rate 2e-4 after 20 epochs.
Matrix products of both are in bf16. Labels only score. With `--own` this library trains alone, from first weights and
pairs of its own draw.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import platform
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from temi_accuracy import Case, cases
from torch import Tensor, nn

from rayclust.methods.base import Batch
from rayclust.methods.settings import EMBEDDINGS
from rayclust.methods.temi import Temi
from rayclust.methods.temi_settings import TemiConfig
from rayclust.metrics.external import accuracy
from rayclust.training.loop import Stepper, fit_arrays

EPOCHS, BATCH, HEADS, BETA, RATE, WARMUP, MOMENTUM = 200, 512, 16, 0.6, 1e-4, 20, 0.996


class Program:
    """The published program's heads, loss and optimiser, on rows at hand.

    Args:
        folder: the checkout.
        found: the rows.
        seed: of weights and pairs, as the program sets it.
    """

    def __init__(self, folder: Path, found: Case, seed: int) -> None:
        sys.path.insert(0, str(folder))  # its modules import each other by their bare names
        warnings.simplefilter("ignore")  # of torch, about what the program uses
        self.utils, losses = (importlib.import_module(name) for name in ("utils", "losses"))
        heads = self._alone(folder / "model_builders" / "multi_head.py")  # the package's other half wants CLIP
        self.utils.fix_random_seeds(seed)
        sizes = {"embed_dim": found.x.shape[1], "out_dim": found.clusters, "num_heads": HEADS, "nlayers": 2}
        sizes |= {"hidden_dim": 512, "bottleneck_dim": 256}
        self.student, self.teacher = (heads.MultiHeadClassifier("none", **sizes) for _ in range(2))
        self.teacher.load_state_dict(self.student.state_dict())
        self.teacher.requires_grad_(False)
        schedule = {
            "warmup_teacher_temp": 0.1,
            "teacher_temp": 0.1,
            "warmup_teacher_temp_epochs": 30,
            "nepochs": EPOCHS,
        }
        self.loss = losses.TEMI(out_dim=found.clusters, batchsize=BATCH, beta=BETA, num_heads=HEADS, **schedule)
        self.optimizer = torch.optim.AdamW(self.utils.get_params_groups(self.student.head))
        self.steps_per_epoch = len(found.x) // BATCH
        rate = RATE * BATCH / 256
        self.rates = self.utils.cosine_scheduler(rate, rate, EPOCHS, self.steps_per_epoch, warmup_epochs=WARMUP)
        self._sums = self.losses = torch.zeros(HEADS)

    @staticmethod
    def _alone(path: Path) -> ModuleType:
        spec = importlib.util.spec_from_file_location(path.stem, path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    def step(self, views: Tensor, step: int) -> None:
        """Take one step on Float32[2 B D]."""
        epoch, place = divmod(step, self.steps_per_epoch)
        for number, group in enumerate(self.optimizer.param_groups):
            group["lr"] = self.rates[step]
            group["weight_decay"] = 1e-4 * (number == 0)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            rows = self.teacher.backbone_embed(list(views))
            taught, learnt = self.teacher.apply_head(rows), self.student.apply_head(rows)
        found = self.loss([one.float() for one in learnt], [one.float() for one in taught], epoch=epoch)
        self.optimizer.zero_grad()
        found.mean().backward()
        self.utils.cancel_gradients_last_layer(epoch, self.student, 1)
        self.optimizer.step()
        with torch.no_grad():
            for leader, follower in zip(self.student.head.parameters(), self.teacher.head.parameters(), strict=True):
                follower.mul_(MOMENTUM).add_((1 - MOMENTUM) * leader)
        self._sums = found.detach() if place == 0 else self._sums + found.detach()
        if place == self.steps_per_epoch - 1:
            self.losses = self._sums
            self.teacher.head.set_losses(self.losses)

    @torch.no_grad()
    def labels(self, x: Tensor) -> np.ndarray:
        """Clusters by each head of the teacher, Int64[H N]."""
        return np.stack([head(x).argmax(1).numpy() for head in self.teacher.head.heads])

    @property
    def best(self) -> int:
        """The head that is kept."""
        return int(self.teacher.head.best_head_idx)


def settings(clusters: int) -> TemiConfig:
    """The published settings in this library's words."""
    written = {"preset": "readme", "warm_start": "none", "epochs": EPOCHS, "batch_size": BATCH, "keep_heads": True}
    return TemiConfig.model_validate({"clusters": clusters, **written})


class Ours:
    """The same training by this library, from the program's first weights."""

    def __init__(self, program: Program, found: Case, seed: int) -> None:
        self.method = Temi(settings(found.clusters), found.x.shape[1], len(found.x), seed)
        student = self.method.student
        with torch.no_grad():
            for h, head in enumerate(program.student.head.heads):
                layers = [layer for layer in head.mlp if isinstance(layer, nn.Linear)]
                for weight, bias, layer in zip(student.weights, student.biases, layers, strict=True):
                    weight[h].copy_(layer.weight)
                    bias[h].copy_(layer.bias)
                student.direction[h].copy_(head.last_layer.weight_v)
                student.scale[h].copy_(head.last_layer.weight_g[:, 0])
        self.method.teacher.load_state_dict(student.state_dict())
        self.stepper = Stepper(self.method)
        self._sums: dict[str, Any] = {}

    def step(self, views: Tensor, rows: Tensor, step: int) -> None:
        """Take one step on Float32[2 B D] of some rows and their neighbours."""
        epoch, place = divmod(step, self.method.plan.steps_per_epoch)
        found = self.stepper.step(Batch({EMBEDDINGS: views}, rows, step, epoch))
        self._sums = {name: value + (self._sums[name] if place else 0) for name, value in found.items()}
        if place == self.method.plan.steps_per_epoch - 1:
            self.method.on_epoch_end(self._sums)


def pairs(found: Case, steps: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Rows and their partners in the program's order, from the generators that it has seeded."""
    neighbors, count = found.neighbors.numpy(), len(found.x)
    for step in range(steps):
        place = step % (count // BATCH)
        if place == 0:
            order = torch.randperm(count).numpy()
        rows = order[place * BATCH : (place + 1) * BATCH]
        yield rows, np.array([np.random.choice(neighbors[row], 1)[0] for row in rows])  # noqa: NPY002  the program's


def scores_of(found: Case, labels: np.ndarray) -> np.ndarray:
    """ACC in % of Int64[H N]."""
    return np.array([100 * accuracy(found.labels, head) for head in labels])


def compare_draws(found: Case, seeds: list[int], report: Path | None) -> None:
    """Print, and append to the report, what this library reaches from each of its own draws."""
    heading = (
        "\nrayclust alone, own draws: ACC of the head that is kept; of all heads, from the smallest to the largest loss"
    )
    for place, seed in enumerate(seeds):
        method = fit_arrays(found.x, found.neighbors, settings(found.clusters), seed)
        assert isinstance(method, Temi)
        scores = scores_of(found, method.predict_heads(torch.from_numpy(found.x)).numpy())
        heads = " ".join(f"{score:5.1f}" for score in scores[np.argsort(method.head_losses.numpy())])
        line = f"seed {seed}: {scores[int(method.best_head)]:5.1f}; mean {scores.mean():5.1f};  {heads}"
        print(line, flush=True)
        if report:
            with report.open("a") as file:
                file.write(("" if place else heading + "\n") + line + "\n")


def main() -> None:
    """Print the table, and write it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("program", type=Path, nargs="?")
    parser.add_argument("--own", type=int, nargs="+", metavar="SEED")
    parser.add_argument("--data", type=Path, default=Path(__file__).resolve().parents[2] / "shared" / "data")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--report", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    (found,) = cases(arguments.data, ["imagenette-a"])
    x = torch.from_numpy(found.x)
    if arguments.own:
        compare_draws(found, arguments.own, arguments.report)
        return
    program = Program(arguments.program, found, arguments.seed)
    ours = Ours(program, found, arguments.seed)
    lines = [
        f"{platform.machine()}, {arguments.threads} threads, torch {torch.__version__}",
        f"python benchmarks/temi_parity.py PROGRAM --seed {arguments.seed} --steps {arguments.steps}",
        "imagenette by encoder a, 3,000 rows; ACC in % of the head that is kept, and of the 16 heads",
        "",
        f"{'':>6}{'published program':>34}{'rayclust':>34}{'largest':>12}",
        f"{'step':>6}" + 2 * f"{'kept':>11}{'ACC':>7}{'heads':>16}" + f"{'difference':>12}",
    ]
    print("\n".join(lines), flush=True)

    def add(*more: str) -> None:
        lines.extend(more)
        print("\n".join(more), flush=True)
        if arguments.report:  # after every line, so that what was measured stays if it is cut
            arguments.report.write_text("\n".join(lines) + "\n")

    worst, alike = 0.0, True
    for step, (rows, partners) in enumerate(pairs(found, arguments.steps)):
        views = torch.stack([x[rows], x[partners]])
        program.step(views, step)
        ours.step(views, torch.from_numpy(rows), step)
        if (step + 1) % 100 and step + 1 < arguments.steps:
            continue
        both = [program.labels(x), ours.method.predict_heads(x).numpy()]
        scores = np.array([scores_of(found, heads) for heads in both])
        difference, kept = float(np.abs(scores[0] - scores[1]).max()), (program.best, int(ours.method.best_head))
        worst, alike = max(worst, difference), alike and kept[0] == kept[1]
        cells = [
            f"{head:>11}{one[head]:>7.1f}{f'{one.min():.1f} to {one.max():.1f}':>16}"
            for head, one in zip(kept, scores, strict=True)
        ]
        add(f"{step + 1:>6}{''.join(cells)}{difference:>12.1f}")
    order = np.argsort(program.losses)
    add("", "ACC of the heads, from the smallest to the largest loss of the program's last whole epoch:")
    add(
        *(
            f"{name:>20} {' '.join(f'{score:5.1f}' for score in one[order])}"
            for name, one in zip(("published program", "rayclust"), scores, strict=True)
        )
    )
    held = worst <= 1.0 and alike
    verdict = "within a point, the same head kept" if held else "NOT within a point, or another head kept"
    add("", f"largest difference of a head {worst:.1f}: {verdict}; load {os.getloadavg()[0]:.1f} at the end")
    sys.exit(not held)


if __name__ == "__main__":
    main()
