from __future__ import annotations

import json
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from rayclust.config import validate
from rayclust.encoders.base import GPU_BATCH
from rayclust.errors import ConfigError
from rayclust.stages.encode import CHUNK, CPU_CHUNK, EncodeChunks, chunk_rows
from tests.stages.runs import tree


def config(**groups: Any):
    return validate(tree("/runs/one", "/images", **groups))


def test_a_chunk_is_a_pass_of_the_network():
    assert chunk_rows(config()) == 8
    assert chunk_rows(config(encoder={"batch_size": None})) == CPU_CHUNK
    assert chunk_rows(config(encoder={"batch_size": None}, resources={"gpus_per_worker": 0.5})) == GPU_BATCH


def chunk(pixels: np.ndarray) -> pa.Scalar:
    row = {"unit": "u", "chunk": 0, "last": True, "records": [], "rejects": [], "pixels": pixels.tobytes()}
    return pa.Table.from_pylist([row], schema=CHUNK)["pixels"][0]


def test_embeddings_are_the_encoders_rows_as_halves():
    worker = EncodeChunks(config(), [])
    pixels = np.random.default_rng(0).integers(0, 255, (3, 8, 8, 3), np.uint8)
    found = worker._embeddings(chunk(pixels), 3)
    assert found.dtype == np.float16
    np.testing.assert_allclose(np.linalg.norm(found.astype(float), axis=1), 1, atol=1e-3)
    flat = pixels.reshape(3, -1) / 255
    np.testing.assert_allclose(found, flat / np.linalg.norm(flat, axis=1, keepdims=True), atol=2e-3)
    assert worker._embeddings(chunk(pixels[:0]), 0).shape == (0, 192)


def test_an_embedding_depends_on_its_image_alone():
    worker = EncodeChunks(config(), [])
    pixels = np.random.default_rng(1).integers(0, 255, (20, 8, 8, 3), np.uint8)
    together = worker._embeddings(chunk(pixels), 20)
    alone = np.concatenate([worker._embeddings(chunk(pixels[i : i + 1]), 1) for i in range(20)])
    assert together.tobytes() == alone.tobytes()


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_gpu_worker_without_a_gpu_does_not_crawl_on_a_cpu():
    with pytest.raises(ConfigError, match=r"resources\.gpus_per_worker = 1: torch .* sees no CUDA device"):
        EncodeChunks(config(resources={"gpus_per_worker": 1}), [])


@pytest.mark.ray
@pytest.mark.usefixtures("ray_session")
def test_chunks_go_to_the_writer_of_their_shard_and_counts_go_on():
    import ray

    @ray.remote(num_cpus=0)
    class Writer:
        def __init__(self) -> None:
            self.taken: list[Any] = []

        def add(self, *chunk: Any) -> float:
            self.taken.append(chunk)
            return 0.25

        def all(self) -> list[Any]:
            return self.taken

    writers = [Writer.remote(), Writer.remote()]
    record = {"key": "k", "uri": "/k", "label": None}
    reject = {"key": "r", "uri": "/r", "reason": "empty", "detail": ""}
    rows = [
        {"unit": json.dumps({"index": i}), "chunk": i, "last": True, "records": [record] * i, "rejects": [reject]}
        | {"pixels": bytes(192 * i), "worker": "a:1", "reading": 0.5, "decoding": 1.5}
        for i in range(3)
    ]
    counts = EncodeChunks(config(), writers)(pa.Table.from_pylist(rows, schema=CHUNK))
    assert counts["images"].to_pylist() == [0, 1, 2]
    assert counts["rejected"].to_pylist() == [1, 1, 1]
    taken = counts.select(["worker", "reading", "decoding", "writing"]).to_pylist()
    assert taken == [{"worker": "a:1", "reading": 0.5, "decoding": 1.5, "writing": 0.25}] * 3
    assert min(counts["encoding"].to_pylist()) >= 0
    first, second = ray.get([writer.all.remote() for writer in writers])
    assert [chunk[1] for chunk in first] == [0, 2]
    assert [chunk[1] for chunk in second] == [1]
    assert first[1][5].shape == (2, 192)
