"""Losses by hand, by the plain forms, in chunks, and over two processes."""

from __future__ import annotations

import math
from typing import Any, get_args

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from rayclust.losses import information
from rayclust.losses.information import (
    InformationOptions,
    LastLayer,
    LossName,
    Marginal,
    information_losses,
    log_probabilities,
)
from tests import references
from tests.workers import on_two_workers

K = 10
LN_K = math.log(K)
NAMES = get_args(LossName)


def layer(logits: Tensor, temperature: float = 1.0) -> LastLayer:
    """A last layer whose logits are Float[H V B K] themselves, so that gradients in its rows are those in logits."""
    heads, _, _, clusters = logits.shape
    eye = torch.eye(clusters, dtype=logits.dtype).expand(heads, -1, -1)
    return LastLayer(logits, eye, torch.ones(heads, clusters, dtype=logits.dtype), temperature, logits.dtype)


def log_q_of(last: LastLayer) -> Tensor:
    """Log-probabilities Float[H V B K] of a whole batch, with gradient in rows and layers."""
    weights = torch.nn.functional.normalize(last.direction, dim=-1) * (last.scale / last.temperature)[..., None]
    return log_probabilities(last.logits(weights.to(last.dtype))[0], 1.0)


def losses_of(student: Tensor, teacher: Tensor, log_marginal: Tensor, **options: Any) -> Tensor:
    """Float[H], from logits Float[H V B K] and a p̂ that the batch does not change."""
    return information_losses(layer(student), layer(teacher), _fixed(log_marginal), InformationOptions(**options))[0]


def agreement(teacher: Tensor) -> Tensor:
    return information_losses(layer(teacher), layer(teacher), _fixed(teacher[:, 0, 0]), InformationOptions())[1]


def _fixed(log_marginal: Tensor) -> Marginal:
    marginal = Marginal(*log_marginal.shape, momentum=1.0).to(log_marginal.dtype)
    marginal.shares.copy_(log_marginal.exp())
    return marginal


def plain(student: Tensor, teacher: Tensor, log_marginal: Tensor, options: InformationOptions) -> Tensor:
    """Float[H] from log-probabilities, pair of views by pair of views, under autograd."""
    views = range(student.shape[1])
    both = torch.stack([teacher[:, a] + teacher[:, b] for a in views for b in views if a != b]).exp().sum(-1).mean(0)
    weights = {"temi": both.mean(0, keepdim=True), "wmi": both}.get(options.loss, torch.ones_like(both))
    beta, prior = (1.0, 0.0 * log_marginal) if options.loss == "scan" else (options.beta, log_marginal)
    losses = []
    for a in views:
        for b in views:
            if a != b:
                found = (beta * (student[:, a] + teacher[:, b]) - prior[:, None]).logsumexp(-1)
                positive = options.positive_pmi and options.loss != "scan"
                losses.append(-(weights * (found.clamp(min=0) if positive else found)).mean(1))
    total = torch.stack(losses).mean(0)
    if options.loss == "wmi":
        total = total + options.entropy_weight * (student.exp() * student).sum(-1).mean((1, 2))
    if options.loss == "scan":
        mean = student.exp().mean(2)
        total = total + options.entropy_weight * (mean * mean.log()).sum(-1).mean(1)
    return total


def _even(heads: int = 1, clusters: int = K) -> Tensor:
    return torch.full((heads, clusters), -math.log(clusters), dtype=torch.float64)


def _one_hot(labels: list[int], clusters: int = K) -> Tensor:
    """Float64[1 2 B K] log-probabilities of confident, matching views."""
    logits = 1e3 * torch.nn.functional.one_hot(torch.tensor(labels), clusters).double()
    return log_probabilities(logits, 1.0).expand(1, 2, -1, -1)


def _uniform(rows: int) -> Tensor:
    return log_probabilities(torch.zeros(1, 2, rows, K, dtype=torch.float64), 1.0)


