"""TURTLE: the labelling that freshly started linear classifiers learn best, in one or several feature spaces.

    min over labels τ of  Σ_s CE_s(w_M^s, τ) − γ Σ_s H(m^s),   w_M^s: M steps of Adam towards τ from a fresh start.

In this order: settings, the keyed draw of rows, labels and the loss with its gradients, runs advanced together, the
score that chooses among them, and the method. Axes beside those of `arrays.py`: S spaces, R runs (settings × starts),
C clusters, d width of a space as the loop sees it; z is Float[B d+1], rows with a one at the end for the bias.

Source: Gadetsky, Jiang, Brbić, "Let Go of Your Labels with Unsupervised Transfer", ICML 2024, arXiv 2406.07236; prior
and sparsemax after PET-TURTLE, arXiv 2601.03237. Departures from the published programs are listed in docs/methods.md.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from rayclust import distributed
from rayclust.arrays import require_matrix
from rayclust.clustering.candidates import leading_components
from rayclust.clustering.row_stats import even_sample
from rayclust.errors import ArtefactError, RayclustError
from rayclust.methods.base import BaseTrainer, Method, Rows
from rayclust.methods.settings import Plan
from rayclust.methods.turtle_settings import TurtleConfig, TurtleSetting

logger = logging.getLogger(__name__)

ADAM = (0.9, 0.999, 1e-8)
"""β₁, β₂ and ε of both problems, as published."""
REPORT_STEPS = 20
"""Outer steps between two rows of metrics, and between two looks at whether a checkpoint is due."""
FOLDS, SCORE_ROWS, SCORE_STEPS = 10, 200_000, 100
"""Of the score: parts of the rows, most rows, and steps of a logistic regression."""
MIN_OCCUPIED, MIN_ENTROPY = 0.9, 0.8
"""Shares of K and of ln K below which a run is refused: its clusters have collapsed, and the score favours that."""
MOMENT_ROWS = 32_768
"""Rows from which mean and principal components of a space are taken."""
HELD_BYTES = 1 << 30
"""Rows as the loop sees them are kept in memory up to this, on a GPU up to half of what is free."""
FEISTEL_ROUNDS = 6
_BATCHES, _STARTS, _SCORE, _ROTATION = range(4)
"""Streams of random numbers, kept apart by their number."""
_LOGITS_AT_ONCE, _ROWS_AT_ONCE = 1 << 26, 8192


def keyed_rows(count: int, size: int, *key: int) -> Tensor:
    """Draw rows without replacement, in time and memory of the draw: the start of a permutation that the key gives.

    A Feistel network on the next even number of bits permutes; numbers above N walk on until they are below.

    Args:
        count: N.
        size: rows drawn; at most N are.
        key: numbers not below 0, such as seed and step.

    Returns:
        Int64[size], distinct, in [0, N).
    """
    half = np.uint64(max(1, (max(count - 1, 1).bit_length() + 1) // 2))
    mask = (np.uint64(1) << half) - np.uint64(1)
    round_keys = np.random.SeedSequence(key).generate_state(FEISTEL_ROUNDS, np.uint64)

    def permute(x: np.ndarray) -> np.ndarray:
        left, right = x >> half, x & mask
        for round_key in round_keys:
            # A round adds a hash of the right half to the left one and swaps them.
            z = (right + round_key) * np.uint64(0xBF58476D1CE4E5B9)
            z = (z ^ (z >> np.uint64(29))) * np.uint64(0x94D049BB133111EB)
            left, right = right, left ^ ((z >> np.uint64(32)) & mask)
        return (left << half) | right

    drawn = permute(np.arange(min(size, count), dtype=np.uint64))
    while len(outside := np.flatnonzero(drawn >= count)):
        drawn[outside] = permute(drawn[outside])
    return torch.from_numpy(drawn.astype(np.int64))


def sparsemax(logits: Tensor) -> Tensor:
    """Project onto the simplex along axis −2: Float[… C B] to the same shape, sums 1, zeros where logits are low.

    Source: Martins and Astudillo, arXiv 1602.02068, algorithm 1.
    """
    ordered = logits.sort(dim=-2, descending=True).values
    place = torch.arange(1, logits.shape[-2] + 1, device=logits.device, dtype=logits.dtype)[:, None]
    excess = ordered.cumsum(-2) - 1
    support = (ordered * place > excess).sum(-2, keepdim=True)
    return (logits - excess.gather(-2, support - 1) / support).clamp(min=0)


def labels_of(logits: Tensor, kind: str) -> Tensor:
    """Return τ^s of one space: Float[… C B] logits to labels that sum to 1 along axis −2."""
    return logits.softmax(-2) if kind == "softmax" else sparsemax(logits)


def logit_gradient(labels: Tensor, gradient: Tensor, kind: str) -> Tensor:
    """Return the gradient in the logits for one in the labels, both Float[… C B]; see section 2.4 of the method."""
    if kind == "softmax":
        return labels * (gradient - (labels * gradient).sum(-2, keepdim=True))
    support = (labels > 0).to(labels)
    return support * (gradient - (support * gradient).sum(-2, keepdim=True) / support.sum(-2, keepdim=True))


def balance(shares: Tensor, prior: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return the term that keeps clusters alive, and its gradient.

    Args:
        shares: m^s, Float[R C], mean labels over the batch.
        prior: Π, Float[C], descending; it belongs to the clusters in order of their shares. None: minus the entropy.

    Returns:
        Float[R], −H(m) or KL(Π ‖ m), nats; Float[R C].
    """
    known = shares.clamp(min=torch.finfo(shares.dtype).tiny)
    logs = known.log()
    if prior is None:
        return (shares * logs).sum(-1), logs + 1
    wanted = torch.empty_like(shares).scatter_(-1, shares.argsort(-1, descending=True), prior.expand_as(shares))
    return (wanted * (wanted.log() - logs)).sum(-1), -wanted / known


