"""Consensus: worked by hand, properties over random members, and the classifier against its closed form."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from scipy import sparse
from sklearn.cluster import KMeans, SpectralClustering

from rayclust.clustering import consensus
from rayclust.clustering.consensus import SoftLabels, match_clusters, ridge_classifier, surest_rows, vote
from rayclust.errors import DataError, ShapeError
from rayclust.metrics.external import ari


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


@pytest.mark.parametrize(("clusters", "right"), [(2, 0.784), (10, 0.840)])
def test_ties_keep_the_present_label(clusters: int, right: float):
    """Three independent members, right with p = 0.7: p³ + 3p²q + pq²·8/9, of K = 2 without ties p³ + 3p²q.

    Ties to the lowest id would give 0.95 where that is the true one.
    """
    generator, count = torch.Generator().manual_seed(0), 200_000
    truth = torch.zeros(count, dtype=torch.int64)
    truth[: count // 2] = torch.arange(count // 2) % clusters  # all clusters there, so that no renaming pays
    members = []
    for _ in range(3):
        wrong = (truth + torch.randint(1, clusters, (count,), generator=generator)) % clusters
        members.append(torch.where(torch.rand(count, generator=generator) < 0.7, truth, wrong))
    result = vote(members, clusters, members[0])
    late = slice(count // 2, None)
    assert (result.labels[late] == truth[late]).double().mean() == pytest.approx(right, abs=0.005)


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


# The gate, the starts, and what is measured of members.

THREE = ("000111", "111000", "001111")


def test_measures_of_three_members_by_hand():
    """§8.3 of the method's notes: NMI(y¹, y³) = 0.4791388, so ANMI of y¹ is (1 + 1 + 0.4791388) / 3."""
    members = [labels(text) for text in THREE]
    assert consensus.anmi(members[0], members) == pytest.approx(0.8263796, abs=1e-6)
    assert consensus.anmi(members[2], members) == pytest.approx(0.6527592, abs=1e-6)
    assert consensus.agreements(members)[0].tolist() == pytest.approx([1, 1, 5 / 6])
    indicator = np.concatenate([np.eye(2)[member] for member in members], axis=1)
    shared = indicator @ indicator.T / 3
    assert shared[[0, 0, 2, 0], [1, 2, 3, 3]].tolist() == pytest.approx([1, 2 / 3, 1 / 3, 0])
    bipartite = indicator / np.sqrt(3) / np.sqrt(indicator.sum(0))
    assert np.linalg.svd(bipartite)[1] == pytest.approx([1, 0.9341724, 0.3568221, 0, 0, 0], abs=1e-6)


def ring(count: int) -> torch.Tensor:
    """Each row's four nearest on a circle of rows in order."""
    return (torch.arange(count)[:, None] + torch.tensor([1, -1, 2, -2])) % count


def test_the_vote_is_what_classical_ensembles_find():
    """CSPA cuts the graph of shared clusters A·Aᵀ, HBGF the rows' singular vectors of H^(−1/2) A D^(−1/2)."""
    generator, truth = torch.Generator().manual_seed(1), torch.arange(240) // 60
    other = (truth + torch.randint(1, 4, (7, 240), generator=generator)) % 4
    members = list(torch.where(torch.rand(7, 240, generator=generator) < 0.15, other, truth))
    indicator = np.concatenate([np.eye(4)[member] for member in members], axis=1)
    cspa = SpectralClustering(4, affinity="precomputed", random_state=0).fit_predict(indicator @ indicator.T)
    left = np.linalg.svd(indicator / np.sqrt(7 * indicator.sum(0)))[0][:, :4]
    unit = left / np.linalg.norm(left, axis=1, keepdims=True)
    hbgf = KMeans(4, n_init=10, random_state=0).fit_predict(unit)
    found = vote(members, 4, members[0]).labels
    assert all(ari(each, found) > 0.95 for each in (cspa, hbgf, truth))


def test_the_gate_says_whom_it_drops_and_why():
    truth = torch.arange(60) // 20
    generator = torch.Generator().manual_seed(0)
    noisy = [torch.where(torch.rand(60, generator=generator) < s, (truth + 1) % 3, truth) for s in (0.1, 0.2, 0.3, 0.4)]
    lost, lopsided = truth.clamp(max=1) * 2, torch.full((60,), 1)
    lopsided[[0, 30]] = torch.tensor([0, 2])
    members = [noisy[3], truth, noisy[0], lost, truth.clone(), lopsided, noisy[1], noisy[2]]
    found = consensus.consensus(members, 3, ring(60))
    reasons = [one.dropped for one in found.members]
    assert reasons[1] == reasons[2] == reasons[6] == ""
    assert reasons[0] == reasons[7] == "in the lower half by modularity"
    assert reasons[3] == "2 of 3 clusters have rows"
    assert reasons[4] == "a copy of member 1"
    assert reasons[5].startswith("sizes have")
    assert (found.voters[0], found.best, found.medoid) == (1, 1, 1)
    assert int((found.vote.labels == truth).sum()) >= 58


def test_bounds_that_no_member_passes_are_not_applied():
    lopsided = torch.zeros(30, dtype=torch.int64)
    lopsided[0] = 1
    found = consensus.consensus([lopsided, lopsided.clone()], 2, ring(30))
    assert [one.dropped for one in found.members] == ["", "a copy of member 0"]
    assert found.vote.labels.equal(lopsided)


