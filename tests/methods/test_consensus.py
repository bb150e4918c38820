"""The consensus as a method: members, the floor, guards, and one result on any number of workers."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from rayclust import distributed, methods
from rayclust.clustering.consensus import ConsensusResult, MemberEvidence, SoftLabels
from rayclust.distributed import DeviceMesh, data_parallel
from rayclust.methods import consensus
from rayclust.methods.base import Batch
from rayclust.methods.consensus import Consensus
from rayclust.methods.settings import ConsensusConfig
from rayclust.metrics.external import accuracy
from rayclust.search.knn import nearest_others
from rayclust.training.loop import fit_arrays
from tests.workers import on_workers


def planted(count: int = 240, noise: float = 0.28) -> tuple[Tensor, Tensor, Tensor]:
    """Unit rows around four orthogonal directions, the direction of each, and their neighbours."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(count) % 4
    x = functional.normalize(torch.eye(16)[labels] + noise * torch.randn(count, 16, generator=generator), dim=1)
    return x, labels, nearest_others(x, 10).long()


def noisy(labels: Tensor, share: float, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    other = (labels + torch.randint(1, 4, labels.shape, generator=generator)) % 4
    return torch.where(torch.rand(len(labels), generator=generator) < share, other, labels)


def fitted(members: list[Tensor] | None, **settings: object) -> Consensus:
    x, _, neighbors = planted()
    method = fit_arrays(x, neighbors, ConsensusConfig(clusters=4, **settings), members=members)
    assert isinstance(method, Consensus)
    return method


def test_noisy_members_make_a_clean_partition_that_new_rows_have():
    x, labels, _ = planted()
    method = fitted([noisy(labels, 0.3, seed) for seed in range(6)])
    whole = method.predict_proba(x)
    assert accuracy(labels, whole.argmax(1)) > 0.97
    assert torch.cat([method.predict_proba(row[None]) for row in x]).allclose(whole, atol=1e-6)
    assert methods.load(method.state()).predict_proba(x).equal(whole)
    assert method.prototypes().norm(dim=1).allclose(torch.ones(4))
    assert [row["candidate"] for row in method.report[-2:]] == ["vote", "vote, self-training"]
    assert [row["weight"] for row in method.report].count(0.0) == 3


def test_without_members_k_means_makes_them():
    x, labels, _ = planted()
    method = fitted(None, restarts=5)
    assert len(method.report) == 7
    assert accuracy(labels, method.predict_proba(x).argmax(1)) > 0.97


def test_the_best_member_stands_where_the_vote_has_less_modularity():
    x, labels, _ = planted()
    wrong = labels // 2 * 2 + (torch.arange(len(labels)) // 4 % 2)  # most members share it
    method = fitted([labels, noisy(wrong, 0.05, 1), noisy(wrong, 0.06, 2), noisy(wrong, 0.05, 3)])
    kept = method.report[-1]
    assert kept["candidate"] == "best member, self-training"
    assert kept["modularity"] > method.report[-2]["modularity"]
    assert accuracy(labels, method.predict_proba(x).argmax(1)) > 0.97


@pytest.mark.parametrize(
    ("agreement", "modularity", "kept_together", "wanted"),
    [
        (0.97, 0.003, 0.001, True),
        (0.97, -0.003, 0.001, True),
        (0.97, 0.003, -0.001, False),
        (0.97, -0.006, 0.001, False),
        (0.8, 0.014, 0.02, False),
        (0.8, 0.016, 0.02, True),
    ],
)
def test_a_vote_that_cuts_otherwise_needs_more_evidence(
    agreement: float, modularity: float, kept_together: float, wanted: bool, monkeypatch: pytest.MonkeyPatch
):
    _, labels, _ = planted()
    best = MemberEvidence(4, 4, 1.0, 0.6, 0.8, 0.9, "")
    vote = MemberEvidence(4, 4, 1.0, 0.6 + modularity, 0.8 + kept_together, 0.9, "")
    vote_of = consensus.consensus

    def with_best(*arguments: Any) -> ConsensusResult:
        found = vote_of(*arguments)
        return replace(found, best=found.voters[0], members=[best] * len(found.members))

    monkeypatch.setattr(consensus, "consensus", with_best)
    monkeypatch.setattr(consensus, "evidence", lambda *arguments: vote)
    monkeypatch.setattr(consensus, "agreements", lambda members: torch.full((2, 2), agreement))
    kept = fitted([noisy(labels, 0.05, seed) for seed in range(3)]).report[-1]["candidate"]
    assert kept.startswith("vote") is wanted


def test_rows_among_those_of_other_clusters_do_not_teach(monkeypatch: pytest.MonkeyPatch):
    """A tenth of each cluster has neighbours of the other alone; it is left out, but not where rows are few."""
    taught, ridge = list[Tensor](), consensus.ridge_classifier

    def recorded(*arguments: Any) -> tuple[Tensor, Tensor]:
        taught.append(arguments[-1])
        return ridge(*arguments)

    monkeypatch.setattr(consensus, "ridge_classifier", recorded)
    monkeypatch.setattr(consensus, "is_supported", lambda *arguments: False)  # the member's labels, not the vote's
    for count, fitted_to in ((400, 360), (200, 200)):
        labels = torch.arange(count) // (count // 2)
        inside = torch.arange(count) % (count // 2) >= count // 20
        own, other = labels * (count // 2) + count // 4, (1 - labels) * (count // 2) + count // 4
        neighbors = torch.where(inside, own, other)[:, None]
        method = fit_arrays(torch.eye(2)[labels], neighbors, ConsensusConfig(clusters=2), members=[labels])
        assert method.report[-1]["candidate"].startswith("best member")
        assert len(taught[-1]) == fitted_to
        assert inside[taught[-1]].all() or fitted_to == count


def test_a_classifier_that_breaks_a_guard_is_not_kept(monkeypatch: pytest.MonkeyPatch):
    x, labels, _ = planted()
    monkeypatch.setattr(consensus, "RIDGE", 1e9)
    monkeypatch.setattr(consensus, "broken_guard", lambda *arguments: "it was asked for")
    method = fitted([noisy(labels, 0.1, seed) for seed in range(3)], classifier="ridge")
    assert method.report[-1]["candidate"].endswith(", nearest means")
    assert method.report[-1]["note"] == "it was asked for"
    assert accuracy(labels, method.predict_proba(x).argmax(1)) > 0.95


def test_a_head_follows_members_that_no_linear_classifier_follows(caplog: pytest.LogCaptureFixture):
    """Each cluster is two groups of rows on opposite sides."""
    generator = torch.Generator().manual_seed(0)
    group = torch.arange(240) % 4
    sides = torch.tensor([[1.0, 1.0], [-1.0, -1.0], [1.0, -1.0], [-1.0, 1.0]])[group]
    x = torch.cat([sides, torch.zeros(240, 6)], dim=1) + 0.15 * torch.randn(240, 8, generator=generator)
    x, labels = functional.normalize(x, dim=1), group // 2
    near, right = nearest_others(x, 10).long(), {}
    for kind in ("ridge", "auto"):
        config = ConsensusConfig(clusters=2, classifier=kind)
        method = fit_arrays(x, near, config, members=[labels, 1 - labels, labels])
        assert isinstance(method, Consensus)
        right[kind] = accuracy(labels, method.predict_proba(x).argmax(1))
        assert bool(method.report[-1]["note"]) == ("is not kept" in caplog.text) == (kind == "ridge")
        caplog.clear()
    assert right["auto"] > 0.97 > right["ridge"] + 0.2
    assert method.report[-1]["candidate"] == "best member, head"
    assert methods.load(method.state()).predict_proba(x).equal(method.predict_proba(x))


def test_a_head_is_taken_wherever_it_is_asked_for():
    x, labels, _ = planted()
    method = fitted([noisy(labels, 0.3, seed) for seed in range(6)], classifier="head")
    assert method.report[-1]["candidate"] == "vote, head"
    assert accuracy(labels, method.predict_proba(x).argmax(1)) > 0.94


def test_classes_weigh_alike_in_what_a_head_learns():
    """Three rows of one class and one of another, with losses 1, 1, 1, 3: 2, the mean of the classes' means."""
    labels, losses = torch.tensor([0, 0, 0, 1]), torch.tensor([1.0, 1.0, 1.0, 3.0])
    own = (-losses).exp()
    shares = ((1 - own) / 2)[:, None].expand(-1, 3).scatter(1, labels[:, None], own[:, None])
    batch = Batch({"embeddings": (consensus.HEAD_TEMPERATURE * shares.log())[None]}, torch.arange(4), 0, 0)
    method = consensus.VoteHead(consensus.VoteHeadConfig(clusters=3, batch_size=4), 3, 4, seed=0)
    method.student.forward = lambda x, training: x[None]  # type: ignore[method-assign,assignment]
    method.votes = SoftLabels(labels[:, None], torch.ones(4, 1))
    assert float(method.training_step(batch)["loss"]) == pytest.approx(2.0)
    method.votes = SoftLabels(torch.full((4, 1), -1), torch.ones(4, 1))  # rows without votes
    assert float(method.training_step(batch)["loss"]) == 0.0


def test_a_heads_loss_and_gradient_do_not_depend_on_the_workers():
    loss, gradient = _head_step(0, 1)
    for found in on_workers(2, _head_step):
        assert found[0].allclose(loss, atol=1e-6)
        assert found[1].allclose(gradient, atol=1e-6)


def _head_step(rank: int, workers: int) -> tuple[Tensor, Tensor]:
    """Loss and gradient of one batch, over all workers."""
    x, labels, _ = planted(24)
    method = consensus.VoteHead(consensus.VoteHeadConfig(clusters=4, batch_size=24), 16, 24, seed=0)
    method.votes = SoftLabels(torch.stack([labels, labels.where(labels > 1, -1)], 1), torch.ones(24, 2))
    rows = torch.arange(24)[rank::workers]
    batch = Batch({"embeddings": x[rows][None]}, rows, step=0, epoch=0, weight=workers * len(rows) / 24)
    loss = method.training_step(batch)["loss"] * batch.weight
    loss.backward()
    parameters = list(method.student.parameters())
    distributed.average_gradients(parameters)
    return distributed.all_reduce(loss.detach()) / workers, parameters[0].grad


def test_probabilities_are_as_sure_as_the_members():
    x, labels, _ = planted()
    for share in (0.02, 0.4):
        method = fitted([noisy(labels, share, seed) for seed in range(6)])
        confidence = method.report[-2]["agreement"]
        assert float(method.predict_proba(x).amax(1).mean()) == pytest.approx(min(confidence, 0.999), abs=0.01)


@pytest.mark.parametrize("count", [2, 5])
def test_few_rows_and_equal_rows_end_without_an_error(count: int):
    for x in (torch.eye(8)[:count], torch.ones(count, 8)):
        method = fit_arrays(x, torch.full((count, 1), -1), ConsensusConfig(clusters=2, restarts=2))
        assert method.predict_proba(x).isfinite().all()


def test_two_and_four_workers_find_what_one_finds():
    alone = _labels(0, 1)
    for found in on_workers(4, _on_four_and_on_two):
        assert found[0].equal(alone)
        assert found[1].equal(alone)


def _on_four_and_on_two(rank: int, workers: int) -> tuple[Tensor, Tensor]:
    """Labels by all four workers, and by each pair of them."""
    with data_parallel(DeviceMesh.of(2).data):
        pair = _labels(rank, 2)
    return _labels(rank, workers), pair


def _labels(rank: int, workers: int) -> Tensor:
    return fitted(None, restarts=4).predict_proba(planted()[0]).argmax(1)