def task_weights(theta: Tensor) -> Tensor:
    """Return the linear maps of weight-normalised task encoders.

    Args:
        theta: Float[R C d+2], direction v, length g and bias b of each class.

    Returns:
        Float[R C d+1], W_c = g_c v_c / ‖v_c‖ and b.
    """
    v, g, b = theta[..., :-2], theta[..., -2:-1], theta[..., -1:]
    return torch.cat([functional.normalize(v, dim=-1) * g, b], dim=-1)


def task_gradient(theta: Tensor, gradient: Tensor) -> Tensor:
    """Return the gradient in θ, Float[R C d+2], for one in its linear map, Float[R C d+1]."""
    v, g = theta[..., :-2], theta[..., -2:-1]
    length = torch.linalg.vector_norm(v, dim=-1, keepdim=True).clamp(min=torch.finfo(theta.dtype).tiny)
    unit, along_weight = v / length, gradient[..., :-1]
    along = (along_weight * unit).sum(-1, keepdim=True)
    return torch.cat([g / length * (along_weight - along * unit), along, gradient[..., -1:]], dim=-1)


@dataclass
class Adam:
    """Adam on one tensor Float[R …] with rates and step numbers of each run.

    Source: Kingma and Ba, arXiv 1412.6980, algorithm 1.
    """

    value: Tensor
    first: Tensor
    second: Tensor

    @classmethod
    def of(cls, value: Tensor) -> Adam:
        """Return the state before the first step."""
        return cls(value, torch.zeros_like(value), torch.zeros_like(value))

    def step(self, gradient: Tensor, rates: Tensor, steps: Tensor) -> None:
        """Update in place; rates, and the number of the step from 1, are Float[R 1 1]."""
        beta_1, beta_2, eps = ADAM
        self.first.lerp_(gradient, 1 - beta_1)
        self.second.mul_(beta_2).addcmul_(gradient, gradient, value=1 - beta_2)
        scale = (self.second / (1 - beta_2**steps)).sqrt_().add_(eps)
        self.value.sub_(self.first / scale * (rates / (1 - beta_1**steps)))


