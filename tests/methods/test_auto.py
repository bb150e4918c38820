"""The default method: planted clusters, what counts as evidence, and one result on any number of workers."""

from __future__ import annotations

import pytest
import torch
from sklearn.cluster import KMeans
from torch import Tensor
from torch.nn import functional

from rayclust import methods
from rayclust.clustering import candidates
from rayclust.clustering.candidates import HEADS, LEARNT, Candidate, choose, make_candidates
from rayclust.methods import graph
from rayclust.methods.auto import Auto
from rayclust.methods.settings import AutoConfig
from rayclust.metrics.external import accuracy
from rayclust.search.knn import top_k
from rayclust.training.loop import Trainer, fit_arrays
from rayclust.training.sampling import ArrayRows
from tests.workers import on_two_workers


def planted(count: int = 240, sizes: tuple[float, ...] = (1, 1, 1, 1), noise: float = 0.28, seed: int = 0):
    """Unit rows around orthogonal directions, the direction of each, and their neighbours."""
    generator = torch.Generator().manual_seed(seed)
    parts = (torch.tensor(sizes) / sum(sizes) * count).round().long()
    labels = torch.repeat_interleave(torch.arange(len(parts)), parts)
    x = functional.normalize(torch.eye(16)[labels] + noise * torch.randn(len(labels), 16, generator=generator), dim=1)
    ids = torch.arange(len(x))
    return x, labels, top_k(x, x, 10, query_ids=ids, database_ids=ids)[0].long()


@pytest.mark.parametrize("sizes", [(1, 1, 1, 1), (8, 4, 2, 1)])
def test_planted_clusters_are_found_even_or_not(sizes: tuple[float, ...]):
    x, labels, neighbors = planted(sizes=sizes)
    method = fit_arrays(x, neighbors, AutoConfig(clusters=4))
    assert accuracy(labels, method.predict_proba(x).argmax(1)) > 0.95


def test_each_row_is_predicted_alone_and_after_a_round_trip():
    x, _, neighbors = planted()
    method = fit_arrays(x, neighbors, AutoConfig(clusters=4))
    whole = method.predict_proba(x)
    assert torch.cat([method.predict_proba(row[None]) for row in x]).allclose(whole, atol=1e-6)
    assert whole.sum(1).allclose(torch.ones(len(x)))
    assert methods.load(method.state()).predict_proba(x).equal(whole)
    assert method.prototypes().norm(dim=1).allclose(torch.ones(4))


def test_probabilities_are_as_sharp_as_neighbours_agree():
    for noise in (0.2, 0.6):
        x, _, neighbors = planted(noise=noise)
        method = fit_arrays(x, neighbors, AutoConfig(clusters=4))
        probabilities = method.predict_proba(x)
        labels = probabilities.argmax(1)
        agreement = float((labels[neighbors] == labels[:, None]).double().mean())
        assert float(probabilities.amax(1).mean()) == pytest.approx(min(agreement, 0.999), abs=0.01)


def evidence(**changed: float) -> dict[str, float]:
    return {"modularity": 0.5, "neighbor_agreement": 0.9, "size_entropy": 0.9, "occupied": 4.0} | changed


@pytest.mark.parametrize(
    ("changed", "taken"),
    [
        ({"moved": 20.0}, True),
        ({"modularity": 0.5}, False),
        ({"neighbor_agreement": 0.9}, False),
        ({"size_entropy": 1.01}, False),
        ({"occupied": 3.0}, True),
        ({"occupied": 2.0}, False),
        ({"moved": 21.0}, False),
        ({"moved": 21.0, "modularity": 0.514}, False),
        ({"moved": 200.0, "modularity": 0.516}, True),
    ],
)
def test_a_candidate_is_kept_where_the_graph_speaks_for_it_and_more_so_if_it_is_another_partition(
    changed: dict[str, float], taken: bool
):
    assert replaces("rival", {"modularity": 0.501, "neighbor_agreement": 0.901} | changed) == taken


def replaces(name: str, changed: dict[str, float], rows: int = 400) -> bool:
    """Whether a candidate of that name, some rows of which have moved, replaces the floor."""
    floor, moved = torch.zeros(rows, dtype=torch.long), int(changed.get("moved", 0))
    empty, found = torch.zeros(4), evidence(**{key: changed[key] for key in changed if key != "moved"})
    rivals = [Candidate(name, (torch.arange(rows) < moved).long(), empty, empty, found)]
    return choose([Candidate("floor", floor, empty, empty, evidence()), *rivals]) is rivals[0]


