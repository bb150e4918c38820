from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch

from rayclust.errors import ArtefactError, ConfigError, DataError, ShapeError
from rayclust.search.index import Stream, VectorIndex, build_index, load_index, recall_at_k, without_self
from rayclust.search.knn import top_k


def clustered(count: int, width: int = 16, groups: int = 40) -> np.ndarray:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(groups, width))[rng.integers(groups, size=count)] + 0.5 * rng.normal(size=(count, width))
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)


def streamed(x: np.ndarray, ids: np.ndarray | None = None, block: int = 500) -> Stream:
    ids = np.arange(len(x)) if ids is None else ids

    def stream() -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for start in range(0, len(x), block):
            yield x[start : start + block], ids[start : start + block]

    return stream


def built(kind: str, count: int = 3000, **options) -> tuple[VectorIndex, np.ndarray]:
    x = clustered(count)
    return build_index(streamed(x), count=count, kind=kind, **options), x


def test_flat_finds_what_exact_search_finds():
    index, x = built("flat")
    ids, similarity = index.search(x[:50], 7)
    truth, values = top_k(torch.from_numpy(x[:50]), torch.from_numpy(x), 7)
    assert np.array_equal(ids, truth)
    assert np.allclose(similarity, values, atol=1e-6)
    assert (index.recall, index.faiss_index.ntotal) == (1.0, 3000)


@pytest.mark.parametrize("min_recall", [0.5, 0.9, 0.99])
def test_inverted_file_reaches_the_wanted_recall(min_recall: float):
    index, x = built("ivf", k=10, min_recall=min_recall)
    assert index.recall >= min_recall
    found = without_self(*index.search(x, 11), np.arange(len(x)))
    truth = top_k(torch.from_numpy(x), torch.from_numpy(x), 10, query_ids=torch.arange(len(x)))
    assert recall_at_k(*found, *(part.numpy() for part in truth)) == pytest.approx(index.recall, abs=0.03)


def test_opens_fewer_lists_for_less_recall():
    found = [built("ivf", min_recall=recall)[0].faiss_index for recall in (0.3, 0.9, 1.0)]
    probes = [index.nprobe for index in found]
    assert probes == sorted(probes)
    assert probes[0] < probes[-1] <= found[0].nlist


@pytest.mark.parametrize("kind", ["flat", "ivf"])
def test_ids_are_the_rows_given_and_bytes_hold_everything(kind: str):
    x = clustered(1000)
    ids = np.random.default_rng(1).permutation(10**12 + np.arange(1000))
    index = build_index(streamed(x, ids, 128), count=1000, kind=kind, min_recall=0.99)
    assert np.mean(index.search(x, 1)[0][:, 0] == ids) > 0.99
    again = load_index(index.to_bytes())
    for before, after in zip(index.search(x, 5), again.search(x, 5), strict=True):
        assert np.array_equal(before, after)
    assert again.to_bytes() == index.to_bytes()


@pytest.mark.parametrize("kind", ["flat", "ivf"])
def test_built_twice_gives_the_same_bytes(kind: str):
    assert built(kind, 1500, seed=3)[0].to_bytes() == built(kind, 1500, seed=3)[0].to_bytes()


@pytest.mark.parametrize("kind", ["flat", "ivf"])
@pytest.mark.parametrize("count", [1, 2, 40])
def test_few_rows(kind: str, count: int):
    index, x = built(kind, count)
    ids, similarity = index.search(x, count + 2)
    assert (np.sort(ids[:, :count]) == np.arange(count)).all()
    assert (ids[:, count:] == -1).all()
    assert np.isneginf(similarity[:, count:]).all()


def test_recall_worked_by_hand():
    truth, similarity = np.array([[1, 2], [3, 4]]), np.array([[0.9, 0.8], [0.7, 0.7]])
    # Row 0 found one of two; row 1 found 9 instead of 4, which is as near.
    found, values = np.array([[2, 7], [3, 9]]), np.array([[0.8, 0.5], [0.7, 0.7]])
    assert recall_at_k(found, values, truth, similarity) == 3 / 4
    # Only one row exists for row 1: nothing is missed where nothing is.
    truth, similarity = np.array([[1, 2], [3, -1]]), np.array([[0.9, 0.8], [0.7, -np.inf]])
    found, values = np.array([[1, 2], [3, -1]]), np.array([[0.9, 0.8], [0.7, -np.inf]])
    assert recall_at_k(found, values, truth, similarity) == 1.0
    assert recall_at_k(np.array([[1, 2], [-1, -1]]), values, truth, similarity) == 2 / 3


def test_without_self_worked_by_hand():
    ids, similarity = np.array([[5, 7, 9], [7, 6, 9], [1, 2, 3]]), np.array([[0.9, 0.8, 0.7]] * 3)
    others, values = without_self(ids, similarity, np.array([5, 6, 7]))
    assert others.tolist() == [[7, 9], [7, 9], [1, 2]]
    assert np.allclose(values, [[0.8, 0.7], [0.9, 0.7], [0.9, 0.8]])


def refusals() -> dict[str, tuple[type[Exception], str, Callable[[], object]]]:
    x = clustered(100)
    index = build_index(streamed(x), count=100, kind="flat")
    return {
        "width": (ShapeError, "width 3: 16 is needed", lambda: index.search(np.zeros((1, 3)), 1)),
        "top": (ConfigError, "top = 0", lambda: index.search(x, 0)),
        "fewer": (DataError, "100 rows came where 120", lambda: build_index(streamed(x), count=120, kind="flat")),
        "fewer for ivf": (DataError, "100 rows came", lambda: build_index(streamed(x), count=120, kind="ivf")),
        "none": (DataError, "no rows", lambda: build_index(streamed(x[:0]), count=0, kind="flat")),
        "none for ivf": (DataError, "0 rows", lambda: build_index(streamed(x[:0]), count=0, kind="ivf")),
        "cut": (ArtefactError, "not a whole faiss file", lambda: load_index(index.to_bytes()[:-5])),
        "other": (ArtefactError, "3 bytes", lambda: load_index(b"abc")),
        "empty": (ArtefactError, "0 bytes", lambda: load_index(b"")),
    }


@pytest.mark.parametrize("case", list(refusals()))
def test_refuses_what_cannot_be(case: str):
    error, message, call = refusals()[case]
    with pytest.raises(error, match=message):
        call()