@pytest.mark.parametrize("seed", range(5))
def test_names_of_members_do_not_matter(seed: int):
    generator = torch.Generator().manual_seed(seed)
    truth = torch.arange(400) // 100
    draws = torch.rand(6, 400, generator=generator) < 0.3
    members = [torch.where(d, torch.randint(0, 4, (400,), generator=generator), truth) for d in draws]
    renamed = [torch.randperm(4, generator=generator)[member] for member in members]
    first, second = (consensus.consensus(some, 4, ring(400)) for some in (members, renamed))
    table = overlaps(first.vote.labels, second.vote.labels, 4, 4)
    assert int(table.toarray().max(axis=1).sum()) == 400
    assert first.vote.agreement == pytest.approx(second.vote.agreement)
    assert first.voters == second.voters
    assert [one.modularity for one in first.members] == pytest.approx([one.modularity for one in second.members])


def test_members_without_the_wanted_number_of_clusters_are_clustered_themselves():
    truth = torch.arange(120) // 30
    halves = 2 * truth + torch.arange(120) % 2  # each cluster in two
    thirds = 3 * truth + torch.arange(120) % 3
    found = consensus.consensus([halves, thirds], 4, ring(120))
    assert found.best is None
    assert consensus.anmi(truth, [found.vote.labels]) == pytest.approx(1)
    assert found.vote.confidence.eq(1).all()


def test_jaccard_of_clusters_decides_which_join():
    """{1,2,3} and {1,2}: ⅔; {4,5,6} and {3,4,5,6}: ¾; {1,2,3} and {3,4,5,6}: 1/6."""
    joined = consensus.meta_clusters([labels("000111"), labels("001111")], 2)
    assert joined[:2].unique().numel() == joined[3:].unique().numel() == 1
    assert joined[0] != joined[5]


def test_soft_members_vote_with_their_shares():
    # The second member agrees more when its clusters swap names: 0.6 + 0.45 against 0.4 + 0.55.
    sure, torn = torch.tensor([[0.9, 0.1], [0.2, 0.8]]), torch.tensor([[0.4, 0.6], [0.45, 0.55]])
    result = vote([SoftLabels.of(sure), SoftLabels.of(torn)], 2, labels("01"))
    assert result.labels.tolist() == [0, 1]
    assert result.confidence.tolist() == pytest.approx([0.75, 0.625])
    assert result.agreement == pytest.approx(2.75)
    one_hot = [SoftLabels.of(torch.eye(2)[labels(text)], columns=1) for text in THREE]
    hard = vote([labels(text) for text in THREE], 2, labels(THREE[0]))
    assert vote(one_hot, 2, labels(THREE[0])).labels.equal(hard.labels)
    assert SoftLabels.of(torch.rand(3, 9)).clusters.shape == (3, 4)


def test_a_start_may_leave_rows_out():
    start = torch.tensor([0, 0, -1, 1, 1, -1])
    assert vote([labels("000111"), start], 2, start).labels.tolist() == [0, 0, 0, 1, 1, 1]


def test_neighbors_that_most_members_join_are_kept():
    """Of one row's neighbours that share 4, 3, 2, 1 and 0 of 4 members the first three are kept."""
    neighbors = torch.tensor([[1, 2, 3, 4, 5]] + [[-1] * 5] * 5)
    members = [torch.tensor([0, *(int(h >= 4 - place) for place in range(5))]) for h in range(4)]
    kept = consensus.shared_neighbors(members, neighbors)
    assert kept[0].tolist() == [True, True, True, False, False]
    assert not kept[1:].any()
    assert consensus.shared_neighbors([torch.zeros(6, dtype=torch.int64)], neighbors)[0].all()
    alone = consensus.shared_neighbors([torch.arange(6)], neighbors)
    assert alone[0].tolist() == [True, True, True, False, False]


def test_the_share_of_neighbors_in_the_same_cluster():
    neighbors = torch.tensor([[1, 2, 3], [0, 2, -1], [-1, -1, -1], [0, 1, 2]])
    assert consensus.neighbor_shares(labels("0010"), neighbors).tolist() == pytest.approx([2 / 3, 1 / 2, 0, 2 / 3])


def test_guards_name_what_is_lost():
    voted = labels("0001112222")
    assert consensus.broken_guard(voted, voted, 3) == ""
    assert "from 3 to 2" in consensus.broken_guard(voted, labels("0000002222"), 3)
    assert "entropy" in consensus.broken_guard(voted, labels("0001222222"), 3)
    assert "20.0% of the rows" in consensus.broken_guard(labels("0001112222"), labels("0012221110"), 3)


def test_the_classifier_is_the_same_from_blocks_and_of_chosen_rows(monkeypatch: pytest.MonkeyPatch):
    generator = torch.Generator().manual_seed(1)
    x, given = torch.randn(50, 4, generator=generator, dtype=torch.float64), torch.arange(50) % 3
    chosen = torch.arange(0, 50, 2)
    whole, part = ridge_classifier(x, given, 3, 0.5), ridge_classifier(x[chosen], given[chosen], 3, 0.5)
    monkeypatch.setattr(consensus, "_RIDGE_VALUES", 28)
    for one, other in zip(whole, ridge_classifier(x, given, 3, 0.5), strict=True):
        assert one.allclose(other, atol=1e-10, rtol=0)
    for one, other in zip(part, ridge_classifier(x, given, 3, 0.5, chosen), strict=True):
        assert one.allclose(other, atol=1e-10, rtol=0)


def test_impossible_members_are_refused():
    with pytest.raises(DataError, match="members = 0"):
        consensus.consensus([], 2, ring(6))
    with pytest.raises(ShapeError, match=r"members\.1 has 3 labels"):
        consensus.consensus([labels("000111"), labels("001")], 2, ring(6))
    with pytest.raises(DataError, match="no opinion on any row"):
        consensus.consensus([torch.full((6,), -1)], 2, ring(6))
