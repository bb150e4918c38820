from __future__ import annotations

import base64
import csv
import io
import json
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import faiss
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from rayclust.cli import run_command
from rayclust.config import RunConfig
from rayclust.errors import ArtefactError, ConfigError, DataError
from rayclust.export import export
from rayclust.export.rows import RunRows
from rayclust.export.tables import ATLAS_COLUMNS, write_atlas
from rayclust.runtime.api import load_run
from rayclust.runtime.edits import edit_clusters
from rayclust.store import storage, tables
from rayclust.store.overlay import Merge, Rename
from rayclust.store.run import Run
from tests.sealed import Sealed


@pytest.fixture(scope="module")
def config(pictures_run: Sealed, tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """A copy of the run in which two of the three clusters are merged and named."""
    folder = tmp_path_factory.mktemp("export") / "run"
    shutil.copytree(pictures_run.folder, folder)
    edit_clusters(Run(str(folder)), Merge(clusters=(2, 0)))
    edit_clusters(Run(str(folder)), Rename(cluster=2, name="warm, or so"))
    return load_run(str(folder))


@pytest.fixture(scope="module")
def wanted(config: RunConfig) -> list[dict[str, Any]]:
    """Every row with its cluster as edited, worked out by hand from the run's own tables."""
    found = list[dict[str, Any]]()
    for part in range(3):
        known = pq.read_table(Run(config.run).embeddings(part), columns=["row", "key", "uri", "label"]).to_pylist()
        own = pq.read_table(Run(config.run).assignments(part), columns=["cluster", "confidence"]).to_pylist()
        for row, assigned in zip(known, own, strict=True):
            cluster = 1 if assigned["cluster"] == 1 else 2
            found.append(row | assigned | {"cluster": cluster, "name": "warm, or so" if cluster == 2 else None})
    return found


def test_a_table_has_a_line_per_image(config: RunConfig, wanted: list[dict[str, Any]], tmp_path: Path):
    assert export(config, "table", str(tmp_path / "t.parquet"))["rows"] == 24
    assert pq.read_table(tmp_path / "t.parquet").to_pylist() == wanted
    assert run_command(["export", config.run, "--to", "table", "--out", str(tmp_path / "new" / "t.csv")]) == 0
    with (tmp_path / "new" / "t.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["key"], row["cluster"], row["name"]) for row in rows] == [
        (row["key"], str(row["cluster"]), row["name"] or "") for row in wanted
    ]
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["new", "t.csv", "t.parquet"], "nothing is left over"


def test_keys_are_listed_by_cluster(config: RunConfig, wanted: list[dict[str, Any]], tmp_path: Path):
    export(config, "keys", str(tmp_path))
    for cluster in (1, 2):
        listed = (tmp_path / f"{cluster:05d}.txt").read_text().splitlines()
        assert listed == [row["key"] for row in wanted if row["cluster"] == cluster]
    with (tmp_path / "clusters.csv").open(newline="") as file:
        assert [tuple(row.values()) for row in csv.DictReader(file)] == [
            ("1", "", "", "8", "00001.txt"),
            ("2", "warm, or so", "", "16", "00002.txt"),
        ]


def test_the_atlas_has_places_and_neighbours_by_position(config: RunConfig, tmp_path: Path):
    export(config, "atlas", str(tmp_path / "a.parquet"), images=True)
    table = pq.read_table(tmp_path / "a.parquet")
    assert table["row"].to_pylist() == list(range(24)), "neighbours are places in the table"
    dots = pa.concat_tables(tables.read_table(Run(config.run).map(part)) for part in (0, 2))
    assert table.select(["row", "x", "y"]).to_pydict() == dots.to_pydict()
    first = tables.read_table(Run(config.run).neighbors(0), ["neighbors", "similarity"]).to_pylist()[0]
    near = table["neighbors"].to_pylist()[0]
    assert near["ids"] == first["neighbors"]
    np.testing.assert_allclose(near["distances"], [max(0, 1 - s) for s in first["similarity"]], atol=1e-3)
    small = Image.open(io.BytesIO(table["image"].to_pylist()[0]["bytes"]))
    assert (small.format, small.size) == ("WEBP", (24, 24))


def test_duckdb_reads_the_atlas_and_the_table_as_they_are(config: RunConfig, tmp_path: Path):
    """embedding-atlas asks its questions by DuckDB."""
    duckdb = pytest.importorskip("duckdb", reason="DuckDB is not installed")
    export(config, "atlas", str(tmp_path / "a.parquet"), images=True)
    export(config, "table", str(tmp_path / "t.csv"))
    atlas, table = duckdb.read_parquet(str(tmp_path / "a.parquet")), duckdb.read_csv(str(tmp_path / "t.csv"))
    assert atlas.aggregate("cluster, name, count(*)").order("cluster").fetchall() == [
        (1, None, 8),
        (2, "warm, or so", 16),
    ]
    assert table.aggregate("cluster, count(*)").order("cluster").fetchall() == [(1, 8), (2, 16)]
    own, near = atlas.project("row, neighbors.ids[1]").order("row").fetchall()[5]
    stored = tables.read_table(Run(config.run).neighbors(0), ["neighbors"]).to_pylist()
    assert (own, near) == (5, stored[5]["neighbors"][0])
    assert atlas.filter("abs(x) <= 1 and abs(y) <= 1 and octet_length(image.bytes) > 0").count("*").fetchall() == [
        (24,)
    ]


def test_the_atlas_opens_in_embedding_atlas(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """A program of that name, which keeps what it is given."""
    monkeypatch.setenv("PATH", str(tmp_path))
    assert run_command(["explore", config.run, "--atlas"]) == 2
    assert "--atlas needs embedding-atlas: pip install embedding-atlas" in capsys.readouterr().err
    program = tmp_path / "embedding-atlas"
    program.write_text(f"#!/bin/sh\n/bin/cp $1 {tmp_path}/seen.parquet\nshift\necho $@ > {tmp_path}/line\nexit $CODE\n")
    program.chmod(0o755)
    monkeypatch.setenv("CODE", "0")
    assert run_command(["explore", config.run, "--atlas", "--port", "7"]) == 0
    line = (tmp_path / "line").read_text()
    assert line == "--x x --y y --neighbors neighbors --image image --host 127.0.0.1 --port 7\n"
    assert set(line.split()[1:8:2]) <= set(pq.read_table(tmp_path / "seen.parquet").column_names)
    monkeypatch.setenv("CODE", "3")
    assert run_command(["explore", config.run, "--atlas"]) == 2
    assert "exit code 3" in capsys.readouterr().err


def test_embedding_atlas_itself_reads_the_atlas(config: RunConfig, tmp_path: Path):
    """As `explore --atlas` starts it, but to a file. One row has a single neighbour."""
    pytest.importorskip("embedding_atlas", reason="embedding-atlas is not installed")
    shutil.copytree(config.run, tmp_path / "run")
    part = tables.read_table(Run(str(tmp_path / "run")).neighbors(0))
    ids = tables.matrix(part["neighbors"]).copy()
    ids[3, 1:] = -1
    place = part.column_names.index("neighbors")
    lists = pa.array(list(ids), part.schema.field("neighbors").type)
    tables.write_table(Run(str(tmp_path / "run")).neighbors(0), part.set_column(place, "neighbors", lists))
    write_atlas(RunRows(load_run(str(tmp_path / "run"))), str(tmp_path / "a.parquet"), images=True)
    line = [sys.executable, "-m", "embedding_atlas.cli", str(tmp_path / "a.parquet"), *ATLAS_COLUMNS]
    subprocess.run([*line, "--export-application", str(tmp_path / "atlas.zip")], check=True, timeout=120)
    with zipfile.ZipFile(tmp_path / "atlas.zip") as archive:
        shown = json.loads(archive.read("data/metadata.json"))["props"]["data"]
        table = pq.read_table(io.BytesIO(archive.read("data/dataset.parquet")))
    assert shown["projection"] == {"x": "x", "y": "y"}
    assert shown["neighbors"] == "neighbors"
    assert table["row"].to_pylist() == list(range(24))
    near = table["neighbors"].to_pylist()[3]
    assert near["ids"] == [*[3] * (len(near["ids"]) - 1), ids[3, 0]]
    assert near["distances"][:-1] == [0.0] * (len(near["ids"]) - 1)


def test_hugging_face_reads_the_folder(config: RunConfig, wanted: list[dict[str, Any]], tmp_path: Path):
    assert export(config, "hf", str(tmp_path), images=True)["missing"] == 0
    card = (tmp_path / "README.md").read_text()
    assert "24 images in 2 clusters, of which 1 have names" in card
    files = sorted((tmp_path / "data").iterdir())
    assert [path.name for path in files] == ["train-00000-of-00002.parquet", "train-00001-of-00002.parquet"]
    table = pa.concat_tables(map(pq.read_table, files))
    features = json.loads(table.schema.metadata[b"huggingface"])["info"]["features"]
    assert features["image"] == {"_type": "Image"}
    assert features["cluster"] == {"dtype": "int32", "_type": "Value"}
    assert table.drop_columns("image").to_pylist() == wanted
    image = table["image"].to_pylist()[5]
    assert image["path"] == "5.png"
    assert Image.open(io.BytesIO(image["bytes"])).size == (24, 24)


def test_hugging_faces_own_library_decodes_it(config: RunConfig, tmp_path: Path):
    datasets = pytest.importorskip("datasets", reason="Hugging Face's datasets is not installed")
    export(config, "hf", str(tmp_path / "hf"), images=True)
    found = datasets.load_dataset(str(tmp_path / "hf"), split="train", cache_dir=str(tmp_path / "cache"))
    assert found.num_rows == 24
    assert found[0]["image"].size == (24, 24)


@contextmanager
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[list[str], dict[str, bytes]]]:
    """Serve the three requests that the hub's client makes for an upload; the values are tokens and files."""
    tokens, files = list[str](), dict[str, bytes]()

    class Hub(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            tokens.append(self.headers.get("authorization", ""))
            status, kind = 200, self.path.rsplit("/", 2)[-2]
            if self.path == "/api/repos/create":
                asked = json.loads(body)
                is_private = asked.get("private") or asked.get("visibility") == "private"  # before and since 1.0
                is_let_in = is_private and asked["type"] == "dataset" and tokens[-1].endswith(" t")
                status = 200 if is_let_in else 401
                answer: Any = {"url": f"https://huggingface.co/datasets/{asked.get('organization')}/{asked['name']}"}
            elif kind == "preupload":
                paths = [each["path"] for each in json.loads(body)["files"]]
                answer = {"files": [{"path": path, "uploadMode": "regular", "shouldIgnore": False} for path in paths]}
            else:
                lines = [json.loads(line)["value"] for line in body.splitlines() if b'"file"' in line]
                files.update({each["path"]: base64.b64decode(each["content"]) for each in lines})
                answer = {"commitUrl": "https://huggingface.co/datasets/me/photos/commit/1", "commitOid": "1"}
            content = json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    yield tokens, files
    server.shutdown()
    server.server_close()


def test_the_hubs_client_uploads_the_folder_with_its_token(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    line = ["export", config.run, "--to", "hf", "--out", str(tmp_path / "hf"), "--push", "me/photos"]
    with hub(monkeypatch) as (tokens, files):
        monkeypatch.setenv("HF_TOKEN", "t")
        assert run_command(line) == 0
        assert capsys.readouterr().out.endswith("/datasets/me/photos\n")
        written = {str(path.relative_to(tmp_path / "hf")): path for path in (tmp_path / "hf").rglob("*.*")}
        assert files == {name: path.read_bytes() for name, path in written.items()}
        assert set(tokens) == {"Bearer t"}
        monkeypatch.setenv("HF_TOKEN", "wrong")
        assert run_command(line) == 2
    assert "--push me/photos: " in capsys.readouterr().err
    with pytest.raises(ConfigError, match="--to hf"):
        export(config, "table", str(tmp_path / "t.csv"), push="me/photos")


def test_tars_hold_each_image_with_its_cluster(config: RunConfig, wanted: list[dict[str, Any]], tmp_path: Path):
    assert export(config, "webdataset", str(tmp_path))["files"] == 2
    found = dict[str, bytes]()
    for name in ("00000.tar", "00001.tar"):
        with tarfile.open(tmp_path / name) as tar:
            found |= {member.name: tar.extractfile(member).read() for member in tar}  # type: ignore[union-attr]
    assert [json.loads(found[f"{row:012d}.json"]) for row in range(24)] == wanted
    assert Image.open(io.BytesIO(found["000000000023.png"])).size == (24, 24)


def test_webdatasets_own_library_reads_the_tars(config: RunConfig, wanted: list[dict[str, Any]], tmp_path: Path):
    webdataset = pytest.importorskip("webdataset", reason="webdataset is not installed")
    export(config, "webdataset", str(tmp_path))
    tars = [str(tmp_path / name) for name in ("00000.tar", "00001.tar")]
    found = list(webdataset.WebDataset(tars, shardshuffle=False).decode("pil"))
    assert [sample["json"] for sample in found] == wanted
    assert {sample["png"].size for sample in found} == {(24, 24)}


def test_clip_retrieval_finds_embeddings_beside_their_metadata(config: RunConfig, tmp_path: Path):
    export(config, "clip-retrieval", str(tmp_path))
    rows = np.concatenate([np.load(tmp_path / "img_emb" / f"img_emb_{i}.npy") for i in (0, 1)])
    assert (rows.shape, rows.dtype) == ((24, 192), np.float16)
    index = faiss.IndexFlatIP(192)
    index.add(rows.astype(np.float32))
    similarity, nearest = index.search(rows.astype(np.float32), 1)
    assert nearest[:, 0].tolist() == list(range(24))
    np.testing.assert_allclose(similarity, 1, atol=2e-3)
    names = [pq.read_table(tmp_path / "metadata" / f"metadata_{i}.parquet") for i in (0, 1)]
    assert pa.concat_tables(names)["image_path"].to_pylist()[0].endswith("shard-000.tar#00000.png")


def test_fiftyone_gets_its_documents(config: RunConfig, wanted: list[dict[str, Any]], tmp_path: Path):
    assert export(config, "fiftyone", str(tmp_path))["missing"] == 0
    about = json.loads((tmp_path / "metadata.json").read_text())
    fields = {field["name"]: field for field in about["sample_fields"]}
    samples = json.loads((tmp_path / "samples.json").read_text())["samples"]
    assert set(samples[0]) - {"_id", "_media_type", "_rand"} == set(fields) - {"id"}
    for sample, row in zip(samples, wanted, strict=True):
        assert Image.open(tmp_path / sample["filepath"]).size == (24, 24)
        assert sample["cluster"]["label"] == (row["name"] or "cluster 1")
        assert sample["ground_truth"]["label"] == row["label"]
    assert len({sample["_id"]["$oid"] for sample in samples}) == 24


def test_object_storage_takes_exports(config: RunConfig, wanted: list[dict[str, Any]], s3_bucket: str):
    export(config, "table", f"{s3_bucket}/out/t.parquet")
    assert tables.read_table(f"{s3_bucket}/out/t.parquet").to_pylist() == wanted
    export(config, "keys", f"{s3_bucket}/keys")
    assert storage.read_bytes(f"{s3_bucket}/keys/00001.txt").count(b"\n") == 8


def test_what_cannot_be_exported_is_one_line(config: RunConfig, vectors_run: Sealed, tmp_path: Path):
    refused = {
        ("sql", "t.db", False): (ConfigError, "must be one of atlas, table"),
        ("table", "t.xlsx", False): (ConfigError, r"must end in \.parquet or \.csv"),
        ("keys", "keys", True): (ConfigError, "holds none"),
    }
    for (to, out, images), (kind, message) in refused.items():
        with pytest.raises(kind, match=message):
            export(config, to, str(tmp_path / out), images=images)
    with pytest.raises(DataError, match="none of the 7 images can be read now"):
        export(vectors_run.config, "webdataset", str(tmp_path / "tars"))
    shutil.copytree(config.run, tmp_path / "run")
    (tmp_path / "run" / "manifests" / "assign.json").unlink()
    with pytest.raises(ArtefactError, match="has no clusters"):
        export(load_run(str(tmp_path / "run")), "table", str(tmp_path / "t.csv"))
    shutil.rmtree(tmp_path / "run")
    shutil.copytree(config.run, tmp_path / "run")
    (tmp_path / "run" / "manifests" / "map.json").unlink()
    with pytest.raises(ArtefactError, match=r"has no map: run `rayclust map RUN\.yaml`"):
        export(load_run(str(tmp_path / "run")), "atlas", str(tmp_path / "a.parquet"))


def test_a_file_that_is_written_in_pieces_is_there_whole_or_not_at_all(tmp_path: Path):
    def broken() -> None:
        with storage.open_output(str(tmp_path / "a" / "b")) as file:
            file.write(b"half")
            assert not (tmp_path / "a" / "b").exists()
            raise KeyError

    with pytest.raises(KeyError):
        broken()
    assert list((tmp_path / "a").iterdir()) == []
    with pytest.raises(DataError), storage.open_output("/proc/none/file"):
        pass