class Runs:
    """R runs on the same batches, stacked along the class axis so that rows are read once for all.

    Args:
        config: resolved.
        runs: setting and number of the start of each run; equal numbers start alike.
        widths: d of each space.
        seed: of all starts.
        like: gives dtype and device.
    """

    def __init__(
        self,
        config: TurtleConfig,
        runs: Sequence[tuple[TurtleSetting, int]],
        widths: Sequence[int],
        seed: int,
        like: Tensor,
    ) -> None:
        self.config, self.seed, self.taken = config, seed, 0
        self._widths, self._starts, self._like = tuple(widths), [start for _, start in runs], like
        rates = like.new_tensor([[setting.inner_rate, setting.outer_rate] for setting, _ in runs])
        self._inner_rates, self._outer_rates = rates.T[:, :, None, None]
        is_cold = [setting.start == "cold" for setting, _ in runs]
        self._is_cold = torch.tensor(is_cold, device=like.device)[:, None, None]
        self.loss = like.new_zeros(len(runs))
        """Float[R], of the last step, before it."""
        self.theta: list[Adam] = []
        """Of each space, Float[R C d+2]: v, g and b of the task encoders."""
        self.w: list[Adam] = []
        """Of each space, Float[R C d+1]: U and u of the classifiers."""
        for space in range(len(widths)):
            start = self._linear_start(space, -1)
            v, b = start[..., :-1], start[..., -1:]
            # g starts at ‖v‖: the first function is that of a plain linear layer.
            self.theta.append(Adam.of(torch.cat([v, torch.linalg.vector_norm(v, dim=-1, keepdim=True), b], dim=-1)))
            self.w.append(Adam.of(self._linear_start(space, 0)))
        self._prior = None
        if config.prior != "uniform":
            power = torch.arange(1, config.clusters + 1).to(like) ** -float(config.prior)
            self._prior = power / power.sum()

    def labels(self, z: Sequence[Tensor]) -> list[Tensor]:
        """Return τ^s of each space, Float[R C B], for rows z of each; their mean is τ."""
        shape = (len(self._starts), self.config.clusters, -1)
        logits = [
            (task_weights(theta.value).flatten(0, 1) @ x.T).view(shape) for theta, x in zip(self.theta, z, strict=True)
        ]
        return [labels_of(a, self.config.labels) for a in logits]

    def step(self, z: Sequence[Tensor], count: int) -> Tensor:
        """Take one outer step; workers divide the rows of the batch.

        Args:
            z: this worker's rows in each space, Float[B' d+1].
            count: B, the rows of all workers.

        Returns:
            Float[S R C], m^s before the step.
        """
        c = self.config
        # 1. The labels of each space, and of all.
        own = self.labels(z)
        labels = torch.stack(own).mean(0)
        # 2. Inner problem: M steps of Adam towards the labels, from a fresh start or from where they were.
        for space, w in enumerate(self.w if self.taken and bool(self._is_cold.any()) else ()):
            w.value.copy_(torch.where(self._is_cold, self._linear_start(space, self.taken), w.value))
            w.first.masked_fill_(self._is_cold, 0)
            w.second.masked_fill_(self._is_cold, 0)
        before = torch.where(self._is_cold, 0.0, float(self.taken * c.inner_steps)).to(self._like)
        for inner in range(c.inner_steps):
            for w, x in zip(self.w, z, strict=True):
                p = (w.value.flatten(0, 1) @ x.T).view_as(labels).softmax(1)
                gradient = (p.sub_(labels).flatten(0, 1) @ x).view_as(w.value)
                w.step(distributed.all_reduce(gradient) / count, self._inner_rates, before + (inner + 1))
        # 3. Outer problem: −Σ_s ln p^s is the loss of a row for each label, constant in θ.
        cost = torch.zeros_like(labels)
        for w, x in zip(self.w, z, strict=True):
            cost -= (w.value.flatten(0, 1) @ x.T).view_as(labels).log_softmax(1)
        shares = distributed.all_reduce(torch.stack([mine.sum(-1) for mine in own])) / count
        self.loss = distributed.all_reduce((labels * cost).sum((1, 2))) / count
        self.taken += 1
        for theta, x, mine, share in zip(self.theta, z, own, shares, strict=True):
            term, slope = balance(share, self._prior)
            self.loss += c.gamma * term
            a = logit_gradient(mine, cost / len(z) + c.gamma * slope[:, :, None], c.labels)
            gradient = distributed.all_reduce((a.flatten(0, 1) @ x).view(*share.shape, -1)) / count
            theta.step(task_gradient(theta.value, gradient), self._outer_rates, before.new_full((1, 1, 1), self.taken))
        return shares

    def tensors(self) -> dict[str, Tensor]:
        """Return the state: the loss, θ, and w where some run goes on from it, with Adam's moments."""
        is_warm = any(setting.start == "warm" for setting, _ in self.config.runs())  # of all, not of these alone
        parts = {"theta": self.theta} | ({"w": self.w} if is_warm else {})
        named = {f"{name}.{space}": adam for name, adams in parts.items() for space, adam in enumerate(adams)}
        return {"loss": self.loss} | {
            f"{n}.{key}": value for n, adam in named.items() for key, value in vars(adam).items()
        }

    def load(self, tensors: Mapping[str, Tensor], taken: int) -> None:
        """Restore what `tensors` gave after so many steps.

        Raises:
            ArtefactError: it is of other runs.
        """
        for name, value in self.tensors().items():
            if name not in tensors or tensors[name].shape != value.shape:
                text = f"checkpoint does not hold {name} of shape {tuple(value.shape)}"
                raise ArtefactError(f"{text}: remove it or restore the config")
            value.copy_(tensors[name])
        self.taken = taken

    def _linear_start(self, space: int, step: int) -> Tensor:
        """Return torch's start of linear layers, Float[R C d+1], as a function of (seed, start, space, step)."""
        width, drawn = self._widths[space], dict[int, Tensor]()
        for start in sorted(set(self._starts)):
            key = np.random.SeedSequence((self.seed, _STARTS, start, space, step + 1)).generate_state(1, np.uint64)
            generator = torch.Generator(self._like.device).manual_seed(int(key[0] >> np.uint64(1)))
            value = self._like.new_empty((self.config.clusters, width + 1))
            drawn[start] = value.uniform_(-(width**-0.5), width**-0.5, generator=generator)
        return torch.stack([drawn[start] for start in self._starts])