@pytest.mark.parametrize(
    ("name", "changed", "taken"),
    [
        (HEADS, {}, False),
        (HEADS, {"neighbor_agreement": 0.901, "modularity": 0.496}, True),
        (HEADS, {"neighbor_agreement": 0.901, "modularity": 0.494}, False),
        (LEARNT, {"neighbor_agreement": 0.907}, False),
        (LEARNT, {"neighbor_agreement": 0.908, "modularity": 0.496}, True),
        (LEARNT, {"neighbor_agreement": 0.908, "modularity": 0.494}, False),
    ],
)
def test_what_was_trained_must_keep_more_neighbours_together(name: str, changed: dict[str, float], taken: bool):
    assert replaces(name, changed) == taken


def test_a_partition_of_few_rows_must_speak_for_itself():
    for modularity, agreement, taken in ((0.514, 0.92, False), (0.516, 0.909, False), (0.516, 0.911, True)):
        assert replaces("rival", {"modularity": modularity, "neighbor_agreement": agreement}, rows=399) == taken


class NoCheckpoints:
    """A store for one training, where a fit has two: a resumed one would take the other's checkpoint."""

    def save(self, *_: object) -> None:
        raise AssertionError

    latest = save


@pytest.mark.parametrize("count", [240, 400])
def test_the_report_has_a_row_for_each_candidate_and_one_is_chosen(count: int):
    x, _, neighbors = planted(count)
    rows: list[dict[str, object]] = []
    method = methods.build(AutoConfig(clusters=4), 16, len(x), 0)
    method.fit(ArrayRows(x, neighbors), Trainer(0, torch.device("cpu"), rows.append, NoCheckpoints()))
    rows = [row for row in rows if "candidate" in row]  # what the trainings report comes before
    assert [row["candidate"] for row in rows] == [
        "k-means",
        "refined k-means",
        "consensus",
        "consensus with spectral clusters",
        HEADS,
        LEARNT,
    ]
    assert sum(float(row["chosen"]) for row in rows) == 1
    for row in rows[-2:]:
        assert row.get("note") == ("left out: fewer than 400 rows" if count < 400 else None)
        assert ("modularity" in row) == (count >= 400)


def test_a_space_in_which_clusters_are_apart_moves_the_best_candidate():
    x, labels, neighbors = planted(noise=0.6)

    def learn(basis: Tensor) -> Tensor:
        """A space in which the last tenth of the rows has no place of its own."""
        assert basis.shape == (16, 16)
        return functional.normalize(torch.eye(4)[labels] + torch.rand(len(x), 1).gt(0.9) * 1.0, dim=1)

    *others, learnt = make_candidates(x, neighbors, 4, 0, learn=learn)
    assert learnt.name == LEARNT
    assert accuracy(labels, learnt.labels) > max(accuracy(labels, other.labels) for other in others)
    assert (x @ learnt.weight + learnt.bias).argmax(1).equal(learnt.labels)


def test_heads_start_at_the_best_candidate_and_are_told_by_a_linear_classifier():
    x, labels, neighbors = planted(noise=0.6)
    starts: list[Candidate] = []

    def train(basis: Tensor, start: Candidate) -> Tensor:
        starts.append(start)
        return labels

    *others, heads = make_candidates(x, neighbors, 4, 0, heads=train)
    assert (heads.name, starts) == (HEADS, [choose(others)])
    assert accuracy(labels, heads.labels) > max(accuracy(labels, other.labels) for other in others)
    assert (x @ heads.weight + heads.bias).argmax(1).equal(heads.labels)


@pytest.mark.parametrize(
    ("settings", "count", "heads", "space"),
    [
        ({}, 3_000, None, None),
        ({}, 399, "fewer than 400 rows", "fewer than 400 rows"),
        ({}, 799, None, "fewer than 80 rows a cluster"),
        ({"budget": 0}, 3_000, "budget = 0", "budget = 0"),
        ({"budget": 1}, 3_000, "some 4 s of one core, of 1", "some 3 s of one core, of 1"),
        ({"budget": 5}, 3_000, None, "some 3 s of one core, of 1.26"),
        ({}, 10_000_000, None, "some 301 s of one core, of 36.3"),
    ],
)
def test_what_takes_longer_than_the_budget_is_not_trained(
    settings: dict[str, float], count: int, heads: str | None, space: str | None
):
    refused = Auto(AutoConfig.model_validate({"clusters": 10, **settings}), 1_280, count, 0).refusals()
    assert (refused.get(HEADS), refused.get(LEARNT)) == (heads, space)


