""""""

from __future__ import annotations

import itertools
import json
import tarfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import ray
import timm
import torch
from safetensors.torch import save_file

from rayclust.config import validate
from rayclust.encoders import openvino
from rayclust.encoders.base import GPU_BATCH
from rayclust.encoders.decode import Preprocess, decode
from rayclust.errors import ConfigError
from rayclust.runtime import cluster
from rayclust.runtime.inputs import InputPlan
from rayclust.runtime.pipeline import STAGES, StageContext, run_all, run_stage
from rayclust.runtime.tasks import Task, read_mark
from rayclust.stages.encode import (
    CHUNK,
    CPU_CHUNK,
    ActorPools,
    EncodeChunks,
    ReadAndDecode,
    ShardWriter,
    _items,
    chunk_rows,
)
from rayclust.store import storage, tables
from rayclust.store.run import Run
from rayclust.store.sources import Shard, plan_shards
from tests.stages.in_process import without_ray
from tests.stages.runs import embeddings, files, picture, tree, write_folder, write_tars


@pytest.fixture
def images(tmp_path: Path) -> Path:
    return write_tars(tmp_path / "images", shards=3, per_shard=2)


def planned(images: Path) -> tuple[StageContext, list[Task]]:
    config = validate(tree(str(images.parent / "run"), str(images)))
    listed = STAGES["encode"].plan(config)
    units = [Task(shard.index, digest, shard) for shard, digest in zip(listed.shards, listed.digests, strict=True)]
    return StageContext(config, Run(config.run), "digest", {}, listed), units


def test_an_item_names_unit_and_shard_of_what_is_left(images: Path):
    context, units = planned(images)
    items = _items(context, [units[0], units[2]])
    assert [json.loads(item["task"]) for item in items] == [
        {"index": 0, "digest": units[0].digest, "row_start": 0},
        {"index": 2, "digest": units[2].digest, "row_start": units[2].payload.first},
    ]
    shards = [Shard.from_json(storage.read_json(item["shard"])) for item in items]
    assert [shard.name for shard in shards] == ["shard-000", "shard-002"]


def test_the_input_is_listed_once(images: Path):
    context, units = planned(images)
    (images / "shard-000b.tar").write_bytes((images / "shard-001.tar").read_bytes())
    (images / "shard-002.tar").unlink()
    shards = [Shard.from_json(storage.read_json(item["shard"])) for item in _items(context, units)]
    assert [shard.name for shard in shards] == ["shard-000", "shard-001", "shard-002"]


def test_shards_of_a_folder_name_their_images_again(tmp_path: Path):
    context, units = planned(write_folder(tmp_path / "images", 7))
    [item] = _items(context, units[:1])
    [whole, *_] = plan_shards(str(tmp_path / "images"), "auto", "auto", shard_size=16)
    assert len(whole.members) == 16
    assert Shard.from_json(storage.read_json(item["shard"])) == whole


@pytest.mark.parametrize(
    ("placement", "pools"),
    [
        ({}, ActorPools(1, 2, 0.66)),
        ({"decode": {"pool": "cpu"}, "encode": {"pool": "gpu"}}, ActorPools(1, 1, 1.0)),
        ({"encode": {"pool": "gpu"}}, ActorPools(1, 1, 0.5)),  # decoders may be on the encoder's node
        ({"decode": {"pool": "gpu"}, "encode": {"pool": "gpu"}}, ActorPools(1, 1, 0.5)),
        ({"decode": {"pool": "cpu"}, "encode": {"market": "spot"}}, ActorPools(1, 2, 0.33)),
        ({"decode": {"pool": "cpu"}, "encode": {"pool": "gpu", "market": "spot"}}, ActorPools(1, 1, 1.0)),
    ],
)
def test_actors_that_may_share_a_node_all_have_a_place_there(
    monkeypatch: pytest.MonkeyPatch, placement: dict[str, Any], pools: ActorPools
):
    labels = [{"pool": pool, "market": "spot"} for pool in ("cpu", "gpu")]
    nodes = [{"Labels": each, "Resources": {"CPU": 1}, "Alive": True} for each in labels]
    monkeypatch.setattr(ray, "nodes", lambda: nodes)
    assert ActorPools.of(validate(tree("/run", "/images", resources={"placement": placement}))) == pools


