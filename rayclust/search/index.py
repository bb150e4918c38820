"""Indexes of unit rows for search by inner product: flat, or an inverted file with a measured recall. Ids are rows."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import faiss
import numpy as np
from numpy.typing import NDArray

from rayclust.arrays import FloatArray, IntArray, require_matrix
from rayclust.errors import ArtefactError, ConfigError, DataError

logger = logging.getLogger(__name__)

Stream = Callable[[], Iterator[tuple[FloatArray, IntArray]]]
"""Returns all rows in blocks, Float[B D] and their ids Int64[B], in the same order at every call."""

_TRAINING_ROWS_PER_LIST = 64
_RECALL_QUERIES = 1000
_TIE = 1e-6
"""Similarities as near as this tie."""


@dataclass
class VectorIndex:
    """A faiss index whose ids are rows: flat, or an inverted file with float16 codes."""

    faiss_index: Any
    recall: float = float("nan")
    """Measured recall@k when it was built; 1 for flat, NaN after loading."""

    def search(self, vectors: FloatArray, top: int) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """Return the rows with the greatest inner product with each vector.

        Args:
            vectors: Float[B D].
            top: how many, above 0.

        Returns:
            Int64[B top] rows and Float32[B top] similarities, nearest first; −1 and −inf where too few were found.

        Raises:
            ConfigError: `top` is below 1.
            ShapeError: the vectors are not as wide as the rows.
        """
        require_matrix(vectors, "vectors", int(self.faiss_index.d))
        if top < 1:
            raise ConfigError(f"top = {top}: must be at least 1")
        similarity, ids = self.faiss_index.search(np.ascontiguousarray(vectors, dtype=np.float32), top)
        return ids, np.where(ids < 0, np.float32(-np.inf), similarity)

    def vectors(self, rows: IntArray) -> NDArray[np.float32]:
        """Return the vectors of some rows, Int64[B], as the index holds them: Float32[B D]."""
        if isinstance(self.faiss_index, faiss.IndexIVF):
            self.faiss_index.make_direct_map()  # once; nothing is done where there is one
        found: NDArray[np.float32] = self.faiss_index.reconstruct_batch(np.asarray(rows, np.int64))
        return found

    def neighbors(self, rows: IntArray, k: int) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """Return the `k` nearest others of some rows, Int64[B]: Int64[B k] and Float32[B k], as `search` does."""
        return without_self(*self.search(self.vectors(rows), k + 1), rows)

    def to_bytes(self) -> bytes:
        """Return the index as the bytes of a faiss file."""
        return bytes(faiss.serialize_index(self.faiss_index).tobytes())


def load_index(data: bytes) -> VectorIndex:
    """Load an index from the bytes of a faiss file.

    Raises:
        ArtefactError: the bytes are not an index.
    """
    try:
        return VectorIndex(faiss.deserialize_index(np.frombuffer(data, dtype=np.uint8)))
    except RuntimeError:
        raise ArtefactError(f"index of {len(data)} bytes: is not a whole faiss file; build it again") from None


def build_index(
    stream: Stream, *, count: int, kind: Literal["flat", "ivf"], seed: int = 0, k: int = 10, min_recall: float = 0.95
) -> VectorIndex:
    """Build an index over all rows of a stream.

    An inverted file has 4·√N lists and probes as few of them per query as the wanted recall needs, measured on up to
    1000 of the rows against exact search. Rows are kept there as float16.

    Args:
        stream: all rows; read once for flat, three times for ivf.
        count: N.
        kind: `flat` is exact and compares with all rows; `ivf` probes a few lists.
        seed: of the samples and of the lists' centres.
        k: neighbours on which the recall is measured.
        min_recall: wanted recall@k, from 0 to 1. If it is out of reach all lists are probed; see `recall`.

    Raises:
        DataError: the stream does not hold `count` rows, or holds none.
    """
    rng = np.random.default_rng(seed)
    faiss_index: Any
    if kind == "flat":
        first = next(iter(stream()), None)
        if first is None:
            raise DataError("index: there are no rows")
        faiss_index = faiss.IndexIDMap2(faiss.IndexFlatIP(first[0].shape[1]))
    else:
        import torch  # for inverted lists alone: a search goes without

        from rayclust.search.ivf import list_count
        from rayclust.search.knn import RunningTopK

        # 1. Train the lists' centres on a sample.
        nlist = list_count(count)
        training, _ = _sampled(stream, rng, count, _TRAINING_ROWS_PER_LIST * nlist)
        width = training.shape[1]
        faiss_index = faiss.IndexIVFScalarQuantizer(
            faiss.IndexFlatIP(width), width, nlist, faiss.ScalarQuantizer.QT_fp16, faiss.METRIC_INNER_PRODUCT
        )
        faiss_index.by_residual = False
        faiss_index.cp.seed, faiss_index.cp.spherical, faiss_index.cp.min_points_per_centroid = seed, True, 1
        if hasattr(faiss, "index_cpu_to_all_gpus") and faiss.get_num_gpus():
            faiss_index.clustering_index = faiss.index_cpu_to_all_gpus(faiss.IndexFlatIP(width))
        faiss_index.train(training)
    # 2. Add all rows.
    for block, ids in stream():
        rows = np.ascontiguousarray(block, dtype=np.float32)
        faiss_index.add_with_ids(rows, np.ascontiguousarray(ids, dtype=np.int64))
    if faiss_index.ntotal != count:
        raise DataError(f"index: {faiss_index.ntotal} rows came where {count} were expected")
    index, k = VectorIndex(faiss_index, recall=1.0), min(k, count - 1)
    if kind == "flat" or k < 1:
        return index
    # 3. Probe the smallest power of two of lists, or all, that reaches the recall on a sample.
    queries, query_ids = _sampled(stream, rng, count, _RECALL_QUERIES)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    exact = RunningTopK(torch.from_numpy(queries).to(device), torch.from_numpy(query_ids), k)
    for block, ids in stream():
        exact.update(torch.from_numpy(np.asarray(block, np.float32)), torch.from_numpy(np.asarray(ids, np.int64)))
    truth, truth_similarity = (part.cpu().numpy() for part in exact.result())
    while True:
        found = without_self(*index.search(queries, k + 1), query_ids)
        index.recall = recall_at_k(*found, truth, truth_similarity)
        logger.debug("nprobe %d of %d: recall@%d %.4f", faiss_index.nprobe, nlist, k, index.recall)
        if index.recall >= min_recall or faiss_index.nprobe >= nlist:
            return index
        faiss_index.nprobe = min(2 * faiss_index.nprobe, nlist)


def recall_at_k(found: IntArray, found_similarity: FloatArray, truth: IntArray, truth_similarity: FloatArray) -> float:
    """Return the share of the true k nearest rows that a search found; a row that ties with the last is as good.

    Range 0 to 1, larger is better; k/N by chance. Not symmetric.

    Args:
        found: Int64[B k], −1 where nothing was found.
        found_similarity: Float[B k].
        truth: Int64[B k] of an exact search, −1 where there are fewer rows.
        truth_similarity: Float[B k].
    """
    expected = (truth >= 0).sum(axis=1)
    last = np.where(truth >= 0, truth_similarity, np.inf).min(axis=1, keepdims=True)
    hits = (found[:, :, None] == truth[:, None, :]).any(axis=2) | (found_similarity >= last - _TIE)
    counted = np.minimum((hits & (found >= 0)).sum(axis=1), expected)
    return float(counted.sum() / max(expected.sum(), 1))


def without_self(ids: IntArray, similarity: FloatArray, own: IntArray) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Return Int64[B k], Float32[B k], results without the query itself, or without the last where that is not found.

    Args:
        ids: Int64[B k+1] found.
        similarity: Float[B k+1].
        own: Int64[B], the queries' ids.
    """
    drop = ids == own[:, None]
    drop[~drop.any(axis=1), -1] = True
    shape = (len(ids), ids.shape[1] - 1)
    return ids[~drop].reshape(shape).astype(np.int64), similarity[~drop].reshape(shape).astype(np.float32)


def _sampled(
    stream: Stream, rng: np.random.Generator, count: int, size: int
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Return a sample of the stream's rows, or all where there are no more, and their ids, in the stream's order."""
    positions = np.arange(count) if size >= count else np.sort(rng.choice(count, size, replace=False))
    rows, ids, start = [], [], 0
    for block, block_ids in stream():
        low, high = np.searchsorted(positions, [start, start + len(block)])
        chosen = positions[low:high] - start
        rows.append(np.asarray(block[chosen], dtype=np.float32))
        ids.append(np.asarray(block_ids[chosen], dtype=np.int64))
        start += len(block)
    if start <= int(positions.max(initial=-1)) or not rows:
        raise DataError(f"index: {start} rows came where more than {int(positions.max(initial=0))} were expected")
    return np.concatenate(rows), np.concatenate(ids)