@pytest.mark.parametrize("seed", [0, 2**40 + 7])
def test_without_candidates_it_is_scikit_learns_k_means(seed: int):
    x, _, neighbors = planted(noise=0.8)
    (floor,) = make_candidates(x, neighbors, 4, seed, rivals=False)
    model = KMeans(4, n_init=10, random_state=seed % 2**32).fit(x.numpy())
    assert floor.labels.numpy().tolist() == model.labels_.tolist()
    assert (x @ floor.weight + floor.bias).argmax(1).equal(floor.labels)
    assert floor.evidence["inertia"] * len(x) == pytest.approx(model.inertia_, rel=1e-4)


def test_of_many_rows_the_floor_is_the_least_inertia_of_the_starts(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(candidates, "FLOOR_OPERATIONS", 0.0)
    x, _, neighbors = planted(noise=0.6)
    (floor,) = make_candidates(x, neighbors, 4, 0, rivals=False)
    p = x - x.mean(0)
    centers = torch.stack([p[floor.labels == k].mean(0) for k in range(4)])
    assert torch.cdist(p, centers).argmin(1).equal(floor.labels)


def test_without_spectral_clusters_the_other_candidates_stay(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(candidates, "SPECTRAL_LIMIT", 1.0)
    x, _, neighbors = planted()
    assert [c.name for c in make_candidates(x, neighbors, 4, 0)] == ["k-means", "refined k-means", "consensus"]


def test_very_many_clusters_are_plain_k_means(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(candidates, "OPERATION_LIMIT", 1.0)
    x, _, neighbors = planted()
    assert [c.name for c in make_candidates(x, neighbors, 4, 0)] == ["k-means"]


@pytest.mark.parametrize("count", [2, 3, 5])
def test_few_rows_and_equal_rows_end_without_an_error(count: int):
    for x in (torch.eye(4)[:count].repeat(1, 2) if count <= 4 else torch.eye(8)[:count], torch.ones(count, 8)):
        neighbors = torch.full((count, 1), -1)
        method = fit_arrays(x, neighbors, AutoConfig(clusters=2))
        assert method.predict_proba(x).isfinite().all()


@pytest.mark.filterwarnings("error")
def test_rows_that_are_there_twice_change_no_partition():
    noise = torch.randn(60, 200, generator=torch.Generator().manual_seed(0))
    x = functional.normalize(torch.eye(200)[torch.arange(60) % 3] + 0.02 * noise, dim=1)
    twice = torch.cat([x, x[:40]])
    assert torch.linalg.matrix_rank(twice) < min(twice.shape) - 1
    axes = candidates.leading_components(twice - twice.mean(0), 99)
    assert axes.norm(dim=0).round(decimals=3).unique().tolist() == [0, 1]
    ids = torch.arange(100)
    neighbors = top_k(twice, twice, 10, query_ids=ids, database_ids=ids)[0].long()
    found = fit_arrays(twice, neighbors, AutoConfig(clusters=3)).predict_proba(twice).argmax(1)
    assert accuracy(torch.cat([ids[:60], ids[:40]]) % 3, found) == 1
    same = torch.ones(30, 8)
    assert len(make_candidates(same, neighbors[:30] % 30, 3, 0)) > 1


def test_a_sample_is_fitted_where_there_are_many_rows(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(graph, "SAMPLE_ROWS", 100)
    monkeypatch.setattr(graph, "SAMPLE_ROWS_PER_CLUSTER", 10)
    x, labels, neighbors = planted(count=380, noise=0.25)
    method = fit_arrays(x, neighbors, AutoConfig(clusters=4))
    assert accuracy(labels, method.predict_proba(x).argmax(1)) > 0.95


def test_two_workers_find_what_one_finds():
    alone = _fitted(0, 1)
    for weight in on_two_workers(_fitted):
        assert weight.allclose(alone, atol=1e-4)


def _fitted(rank: int, workers: int) -> Tensor:
    x, _, neighbors = planted()
    method = fit_arrays(x, neighbors, AutoConfig(clusters=4))
    assert isinstance(method, Auto)
    return method.weight


def test_nothing_is_trained_while_a_number_of_clusters_is_chosen():
    config = AutoConfig(clusters=3)
    assert config.model_copy(update=config.selection_settings) == AutoConfig(clusters=3, budget=0) != config
