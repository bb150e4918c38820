from __future__ import annotations

import logging
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from rayclust.clustering import spectral
from rayclust.clustering.spectral import (
    Affinity,
    NormalizedMembership,
    Spectral,
    balance,
    kernel,
    leading_eigenpairs,
    membership,
    partition,
    unit,
)
from rayclust.errors import ArtefactError, ConfigError, DataError, ShapeError
from rayclust.metrics.external import accuracy, ari
from rayclust.settings import SpectralOptions
from tests import references
from tests.clustering.sharded import subspaces


def of(codes: torch.Tensor, most: int, seed: int = 0, **options) -> Spectral:
    settings = SpectralOptions(**{"temperature": 0.1, **options})
    return partition(lambda: torch.split(codes, 100), most, settings, seed)


@pytest.mark.parametrize("half_steps", [None, 5])
@pytest.mark.parametrize("count", [120, 700])
def test_the_embedding_is_that_of_the_whole_matrix(half_steps: int | None, count: int):
    codes, _ = subspaces(4, count)
    found = of(codes, 4, half_steps=half_steps)
    expected = references.spectral_embedding(codes.double().numpy(), 0.1, 4, half_steps or 501)
    rows = torch.nn.functional.normalize(found.functions, dim=1).double().numpy()
    np.testing.assert_allclose(rows @ rows.T, expected @ expected.T, atol=2e-2)
    assert float(found.values[0]) == pytest.approx(1.0, abs=2e-3)


def test_subspaces_are_found_and_rows_get_the_labels_of_their_fit():
    codes, labels = subspaces(5, 800)
    found = of(codes, 8)
    assert accuracy(labels, found.labels(5).numpy()) > 0.99
    for clusters in (3, 5, 8):
        chances = found.assign(codes, clusters)
        torch.testing.assert_close(chances.sum(1), torch.ones(800))
        assert torch.equal(chances.argmax(1), found.labels(clusters))
    assert torch.equal(found.assign(-codes, 5).argmax(1), found.labels(5))


def test_new_rows_are_assigned_one_by_one_as_together():
    codes, labels = subspaces(5, 1000)
    found = of(codes[:800], 5)
    chances = found.assign(codes[800:], 5)
    assert (
        accuracy(np.concatenate([labels[:800], labels[800:]]), torch.cat([found.labels(5), chances.argmax(1)])) > 0.99
    )
    torch.testing.assert_close(found.assign(codes[900:901], 5), chances[100:101], atol=1e-4, rtol=1e-3)
    assert found.assign(codes[:0], 5).shape == (0, 5)


@pytest.mark.parametrize(("clusters", "noise"), [(5, 0.3), (5, 0.8), (20, 0.3)])
def test_a_sample_gives_the_clusters_of_all_rows(clusters: int, noise: float):
    codes, _ = subspaces(clusters, 3000, noise=noise)
    exact, sampled = of(codes, clusters), of(codes, clusters, dense_rows=1000)
    assert sampled.codes.shape == (1000, 32)
    assert ari(exact.labels(clusters).numpy(), sampled.assign(codes, clusters).argmax(1).numpy()) >= 0.95


def test_tiles_are_the_exact_route_where_rows_have_no_clusters_as_well():
    codes = torch.nn.functional.normalize(torch.randn(1200, 16, generator=torch.Generator().manual_seed(3)), dim=1)
    exact, tiled = of(codes, 7), of(codes, 7, dense_rows=400, beyond="tiles")
    assert ari(exact.labels(7).numpy(), of(codes, 7, dense_rows=400).assign(codes, 7).argmax(1).numpy()) < 0.9
    assert ari(exact.labels(7).numpy(), tiled.assign(codes, 7).argmax(1).numpy()) >= 0.95
    assert torch.equal(tiled.labels(7), tiled.assign(codes, 7).argmax(1))


def test_tiles_are_the_exact_route():
    codes, labels = subspaces(6, 1500)
    exact, tiled = of(codes, 6), of(codes, 6, dense_rows=600, beyond="tiles")
    torch.testing.assert_close(tiled.values, exact.values, atol=1e-5, rtol=0)
    assert ari(exact.labels(6).numpy(), tiled.assign(codes, 6).argmax(1).numpy()) >= 0.95
    assert accuracy(labels, tiled.assign(codes, 6).argmax(1).numpy()) > 0.99


