from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from rayclust.collectives import Team, everyone, sharing_rows, stretches
from rayclust.losses.information import (
    LOSSES,
    InformationOptions,
    Marginal,
    agreement,
    log_probabilities,
    pmi,
    pointwise_information,
    scan,
    temi,
    wmi,
)
from tests import references
from tests.workers import on_two_workers

K = 10
LN_K = math.log(K)


def _even(heads: int = 1, clusters: int = K) -> Tensor:
    return torch.full((heads, clusters), -math.log(clusters), dtype=torch.float64)


def _one_hot(labels: list[int], clusters: int = K) -> Tensor:
    """Float64[1 2 B K] log-probabilities of confident, matching views."""
    logits = 1e3 * torch.nn.functional.one_hot(torch.tensor(labels), clusters).double()
    return log_probabilities(logits, 1.0).expand(1, 2, -1, -1)


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
    uniform = log_probabilities(torch.zeros(1, 2, 7, K, dtype=torch.float64), 0.1)
    assert agreement(uniform).allclose(torch.full((1, 7), 1 / K, dtype=torch.float64))
    loss = temi(uniform, uniform, _even(), InformationOptions(beta=0.6))
    assert loss.item() == pytest.approx((2 * 0.6 - 2) * LN_K / K)
    assert loss.item() == pytest.approx(-0.184207, abs=1e-6)


def test_matching_one_hot_pairs_give_minus_log_k():
    views = _one_hot(list(range(K)))
    assert agreement(views).allclose(torch.ones(1, K, dtype=torch.float64))
    assert temi(views, views, _even(), InformationOptions()).item() == pytest.approx(-LN_K)


def test_matching_one_hot_pairs_see_the_marginal_after_its_update():
    views = _one_hot([0, 1, 2, 3, 4, 5, 6, 7])
    log_marginal = Marginal(1, K).double().update(views)
    assert log_marginal[0, 0].exp().item() == pytest.approx(0.1025)
    assert temi(views, views, log_marginal, InformationOptions()).item() == pytest.approx(-2.2779, abs=1e-4)


def test_collapse_costs_nothing_and_the_order_of_answers_follows_beta():
    collapsed, uniform = _one_hot([3] * 5), log_probabilities(torch.zeros(1, 2, 5, K, dtype=torch.float64), 1.0)
    marginal = Marginal(1, K, momentum=0.0).double()
    assert temi(collapsed, collapsed, marginal.update(collapsed), InformationOptions()).item() == pytest.approx(0.0)
    for beta, expected in [(0.7, -0.6 * LN_K), (0.5, -LN_K), (1.0, 0.0)]:
        assert pmi(uniform, uniform, _even(), InformationOptions(beta)).item() == pytest.approx(expected)
    balanced = pmi(_one_hot(list(range(K))), _one_hot(list(range(K))), _even(), InformationOptions(0.7))
    assert balanced.item() == pytest.approx(-LN_K)


def test_marginal_after_equal_steps_is_the_closed_form_and_sums_to_one():
    _, teacher = _random(3, 2, 6, 4)
    marginal = Marginal(3, 4).double()
    mean = teacher.exp().mean((1, 2))
    for step in range(1, 6):
        shares = marginal.update(teacher).exp()
        assert shares.allclose(0.9**step / 4 + (1 - 0.9**step) * mean, atol=1e-7)
        assert shares.sum(1).allclose(torch.ones(3, dtype=torch.float64))


def test_marginal_counts_live_clusters_and_measures_its_entropy():
    marginal = Marginal(1, K, momentum=0.0)
    marginal.update(_one_hot([0, 1, 1, 0]).float())
    assert marginal.live().tolist() == [2]
    assert marginal.entropy().item() == pytest.approx(math.log(2))
    assert marginal.log().isfinite().all()


@pytest.mark.parametrize("name", LOSSES)
def test_swapped_views_and_permuted_clusters_change_nothing(name: str):
    student, teacher = _random(3, 2, 8, 5)
    log_marginal, options = _random_marginal(3, 5), InformationOptions(0.6, entropy_weight=0.7)
    expected = LOSSES[name](student, teacher, log_marginal, options)
    assert LOSSES[name](student.flip(1), teacher.flip(1), log_marginal, options).allclose(expected)
    order = torch.tensor([3, 1, 4, 0, 2])
    permuted = LOSSES[name](student[..., order], teacher[..., order], log_marginal[:, order], options)
    assert permuted.allclose(expected)