def _random(
    heads: int, views: int, rows: int, clusters: int, seed: int = 0, scale: float = 3.0
) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shape = (2, heads, views, rows, clusters)
    student, teacher = log_probabilities(scale * torch.randn(shape, generator=generator, dtype=torch.float64), 1.0)
    return student, teacher


def _random_marginal(heads: int, clusters: int, seed: int = 5) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return log_probabilities(torch.randn(heads, clusters, generator=generator, dtype=torch.float64), 1.0)


def test_uniform_logits_give_two_beta_minus_two_log_k_over_k():
    assert agreement(_uniform(7)).allclose(torch.full((1, 7), 1 / K, dtype=torch.float64))
    loss = losses_of(_uniform(7), _uniform(7), _even(), beta=0.6)
    assert loss.item() == pytest.approx((2 * 0.6 - 2) * LN_K / K)
    assert loss.item() == pytest.approx(-0.184207, abs=1e-6)


def test_matching_one_hot_pairs_give_minus_log_k():
    views = _one_hot(list(range(K)))
    assert agreement(views).allclose(torch.ones(1, K, dtype=torch.float64))
    assert losses_of(views, views, _even()).item() == pytest.approx(-LN_K)


def test_matching_one_hot_pairs_see_the_marginal_after_its_update():
    views, marginal = layer(_one_hot([0, 1, 2, 3, 4, 5, 6, 7])), Marginal(1, K).double()
    loss, _ = information_losses(views, views, marginal, InformationOptions())
    assert marginal.shares.log()[0, 0].exp().item() == pytest.approx(0.1025)
    assert loss.item() == pytest.approx(-2.2779, abs=1e-4)


def test_collapse_costs_nothing_and_the_order_of_answers_follows_beta():
    collapsed, marginal = layer(_one_hot([3] * 5)), Marginal(1, K, momentum=0.0).double()
    assert information_losses(collapsed, collapsed, marginal, InformationOptions())[0].item() == pytest.approx(0.0)
    for beta, expected in [(0.7, -0.6 * LN_K), (0.5, -LN_K), (1.0, 0.0)]:
        assert losses_of(_uniform(5), _uniform(5), _even(), loss="pmi", beta=beta).item() == pytest.approx(expected)
    views = _one_hot(list(range(K)))
    assert losses_of(views, views, _even(), loss="pmi", beta=0.7).item() == pytest.approx(-LN_K)


def test_marginal_after_equal_steps_is_the_closed_form_and_sums_to_one():
    probabilities = _random(3, 2, 6, 4)[1].exp()
    marginal = Marginal(3, 4).double()
    mean = probabilities.mean((1, 2))
    for step in range(1, 6):
        shares = marginal.update(probabilities.sum((1, 2)), 12).exp()
        assert shares.allclose(0.9**step / 4 + (1 - 0.9**step) * mean, atol=1e-7)
        assert shares.sum(1).allclose(torch.ones(3, dtype=torch.float64))


def test_the_share_of_a_dead_cluster_has_a_logarithm():
    marginal = Marginal(1, K, momentum=0.0)
    logs = marginal.update(_one_hot([0, 1, 1, 0]).float().exp().sum((1, 2)), 8)
    assert (marginal.shares > 0).sum() == 2
    assert logs.isfinite().all()


@pytest.mark.parametrize("name", NAMES)
def test_swapped_views_and_permuted_clusters_change_nothing(name: str):
    student, teacher = _random(3, 2, 8, 5)
    log_marginal, options = _random_marginal(3, 5), {"loss": name, "entropy_weight": 0.7}
    expected = losses_of(student, teacher, log_marginal, **options)
    assert losses_of(student.flip(1), teacher.flip(1), log_marginal, **options).allclose(expected)
    order = torch.tensor([3, 1, 4, 0, 2])
    permuted = losses_of(student[..., order], teacher[..., order], log_marginal[:, order], **options)
    assert permuted.allclose(expected)