def test_one_decomposition_serves_fewer_clusters():
    codes, _ = subspaces(4, 700)
    many, few = of(codes, 12), of(codes, 4)
    assert ari(many.labels(4).numpy(), few.labels(4).numpy()) == 1.0


def test_eigengap_by_hand_and_where_there_is_no_next_eigenvalue():
    found = of(subspaces(3, 300)[0], 5)
    assert max(range(2, 6), key=found.eigengap) == 3
    found = replace(found, values=torch.tensor([1.0, 0.9, 0.5, -0.2], dtype=torch.float64))
    assert found.eigengap(2) == pytest.approx(math.log(math.log(0.5) / math.log(0.9)))
    assert math.isfinite(found.eigengap(1))
    assert math.isfinite(found.eigengap(3)), "an eigenvalue below 0 forgets at once"
    assert math.isnan(found.eigengap(4))


def test_tensors_bring_everything_back():
    codes, _ = subspaces(4, 300)
    found = of(codes, 6)
    found.labels(4)
    again = Spectral.from_tensors(found.tensors(), found.options, found.seed)
    assert set(found.tensors()) == {"codes", "scales", "functions", "values", "centers.4"}
    for clusters in (4, 6):  # one with centres, one without
        assert torch.equal(again.labels(clusters), found.labels(clusters))
        assert torch.equal(again.assign(codes, clusters), found.assign(codes, clusters))


def test_seeds_differ_in_kmeans_alone():
    codes, _ = subspaces(6, 400, noise=1.5)
    found = of(codes, 6)
    assert torch.equal(found.labels(6), of(codes, 6).labels(6))
    runs = [found.labels(6, seed=seed).numpy() for seed in range(3)]
    assert min(ari(runs[0], run) for run in runs) > 0.3
    assert list(found.centers) == [6]


def test_isolated_rows_are_safe():
    codes = torch.eye(8)[[0] * 10 + [1] * 10 + [2]]
    found = of(codes, 3, temperature=1e-3)
    assert found.functions.isfinite().all()
    assert found.assign(codes, 2).isfinite().all()
    assert len(set(found.labels(2)[:10].tolist())) == 1


def test_equal_rows_and_as_many_clusters_as_rows():
    equal = of(torch.ones(6, 3), 2)
    assert equal.assign(torch.ones(2, 3), 2).isfinite().all()
    codes, _ = subspaces(2, 5)
    assert len(set(of(codes, 5).labels(5).tolist())) == 5


def test_refuses_what_cannot_be():
    codes, _ = subspaces(3, 60)
    found = of(codes, 3)
    with pytest.raises(ConfigError, match="clusters = 4: from 1 to 3"):
        found.labels(4)
    with pytest.raises(ConfigError, match="clusters = 61: from 1 to the number of rows, 60"):
        of(codes, 61)
    with pytest.raises(ShapeError, match="width 3: 32 is needed"):
        found.assign(torch.ones(2, 3), 3)
    with pytest.raises(DataError, match="NaN"):
        of(codes * torch.nan, 3)
    with pytest.raises(ArtefactError, match="lacks functions, values"):
        Spectral.from_tensors({"codes": codes, "scales": codes}, found.options, 0)


