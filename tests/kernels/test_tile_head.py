from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch

from rayclust.kernels import native, plain_head, tile_head
from rayclust.kernels.products import Shared

pytestmark = pytest.mark.skipif(native.library() is None, reason="no compiler, or no matrix tiles")

BETA, FACTOR = 0.6, 10.0


def _in_blocks(x: torch.Tensor, depth: int = 256) -> torch.Tensor:
    """LEFT, number by number."""
    rows, columns = x.shape
    stretches = [(start, min(start + depth, columns)) for start in range(0, columns, depth)]
    blocks = [(m, k) for start, end in stretches for m in range(0, rows, 32) for k in range(start, end, 32)]
    return torch.cat([x[m : m + 32, k : k + 32].flatten() for m, k in blocks])


def _in_pairs(x: torch.Tensor) -> torch.Tensor:
    """RIGHT, number by number."""
    rows, columns = x.shape
    tiles = [(k, n + half) for n in range(0, columns, 32) for k in range(0, rows, 32) for half in (0, 16)]
    pairs = [x[k + p : k + p + 2, n : n + 16] for k, n in tiles for p in range(0, 32, 2)]
    return torch.cat([pair.T.flatten() for pair in pairs])


@pytest.mark.parametrize("size", [(32, 32), (64, 96), (96, 320), (32, 800)])
def test_orders_of_tiles(size: tuple[int, int]):
    x = torch.randn(size)
    narrow = x.to(torch.bfloat16)
    assert tile_head.to_left(x).equal(_in_blocks(narrow))
    for transposed in (False, True):
        out = torch.empty(x.numel(), dtype=torch.bfloat16)
        tile_head.to_right(narrow, out, transposed)
        assert out.equal(_in_pairs(narrow.T if transposed else narrow))


@dataclass
class Case:
    """A teacher's and a student's head, a batch, and what is known besides."""

    sizes: tuple[int, int, int, int, int]
    """D, hidden, bottleneck, K, B."""
    size_of_logits: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        torch.manual_seed(self.seed)
        dimension, hidden, bottleneck, clusters, rows = self.sizes
        shapes = [(hidden, dimension), (bottleneck, hidden), (hidden,), (bottleneck,), (clusters, bottleneck)]
        self.nets = []
        for _ in range(2):
            drawn = [torch.randn(*shape) * (shape[-1] ** -0.5 if len(shape) > 1 else 0.1) for shape in shapes]
            drawn[:2] = [weight.to(torch.bfloat16).float() for weight in drawn[:2]]
            self.nets.append([*drawn, self.size_of_logits * (torch.rand(clusters) + 0.5)])
        self.x = torch.randn(2, rows, dimension).to(torch.bfloat16)
        self.log_marginal = torch.randn(clusters).log_softmax(0)
        self.log_marginal[clusters // 2] = -87.0  # a dead cluster

    def plainly(self) -> tuple[list[torch.Tensor], dict[str, torch.Tensor]]:
        """In torch, in float64: logits, normalizer, sums, agreement, loss; gradients."""
        _, hidden, bottleneck, clusters, rows = self.sizes
        room = plain_head.Room(plain_head.Sizes(hidden, bottleneck, clusters, 2 * rows, torch.float64, torch.float64))
        teacher, student = (
            plain_head.Net((a, b), (c, d), e, f)
            for a, b, c, d, e, f in ([p.double() for p in net] for net in self.nets)
        )
        x = self.x.flatten(0, 1).double()
        packed = Shared(x, hidden), Shared(x.T.contiguous(), hidden)
        sizes = (clusters, 2 * rows), (2 * rows,), (clusters,), (rows,)
        out = tuple(torch.empty(*size, dtype=torch.float64) for size in sizes)
        room.teach(teacher, packed[0], FACTOR, out)
        lesson = plain_head.Lesson(out[0], out[1], self.log_marginal.double(), out[3], BETA, 1 / (2 * rows))
        loss, gradients = room.learn(student, *packed, FACTOR, lesson, last_learns=True)
        return [*out, loss[None]], gradients

    def on_tiles(self) -> tuple[list[torch.Tensor], dict[str, torch.Tensor]]:
        """The same by the compiled passes."""
        dimension, hidden, bottleneck, clusters, rows = self.sizes
        half, height = tile_head.padded(rows), tile_head.padded(clusters)
        shape = tile_head.Shape(dimension, hidden, bottleneck, clusters, height, 2 * half, rows)
        x = torch.zeros(2, half, dimension, dtype=torch.bfloat16)
        x[:, :rows] = self.x
        ordered = torch.empty(2, x.numel(), dtype=torch.bfloat16)
        for side in range(2):
            tile_head.to_right(x.flatten(0, 1), ordered[side], transposed=side == 0)
        inputs, room = tile_head.Inputs.of(*ordered), tile_head.room(shape)
        nets = [tile_head.Net.of(tile_head.to_left(net[0]), tile_head.to_left(net[1]), *net[2:]) for net in self.nets]
        bounds = [float(1.01 * FACTOR * net[5].max()) for net in self.nets]
        logits = torch.empty(height * 2 * half, dtype=torch.bfloat16)
        told = tile_head.Taught(logits, torch.empty(2 * half), torch.empty(clusters), torch.empty(half))
        tile_head.teach(shape, nets[0], inputs, room, told, FACTOR, bounds[0])
        weights = told.agreement.clone()
        weights[rows:] = 0.0
        known = logits, told.normalizer, self.log_marginal, weights
        lesson = tile_head.Lesson.of(*known, BETA, 1 / (2 * rows), bounds[1], bounds[0])
        names = ("weights.0", "weights.1", "biases.0", "biases.1", "direction", "scale")
        gradients = {
            name: torch.empty_like(parameter, dtype=torch.bfloat16 if "weights" in name else torch.float32)
            for name, parameter in zip(names, self.nets[1], strict=True)
        }
        loss = torch.empty(1)
        out = loss, tile_head.Gradients.of(*gradients.values())
        tile_head.learn(shape, nets[1], inputs, room, lesson, out, FACTOR, last_learns=True)
        columns = [*range(rows), *range(half, half + rows)]
        unordered = logits.view(2 * half // 32, height // 32, 2, 16, 16, 2).permute(1, 3, 5, 0, 2, 4)
        plain = unordered.reshape(height, 2 * half)[:clusters, columns]
        return [plain, told.normalizer[columns], told.sums, weights[:rows], loss], gradients


@pytest.mark.parametrize(
    "case",
    [
        Case((32, 32, 32, 2, 1)),
        Case((64, 64, 32, 10, 50)),
        Case((96, 320, 64, 37, 100)),
        Case((800, 512, 256, 65, 33)),
        Case((64, 64, 32, 11, 70), size_of_logits=3.0),
        Case((64, 64, 32, 100, 70), size_of_logits=30.0),
    ],
    ids=lambda case: f"{case.sizes} {case.size_of_logits}",
)
def test_a_head_on_tiles_is_its_plain_twin_but_for_rounding(case: Case):
    found, gradients = case.on_tiles()
    expected, wanted = case.plainly()
    # Logits are bf16: what is an exponential of them is off by their size times 2^-9.
    tolerance = 0.015 * max(1.0, case.size_of_logits)
    for a, b in zip(found, expected, strict=True):
        assert a.isfinite().all()
        assert _distance(a, b) < tolerance
    for name, gradient in wanted.items():
        assert _distance(gradients[name], gradient) < 3 * tolerance, name


def _distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.double() - expected).norm() / expected.norm())