def test_a_constant_added_to_a_row_of_logits_changes_nothing():
    logits = torch.randn(2, 2, 4, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    shifted = logits + torch.arange(4)[:, None]
    assert log_probabilities(shifted, 0.1).allclose(log_probabilities(logits, 0.1))
    expected = losses_of(logits, logits, _even(2, 5))
    assert losses_of(shifted, shifted.flip(1), _even(2, 5)).allclose(losses_of(logits, logits.flip(1), _even(2, 5)))
    assert losses_of(shifted, shifted, _even(2, 5)).allclose(expected)


def test_one_head_makes_temi_wmi_and_full_agreement_makes_it_pmi():
    student, teacher = _random(1, 2, 8, 5)
    log_marginal = _random_marginal(1, 5)
    assert losses_of(student, teacher, log_marginal).allclose(losses_of(student, teacher, log_marginal, loss="wmi"))
    sure = _one_hot([0, 1, 2, 3, 4, 0, 1, 2], clusters=5)
    assert losses_of(student, sure, log_marginal).allclose(losses_of(student, sure, log_marginal, loss="pmi"))


def test_a_uniform_and_a_one_hot_head_share_the_weight_055():
    sure = _one_hot([0, 1, 2, 3])
    heads = torch.cat([_uniform(4), sure])
    assert agreement(heads).mean(0).allclose(torch.full((4,), 0.55, dtype=torch.float64))
    losses = losses_of(heads, heads, _even(2))
    assert losses.tolist() == pytest.approx([0.55 * (2 * 0.6 - 2) * LN_K, -0.55 * LN_K])
    assert losses.allclose(0.55 * losses_of(heads, heads, _even(2), loss="pmi"))
    doubled = losses_of(heads, heads, _even(2), mean_agreement=lambda x: 2.0 * x.mean(0, keepdim=True))
    assert doubled.allclose(2.0 * losses)


@pytest.mark.parametrize("seed", range(3))
def test_agreement_and_information_keep_their_bounds(seed: int):
    student, teacher = _random(4, 2, 20, 6, seed, scale=10.0)
    assert ((agreement(teacher) >= 0) & (agreement(teacher) <= 1)).all()
    log_marginal = _random_marginal(4, 6, seed)
    for row in range(20):
        one, other = student[:, :, row : row + 1], teacher[:, :, row : row + 1]
        assert (-losses_of(one, other, log_marginal, loss="pmi", beta=1.0) <= -log_marginal.amin(1) + 1e-12).all()


@pytest.mark.parametrize("views", [2, 4])
def test_log_space_agrees_with_the_direct_form(views: int):
    generator = torch.Generator().manual_seed(7)
    logits = 20 * torch.rand(2, 3, views, 5, 4, generator=generator, dtype=torch.float64) - 10
    student, teacher = log_probabilities(logits, 1.0)
    log_marginal = _random_marginal(3, 4)
    arrays = (student.exp().numpy(), teacher.exp().numpy(), log_marginal.exp().numpy(), 0.6)
    expected = torch.from_numpy(references.temi_losses(*arrays))
    assert losses_of(student, teacher, log_marginal).allclose(expected, rtol=0, atol=1e-12)
    expected = torch.from_numpy(references.temi_losses(*arrays, weights=agreement(teacher).numpy()))
    assert losses_of(student, teacher, log_marginal, loss="wmi").allclose(expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_confident_disagreement_stays_finite_with_its_gradient(name: LossName, dtype: torch.dtype):
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    logits = torch.tensor([[1e4, -1e4, 0.0], [-1e4, 1e4, 0.0]], dtype=wide).view(1, 2, 1, 3).requires_grad_()
    eye, ones = torch.eye(3, dtype=wide)[None], torch.ones(1, 3, dtype=wide)
    last, marginal = LastLayer(logits, eye, ones, 0.1, dtype), Marginal(1, 3).to(wide)
    options = InformationOptions(name, 0.6, entropy_weight=1.0)
    for _ in range(2000):  # the third cluster dies out
        marginal.update(torch.tensor([[1.0, 1.0, 0.0]], dtype=wide), 2)
    losses, _ = information_losses(last, last, marginal, options)
    losses.mean().backward()
    assert losses.dtype == wide
    assert losses.isfinite().all()
    assert logits.grad is not None
    assert logits.grad.isfinite().all()


def test_the_gradient_is_the_gap_between_the_student_and_the_shared_answer():
    """dℓ/dlogit = β/τ·(q_s − r), r the softmax of β·(ln q_s + ln q_t) − ln p̂, worked out by hand."""
    generator = torch.Generator().manual_seed(3)
    logits, targets = torch.randn(2, 1, 2, 4, 5, generator=generator, dtype=torch.float64)
    logits.requires_grad_()
    log_marginal, beta, temperature = _random_marginal(1, 5), 0.7, 0.1
    options = InformationOptions("pmi", beta)
    losses, _ = information_losses(layer(logits, temperature), layer(targets), _fixed(log_marginal), options)
    (losses.sum() * 2 * 4).backward()
    student, teacher = log_probabilities(logits, temperature), log_probabilities(targets, 1.0)
    shared = (beta * (student + teacher.flip(1)) - log_marginal).softmax(-1)
    assert logits.grad is not None
    assert logits.grad.allclose(beta / temperature * (student.exp() - shared))


def test_scan_on_two_points_by_hand():
    """Rows (.8, .2) and (.4, .6), both views alike: agreement .68 and .52, mean student (.6, .4)."""
    logits = torch.tensor([[0.8, 0.2], [0.4, 0.6]], dtype=torch.float64).log().expand(1, 2, 2, 2)
    expected = -(math.log(0.68) + math.log(0.52)) / 2 + 5 * (0.6 * math.log(0.6) + 0.4 * math.log(0.4))
    assert losses_of(logits, logits, _even(1, 2), loss="scan", entropy_weight=5.0).item() == pytest.approx(expected)


H, B, WIDTH, CLUSTERS = 3, 11, 5, 70
FOUR_ROWS = 4 * 2 * CLUSTERS * 8  # bytes of their logits under one head in float64


def _parameters(seed: int, dtype: torch.dtype, views: int = 2) -> list[Tensor]:
    """Rows, directions and scales of H heads, in the accumulation dtype."""
    generator = torch.Generator().manual_seed(seed)
    wide = torch.float32 if dtype == torch.bfloat16 else dtype
    shapes = ((H, views, B, WIDTH), (H, CLUSTERS, WIDTH), (H, CLUSTERS))
    units, direction, scale = (torch.randn(s, generator=generator, dtype=torch.float64).to(wide) for s in shapes)
    return [functional.normalize(units, dim=-1), direction, 1.0 + scale.square()]


def _differentiated(losses: Tensor, parameters: list[Tensor]) -> list[Tensor]:
    upstream = torch.tensor([0.5, -1.0, 2.0], dtype=losses.dtype)
    return [losses.detach(), *torch.autograd.grad((upstream * losses).sum(), parameters)]


def _close(found: list[Tensor], wanted: list[Tensor], tolerance: float) -> None:
    for one, other in zip(found, wanted, strict=True):
        assert float((one - other).norm()) <= tolerance * float(other.norm())


@pytest.mark.parametrize("sizes", [(1 << 30, 1 << 30), (1 << 30, 0), (FOUR_ROWS, 1 << 30), (FOUR_ROWS, 0), (1, 0)])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 0.05)]
)
def test_chunks_have_the_losses_and_gradients_of_the_plain_form(
    dtype: torch.dtype, tolerance: float, sizes: tuple[int, int], monkeypatch: pytest.MonkeyPatch
):
    for name, size in zip(("CHUNK_BYTES", "KEPT_BYTES"), sizes, strict=True):
        monkeypatch.setitem(getattr(information, name), "cpu", size)
    student, teacher = _parameters(1, dtype), _parameters(2, dtype)
    for leaf in student:
        leaf.requires_grad_()
    layers = [LastLayer(x[0], x[1], x[2], 0.4, dtype) for x in (student, teacher)]
    marginal = Marginal(H, CLUSTERS).to(student[0].dtype)
    losses, found_agreement = information_losses(*layers, marginal, InformationOptions())
    log_q, log_p = (log_q_of(one) for one in layers)
    wanted = plain(log_q, log_p, marginal.shares.log(), InformationOptions())
    _close(_differentiated(losses, student), _differentiated(wanted, student), tolerance)
    _close([found_agreement], [(log_p[:, 0] + log_p[:, 1]).exp().sum(-1)], tolerance)
    assert found_agreement.max() <= 1


