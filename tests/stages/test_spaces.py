"""Runs with several encoders: one pass over the images, rows aligned by key, and methods that see all spaces."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torch import Tensor
from torch.nn import functional

import rayclust as rc
from rayclust import methods
from rayclust.config import RunConfig, validate
from rayclust.errors import ConfigError, DataError
from rayclust.methods.base import BaseTrainer, Method, Rows
from rayclust.methods.settings import BaseMethodConfig
from rayclust.runtime.pipeline import Manifests, run_all, run_stage
from rayclust.runtime.preflight import check
from rayclust.runtime.tensors import StoredRows
from rayclust.stages.predict import predict
from rayclust.stages.search import search
from rayclust.store import tables
from rayclust.store.manifest import EncodeOutputs, read_manifest
from tests.stages.in_process import without_ray
from tests.stages.runs import picture, tree, write_tars

ENCODERS = [
    {"name": "pixels", "space": "small", "image_size": 4, "batch_size": 8},
    {"name": "pixels", "space": "large", "image_size": 8, "batch_size": 8, "features": {"standardize": True}},
]


def config_of(run: Path, source: Path, encoders: list[Any], **groups: Any) -> RunConfig:
    content = tree(str(run), str(source), **groups)
    content.pop("encoder", None)
    return validate(content | {"encoders": encoders})


def units(x: np.ndarray) -> np.ndarray:
    return x / np.linalg.norm(x, axis=1, keepdims=True)


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """A finished run over 23 pictures in two shards, one of them broken, encoded at two sizes."""
    folder = tmp_path_factory.mktemp("two")
    source = write_tars(folder / "images", shards=2, per_shard=12)
    data = bytearray((source / "shard-000.tar").read_bytes())
    at = data.index(b"IHDR")
    data[at : at + 4] = b"XXXX"
    (source / "shard-000.tar").write_bytes(data)
    config = config_of(folder / "run", source, ENCODERS)
    with pytest.MonkeyPatch.context() as patch:
        without_ray(patch)
        run_all(config)
    return config


def column(config: RunConfig, space: str) -> np.ndarray:
    files = sorted((Path(config.run) / "embeddings" / space).glob("*.parquet"))
    return np.concatenate([tables.matrix(pq.read_table(path)["embedding"]) for path in files])


def rows_of(config: RunConfig) -> pa.Table:
    return pa.concat_tables(pq.read_table(path) for path in sorted((Path(config.run) / "rows").glob("*.parquet")))


def test_each_space_has_its_table_and_rows_stand_once(two: RunConfig):
    rows = rows_of(two)
    assert rows.schema.equals(tables.ROWS())
    assert rows["row"].to_pylist() == list(range(23))
    manifest = read_manifest(rc.load(two.run)._run, "encode")
    outputs = manifest.outputs_of(EncodeOutputs)
    assert [(space.name, space.dimension) for space in outputs.spaces] == [("small", 48), ("large", 192)]
    assert (outputs.dimension, outputs.parts) == (240, (11, 12))
    for name in ("small", "large"):
        part = pq.read_table(Path(two.run) / "embeddings" / name / "part-00001.parquet")
        assert part["row"].to_pylist() == list(range(11, 23))
        assert part.schema.equals(tables.SPACE({"small": 48, "large": 192}[name], pa.float16()))
    assert not list((Path(two.run) / "embeddings").glob("*.parquet"))


@pytest.mark.usefixtures("in_process")
def test_a_row_is_what_its_encoder_alone_makes_of_the_image(two: RunConfig, tmp_path: Path):
    for place, name in enumerate(("small", "large")):
        alone = {key: value for key, value in ENCODERS[place].items() if key not in ("space", "features")}
        run_stage("encode", validate(tree(str(tmp_path / name), two.images.uri, encoder=alone)))
        files = sorted((tmp_path / name / "embeddings").glob("*.parquet"))
        assert (
            tables.matrix(pa.concat_tables(map(pq.read_table, files))["embedding"]).tobytes()
            == column(two, name).tobytes()
        )


def test_cosines_are_the_mean_over_the_spaces_each_with_its_features(two: RunConfig, tmp_path: Path):
    small, large = (column(two, name).astype(float) for name in ("small", "large"))
    small = units(small - small.mean(0))
    large = units((large - large.mean(0)) / large.std(0))
    joint = np.concatenate([small, large], axis=1) / np.sqrt(2)
    rows = StoredRows(rc.load(two.run)._run, Manifests(two).of("encode"), two.features, tmp_path)
    assert (rows.spaces, rows.dimensions, rows.dimension) == (("small", "large"), {"small": 48, "large": 192}, 240)
    np.testing.assert_allclose(rows.tensor(), joint, atol=2e-5)
    np.testing.assert_allclose(rows.tensor("large"), large, atol=2e-5)
    found = pa.concat_tables(rc.load(two.run).iter("neighbors"))
    similarity = (small @ small.T + large @ large.T) / 2
    np.fill_diagonal(similarity, -2)
    np.testing.assert_allclose(tables.matrix(found["similarity"])[:, 0], similarity.max(1), atol=1e-3)


@pytest.mark.usefixtures("in_process")
def test_neighbors_may_be_those_that_all_spaces_agree_on(two: RunConfig, tmp_path: Path):
    config = config_of(tmp_path / "run", Path(two.images.uri), ENCODERS, neighbors={"spaces": "agree", "k": 6})
    run_all(config)
    found = tables.matrix(pa.concat_tables(rc.load(config.run).iter("neighbors"))["neighbors"])
    small, large = (column(config, name).astype(float) for name in ("small", "large"))
    lists = []
    for x in (units(small - small.mean(0)), units((large - large.mean(0)) / large.std(0))):
        cosines = x @ x.T
        np.fill_diagonal(cosines, -2)
        lists.append([set(row[:12]) for row in np.argsort(-cosines, axis=1, kind="stable").tolist()])
    for row, ids in enumerate(found.tolist()):
        agreed = lists[0][row] & lists[1][row]
        known = [i for i in ids if i >= 0]
        assert set(known) <= agreed if len(agreed) >= 3 else len(known) == 3
        assert len(known) == max(3, min(6, len(agreed)))
        assert ids[len(known) :] == [-1] * (6 - len(known))
    assert rc.load(config.run).metrics["knn_accuracy"] == 1.0


def test_such_a_run_goes_to_its_report(two: RunConfig):
    run = rc.load(two.run)
    assert run.metrics["accuracy"] == 1.0
    assert run.frame()["cluster"].nunique() == 3
    assert "pixels + pixels" in Path(run.report).read_text()
    assert sorted(path.name for path in (Path(two.run) / "index").glob("*.faiss")) == ["encoder.faiss", "large.faiss"]


@pytest.mark.usefixtures("in_process")
def test_new_images_are_encoded_by_all_encoders(two: RunConfig, tmp_path: Path):
    out = tmp_path / "t.parquet"
    assert predict(two, two.images.uri, str(out)) == {"rows": 23, "rejects": 1}
    assigned = pa.concat_tables(rc.load(two.run).iter("assignments"))
    assert pq.read_table(out)["cluster"].to_pylist()[:23] == assigned["cluster"].to_pylist()
    (tmp_path / "new.png").write_bytes(picture((230, 160, 20), 5))
    found = rc.load(two.run).predict([tmp_path / "new.png"])
    amber = rows_of(two)["label"].to_pylist().index("amber")
    assert found["cluster"][0] == assigned["cluster"][amber].as_py()
    side_by_side = np.concatenate([column(two, "small"), column(two, "large")], axis=1)
    assert rc.load(two.run).predict(side_by_side)["cluster"].tolist() == assigned["cluster"].to_pylist()


def test_search_takes_the_name_of_a_space(two: RunConfig, tmp_path: Path):
    image = tmp_path / "query.png"
    image.write_bytes(picture((30, 60, 220), 9))
    for space, name in (("encoder", "small"), ("small", "small"), ("large", "large")):
        [hits] = search(two, image=str(image), text=None, top=23, space=space).values()
        rows = units(column(two, name).astype(np.float32))
        best = rows[[hit.row for hit in hits]]
        assert [hit.similarity for hit in hits] == sorted((hit.similarity for hit in hits), reverse=True)
        assert best.shape == rows.shape
    with pytest.raises(ConfigError, match="--space huge: must be one of encoder, z, both, small, large"):
        search(two, image=str(image), text=None, top=1, space="huge")


@pytest.mark.usefixtures("in_process")
def test_features_of_one_space_decide_what_runs_again(two: RunConfig):
    manifests = Manifests(two)
    assert all(manifests.of(stage) is not None for stage in ("encode", "neighbors", "train", "assign"))
    other = [ENCODERS[0] | {"features": {"center": False}}, ENCODERS[1]]
    changed = Manifests(config_of(Path(two.run), Path(two.images.uri), other))
    assert changed.of("encode") is not None
    assert changed.of("neighbors") is None
    assert changed.of("train") is None


@pytest.mark.ray
def test_a_cluster_encodes_the_same_rows(two: RunConfig, tmp_path: Path, ray_session: None):
    config = config_of(tmp_path / "run", Path(two.images.uri), ENCODERS, resources={"in_driver": "never"})
    run_stage("encode", config)
    for folder in ("rows", "embeddings/small", "embeddings/large"):
        parts = sorted((Path(two.run) / folder).glob("*.parquet"))
        assert [path.read_bytes() for path in parts] == [
            (tmp_path / "run" / folder / path.name).read_bytes() for path in parts
        ]


class EachConfig(BaseMethodConfig):
    name: str = "each"


class Each(Method):
    """Gives a row to the class of the nearest of the first K rows, by the summed cosines in all spaces."""

    spaces: ClassVar[int | None] = None
    config_type = EachConfig

    def __init__(self, config: EachConfig, dimension: dict[str, int], count: int, seed: int) -> None:
        super().__init__(config, dimension, count, seed)
        self.first = torch.nn.ParameterDict(
            {name: torch.zeros(config.clusters, width) for name, width in dimension.items()}
        )

    def fit(self, rows: Rows, trainer: BaseTrainer) -> None:
        for name in rows.spaces:
            self.first[name] = functional.normalize(rows.tensor(name)[: self.config.clusters].clone(), dim=1)

    def predict_proba(self, x: dict[str, Tensor]) -> Tensor:
        return sum(functional.normalize(x[name], dim=1) @ first.T for name, first in self.first.items()).softmax(1)


@pytest.mark.parametrize("spaces", [1, 2])
def test_a_method_may_see_each_space(
    two: RunConfig, tmp_path: Path, spaces: int, in_process: None, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setitem(methods.METHODS, "each", f"{__name__}:Each")
    config = config_of(
        tmp_path / "run", Path(two.images.uri), ENCODERS[:spaces], method={"name": "each", "clusters": 3}
    )
    run_all(config, stop_after="assign")
    method = json.loads((tmp_path / "run" / "model" / "config.json").read_text())
    widths = {"small": 48, "large": 192} if spaces == 2 else {"embeddings": 48}
    assert method["dimension"] == widths
    labels = rows_of(config)["label"] if spaces == 2 else rc.load(config.run).table("embeddings")["label"]
    clusters = pa.concat_tables(rc.load(config.run).iter("assignments"))["cluster"]
    assert clusters.to_pylist()[:3] == [0, 1, 2]
    assert len(set(zip(labels.to_pylist(), clusters.to_pylist(), strict=True))) == 3


# Ready embeddings.

KEYS = [f"k{i:02d}" for i in range(40)]
A = np.random.default_rng(0).normal(size=(40, 4)).astype(np.float32)
B = np.random.default_rng(1).normal(size=(40, 6)).astype(np.float32)


def write_rows(path: Path, keys: list[str] | None, x: np.ndarray, group: int = 40) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    columns: dict[str, Any] = {} if keys is None else {"key": keys}
    columns["embedding"] = pa.array(list(x), pa.list_(pa.float32()))
    pq.write_table(pa.table(columns), path, row_group_size=group)
    return path


def both(folder: Path, source: Path, other: Path, **groups: Any) -> RunConfig:
    groups = {"images": {"shard_size": 1}} | groups  # shards of 32 rows
    return config_of(folder / "run", source, [{"space": "a"}, {"space": "b", "embeddings": str(other)}], **groups)


def shuffled(folder: Path) -> tuple[Path, Path]:
    order = np.random.default_rng(2).permutation(40)
    other = write_rows(folder / "b.parquet", [KEYS[i] for i in order], B[order], group=7)
    return write_rows(folder / "a.parquet", KEYS, A, group=8), other


def arrays(folder: Path) -> tuple[Path, Path]:
    np.save(folder / "a.npy", A)
    np.save(folder / "b.npy", B)
    return folder / "a.npy", folder / "b.npy"


def folders(folder: Path) -> tuple[Path, Path]:
    for name, x in (("a", A), ("b", B)):
        (folder / name).mkdir()
        np.save(folder / name / "x-0.npy", x[:25])
        np.save(folder / name / "x-1.npy", x[25:])
    return folder / "a", folder / "b"


@pytest.mark.usefixtures("in_process")
@pytest.mark.parametrize("write", [shuffled, arrays, folders])
def test_ready_embeddings_are_aligned(tmp_path: Path, write: Callable[[Path], tuple[Path, Path]]):
    config = both(tmp_path, *write(tmp_path))
    run_stage("encode", config)
    assert len(rows_of(config)) == 40
    np.testing.assert_array_equal(column(config, "a"), A.astype(np.float16))
    np.testing.assert_array_equal(column(config, "b"), B.astype(np.float16))
    assert [finding.text for finding in check(config) if not finding.good] == []


@pytest.mark.usefixtures("in_process")
def test_ready_embeddings_stand_beside_an_encoder(two: RunConfig, tmp_path: Path):
    rows = rows_of(two)
    order = np.random.default_rng(3).permutation(23)
    other = write_rows(tmp_path / "b.parquet", [rows["key"][i].as_py() for i in order], B[order])
    encoders = [{"space": "b", "embeddings": str(other)}, ENCODERS[0]]
    config = config_of(tmp_path / "run", Path(two.images.uri), encoders)
    run_stage("encode", config)
    np.testing.assert_array_equal(column(config, "b"), B[:23].astype(np.float16))
    np.testing.assert_array_equal(column(config, "small"), column(two, "small"))
    run_all(config, stop_after="train")
    with pytest.raises(ConfigError, match="the embeddings of the space b are ready ones"):
        predict(rc.load(config.run).config, two.images.uri, str(tmp_path / "t.csv"))


@pytest.mark.usefixtures("in_process")
def test_rows_that_one_space_lacks_are_refused(tmp_path: Path):
    source = write_rows(tmp_path / "a.parquet", KEYS, A)
    few = write_rows(tmp_path / "few.parquet", KEYS[:30] + KEYS[31:], np.delete(B, 30, axis=0))
    with pytest.raises(
        DataError, match=r"few\.parquet of the space b: lacks the run's row k30 \(no row has this key\)"
    ):
        run_stage("encode", both(tmp_path, source, few))
    zero = write_rows(tmp_path / "zero.parquet", KEYS, B * (np.arange(40) != 7)[:, None])
    with pytest.raises(DataError, match=r"lacks the run's row k07 \(zero_vector\)"):
        run_stage("encode", both(tmp_path, source, zero))
    more = write_rows(tmp_path / "more.parquet", [*KEYS, "z"], np.concatenate([B, B[:1]]))
    with pytest.raises(DataError, match=r"has the row z, which the run's other spaces lack"):
        run_stage("encode", both(tmp_path, source, more))
    np.save(tmp_path / "b.npy", B)
    with pytest.raises(DataError, match=r"b\.npy of the space b: lacks the run's row k00"):  # never by position
        run_stage("encode", both(tmp_path, source, tmp_path / "b.npy"))


@pytest.mark.usefixtures("in_process")
def test_each_space_needs_a_source(tmp_path: Path, two: RunConfig):
    source = write_rows(tmp_path / "a.parquet", KEYS, A)
    for encoders, message in (
        ([{"space": "a"}, {"name": "pixels"}], r"encoders\.1\.embeddings: is missing; images.uri = .* holds no images"),
        (
            [{"space": "a", "embeddings": str(source)}, "pixels"],
            r"encoders\.0\.embeddings: those of the first space are",
        ),
    ):
        with pytest.raises(ConfigError, match=message):
            run_stage("encode", config_of(tmp_path / "run", source, encoders))
    with pytest.raises(ConfigError, match=r"encoders\.0\.name: is missing"):
        run_stage("encode", config_of(tmp_path / "run", Path(two.images.uri), [{"space": "a"}, "pixels"]))


@pytest.mark.usefixtures("in_process")
def test_changed_embeddings_of_one_space_run_again(tmp_path: Path):
    source, other = write_rows(tmp_path / "a.parquet", KEYS, A), tmp_path / "b.parquet"
    config = both(tmp_path, source, write_rows(other, KEYS, B))
    before = run_stage("encode", config)
    write_rows(other, KEYS, B[::-1].copy())
    assert run_stage("encode", config).digest != before.digest
    np.testing.assert_array_equal(column(config, "b"), B[::-1].astype(np.float16))


@pytest.mark.usefixtures("in_process")
def test_tables_of_spaces_that_are_gone_are_removed(tmp_path: Path):
    source, other = arrays(tmp_path)
    run_stage("encode", both(tmp_path, source, other))
    run_stage("encode", validate(tree(str(tmp_path / "run"), str(source))))
    assert not list((tmp_path / "run" / "rows").glob("*"))
    left = [path.name for path in (tmp_path / "run" / "embeddings").rglob("*.parquet")]
    assert left == ["part-00000.parquet"]
    run_stage("encode", both(tmp_path, source, other))
    assert not list((tmp_path / "run" / "embeddings").glob("*.parquet"))