PREPROCESS = Preprocess(8, max_bytes=100_000)


def chunks(source: Path, rows: int, shard_size: int = 512) -> list[dict[str, Any]]:
    """What the worker makes of all shards of an input."""
    found = []
    for shard in plan_shards(str(source), shard_size=shard_size):
        uri = str(source.parent / f"{shard.index}.json")
        storage.write_json(uri, asdict(shard))
        batch = pa.table({"task": [json.dumps(shard.index)], "shard": [uri]})
        for table in ReadAndDecode(rows, (PREPROCESS,))(batch):
            assert table.schema.equals(CHUNK)
            found += table.to_pylist()
    return found


@pytest.mark.parametrize("rows", [1, 2, 5, 9, 10])
def test_every_cut_gives_the_same_images_and_says_which_chunk_is_the_last(tmp_path: Path, rows: int):
    images = write_folder(tmp_path / "images", per_class=3)
    (images / "blue" / "0001.png").write_bytes(b"")
    found = chunks(images, rows)
    assert [chunk["chunk"] for chunk in found] == list(range(-(-9 // rows)))
    assert [chunk["last"] for chunk in found] == [False] * (len(found) - 1) + [True]
    records = [record for chunk in found for record in chunk["records"]]
    assert [record["key"] for record in records] == [
        f"{label}/{number:04d}.png"
        for label in ("amber", "blue", "green")
        for number in range(3)
        if (label, number) != ("blue", 1)
    ]
    assert [record["label"] for record in records] == ["amber"] * 3 + ["blue"] * 2 + ["green"] * 3
    assert [reject["reason"] for chunk in found for reject in chunk["rejects"]] == ["empty"]
    pixels = np.concatenate(
        [np.frombuffer(chunk["pixels"], np.uint8).reshape(len(chunk["records"]), 8, 8, 3) for chunk in found]
    )
    for record, shown in zip(records, pixels, strict=True):
        np.testing.assert_array_equal(shown, decode(Path(record["uri"]).read_bytes(), PREPROCESS))


def test_a_shard_without_images_is_one_empty_chunk(tmp_path: Path):
    tarfile.open(tmp_path / "none.tar", "w").close()
    [chunk] = chunks(tmp_path / "none.tar", 4)
    assert (chunk["chunk"], chunk["last"], chunk["records"], chunk["pixels"]) == (0, True, [], b"")


def test_an_image_that_vanished_or_grew_since_it_was_listed_is_a_reject(tmp_path: Path):
    images = tmp_path / "images"
    images.mkdir()
    for name in ("a", "b", "c"):
        (images / f"{name}.png").write_bytes(picture((200, 10, 10), 1))
    [shard] = plan_shards(str(images))
    (images / "a.png").unlink()
    (images / "c.png").write_bytes(bytes(100_001))
    storage.write_json(str(tmp_path / "s.json"), asdict(shard))
    batch = pa.table({"task": ["u"], "shard": [str(tmp_path / "s.json")]})
    [chunk] = [row for table in ReadAndDecode(10, (PREPROCESS,))(batch) for row in table.to_pylist()]
    assert [record["key"] for record in chunk["records"]] == ["b.png"]
    assert {reject["key"] for reject in chunk["rejects"]} == {"a.png", "c.png"}
    assert all(reject["detail"] for reject in chunk["rejects"])


def test_shards_stay_apart(tmp_path: Path):
    images = write_folder(tmp_path / "images", per_class=2)
    found = chunks(images, 2, shard_size=3)
    assert [(chunk["task"], chunk["chunk"], chunk["last"]) for chunk in found] == [
        ("0", 0, False),
        ("0", 1, True),
        ("1", 0, False),
        ("1", 1, True),
    ]


def config(**groups: Any):
    return validate(tree("/runs/one", "/images", **groups))


def test_a_chunk_is_a_pass_of_the_network():
    assert chunk_rows(config()) == 8
    assert chunk_rows(config(encoder={"batch_size": None})) == CPU_CHUNK
    assert chunk_rows(config(encoder={"batch_size": None}, resources={"gpus_per_worker": 0.5})) == GPU_BATCH


def encoded(worker: EncodeChunks, pixels: np.ndarray) -> np.ndarray:
    """What the worker makes of a chunk of these images, UInt8[B H W C]."""
    records = [{"key": str(i), "uri": "/k", "label": None} for i in range(len(pixels))]
    row = {"task": "u", "chunk": 0, "last": True, "records": records, "rejects": [], "pixels": pixels.tobytes()}
    return worker.encode(pa.Table.from_pylist([row], schema=CHUNK))["embeddings"]


def test_embeddings_are_the_encoders_rows_as_halves():
    worker = EncodeChunks(config(), [])
    pixels = np.random.default_rng(0).integers(0, 255, (3, 8, 8, 3), np.uint8)
    found = encoded(worker, pixels)
    assert found.dtype == np.float16
    np.testing.assert_allclose(np.linalg.norm(found.astype(float), axis=1), 1, atol=1e-3)
    flat = pixels.reshape(3, -1) / 255
    np.testing.assert_allclose(found, flat / np.linalg.norm(flat, axis=1, keepdims=True), atol=2e-3)
    assert encoded(worker, pixels[:0]).shape == (0, 192)


def test_an_embedding_depends_on_its_image_alone():
    worker = EncodeChunks(config(), [])
    pixels = np.random.default_rng(1).integers(0, 255, (20, 8, 8, 3), np.uint8)
    together = encoded(worker, pixels)
    alone = np.concatenate([encoded(worker, pixels[i : i + 1]) for i in range(20)])
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
        {"task": json.dumps({"index": i}), "chunk": i, "last": True, "records": [record] * i, "rejects": [reject]}
        | {"pixels": bytes(192 * i), "worker": "a:1", "reading": 0.5, "decoding": 1.5}
        for i in range(3)
    ]
    encode = EncodeChunks(config(), writers)
    counts = pa.concat_tables([encode(pa.Table.from_pylist([row], schema=CHUNK)) for row in rows])
    assert counts["images"].to_pylist() == [0, 1, 2]
    assert counts["rejected"].to_pylist() == [1, 1, 1]
    taken = counts.select(["worker", "reading", "decoding", "writing"]).to_pylist()
    assert taken == [{"worker": "a:1", "reading": 0.5, "decoding": 1.5, "writing": 0.25}] * 3
    assert min(counts["encoding"].to_pylist()) >= 0
    first, second = ray.get([writer.all.remote() for writer in writers])
    assert [chunk[1] for chunk in first] == [0, 2]
    assert [chunk[1] for chunk in second] == [1]
    assert first[1][5].shape == (2, 192)


@pytest.mark.ray
def test_rows_and_bytes_do_not_depend_on_the_number_of_workers(tmp_path: Path, ray_session: None):
    images = write_folder(tmp_path / "images", per_class=20, size=96)
    torch.manual_seed(0)
    model = timm.create_model("mobilenetv2_050", pretrained=False, num_classes=0)
    save_file(model.state_dict(), tmp_path / "weights.safetensors")
    network = {"name": "timm/mobilenetv2_050", "pretrained": str(tmp_path / "weights.safetensors"), "image_size": 96}
    network |= {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5], "engine": "torch"}
    many, alone = (
        validate(tree(str(tmp_path / name), str(images), encoder=network, resources=resources))
        for name, resources in (("many", {"workers": 2, "decode_workers": 2}), ("alone", {}))
    )
    run_all(many, stop_after="encode")
    with pytest.MonkeyPatch.context() as patch:
        without_ray(patch)
        run_all(alone, stop_after="encode")
    assert files(tmp_path / "many", "embeddings/*.parquet") == files(tmp_path / "alone", "embeddings/*.parquet")
    assert np.isfinite(np.stack(embeddings(tmp_path / "many")["embedding"].to_numpy(zero_copy_only=False))).all()


@pytest.mark.parametrize(("engine", "batch_size"), [("torch", None), ("torch", 4), ("openvino", None)])
def test_threads_in_the_driver_give_the_same_parts_and_go_on_after_an_interruption(
    engine: str, batch_size: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    if engine == "openvino" and not openvino.is_installed():
        pytest.skip("the extra cpu is not installed")
    without_ray(monkeypatch)
    images = write_folder(tmp_path / "images", per_class=13, size=40)
    (images / "blue" / "0001.png").write_bytes(b"")
    torch.manual_seed(0)
    network = timm.create_model("test_efficientnet", pretrained=False, num_classes=0)
    save_file(network.state_dict(), tmp_path / "weights.safetensors")
    encoder = {"name": "timm/test_efficientnet", "pretrained": str(tmp_path / "weights.safetensors"), "image_size": 32}

    def encoded(name: str, threads: int) -> dict[str, bytes]:
        monkeypatch.setattr("rayclust.stages.encode.cores", lambda: threads)
        own = {"batch_size": batch_size, "engine": engine}
        given = {"encoder": encoder | own, "images": {"uri": str(images), "shard_size": 13}}
        manifest = run_stage("encode", validate(tree(str(tmp_path / name), str(images), **given)))
        assert (manifest.counts["rows"], manifest.counts["rejects"]) == (38, 1)
        return files(tmp_path / name, "embeddings/*.parquet") | files(tmp_path / name, "rejects/*.parquet")

    alone = encoded("alone", 1)
    assert encoded("many", 4) == alone
    # Interrupted while the second of three shards is written.
    write, written = EncodeChunks.write, []

    def interrupted(self: EncodeChunks, chunk: dict[str, Any]) -> pa.Table:
        written.append(json.loads(chunk["task"])["index"])
        if written[-1] == 1:
            raise KeyboardInterrupt
        return write(self, chunk)

    with monkeypatch.context() as patch:
        patch.setattr(EncodeChunks, "write", interrupted)
        with pytest.raises(KeyboardInterrupt):
            encoded("killed", 3)
    marks = tmp_path / "killed" / "manifests" / "encode"
    assert [path.name for path in marks.iterdir()] == ["part-00000.json"]
    before = (marks / "part-00000.json").stat().st_mtime_ns
    assert encoded("killed", 3) == alone
    assert (marks / "part-00000.json").stat().st_mtime_ns == before


@pytest.mark.parametrize(("cores", "encoder", "images", "in_driver"), [
    (2, "timm/resnet18", 1025, True), (64, "timm/resnet18", 1024, True), (64, "timm/resnet18", 1025, False),
    (64, "pixels", 1025, True), (2, "timm/resnet18", 2**15 + 1, False),
    (2, "timm/resnet18", None, True), (64, "timm/resnet18", None, False),
])  # fmt: skip
def test_few_images_stay_in_the_driver(
    cores: int, encoder: str, images: int | None, in_driver: bool, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("rayclust.stages.encode.cores", lambda: cores)
    monkeypatch.setattr("rayclust.stages.encode.may_use_driver", lambda config: True)
    monkeypatch.setattr("rayclust.stages.encode._encode", lambda context: cluster.in_driver())
    shards = [Shard(0, "folder", "/images", "a", "stamp", count=images)]
    plan = InputPlan("digest", tuple(shards), ("digest",), (b"",))
    settings = config(encoder={"name": encoder, "image_size": None})
    assert STAGES["encode"].run(StageContext(settings, Run(settings.run), "digest", {}, plan)) == in_driver


# Chunks come in any order and more than once; the shard is written once, with each record in its place.


def unit(index: int, digest: str = "digest", row_start: int = 0) -> str:
    return json.dumps({"index": index, "digest": digest, "row_start": row_start})


def writer_chunk(number: int, last: bool, rows: int = 2, rejects: int = 0) -> tuple:
    """Arguments of `add` after the unit: records named by chunk and place, and embeddings that say the same."""
    records = [{"key": f"{number}-{i}", "uri": f"/{number}/{i}", "label": None} for i in range(rows)]
    lost = [{"key": f"{number}-r{i}", "uri": "/r", "reason": "empty", "detail": ""} for i in range(rejects)]
    embeddings = np.array([[number + 1, i + 1] for i in range(rows)], np.float16).reshape(rows, 2)
    return number, last, records, lost, embeddings


CHUNKS = [
    writer_chunk(0, False),
    writer_chunk(1, False, rejects=1),
    writer_chunk(2, True, rows=1),
]


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_every_order_of_chunks_gives_the_same_part(order: tuple[int, ...], tmp_path: Path):
    run = Run(str(tmp_path))
    writer = ShardWriter(run.uri)
    for place, number in enumerate(order):
        assert read_mark(run.mark(0)) is None, place
        writer.add(unit(0, row_start=30), *CHUNKS[number])
    part = tables.read_table(run.embeddings(0))
    assert part["key"].to_pylist() == ["0-0", "0-1", "1-0", "1-1", "2-0"]
    assert part["row"].to_pylist() == [30, 31, 32, 33, 34]
    assert tables.matrix(part["embedding"]).tolist() == [[1, 1], [1, 2], [2, 1], [2, 2], [3, 1]]
    digest, result = read_mark(run.mark(0)) or ("", None)
    assert digest == "digest"
    assert result is not None
    assert result.counts == {"rows": 5, "rejects": 1, "labelled": 0}


def test_a_chunk_that_comes_twice_is_taken_once(tmp_path: Path):
    run = Run(str(tmp_path))
    writer = ShardWriter(run.uri)
    for number in (0, 0, 2, 1, 1, 0, 2):
        writer.add(unit(0), *CHUNKS[number])
    assert tables.read_table(run.embeddings(0)).num_rows == 5
    before = storage.read_bytes(run.embeddings(0))
    storage.remove(run.embeddings(0))
    writer.add(unit(0), *CHUNKS[2])
    assert not storage.exists(run.embeddings(0)), "a late copy of a chunk wrote a whole shard again"
    assert before


def test_shards_do_not_mix(tmp_path: Path):
    run = Run(str(tmp_path))
    writer = ShardWriter(run.uri)
    writer.add(unit(0), *CHUNKS[0])
    writer.add(unit(1), *writer_chunk(0, True))
    assert read_mark(run.mark(0)) is None
    assert tables.read_table(run.embeddings(1)).num_rows == 2
    writer.add(unit(0), *CHUNKS[2])
    writer.add(unit(0), *CHUNKS[1])
    assert tables.read_table(run.embeddings(0)).num_rows == 5


def test_a_shard_of_rejects_alone_and_one_of_nothing_are_written(tmp_path: Path):
    run = Run(str(tmp_path))
    writer = ShardWriter(run.uri)
    writer.add(unit(0), *writer_chunk(0, True, rows=0, rejects=2))
    writer.add(unit(1), *writer_chunk(0, True, rows=0))
    assert tables.read_table(run.rejects(0)).num_rows == 2
    assert tables.read_table(run.embeddings(1)).schema.equals(tables.EMBEDDINGS(2))
    assert read_mark(run.mark(1)) is not None


def test_an_older_marker_is_gone_while_its_part_is_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    run = Run(str(tmp_path))
    ShardWriter(run.uri).add(unit(0, "old"), *writer_chunk(0, True))

    def killed(*arguments: object, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("rayclust.stages.encode.write_shard", killed)
    with pytest.raises(KeyboardInterrupt):
        ShardWriter(run.uri).add(unit(0, "new"), *writer_chunk(0, True))
    assert read_mark(run.mark(0)) is None


@pytest.mark.parametrize(("rows", "in_driver"), [(2**14, True), (2**16, False)])
def test_a_small_file_of_tensors_stays_in_the_driver(
    rows: int, in_driver: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    with (tmp_path / "x.pt").open("wb") as file:
        file.truncate(rows * 1024)
    monkeypatch.setattr("rayclust.stages.encode.may_use_driver", lambda config: True)
    monkeypatch.setattr("rayclust.stages.encode._encode", lambda context: cluster.in_driver())
    shards = (Shard(0, "embeddings_pt", str(tmp_path / "x.pt"), "x", "stamp"),)
    plan = InputPlan("digest", shards, ("digest",), (b"",))
    settings = config(encoder={"name": "unknown", "image_size": None})
    assert STAGES["encode"].run(StageContext(settings, Run(settings.run), "digest", {}, plan)) == in_driver
