"""Consensus: worked by hand, properties over random members, and the classifier against its closed form."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from scipy import sparse

from rayclust.clustering import consensus
from rayclust.clustering.consensus import match_clusters, ridge_classifier, surest_rows, vote
from rayclust.errors import DataError, ShapeError


def labels(text: str) -> torch.Tensor:
    return torch.tensor([int(c) for c in text])


def overlaps(a: torch.Tensor, b: torch.Tensor, rows: int, columns: int) -> sparse.csr_array:
    return sparse.coo_array((np.ones(len(a), int), (a.numpy(), b.numpy())), shape=(rows, columns)).tocsr()


def test_three_members_by_hand():
    members = [labels("000111"), labels("111000"), labels("001111")]
    result = vote(members, 2, members[0])
    assert result.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert result.confidence.tolist() == pytest.approx([1, 1, 2 / 3, 1, 1, 1])
    assert result.margin.tolist() == pytest.approx([1, 1, 1 / 3, 1, 1, 1])
    assert result.agreement == pytest.approx(17)
    assert result.names[1].tolist() == [1, 0]


def test_renamings_of_one_partition_agree_at_once():
    start = torch.arange(20) % 4
    members = [torch.tensor(p)[start] for p in itertools.islice(itertools.permutations(range(4)), 5)]
    result = vote(members, 4, start)
    assert result.labels.equal(start)
    assert result.confidence.eq(1).all()
    assert result.agreement == pytest.approx(100)
    assert result.rounds == 1


@pytest.mark.parametrize("seed", range(20))
def test_agreement_never_falls_and_names_do_not_matter(seed: int):
    generator = torch.Generator().manual_seed(seed)
    truth = torch.randint(0, 5, (500,), generator=generator)
    others = torch.randint(0, 5, (7, 500), generator=generator)
    members = list(torch.where(torch.rand(7, 500, generator=generator) < 0.5, truth, others))
    reached = [vote(members, 5, members[0], rounds=r).agreement for r in range(1, 8)]
    assert all(b >= a - 1e-9 for a, b in itertools.pairwise(reached))
    renamed = [torch.randperm(5, generator=generator)[member] for member in members]
    first, second = vote(members, 5, members[0]), vote([*renamed[:-1], members[-1]], 5, members[0])
    assert first.labels.equal(second.labels)


def test_ties_keep_the_present_label():
    """Three independent members, right with p = 0.7, K = 10: p³ + 3p²q + pq²·8/9 = 0.840, not 0.95 as by lowest ids."""
    generator, count = torch.Generator().manual_seed(0), 200_000
    truth = torch.zeros(count, dtype=torch.int64)
    truth[: count // 2] = torch.arange(count // 2) % 10  # all clusters there, so that no renaming pays
    members = []
    for _ in range(3):
        wrong = (truth + torch.randint(1, 10, (count,), generator=generator)) % 10
        members.append(torch.where(torch.rand(count, generator=generator) < 0.7, truth, wrong))
    result = vote(members, 10, members[0])
    late = slice(count // 2, None)
    assert (result.labels[late] == truth[late]).double().mean() == pytest.approx(0.840, abs=0.005)


def test_finer_members_join_without_loss():
    start = torch.arange(40) % 4
    finer = 2 * start + torch.arange(40) // 20
    result = vote([finer, finer], 4, start)
    assert result.labels.equal(start)
    assert result.confidence.eq(1).all()


def test_coarser_members_leave_names_unused():
    start = torch.arange(40) % 4
    coarse = (start >= 2).long()
    assert sorted(match_clusters(overlaps(coarse, start, 2, 4)).tolist()) in ([0, 2], [0, 3], [1, 2], [1, 3])


def test_members_without_opinion_and_weights():
    start, silent = labels("000111"), torch.full((6,), -1)
    members = [start, labels("001111")]
    plain = vote(members, 2, start)
    for other in (
        vote([*members, labels("010101")], 2, start, weights=[1, 1, 0]),
        vote([members[0], members[0], members[1], members[1]], 2, start),
        vote([members[0], members[1]], 2, start, weights=[3, 3]),
    ):
        assert other.labels.equal(plain.labels)
        assert other.confidence.tolist() == pytest.approx(plain.confidence.tolist())
    assert vote([*members, silent], 2, start).labels.equal(plain.labels)
    assert vote([start, start, labels("001111")], 2, start).agreement == pytest.approx(
        vote([start, labels("001111")], 2, start, weights=[2, 1]).agreement
    )


def test_sparse_matching_has_the_weight_of_the_dense_one(monkeypatch: pytest.MonkeyPatch):
    generator = torch.Generator().manual_seed(3)
    a, b = (torch.randint(0, 200, (4_000,), generator=generator) for _ in range(2))
    table = overlaps(a, b, 200, 200)
    weights = []
    for bound in (5_000, 10):
        monkeypatch.setattr(consensus, "MOST_DENSE", bound)
        names = match_clusters(table)
        assert sorted(names.tolist()) == list(range(200))
        weights.append(int(table.toarray()[np.arange(200), names].sum()))
    assert weights[0] == weights[1]


def test_impossible_votes_are_refused():
    with pytest.raises(DataError, match="members = 0"):
        vote([], 2, labels("01"))
    with pytest.raises(ShapeError, match="as of the start"):
        vote([labels("011")], 2, labels("01"))


def test_every_cluster_keeps_its_share_of_surest_rows():
    kept = surest_rows(
        labels("00001"), torch.tensor([0.5, 0.9, 0.9, 0.1, 0.2]), torch.tensor([0.0, 0.1, 0.3, 0, 0]), 0.5
    )
    assert kept.tolist() == [False, True, True, False, True]
    ties = surest_rows(labels("0000"), torch.ones(4), torch.ones(4), 0.7)
    assert ties.tolist() == [True, True, False, False]


def test_ridge_reproduces_separable_labels_and_shrinks_to_shares():
    given = torch.arange(30) % 3
    x = torch.eye(3)[given] + 5.0
    weight, bias = ridge_classifier(x, given, 3, 1e-6)
    assert (x @ weight + bias).argmax(1).equal(given)
    assert (x @ weight + bias).allclose(torch.eye(3)[given], atol=1e-4)
    weight, bias = ridge_classifier(x, labels("0" * 15 + "1" * 10 + "2" * 5), 3, 1e9)
    assert (x @ weight + bias).allclose(torch.tensor([15.0, 10.0, 5.0]) / 30, atol=1e-5)
