from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from rayclust.errors import ShapeError
from rayclust.search.ivf import ListCenters, choose_probes, list_count, ranked_lists, train_centers
from rayclust.search.knn import top_k


def planted(count: int, groups: int, width: int = 16, seed: int = 0) -> Tensor:
    """Float32[N D] unit rows around some directions."""
    random = np.random.default_rng(seed)
    x = random.normal(size=(groups, width))[random.integers(groups, size=count)]
    x += 0.4 * random.normal(size=(count, width))
    return torch.nn.functional.normalize(torch.from_numpy(x.astype(np.float32)), dim=1)


@pytest.mark.parametrize(
    ("count", "lists"), [(0, 1), (2, 1), (77, 1), (78, 2), (1521, 39), (10_000, 256), (10**6, 4000), (10**7, 12_649)]
)
def test_lists_are_four_roots_but_some_rows_long(count: int, lists: int):
    assert list_count(count) == lists


def test_lists_of_a_parent_follow_each_other_and_are_near_it():
    x = planted(4000, 30)
    found = train_centers(x, 64)
    assert torch.allclose(found.centers.norm(dim=1), torch.ones(len(found.centers)), atol=1e-5)
    assert abs(len(found.centers) - 64) <= 8
    assert found.starts[0] == 0
    assert found.starts[-1] == len(found.centers)
    assert (found.starts.diff() > 0).all()
    owner = torch.repeat_interleave(torch.arange(len(found.parents)), found.starts.diff())
    nearest = (found.centers @ found.parents.T).argmax(1)
    assert (nearest == owner).float().mean() > 0.9


def test_the_same_sample_gives_the_same_centres_whatever_the_threads():
    x = planted(2000, 10)
    threads = torch.get_num_threads()
    first = train_centers(x, 40)
    torch.set_num_threads(1)
    second = train_centers(x, 40)
    torch.set_num_threads(threads)
    assert torch.equal(first.centers, second.centers)
    assert not torch.equal(first.centers, train_centers(x, 40, seed=1).centers)


@pytest.mark.parametrize("lists", [1, 2, 5, 200])
def test_few_or_equal_rows_have_as_many_lists_as_there_can_be(lists: int):
    for x in (planted(2, 1), planted(7, 2), torch.ones(50, 4) / 2, torch.zeros(9, 4)):
        found = train_centers(x, lists)
        assert 1 <= len(found.centers) <= len(x)
        assert found.centers.isfinite().all()
        labels = found.assign(x)
        assert labels.min() >= 0
        assert labels.max() < len(found.centers)


def test_a_row_goes_to_the_nearest_list_of_four_parents():
    x = planted(3000, 20)
    small = train_centers(x, 16)
    assert len(small.parents) == 4
    assert (small.assign(x) == (x @ small.centers.T).argmax(1)).float().mean() > 0.999
    large = train_centers(x, 144)
    similarity = x @ large.centers.T
    assert (large.assign(x) == similarity.argmax(1)).float().mean() > 0.95
    own = similarity.gather(1, large.assign(x)[:, None])[:, 0]
    parents = (x @ large.parents.T).topk(4)[1]
    owner = torch.repeat_interleave(torch.arange(len(large.parents)), large.starts.diff())
    tried = (owner == parents[:, :, None]).any(1)
    assert torch.allclose(own, similarity.masked_fill(~tried, -2).amax(1), atol=1e-6)


def test_a_width_that_is_not_the_centres_is_refused():
    found = train_centers(planted(50, 2), 4)
    with pytest.raises(ShapeError):
        found.assign(torch.zeros(3, 5))


CORNERS = torch.eye(4)
"""Centres of four lists."""


def test_the_own_list_comes_first_then_the_nearest():
    x = torch.tensor([[0.9, 0.1, 0.3, 0.2], [0.5, 0.8, 0.1, 0.2]])
    lists, needed = ranked_lists(CORNERS, torch.tensor([5, 5, 5, 5]), x, 0, k=3, reach=4)
    assert lists.tolist() == [[0, 2, 3, 1], [0, 1, 3, 2]]
    assert needed.tolist() == [[True, False, False, False]] * 2


def test_as_many_lists_are_opened_as_hold_more_than_k_rows():
    x = torch.tensor([[0.9, 0.1, 0.3, 0.2]])
    sizes = torch.tensor([2, 5, 0, 1])
    assert ranked_lists(CORNERS, sizes, x, 0, k=1, reach=4)[1].tolist() == [[True, False, False, False]]
    assert ranked_lists(CORNERS, sizes, x, 0, k=2, reach=4)[1].tolist() == [[True, True, True, False]]
    assert ranked_lists(CORNERS, sizes, x, 0, k=3, reach=4)[1].tolist() == [[True, True, True, True]]
    lists, _ = ranked_lists(CORNERS, sizes, x, 0, k=6, reach=1)
    assert lists.shape == (1, 4), "two lists around hold 3 rows at most"
    lists, opened = ranked_lists(CORNERS, sizes, x, 0, k=1, reach=4, nprobe=2)
    assert lists[opened].tolist() == [0, 2]


@pytest.mark.parametrize("min_recall", [0.0, 0.3, 0.8, 0.95, 1.0])
def test_so_many_lists_are_opened_as_the_recall_takes_and_not_one_more(min_recall: float):
    x, k = planted(3000, 12), 10
    found = train_centers(x, 100)
    homes = found.assign(x)
    sizes = homes.bincount(minlength=len(found.centers))
    queries = torch.arange(0, 3000, 10)
    truth = homes[top_k(x[queries], x, k, query_ids=queries)[0]]
    reach, nprobe = choose_probes(found.centers, sizes, x[queries], homes[queries], truth, min_recall)

    def recall(probes: int) -> float:
        found_in = []
        for query, home, near in zip(x[queries], homes[queries].tolist(), truth, strict=True):
            options = {"k": k, "reach": reach, "nprobe": probes}
            lists, opened = ranked_lists(found.centers, sizes, query[None], home, **options)
            found_in.append(torch.isin(near, lists[opened]))
        return float(torch.cat(found_in).double().mean())

    assert recall(nprobe) >= min_recall
    assert nprobe == 1 or recall(nprobe - 1) < min_recall
    assert reach >= min(4 * nprobe, len(found.centers))


def test_all_lists_are_opened_where_only_that_reaches_the_recall():
    far = ListCenters(CORNERS, CORNERS[:1], torch.tensor([0, 4])).centers
    queries = torch.tensor([[0.9, 0.3, 0.2, 0.1]])
    truth = torch.tensor([[3, 0]])
    sizes = torch.tensor([9, 9, 9, 9])
    assert choose_probes(far, sizes, queries, torch.tensor([0]), truth, 0.5) == (4, 1)
    assert choose_probes(far, sizes, queries, torch.tensor([0]), truth, 0.51) == (4, 4)
