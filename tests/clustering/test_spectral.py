from __future__ import annotations

import numpy as np
import pytest
import torch

from rayclust.clustering.spectral import Spectral, SpectralOptions, partition
from rayclust.errors import ArtefactError, ConfigError, DataError, ShapeError
from rayclust.metrics.external import accuracy, ari
from tests import references
from tests.workers import on_two_workers


def subspaces(clusters: int, count: int, *, noise: float = 0.3, width: int = 32, seed: int = 0) -> tuple:
    """Rows of random two-dimensional subspaces, in mixed order, and which."""
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.arange(count) % clusters)
    bases = np.linalg.qr(rng.normal(size=(clusters, width, 2)))[0]
    rows = np.einsum("nr,ndr->nd", rng.normal(size=(count, 2)), bases[labels])
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    rows += noise * rng.normal(size=rows.shape) / np.sqrt(width)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    return torch.from_numpy(rows.astype(np.float32)), labels


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


def _on_worker(rank: int, world: int, codes: torch.Tensor, dense_rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    own = codes[: 1 + len(codes) // 3] if rank == 0 and world > 1 else codes[1 + len(codes) // 3 :]
    blocks = torch.split(own if world > 1 else codes, 128)
    found = partition(lambda: blocks, 4, SpectralOptions(temperature=0.1, dense_rows=dense_rows), 0)
    return found.labels(4), found.values


@pytest.mark.parametrize("dense_rows", [1000, 300])
def test_two_workers_are_one(dense_rows: int):
    codes, _ = subspaces(4, 700)
    labels, values = _on_worker(0, 1, codes, dense_rows)
    results = on_two_workers(_on_worker, codes, dense_rows)
    for found, eigenvalues in results:
        assert torch.equal(found, labels)
        torch.testing.assert_close(eigenvalues, values, atol=1e-5, rtol=0)


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