def doubles(count: int = 12, width: int = 5, seed: int = 0) -> torch.Tensor:
    x = torch.randn(count, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.nn.functional.normalize(x, dim=1)


@pytest.mark.parametrize("half_steps", [1, 3, 5, 11])
def test_is_the_alternating_scaling_of_the_whole_matrix(half_steps: int):
    c = doubles()
    wanted = references.membership(c.numpy(), 0.2, half_steps)
    np.testing.assert_allclose(membership(c, 0.2, half_steps).numpy(), wanted, rtol=1e-10)
    assert membership(c, 0.2, half_steps).sum(1).allclose(torch.ones(12, dtype=torch.float64), atol=1e-12)
    assert membership(c.float(), 0.2, half_steps).sum(1).allclose(torch.ones(12), atol=1e-6)


def test_equal_codes_belong_to_all_alike():
    c = doubles(1).expand(7, 5)
    torch.testing.assert_close(membership(c, 0.1), torch.full((7, 7), 1 / 7, dtype=torch.float64))


def test_two_orthogonal_groups():
    c = torch.eye(4, dtype=torch.float64)[[0, 0, 0, 1, 1, 1]]
    found = membership(c, 0.1)
    inside = math.exp(10) / (3 * math.exp(10) + 3)
    assert found[0, 1].item() == pytest.approx(inside)
    assert inside == pytest.approx(0.333318, abs=5e-7)
    assert found[0, 3].item() == pytest.approx(1.513e-5, abs=5e-9)


def test_temperature_goes_from_each_alone_to_all_alike():
    c = doubles()
    torch.testing.assert_close(membership(c, 1e-4), torch.eye(12, dtype=torch.float64), atol=1e-6, rtol=0)
    torch.testing.assert_close(membership(c, 1e5), torch.full((12, 12), 1 / 12, dtype=torch.float64), atol=1e-5, rtol=0)


def test_signs_and_order_of_codes():
    c, order = doubles(), torch.randperm(12, generator=torch.Generator().manual_seed(1))
    signs = torch.tensor([1.0, -1.0] * 6, dtype=torch.float64)[:, None]
    torch.testing.assert_close(membership(signs * c, 0.2), membership(c, 0.2))
    torch.testing.assert_close(membership(c[order], 0.2), membership(c, 0.2)[order][:, order])


def test_gradient_holds_the_columns_scales_fixed():
    c = doubles().requires_grad_()
    weights = torch.randn(12, 12, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    (gradient,) = torch.autograd.grad((membership(c, 0.2) * weights).sum(), c)
    with torch.no_grad():  # any row scaling cancels: b is read off up to a constant
        scales = (membership(c, 0.2).log() - (c @ c.T).abs() / 0.2)[0]
    plain = ((c @ c.T).abs() / 0.2 + scales).softmax(1)
    torch.testing.assert_close(gradient, torch.autograd.grad((plain * weights).sum(), c)[0])
    assert torch.autograd.grad(membership(c, 0.2).sum(), c)[0].abs().max() < 1e-12


def test_converged_membership_is_doubly_stochastic_and_symmetric():
    found = membership(doubles(60, 8), 0.1, None)
    assert (found.sum(0) - 1).abs().max() < 2e-6
    torch.testing.assert_close(found, found.T, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("settings", "message"), [
    ((0.0, 5), "temperature = 0.0: must be above 0"),
    ((0.1, 4), "half_steps = 4: must be odd"),
])  # fmt: skip
def test_what_cannot_be_is_refused(settings: tuple[float, int], message: str):
    with pytest.raises(ConfigError, match=message):
        membership(doubles(), *settings)


def codes(count: int = 60, width: int = 5, seed: int = 0) -> torch.Tensor:
    return unit(torch.randn((count, width), generator=torch.Generator().manual_seed(seed)))


def scaled_kernel(c: torch.Tensor, temperature: float, half_steps: int | None = None) -> torch.Tensor:
    scaling = balance(Affinity(c, temperature), half_steps)
    return scaling.rows[:, None] * kernel(c, c, temperature).fill_diagonal_(1.0) * scaling.columns


def test_scaled_kernel_equal_codes_share_evenly():
    torch.testing.assert_close(scaled_kernel(codes(1).expand(7, -1), 0.1), torch.full((7, 7), 1 / 7))


def test_scaled_kernel_two_orthogonal_groups_by_hand():
    found = scaled_kernel(torch.eye(4)[[0, 0, 0, 1, 1, 1]], 0.1)
    inside, outside = (math.exp(s / 0.1) / (3 * math.exp(10) + 3) for s in (1, 0))
    torch.testing.assert_close(found[:3, :3], torch.full((3, 3), inside))
    torch.testing.assert_close(found[:3, 3:], torch.full((3, 3), outside))
    assert inside == pytest.approx(0.333318, abs=1e-6)
    assert outside == pytest.approx(1.513e-5, rel=1e-3)


@pytest.mark.parametrize("temperature", [0.02, 0.1, 0.175, 10.0])
def test_scaled_kernel_rows_and_columns_sum_to_one(temperature: float):
    found = scaled_kernel(codes(), temperature)
    torch.testing.assert_close(found.sum(1), torch.ones(60), atol=1e-5, rtol=0)
    torch.testing.assert_close(found.sum(0), torch.ones(60), atol=1e-5, rtol=0)
    torch.testing.assert_close(found, found.T)
    assert balance(Affinity(codes(), temperature)).error < 1e-5


def test_scaled_kernel_the_temperature_goes_from_each_row_alone_to_all_alike():
    torch.testing.assert_close(scaled_kernel(codes(), 1e-4), torch.eye(60), atol=1e-5, rtol=0)
    torch.testing.assert_close(scaled_kernel(codes(), 1e4), torch.full((60, 60), 1 / 60), atol=1e-5, rtol=0)


def test_scaled_kernel_signs_play_no_part():
    c = codes()
    signs = torch.where(torch.arange(60) % 3 == 0, -1.0, 1.0)[:, None]
    torch.testing.assert_close(scaled_kernel(c * signs, 0.1), scaled_kernel(c, 0.1))


@pytest.mark.parametrize("half_steps", [1, 5])
def test_scaled_kernel_half_steps_are_the_plain_form(half_steps: int):
    expected = references.membership(codes().double().numpy(), 0.1, half_steps)
    np.testing.assert_allclose(scaled_kernel(codes(), 0.1, half_steps).numpy(), expected, rtol=1e-4, atol=1e-7)
    np.testing.assert_allclose(expected.sum(1), 1.0)


def test_the_symmetric_steps_reach_what_half_steps_reach():
    expected = references.membership(codes().double().numpy(), 0.1, 2001)
    np.testing.assert_allclose(scaled_kernel(codes(), 0.1).numpy(), expected, rtol=1e-4, atol=1e-7)


def test_tiles_are_the_kept_kernel(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(spectral, "_ENTRIES_ON_CPU", 60 * 17)
    c, x = codes(90), torch.randn((90, 3), generator=torch.Generator().manual_seed(5))
    kept, tiled = Affinity(c, 0.1, weight=2.0), Affinity(c, 0.1, weight=2.0, keep=False)
    tiled._columns_at_once = 17
    dense = 2.0 * (kernel(c, c, 0.1) - torch.eye(90)) @ x
    torch.testing.assert_close(kept.product(x), dense, atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(tiled.product(x), dense, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("half_steps", [None, 5])
def test_the_normalised_membership_is_the_plain_form(half_steps: int | None):
    c = codes()
    operator = NormalizedMembership(Affinity(c, 0.1), balance(Affinity(c, 0.1), half_steps))
    linked = references.membership(c.double().numpy(), 0.1, half_steps or 2001)
    np.fill_diagonal(linked, 0.0)
    root = np.sqrt(linked.sum(0))
    expected = 0.5 * (linked + linked.T) / root[:, None] / root
    np.testing.assert_allclose(operator.product(torch.eye(60)).numpy(), expected, rtol=2e-4, atol=1e-6)


def test_a_code_that_meets_no_other_is_safe():
    c = torch.eye(4)[[0, 0, 1, 1, 2]]
    operator = NormalizedMembership(Affinity(c, 1e-3), balance(Affinity(c, 1e-3)))
    assert operator.degrees[4] == 0
    assert operator.product(torch.eye(5)).isfinite().all()
    assert (operator.product(torch.eye(5))[4] == 0).all()


def test_operators_refuse_what_cannot_be():
    with pytest.raises(ConfigError, match="temperature = 0: must be above 0"):
        Affinity(codes(), 0)
    with pytest.raises(ConfigError, match="half_steps = 4: must be odd"):
        balance(Affinity(codes(), 0.1), 4)
    with pytest.raises(ShapeError, match="two axes"):
        Affinity(torch.ones(3), 0.1)


def symmetric(values: torch.Tensor, seed: int = 0) -> torch.Tensor:
    turn, _ = torch.linalg.qr(torch.randn((len(values), len(values)), generator=torch.Generator().manual_seed(seed)))
    return turn @ torch.diag(values) @ turn.T


def first_block(rows: int, columns: int) -> torch.Tensor:
    return torch.randn((rows, columns), generator=torch.Generator().manual_seed(1))


def test_the_largest_by_value_not_by_size():
    values = torch.cat([torch.tensor([3.0, 2.0, -9.0]), torch.linspace(-1, 1, 197)])
    a = symmetric(values)
    found = leading_eigenpairs(lambda x: a @ x, first_block(200, 6), 3)
    assert found.values.tolist() == pytest.approx([3.0, 2.0, 1.0], abs=1e-4)
    assert found.residual < 9 * 1e-5
    torch.testing.assert_close(found.vectors.T @ found.vectors, torch.eye(3), atol=1e-5, rtol=0)


def test_slowly_falling_eigenvalues_need_restarts():
    values = 1.0 - torch.arange(400) / 400.0
    a = symmetric(values)
    found = leading_eigenpairs(lambda x: a @ x, first_block(400, 12), 5, tolerance=1e-5)
    assert found.values.tolist() == pytest.approx(values[:5].tolist(), abs=1e-5)
    assert 8 < found.products < 100
    exact = torch.linalg.eigh(a.double())[1][:, -5:].float()
    assert torch.linalg.svdvals(found.vectors.T @ exact).min() > 0.999


def test_equal_eigenvalues_and_a_whole_space():
    a = torch.diag(torch.tensor([2.0, 2.0, 1.0, 0.0]))
    found = leading_eigenpairs(lambda x: a @ x, torch.eye(4), 3)
    assert found.values.tolist() == pytest.approx([2.0, 2.0, 1.0])
    assert found.products == 1


def test_an_operator_of_small_rank_is_exhausted():
    u = torch.nn.functional.normalize(first_block(50, 1), dim=0)
    found = leading_eigenpairs(lambda x: u @ (u.T @ x), first_block(50, 4), 2)
    assert found.values.tolist() == pytest.approx([1.0, 0.0], abs=1e-5)
    torch.testing.assert_close(found.vectors[:, :1].abs(), u.abs(), atol=1e-4, rtol=0)
    nothing = leading_eigenpairs(torch.zeros_like, first_block(50, 4), 2)
    assert nothing.values.tolist() == [0.0, 0.0]


def test_same_start_same_bits_and_signs_are_fixed():
    a = symmetric(torch.linspace(0, 1, 60))
    first, second = (leading_eigenpairs(lambda x: a @ x, first_block(60, 5), 3) for _ in range(2))
    assert torch.equal(first.vectors, second.vectors)
    turned = leading_eigenpairs(lambda x: a @ x, -first_block(60, 5), 3)
    torch.testing.assert_close(turned.vectors, first.vectors, atol=1e-3, rtol=0)


def test_running_out_of_products_is_said(caplog: pytest.LogCaptureFixture):
    a = symmetric(1.0 - torch.arange(400) / 400.0)
    with caplog.at_level(logging.INFO):
        found = leading_eigenpairs(lambda x: a @ x, first_block(400, 6), 5, max_products=2)
    assert found.products == 2
    assert "residual" in caplog.text


def test_eigenpairs_refuse_more_vectors_than_columns():
    with pytest.raises(ConfigError, match="count = 3: from 1 to the 2 columns"):
        leading_eigenpairs(torch.zeros_like, first_block(9, 2), 3)


def test_rows_that_the_kernel_leaves_without_neighbours_are_a_warning(caplog: pytest.LogCaptureFixture):
    codes = torch.eye(6)
    partition(lambda: iter([codes]), 2, SpectralOptions(temperature=0.1))
    assert not caplog.records
    partition(lambda: iter([codes]), 2, SpectralOptions(temperature=0.005))
    assert "6 of 6 rows have no neighbour at η = 0.005" in caplog.text


def test_more_clusters_than_positive_eigenvalues_still_give_fitted_rows_their_labels():
    """Rows that all point elsewhere: of 12 eigenvalues one is positive."""
    codes = torch.eye(12, 16) + 0.05 * torch.randn(12, 16, generator=torch.Generator().manual_seed(0))
    fitted = partition(lambda: iter([codes]), 10, SpectralOptions(temperature=0.1))
    assert int((fitted.values > 0).sum()) < 10
    assert fitted.assign(codes, 10).argmax(1).tolist() == fitted.labels(10).tolist()
    assert len(fitted.labels(10).unique()) > 5