@pytest.mark.parametrize("views", [2, 4])
@pytest.mark.parametrize("positive", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_each_loss_is_its_plain_form_in_value_and_gradient(name: LossName, positive: bool, views: int):
    student, teacher = _parameters(1, torch.float64, views), _parameters(2, torch.float64, views)
    for leaf in student:
        leaf.requires_grad_()
    layers = [LastLayer(x[0], x[1], x[2], 0.2, torch.float64) for x in (student, teacher)]
    options, marginal = InformationOptions(name, 0.9, positive, entropy_weight=0.7), Marginal(H, CLUSTERS).double()
    losses, _ = information_losses(*layers, marginal, options)
    wanted = plain(log_q_of(layers[0]), log_q_of(layers[1]), marginal.shares.log(), options)
    _close(_differentiated(losses, student), _differentiated(wanted, student), 1e-11)


def test_nothing_is_differentiable_without_gradient():
    student, teacher = _random(2, 2, 6, 4)
    assert not losses_of(student, teacher, _even(2, 4)).requires_grad
    assert losses_of(student.requires_grad_(), teacher, _even(2, 4)).requires_grad


def test_chunks_are_as_few_and_as_even_as_can_be():
    last = LastLayer(torch.zeros(5, 2, 10, 4), torch.zeros(5, 70, 4), torch.zeros(5, 70), 1.0, torch.float32)
    one = last.row_bytes
    assert one == 2 * 70 * 4
    assert last.chunks(100 * one) == ([slice(0, 5)], [slice(0, 10)])
    assert last.chunks(25 * one) == ([slice(0, 1), slice(1, 3), slice(3, 5)], [slice(0, 10)])
    assert last.chunks(4 * one) == ([slice(h, h + 1) for h in range(5)], [slice(0, 3), slice(3, 6), slice(6, 10)])
    assert len(last.chunks(0)[1]) == 10
    assert set(information.CHUNK_BYTES) == set(information.KEPT_BYTES)


def _losses_of_a_share(rank: int, world: int) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
    """Of each loss: value, gradient and marginal of rows rank::world, of 7 in all, as a worker sees them."""
    generator = torch.Generator().manual_seed(11)
    logits, targets = torch.randn(2, 3, 2, 7, 5, generator=generator, dtype=torch.float64)
    found = {}
    for name in NAMES:
        mine, marginal = logits[:, :, rank::world].clone().requires_grad_(), Marginal(3, 5).double()
        last, taught = layer(mine, 0.5), layer(targets[:, :, rank::world], 0.5)
        losses, _ = information_losses(last, taught, marginal, InformationOptions(name, entropy_weight=2.0))
        share = world * mine.shape[2] / 7
        (losses.mean() * share).backward()
        assert mine.grad is not None
        found[name] = (losses.detach() * share, mine.grad / world, marginal.shares.log())
    return found


def test_two_workers_have_the_losses_and_gradients_of_one():
    """TEMI's weights depend on a worker's own rows alone, p̂ and SCAN's mean student on those of both."""
    alone, together = _losses_of_a_share(0, 1), on_two_workers(_losses_of_a_share)
    for name, (losses, gradient, log_marginal) in alone.items():
        parts = [worker[name] for worker in together]
        assert torch.stack([part[0] for part in parts]).mean(0).allclose(losses, rtol=0, atol=1e-12)
        for rank, (_, part, marginal) in enumerate(parts):
            assert part.allclose(gradient[:, :, rank::2], rtol=0, atol=1e-12)
            assert marginal.allclose(log_marginal, rtol=0, atol=1e-12)