def generalization_score(z: Sequence[Tensor], labels: Tensor, clusters: int) -> Tensor:
    """Return how well linear classifiers predict labels of rows that they were not trained on; workers share the folds.

    Ten folds of multinomial logistic regression with ‖W‖²/2 beside the summed losses, accuracy in each space, mean over
    spaces. A constant labelling scores 1, a random one of even shares 1/C: compare it with the largest share.

    Args:
        z: rows in each space, Float[n d+1], in random order.
        labels: Int64[R n].
        clusters: C.

    Returns:
        Float64[R], in [0, 1].

    Source: arXiv 2406.07236, the published program's `cross_val.py`. Solved by steps with the curvature's upper bound
    ½ZᵀZ (Böhning 1992), the same for all classes, runs and steps, under Nesterov's acceleration.
    """
    R, n = labels.shape
    hits = labels.new_zeros(R, dtype=torch.float64)
    group, at_once = distributed.data_group(), max(1, _LOGITS_AT_ONCE // (clusters * n))
    for fold in range(group.rank, FOLDS, group.size):
        test = torch.zeros(n, dtype=torch.bool, device=labels.device)
        test[fold::FOLDS] = True
        for x in z:
            train, aside = x[~test], x[test]
            penalty = torch.ones_like(x[0])
            penalty[-1] = 0.0  # the bias is free
            bound = 0.5 * (train.mT @ train).double() + torch.diag(penalty.double())
            inverse = torch.cholesky_inverse(torch.linalg.cholesky(bound)).to(x.dtype)
            for part in torch.split(torch.arange(R, device=labels.device), at_once):
                wanted = labels[part][:, None, ~test]
                w = ahead = x.new_zeros((len(part) * clusters, x.shape[1]))
                momentum = 1.0
                for _ in range(SCORE_STEPS):
                    p = (ahead @ train.mT).view(len(part), clusters, -1).softmax(1)
                    p.scatter_add_(1, wanted, -torch.ones_like(p[:, :1]))
                    new = ahead - (p.flatten(0, 1) @ train + ahead * penalty) @ inverse
                    grown = 0.5 * (1 + math.sqrt(1 + 4 * momentum * momentum))
                    ahead, w, momentum = new + (momentum - 1) / grown * (new - w), new, grown
                predicted = (w @ aside.mT).view(len(part), clusters, -1).argmax(1)
                hits[part] += (predicted == labels[part][:, test]).sum(1)
    return distributed.all_reduce(hits) / (n * len(z))


@dataclass(frozen=True)
class SpaceMap:
    """The affine map from rows of a space to z."""

    mean: Tensor
    """Float[D], subtracted first."""
    basis: Tensor
    """Float[D d], or Float[] that multiplies all components."""

    @classmethod
    def of(cls, sample: Tensor, config: TurtleConfig, seed: int, space: int) -> SpaceMap:
        """Return the map for a sample of the rows, Float[n D], that is the same on all workers."""
        if config.scale == "published":
            if bool(((torch.linalg.vector_norm(sample, dim=1) - 1).abs() < 1e-3).all()):
                text = "turtle: rows have length 1, so that classifiers hardly leave their start: let rows come as the "
                logger.warning("%sencoder gives them, or set scale: auto", text)
            return cls(torch.zeros_like(sample[0]), sample.new_ones(()))
        mean = sample.mean(0)
        mapped, basis = sample - mean, sample.new_ones(())
        if config.components is not None:
            # Adam moves all weights alike. Along principal axes the leading ones would then decide alone; turned at
            # random, all axes have about the same variance, as the axes of an encoder have.
            axes = leading_components(mapped, config.components).to(sample)
            normal = np.random.default_rng((seed, _ROTATION, space)).standard_normal((axes.shape[1], axes.shape[1]))
            basis = axes @ torch.from_numpy(np.linalg.qr(normal)[0]).to(sample)
            mapped = mapped @ basis
        basis = basis / mapped.square().mean().sqrt().clamp(min=torch.finfo(sample.dtype).tiny)
        group = distributed.data_group()  # rounding may differ between processors
        return cls(group.broadcast(mean), group.broadcast(basis.contiguous()))

    def __call__(self, x: Tensor) -> Tensor:
        """Map Float[B D] to Float[B d+1]."""
        centered = x.to(self.mean) - self.mean
        mapped = centered @ self.basis if self.basis.dim() else centered * self.basis
        return functional.pad(mapped, (0, 1), value=1.0)


class Turtle(Method):
    """TURTLE in spaces of some widths.

    Args:
        config: the settings; a preset is written out.
        dimension: D of each space by its name.
        count: N, the rows of all workers.
        seed: of batches and starts.
    """

    spaces = None
    config_type = TurtleConfig
    config: TurtleConfig
    dimension: dict[str, int]
    report: list[dict[str, Any]]
    """Of the fit, for each run: `candidate`, its setting and start; `chosen`, 0 or 1; score and sizes. The kept one
    comes last; empty for a single run."""

    def __init__(self, config: TurtleConfig, dimension: dict[str, int], count: int, seed: int) -> None:
        config = config.resolved(count, list(dimension.values()))
        super().__init__(config, dimension, count, seed)
        self.report = []
        self.plan = Plan(min(config.batch_size, count), REPORT_STEPS, config.steps, 0)
        for space, width in dimension.items():
            self.register_buffer(f"weight_{space}", torch.zeros(config.clusters, width))
            self.register_buffer(f"bias_{space}", torch.zeros(config.clusters))

    @torch.no_grad()
    def fit(self, rows: Rows, trainer: BaseTrainer) -> None:
        """Advance all runs to their end, from the newest checkpoint if there is one, and keep the one of highest score.

        Reports a row of metrics every 20 steps, and in the end one for each run where there are several.

        Raises:
            ArtefactError: the checkpoint is of other runs.
            RayclustError: the loss is no longer a finite number.
        """
        c = self.config
        self.to(trainer.device)
        like = next(self.buffers())
        # 1. The rows as the loop sees them; a checkpoint holds the map, of which it depends.
        x, checkpoint = [rows.tensor(space) for space in self.dimension], trainer.restore()
        kept = {} if checkpoint is None else checkpoint[0]
        maps = []
        for space, each in enumerate(x):
            if checkpoint is None:
                sample = each[even_sample(self.count, MOMENT_ROWS, self.seed).to(each.device)].to(like)
                maps.append(SpaceMap.of(sample, c, self.seed, space))
            else:
                maps.append(SpaceMap(kept[f"mean.{space}"].to(like), kept[f"basis.{space}"].to(like)))
        map_tensors = {f"{name}.{space}": part for space, each in enumerate(maps) for name, part in vars(each).items()}
        take = _reader(x, maps)
        widths = [z.shape[1] - 1 for z in take(torch.zeros(1, dtype=torch.int64))]
        # 2. Workers divide the runs, which exchange nothing, and the rows where there are fewer runs.
        settings, world = c.runs(), distributed.world().size
        most = max(parts for parts in range(1, world + 1) if world % parts == 0 and parts <= len(settings))
        mesh = distributed.DeviceMesh.of(most)
        own = distributed.even_slices(len(settings), most)[mesh.heads.rank]
        runs = Runs(c, settings[own], widths, self.seed, like)
        if checkpoint is not None:
            runs.load({name: kept[name][own] for name in runs.tensors() if name in kept}, int(checkpoint[1]["step"]))
        state = self._advance(runs, take, mesh, trainer, map_tensors)
        if most > 1:
            runs = Runs(c, settings, widths, self.seed, like)
            runs.load(state, c.steps)
        # 3. The run that is kept, as linear maps of rows as they come: those of z behind the map from rows to z.
        chosen = self._choose(runs, take, trainer) if len(settings) > 1 else 0
        for name, theta, space_map in zip(self.dimension, runs.theta, maps, strict=True):
            of_z, basis = task_weights(theta.value[chosen]), space_map.basis
            weight = of_z[:, :-1] @ basis.mT if basis.dim() else of_z[:, :-1] * basis
            self.get_buffer(f"weight_{name}").copy_(weight)
            self.get_buffer(f"bias_{name}").copy_(of_z[:, -1] - weight @ space_map.mean)

    def _advance(
        self,
        runs: Runs,
        take: Callable[[Tensor], list[Tensor]],
        mesh: distributed.DeviceMesh,
        trainer: BaseTrainer,
        map_tensors: dict[str, Tensor],
    ) -> dict[str, Tensor]:
        """Take the outer steps of this worker's runs, each on rows of its own; return the state of all runs."""
        c, B, count = self.config, self.plan.batch_size, len(self.config.runs())

        def of_all(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
            return {name: mesh.heads.all_gather_cat(x, count) for name, x in tensors.items()}

        with distributed.data_parallel(mesh.data):
            for step in range(runs.taken, c.steps):
                batch = keyed_rows(self.count, B, self.seed, _BATCHES, step)
                shares = runs.step(take(batch[distributed.own_slice(B)]), B)
                is_last, epoch = step + 1 == c.steps, step // REPORT_STEPS
                if is_last or (step + 1) % REPORT_STEPS == 0:
                    values = of_all({"loss": runs.loss, "entropy": -torch.xlogy(shares, shares).sum(-1).mean(0)})
                    loss, entropy = float(values["loss"].mean()), float(values["entropy"].mean())
                    row = {"epoch": epoch, "step": step + 1, "loss": loss, "marginal_entropy": entropy}
                    trainer.report(row | {"seconds": trainer.seconds()})
                    if not math.isfinite(loss):
                        raise RayclustError(f"training loss = {loss} after step {step + 1}: lower the rates")
                    if is_last or trainer.is_due(epoch + 1):
                        trainer.save(step + 1, of_all(runs.tensors()) | map_tensors)
        return of_all(runs.tensors())

    def _choose(self, runs: Runs, take: Callable[[Tensor], list[Tensor]], trainer: BaseTrainer) -> int:
        """Return the number of the run with the highest score among those whose clusters are alive, and report all."""
        K, settings = self.config.clusters, self.config.runs()
        # 1. Labels of a sample in random order, the same on all workers.
        z = take(keyed_rows(self.count, SCORE_ROWS, self.seed, _SCORE))
        n, block = len(z[0]), max(1, _LOGITS_AT_ONCE // (len(settings) * K))
        slices = [slice(low, low + block) for low in range(0, n, block)]
        parts = [torch.stack(runs.labels([each[part] for each in z])).mean(0) for part in slices]
        labels = distributed.data_group().broadcast(torch.cat([part.argmax(1) for part in parts], dim=1))
        shares = torch.stack([part.sum(-1) for part in parts]).sum(0).double() / n
        # 2. Scores, and what they are worth: chance, and whether the clusters are alive.
        scores = generalization_score(z, labels, K).tolist()
        entropy = (-torch.xlogy(shares, shares).sum(1) / math.log(K)).tolist()
        alive: list[bool] = []
        for run, (setting, start) in enumerate(settings):
            sizes = torch.bincount(labels[run], minlength=K)
            largest, occupied = int(sizes.max()) / n, int((sizes > 0).sum())
            is_even = self.config.prior != "uniform" or entropy[run] >= MIN_ENTROPY
            alive.append(occupied >= MIN_OCCUPIED * K and is_even)
            name = f"rates {setting.inner_rate:.2g} and {setting.outer_rate:.2g}, {setting.start} start {start}"
            row: dict[str, Any] = {"candidate": name if alive[run] else f"{name} (collapsed)"}
            row |= {"chosen": 0.0, "score": scores[run], "largest_share": largest, "loss": float(runs.loss[run])}
            row["normalized_score"] = (scores[run] - largest) / (1 - largest) if largest < 1 else 0.0
            self.report.append(row | {"occupied": occupied, "share_entropy": entropy[run]})
        # 3. The highest score is kept.
        order = sorted(range(len(settings)), key=lambda run: (alive[run], scores[run]))
        if not alive[order[-1]]:
            logger.warning("turtle: the clusters of all runs have collapsed; raise gamma or lower clusters")
        self.report = [self.report[run] for run in order]
        self.report[-1]["chosen"] = 1.0
        for row in self.report:
            last = {"epoch": len(trainer.history), "step": self.config.steps, "seconds": trainer.seconds()}
            trainer.report(last | row)
        return order[-1]

    def predict_proba(self, x: Mapping[str, Tensor]) -> Tensor:
        """Return τ, Float[B K], for Float[B D] of each space by its name; rows sum to 1."""
        labels = []
        for space, width in self.dimension.items():
            require_matrix(x[space], space, width)
            weight, bias = self.get_buffer(f"weight_{space}"), self.get_buffer(f"bias_{space}")
            labels.append(labels_of(weight @ x[space].to(weight).T + bias[:, None], self.config.labels))
        return torch.stack(labels).mean(0).T

    def prototypes(self) -> Tensor:
        """Return the clusters' weights in all spaces as unit rows, Float[K ΣD]."""
        weights = [self.get_buffer(f"weight_{space}") for space in sorted(self.dimension)]
        return functional.normalize(torch.cat(weights, dim=1), dim=1)


def _reader(x: Sequence[Tensor], maps: Sequence[SpaceMap]) -> Callable[[Tensor], list[Tensor]]:
    """Return the function from row numbers, Int64[B], to z of each space; rows that fit in memory are mapped once."""
    spaces, device = list(zip(x, maps, strict=True)), maps[0].mean.device

    def read(ids: Tensor) -> list[Tensor]:
        return [to_z(each.index_select(0, ids.to(each.device)).to(device)) for each, to_z in spaces]

    first = read(torch.zeros(1, dtype=torch.int64))
    size = len(x[0]) * sum(each.numel() * each.element_size() for each in first)
    if size > (HELD_BYTES if device.type == "cpu" else torch.cuda.mem_get_info(device)[0] // 2):
        return read
    bounds = range(0, len(x[0]), _ROWS_AT_ONCE)
    held = [torch.cat([to_z(each[low : low + _ROWS_AT_ONCE].to(device)) for low in bounds]) for each, to_z in spaces]
    return lambda ids: [each.index_select(0, ids.to(device)) for each in held]