def _of_equal_columns(clusters: int, scale: float) -> Case:
    """All rows alike, so that every column has the same logits."""
    case = Case((32, 32, 32, clusters, 40))
    case.x[:] = case.x[0, 0]
    case.nets = [[*case.nets[0][:5], torch.full((clusters,), scale)] for _ in range(2)]
    return case


def test_even_logits_by_hand():
    """Everything uniform: a row's views agree with 1/K, ℓ = (2β − 2)·ln K, and there is nothing to gain."""
    case = _of_equal_columns(10, 0.0)
    case.log_marginal = torch.full((10,), -math.log(10))
    (_, _, sums, agreement, loss), gradients = case.on_tiles()
    assert sums.tolist() == pytest.approx([8.0] * 10, rel=1e-5)
    assert agreement.tolist() == pytest.approx([0.1] * 40, rel=1e-5)
    assert float(loss) == pytest.approx(-0.184207, abs=2e-6)
    assert max(float(gradient.abs().max()) for gradient in gradients.values()) < 1e-7


def test_a_sure_pair_has_agreement_one_and_no_gradient():
    case = _of_equal_columns(4, 30.0)
    case.log_marginal = torch.full((4,), -math.log(4))
    (_, _, _, agreement, loss), gradients = case.on_tiles()
    assert agreement.tolist() == pytest.approx([1.0] * 40, rel=1e-6)
    assert float(loss) == pytest.approx(-math.log(4), rel=1e-5)
    assert max(float(gradient.abs().max()) for gradient in gradients.values()) < 1e-6


def test_rows_of_zeros_are_no_trouble():
    case = Case((32, 32, 32, 10, 40))
    case.x[:] = 0.0
    for net in case.nets:
        net[2].zero_()
        net[3].zero_()
    found, gradients = case.on_tiles()
    for tensor in (*found, *gradients.values()):
        assert tensor.isfinite().all()