def test_a_constant_added_to_a_row_of_logits_changes_nothing():
    logits = torch.randn(2, 2, 4, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    shifted = logits + torch.arange(4)[:, None]
    assert log_probabilities(shifted, 0.1).allclose(log_probabilities(logits, 0.1))


def test_one_head_makes_temi_wmi_and_full_trust_makes_it_pmi():
    student, teacher = _random(1, 2, 8, 5)
    log_marginal, options = _random_marginal(1, 5), InformationOptions(0.6)
    assert temi(student, teacher, log_marginal, options).allclose(wmi(student, teacher, log_marginal, options))
    sure = _one_hot([0, 1, 2, 3, 4, 0, 1, 2], clusters=5)
    assert temi(student, sure, log_marginal, options).allclose(pmi(student, sure, log_marginal, options))


def test_scaled_trust_scales_the_loss():
    student, _ = _random(1, 2, 6, K)
    sure = _one_hot([0, 1, 2, 3, 4, 5])
    uniform = log_probabilities(torch.zeros(1, 2, 6, K, dtype=torch.float64), 1.0)
    heads = torch.cat([sure, uniform])
    both = temi(student.expand(2, -1, -1, -1), heads, _even(2), InformationOptions())
    alone = pmi(student.expand(2, -1, -1, -1), heads, _even(2), InformationOptions())
    assert both.allclose(0.55 * alone)


def test_a_uniform_and_a_one_hot_head_share_the_weight_055():
    sure = _one_hot([0, 1, 2, 3])
    heads = torch.cat([log_probabilities(torch.zeros_like(sure), 1.0), sure])
    assert agreement(heads).mean(0).allclose(torch.full((4,), 0.55, dtype=torch.float64))
    losses = temi(heads, heads, _even(2), InformationOptions(0.6))
    assert losses.tolist() == pytest.approx([0.55 * (2 * 0.6 - 2) * LN_K, -0.55 * LN_K])


@pytest.mark.parametrize("seed", range(3))
def test_trust_and_information_keep_their_bounds(seed: int):
    student, teacher = _random(4, 2, 20, 6, seed, scale=10.0)
    assert ((agreement(teacher) >= 0) & (agreement(teacher) <= 1)).all()
    log_marginal = _random_marginal(4, 6, seed)[:, None, None]
    highest = -log_marginal.min(-1).values
    assert (pointwise_information(student, teacher, log_marginal, 1.0) <= highest + 1e-12).all()
    overlap = ((student + teacher).exp().sqrt() / log_marginal.exp()).sum(-1).log()
    assert pointwise_information(student, teacher, log_marginal, 0.5).allclose(overlap)


@pytest.mark.parametrize("views", [2, 4])
def test_log_space_agrees_with_the_direct_form(views: int):
    generator = torch.Generator().manual_seed(7)
    logits = 20 * torch.rand(2, 3, views, 5, 4, generator=generator, dtype=torch.float64) - 10
    student, teacher = log_probabilities(logits, 1.0)
    log_marginal = _random_marginal(3, 4)
    arrays = (student.exp().numpy(), teacher.exp().numpy(), log_marginal.exp().numpy(), 0.6)
    expected = torch.from_numpy(references.temi_losses(*arrays))
    assert temi(student, teacher, log_marginal, InformationOptions()).allclose(expected, rtol=0, atol=1e-12)
    own = agreement(teacher).numpy()
    expected = torch.from_numpy(references.temi_losses(*arrays, weights=own))
    assert wmi(student, teacher, log_marginal, InformationOptions()).allclose(expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_confident_disagreement_stays_finite_with_its_gradient(name: str, dtype: torch.dtype):
    logits = torch.tensor([[1e4, -1e4, 0.0], [-1e4, 1e4, 0.0]], dtype=dtype).view(1, 2, 1, 3).requires_grad_()
    teacher = log_probabilities(logits.detach(), 0.1)
    marginal = Marginal(1, 3).to(teacher.dtype)
    for _ in range(2000):  # the third cluster dies out
        log_marginal = marginal.update(teacher)
    student = log_probabilities(logits, 0.1)
    assert student.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    loss = LOSSES[name](student, teacher, log_marginal, InformationOptions(0.6, entropy_weight=1.0)).mean()
    loss.backward()
    assert loss.isfinite()
    assert logits.grad is not None
    assert logits.grad.isfinite().all()


def test_the_gradient_is_the_gap_between_the_student_and_the_shared_answer():
    """dℓ/dlogit = β/τ·(q_s − r), r the softmax of β·(ln q_s + ln q_t) − ln p̂, worked out by hand."""
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(4, 5, generator=generator, dtype=torch.float64, requires_grad=True)
    teacher = log_probabilities(torch.randn(4, 5, generator=generator, dtype=torch.float64), 1.0)
    log_marginal, beta, temperature = _random_marginal(1, 5), 0.7, 0.1
    student = log_probabilities(logits, temperature)
    (-pointwise_information(student, teacher, log_marginal, beta)).sum().backward()
    shared = (beta * (student + teacher) - log_marginal).softmax(-1)
    assert logits.grad is not None
    assert logits.grad.allclose(beta / temperature * (student.exp() - shared))


def test_positive_pmi_cuts_off_disagreement():
    student, teacher = _random(2, 2, 50, 4, scale=8.0)
    log_marginal = _even(2, 4)
    cut = pmi(student, teacher, log_marginal, InformationOptions(1.0, positive_pmi=True))
    information = pointwise_information(student.flip(1), teacher, log_marginal[:, None, None], 1.0)
    assert (information < 0).any()
    assert cut.allclose(-information.clamp(min=0).mean((1, 2)))


def test_wmi_rewards_entropy_of_its_rows():
    student, teacher = _random(2, 2, 6, 4)
    plain = wmi(student, teacher, _even(2, 4), InformationOptions())
    rewarded = wmi(student, teacher, _even(2, 4), InformationOptions(entropy_weight=0.5))
    entropy = -(student.exp() * student).sum(-1).mean((1, 2))
    assert rewarded.allclose(plain - 0.5 * entropy)


def test_scan_on_two_points_by_hand():
    """Rows (.8, .2) and (.4, .6), both views alike: agreement .68 and .52, mean student (.6, .4)."""
    probabilities = torch.tensor([[0.8, 0.2], [0.4, 0.6]], dtype=torch.float64).log().expand(1, 2, 2, 2)
    expected = -(math.log(0.68) + math.log(0.52)) / 2 + 5 * (0.6 * math.log(0.6) + 0.4 * math.log(0.4))
    loss = scan(probabilities, probabilities, _even(1, 2), InformationOptions(entropy_weight=5.0))
    assert loss.item() == pytest.approx(expected)


def _shares_of_the_losses(rank: int, world: int) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
    """Of each loss: value, gradient and marginal of rows rank::world, of 7 in all, as a worker sees them."""
    generator = torch.Generator().manual_seed(11)
    logits, targets = torch.randn(2, 3, 2, 7, 5, generator=generator, dtype=torch.float64)
    teacher = log_probabilities(targets[:, :, rank::world], 0.5)
    options, found = InformationOptions(0.6, entropy_weight=2.0), {}
    for name, loss in LOSSES.items():
        mine = logits[:, :, rank::world].clone().requires_grad_()
        log_marginal = Marginal(3, 5).double().update(teacher)
        losses = loss(log_probabilities(mine, 0.5), teacher, log_marginal, options)
        share = world * mine.shape[2] / 7
        (losses.mean() * share).backward()
        assert mine.grad is not None
        found[name] = (losses.detach() * share, mine.grad / world, log_marginal)
    return found


def test_two_workers_have_the_losses_and_gradients_of_one():
    alone, together = _shares_of_the_losses(0, 1), on_two_workers(_shares_of_the_losses)
    for name, (losses, gradient, log_marginal) in alone.items():
        parts = [worker[name] for worker in together]
        assert torch.stack([part[0] for part in parts]).mean(0).allclose(losses, rtol=0, atol=1e-12)
        for rank, (_, part, marginal) in enumerate(parts):
            assert part.allclose(gradient[:, :, rank::2], rtol=0, atol=1e-12)
            assert marginal.allclose(log_marginal, rtol=0, atol=1e-12)


def _of_some_clusters(rank: int, world: int) -> list[tuple[str, list[Tensor]]]:
    """Of each loss, with and without a cut at 0, for two views and four, at several sizes: this worker's clusters'."""
    with sharing_rows(Team()):
        return _of_these_clusters(rank, world)


def _of_these_clusters(rank: int, world: int) -> list[tuple[str, list[Tensor]]]:
    stack, found = everyone(), []
    for seed, (heads, views, rows, clusters) in enumerate(((1, 2, 1, 2), (3, 2, 7, 5), (2, 4, 3, 33), (2, 2, 4, 130))):
        some = stretches(clusters, world)[rank]
        generator = torch.Generator().manual_seed(seed)
        logits, targets = 3 * torch.randn(2, heads, views, rows, clusters, generator=generator, dtype=torch.float64)
        teacher = log_probabilities(targets[..., some], 0.5, stack)
        marginal = Marginal(heads, some.stop - some.start, all_clusters=clusters).double()
        log_marginal = marginal.update(teacher)
        told = [teacher, marginal.shares, stack.all_sum(marginal.entropy()), stack.all_sum(marginal.live())]
        for name, loss in LOSSES.items():
            for positive in (False, True):
                options = InformationOptions(0.6, positive, entropy_weight=2.0, stack=stack)
                mine = logits[..., some].clone().requires_grad_()
                losses = loss(log_probabilities(mine, 0.5, stack), teacher, log_marginal, options, None)
                (losses * torch.arange(1, heads + 1)).sum().backward()
                assert mine.grad is not None
                case = f"{name}, {positive}, {clusters}"
                found.append((case, [losses.detach(), mine.grad, agreement(teacher, stack), *told]))
    return found


def test_workers_with_some_clusters_each_have_the_losses_and_gradients_of_one_with_all():
    alone, together = _of_some_clusters(0, 1), on_two_workers(_of_some_clusters)
    for place, (case, wanted) in enumerate(alone):
        parts = [worker[place][1] for worker in together]
        for number, value in enumerate(wanted):
            each = [part[number] for part in parts]
            if each[0].shape == value.shape and each[1].shape == value.shape:
                assert each[0].equal(each[1]), f"{case}: workers differ"
                assert each[0].double().allclose(value.double(), rtol=1e-11, atol=1e-12), case
            else:
                assert torch.cat(each, dim=-1).allclose(value, rtol=1e-11, atol=1e-12), case
