from __future__ import annotations

import base64
import csv
import io
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image
from sklearn.metrics import adjusted_rand_score
from starlette.testclient import TestClient
from tensorboardX import SummaryWriter

from rayclust.config import RunConfig
from rayclust.errors import ArtefactError, DataError
from rayclust.export import export
from rayclust.runtime.api import load_run
from rayclust.runtime.edits import edit_clusters
from rayclust.stages.predict import predict
from rayclust.store import storage
from rayclust.store.overlay import Merge, Split
from rayclust.store.run import Run
from rayclust.store.sources import fetch_many
from rayclust.web import app as web
from rayclust.web.app import Opening, create_app, serve
from rayclust.web.comparison import DRAWN, _Flows
from rayclust.web.explorer import Explorer
from tests.sealed import Sealed

OWN = {"x-rayclust": "1", "origin": "http://127.0.0.1:8008"}


@pytest.fixture
def page(config: RunConfig) -> Iterator[TestClient]:
    with client(Explorer(config)) as found:
        yield found


def client(explorer: Explorer, token: str | None = None) -> TestClient:
    application = create_app(Opening(explorer.config, opened=explorer), hosts={"127.0.0.1"}, token=token)
    return TestClient(application, base_url="http://127.0.0.1:8008", follow_redirects=False)


def get(page: TestClient, path: str, **values: Any) -> Any:
    answer = page.get(path, params=values)
    assert answer.status_code == 200, answer.text
    return answer.json()


def post(page: TestClient, path: str, content: Any) -> Any:
    answer = page.post(path, json=content, headers=OWN)
    assert answer.status_code == 200, answer.text
    return answer.json()


def own_clusters(config: RunConfig) -> dict[str, int]:
    tables = [pq.read_table(Run(config.run).assignments(part)).to_pylist() for part in range(3)]
    return {row["key"]: row["cluster"] for table in tables for row in table}


@pytest.mark.usefixtures("in_process")
def test_a_person_finds_all_images_of_a_cluster_renames_it_merges_two_and_takes_home_a_csv(
    page: TestClient, config: RunConfig, tmp_path: Path
):
    # 1. The list: three clusters of eight images, one of them all blue.
    listed = get(page, "/api/clusters")
    assert (listed["total"], listed["images"]) == (3, 24)
    [blue] = get(page, "/api/clusters", query="blue")["clusters"]
    assert (blue["size"], blue["label"], blue["purity"]) == (8, "blue", 1.0)
    # 2. Every image of it, page by page.
    path, seen = f"/api/clusters/{blue['number']}/images", list[dict[str, Any]]()
    while len(seen) < (total := get(page, path, offset=len(seen), limit=3)["total"]):
        seen += get(page, path, offset=len(seen), limit=3)["images"]
    assert total == 8
    own = own_clusters(config)
    assert sorted(image["key"] for image in seen) == sorted(k for k, c in own.items() if c == blue["number"])
    assert {image["label"] for image in seen} == {"blue"}
    # 3. A name, and one cluster of the two others.
    post(page, "/api/edits", {"do": "rename", "cluster": blue["number"], "name": "the sea"})
    first, second = (each["number"] for each in listed["clusters"] if each["number"] != blue["number"])
    facts = post(page, "/api/edits", {"do": "merge", "clusters": [first, second]})
    assert (facts["clusters"], facts["edits"]) == (2, 2)
    assert [each["size"] for each in get(page, "/api/clusters")["clusters"]] == [16, 8]
    assert get(page, "/api/clusters", query="SEA")["clusters"][0]["number"] == blue["number"]
    # 4. A table to take home.
    answer = page.post("/api/table.csv", json={"clusters": [first]}, headers=OWN)
    rows = list(csv.DictReader(io.StringIO(answer.text)))
    assert sorted(row["key"] for row in rows) == sorted(k for k, c in own.items() if c != blue["number"])
    assert {row["cluster"] for row in rows} == {str(first)}
    # 5. What other commands say afterwards.
    export(config, "table", str(tmp_path / "t.parquet"))
    table = pq.read_table(tmp_path / "t.parquet").to_pylist()
    assert {row["name"] for row in table if row["label"] == "blue"} == {"the sea"}
    assert {row["cluster"] for row in table if row["label"] != "blue"} == {first}
    predict(config, config.images.uri, str(tmp_path / "p.parquet"))
    assert set(pq.read_table(tmp_path / "p.parquet")["name"].to_pylist()) == {"the sea", None}


def test_the_list_is_sorted_filtered_and_cut(page: TestClient):
    post(page, "/api/edits", {"do": "rename", "cluster": 1, "name": "beach"})
    post(page, "/api/edits", {"do": "mark", "cluster": 2, "mark": "Checked"})
    by_name = get(page, "/api/clusters", sort="name", descending=0)["clusters"]
    assert [each["name"] for each in by_name] == ["beach", None, None]
    numbers = [each["number"] for each in get(page, "/api/clusters", sort="number", descending=1)["clusters"]]
    assert numbers == [2, 1, 0]
    cut = get(page, "/api/clusters", sort="number", descending=0, offset=1, limit=1)
    assert (cut["total"], [each["number"] for each in cut["clusters"]]) == (3, [1])
    assert [each["number"] for each in get(page, "/api/clusters", query="checked")["clusters"]] == [2]
    assert get(page, "/api/clusters", query="beach #2")["total"] == 0
    bounds = {"size>7": 3, "size>8": 0, "size<9 purity>99": 3, "purity<100": 0, "confidence>0 beach": 1, "size>": 0}
    assert {query: get(page, "/api/clusters", query=query)["total"] for query in bounds} == bounds
    certain = [each["confidence"] for each in get(page, "/api/clusters", sort="confidence")["clusters"]]
    assert certain == sorted(certain, reverse=True)
    for path, asked, wanted in (
        ("clusters", {"limit": "x"}, "limit = x: must be a whole number"),
        ("records", {"rows": "1,a"}, "rows: must be at most 500 numbers, separated by commas"),
        ("records", {}, "rows: must be at most 500 numbers, separated by commas"),
        ("search", {"text": " "}, "text: give some words, at most 1,000 letters"),
        ("search", {"text": "a", "top": "-1"}, "top = -1: must be a whole number"),
    ):
        assert page.get(f"/api/{path}", params=asked).json() == {"error": wanted}
    assert len(get(page, "/api/clusters", limit="", offset="")["clusters"]) == 3


def test_an_image_shows_its_neighbours_and_pictures(page: TestClient, config: RunConfig):
    found = get(page, "/api/images/15")
    assert found["key"] == "shard-001/00003"
    wanted = pq.read_table(Run(config.run).neighbors(2)).to_pylist()[3]
    assert wanted["row"] == 15
    assert [near["row"] for near in found["neighbors"]] == wanted["neighbors"]
    for size in (160, 1024):
        answer = page.get("/api/images/15/picture", params={"size": size})
        assert answer.headers["content-type"] == "image/webp"
        assert Image.open(io.BytesIO(answer.content)).size == (24, 24)
    assert page.get("/api/images/15/picture", params={"size": 7}).status_code == 400
    assert page.get("/api/images/24").json() == {"error": "there is no row 24 among 24"}


def test_the_map_shows_the_clusters_as_edited(page: TestClient, config: RunConfig):
    post(page, "/api/edits", {"do": "rename", "cluster": 1, "name": "beach"})
    post(page, "/api/edits", {"do": "merge", "clusters": [2, 0]})
    found = get(page, "/api/map")
    kinds = {"row": "<f8", "cluster": "<u4", "x": "<u2", "y": "<u2"}
    column = {name: np.frombuffer(base64.b64decode(found[name]), kind) for name, kind in kinds.items()}
    assert column["row"].tolist() == list(range(found["count"])) == list(range(24))
    assert found["clusters"] == [[2, None], [1, "beach"]]
    own = list(own_clusters(config).values())
    assert [found["clusters"][place][0] for place in column["cluster"]] == [1 if own[i] == 1 else 2 for i in range(24)]
    places = pq.read_table(Run(config.run).map(0)).to_pylist()
    for axis in "xy":  # of a part, places keep their order along either axis
        np.testing.assert_array_equal(
            np.argsort(column[axis][: len(places)], kind="stable"), np.argsort([p[axis] for p in places], kind="stable")
        )
    records = get(page, "/api/records", rows="5,3")
    assert [record["row"] for record in records] == [5, 3]
    assert records[0].keys() == get(page, "/api/images/5").keys() - {"neighbors"}
    for rows in ("24", "", "1,,2", "-1", ",".join(["1"] * 501)):
        assert page.get("/api/records", params={"rows": rows}).status_code == 400, rows


def test_a_cluster_begins_with_what_is_most_certain_or_least(page: TestClient):
    for cluster in range(3):
        found = get(page, f"/api/clusters/{cluster}/images")["images"]
        certain = [image["confidence"] for image in found]
        assert certain == sorted(certain, reverse=True)
        assert get(page, f"/api/clusters/{cluster}/images", odd_first=1)["images"] == found[::-1]
        typical = get(page, f"/api/clusters/{cluster}")["typical"]
        assert set(typical) <= {image["row"] for image in found}


def test_search_by_an_image(page: TestClient, config: RunConfig):
    uri = get(page, "/api/images/15")["uri"]
    [(_, data)] = fetch_many([uri])
    answer = page.post("/api/search/image", content=data, params={"top": 3}, headers=OWN)
    found = answer.json()
    assert found[0]["row"] == 15
    assert found[0]["similarity"] == pytest.approx(1, abs=1e-3)
    assert len(found) == 3
    answer = page.post("/api/search/image", content=b"no image", headers=OWN)
    assert (answer.status_code, "the image" in answer.json()["error"]) == (400, True)
    answer = page.get("/api/search", params={"text": "a dog"})
    assert (answer.status_code, "no text tower" in answer.json()["error"]) == (400, True)


def test_images_are_split_off_and_come_back(page: TestClient):
    rows = [image["row"] for image in get(page, "/api/clusters/0/images")["images"]]
    facts = post(page, "/api/edits", {"do": "split", "cluster": 0, "rows": [rows[0], rows[3]], "name": "two"})
    assert facts["clusters"] == 4
    assert [image["row"] for image in get(page, "/api/clusters/0/images")["images"]] == [
        row for row in rows if row not in (rows[0], rows[3])
    ]
    assert {image["row"] for image in get(page, "/api/clusters/3/images")["images"]} == {rows[0], rows[3]}
    assert get(page, f"/api/images/{rows[3]}")["name"] == "two"
    sizes = {each["number"]: each["size"] for each in get(page, "/api/clusters")["clusters"]}
    assert sizes == {0: 6, 1: 8, 2: 8, 3: 2}
    post(page, "/api/edits", {"do": "merge", "clusters": [1, 3]})
    assert get(page, "/api/clusters/1/images")["total"] == 10
    table = page.post("/api/table.csv", json={"rows": [rows[0]]}, headers=OWN).text
    assert next(iter(csv.DictReader(io.StringIO(table))))["cluster"] == "1"
    assert post(page, "/api/edits/undo", {})["edits"] == 1
    assert post(page, "/api/edits/undo", {})["clusters"] == 3
    assert [image["row"] for image in get(page, "/api/clusters/0/images")["images"]] == rows


@pytest.mark.parametrize(
    ("content", "wanted"),
    [
        ({"do": "rename", "cluster": 9, "name": "x"}, "there is no cluster 9"),
        ({"do": "rename", "cluster": 0, "name": "x" * 201}, "at most 200"),
        ({"do": "split", "cluster": 0, "rows": [99]}, "there is no row 99"),
        ({"do": "split", "cluster": 0, "rows": "all"}, "must be a list of numbers"),
        ([], "a JSON object is needed"),
    ],
)
def test_what_is_no_edit_is_refused_in_a_line(page: TestClient, content: Any, wanted: str):
    answer = page.post("/api/edits", json=content, headers=OWN)
    assert answer.status_code == 400
    assert wanted in answer.json()["error"]
    assert get(page, "/api/run")["edits"] == 0


def test_only_known_hosts_are_answered(page: TestClient):
    for host in ("127.0.0.1:8008", "localhost", "LOCALHOST:1", "[::1]:8008", "10.0.0.5:8008"):
        assert page.get("/api/run", headers={"host": host}).status_code == 200, host
    for host in ("evil.example", "evil.example:8008", "127.0.0.1.evil.example", "", "localhost.evil.example:80"):
        assert page.get("/api/run", headers={"host": host}).status_code == 421, host


def test_other_sites_change_nothing_and_read_nothing(page: TestClient):
    edit = {"do": "rename", "cluster": 0, "name": "x"}
    for headers in (
        {},
        {"x-rayclust": "1", "origin": "https://evil.example"},
        {"x-rayclust": "1", "origin": "null"},
        {"origin": "http://127.0.0.1:8008"},
        {**OWN, "sec-fetch-site": "cross-site"},
        {**OWN, "sec-fetch-site": "same-site"},
    ):
        assert page.post("/api/edits", json=edit, headers=headers).status_code == 403, headers
    assert get(page, "/api/run")["edits"] == 0
    assert page.get("/api/images/0/picture", headers={"sec-fetch-site": "cross-site"}).status_code == 403
    assert page.get("/", headers={"sec-fetch-site": "cross-site"}).status_code == 200, "a link may lead here"
    assert page.get("/api/edits").status_code == 405


def test_from_elsewhere_a_token_is_needed(config: RunConfig):
    explorer = Explorer(config)
    with client(explorer, "secret") as page:
        for path in ("/", "/app.js", "/api/run", "/api/images/0/picture", "/?token=wrong", "/api/run?token=secret"):
            assert page.get(path).status_code == 401, path
        assert page.post("/api/edits", json={}, headers=OWN).status_code == 401
        assert page.get("/api/run", headers={"authorization": "Bearer secret"}).status_code == 200
        answer = page.get("/?token=secret")
        assert (answer.status_code, answer.headers["location"]) == (303, "/")
        assert {"HttpOnly", "SameSite=strict"} <= set(answer.headers["set-cookie"].split("; "))
        assert page.get("/api/run").status_code == 200, "with the cookie"


def test_the_address_has_a_token_where_other_machines_reach_it(config: RunConfig, monkeypatch: pytest.MonkeyPatch):
    listener = SimpleNamespace(getsockname=lambda: ("", 8008))
    monkeypatch.setattr(web.socket, "create_server", lambda *address, **_: listener)
    monkeypatch.setattr(web.uvicorn, "Server", lambda _: SimpleNamespace(run=lambda **_: None))
    shown = list[str]()
    for host in ("127.0.0.1", "::1", "localhost", "192.168.0.7", "box"):
        serve(config, host=host, port=0, show=shown.append)
    assert shown[:3] == ["http://127.0.0.1:8008/", "http://[::1]:8008/", "http://localhost:8008/"]
    assert all(re.fullmatch(r"http://(192\.168\.0\.7|box):8008/\?token=[\w-]{32}", address) for address in shown[3:])


def test_nothing_but_the_pages_own_files_is_served(page: TestClient):
    for path in (
        "/../pyproject.toml", "/static/app.js", "/app.py", "/..%2f..%2fetc%2fpasswd", "/%2e%2e/app.py", "//etc/passwd",
        "/api/images/-1", "/api/clusters/1e3", "/api/images/0/picture/x",
    ):  # fmt: skip
        assert page.get(path).status_code in (404, 307) or page.get(path).json().keys() == {"error"}, path
    for path in ("/", "/app.js", "/map.js", "/style.css", "/icon.svg", "/api/run"):
        answer = page.get(path)
        policy = answer.headers["content-security-policy"]
        assert answer.status_code == 200
        assert "default-src 'none'" in policy
        assert "unsafe" not in policy
        assert answer.headers["x-content-type-options"] == "nosniff"
    html = page.get("/").text
    assert "onclick" not in html
    assert "style=" not in html
    assert "http" not in html, "nothing from elsewhere"


def test_a_request_has_a_bound(page: TestClient, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(web, "MAX_BODY", 1000)
    assert page.post("/api/search/image", content=b"x" * 1001, headers=OWN).status_code == 413
    assert len(get(page, "/api/clusters", limit=10**9)["clusters"]) == 3
    assert page.get("/api/clusters", params={"limit": "-1"}).status_code == 400


def test_the_files_on_disk_are_made_once(config: RunConfig, tmp_path: Path):
    Explorer(config)
    [done] = (tmp_path / "scratch").rglob("done")
    before = done.stat().st_mtime_ns
    explorer = Explorer(config)
    assert done.stat().st_mtime_ns == before
    assert isinstance(explorer._index.order, np.memmap)
    assert sorted(path.name for path in done.parent.iterdir()) == [
        "clusters.npy", "confidence.npy", "done", "order.npy", "rows.arrow",
    ]  # fmt: skip


def test_a_run_that_is_not_labelled_is_one_line(config: RunConfig):
    Path(Run(config.run).manifest("label")).unlink()
    with pytest.raises(ArtefactError, match="is not labelled"):
        Explorer(config)


def test_two_runs_are_compared_image_by_image(config: RunConfig, tmp_path: Path):
    """The other run is this one with two images of cluster 0 in a cluster of their own, and 1 and 2 as one."""
    shutil.copytree(config.run, tmp_path / "other")
    keys = [k for k, c in own_clusters(config).items() if c == 0][:2]
    edit_clusters(Run(str(tmp_path / "other")), Split(cluster=0, keys=tuple(keys), name="two"))
    edit_clusters(Run(str(tmp_path / "other")), Merge(clusters=(1, 2)))
    explorer = Explorer(config, load_run(str(tmp_path / "other")))
    with client(explorer) as page:
        assert get(page, "/api/run")["against"] == str(tmp_path / "other")
        found = get(page, "/api/compare")
        truth = [own_clusters(config)[key] for key in own_clusters(config)]
        there = [3 if key in keys else min(c, 1) for key, c in own_clusters(config).items()]
        assert found["ari"] == pytest.approx(adjusted_rand_score(truth, there), abs=1e-4)
        assert (found["images"], found["absent"], found["together"]) == (24, 0, round(22 / 24, 4))
        flows = {(flow["from"], flow["to"]): flow for flow in found["flows"]}
        assert {places: flow["images"] for places, flow in flows.items()} == {
            (0, 0): 6,
            (0, 3): 2,
            (1, 1): 8,
            (2, 1): 8,
        }
        assert [places for places, flow in flows.items() if flow["moved"]] == [(0, 3)]
        assert (flows[0, 3]["to_name"], flows[0, 3]["share"], flows[0, 3]["share_of_other"]) == ("two", 0.25, 1.0)
        moved = get(page, "/api/compare/0/3")
        assert (moved["total"], moved["from_name"], moved["to_name"]) == (2, None, "two")
        assert sorted(re.findall(r'href="(.*?)"', found["drawing"])) == [f"#/flow/{a}/{b}" for a, b in sorted(flows)]
        assert {image["key"] for image in moved["images"]} == set(keys)
        # An edit here counts at once.
        rows = [image["row"] for image in moved["images"]]
        post(page, "/api/edits", {"do": "split", "cluster": 0, "rows": rows})
        assert not any(flow["moved"] for flow in get(page, "/api/compare")["flows"])


def test_what_moved_is_drawn_and_the_other_clusters_are_one_group():
    """Of 60 clusters of 10 one gives three images to one, and 30 give one each to another."""
    own = np.repeat(np.arange(60), 10)
    other = own.copy()
    other[70:73], other[300::10] = 58, 20
    drawing = _Flows.between(own, other).drawn({7: "seven"}, {20: "twenty"})
    links = [tuple(map(int, pair)) for pair in re.findall(r'href="#/flow/(\d+)/(\d+)"', drawing)]
    assert {(7, 7), (7, 58), (30, 30), (30, 20), (20, 20), (58, 20)} <= set(links)
    assert len({a for a, _ in links}) == len({b for _, b in links}) == DRAWN
    assert set(re.findall(r">(seven|twenty|\d+ more) · (\d+)<", drawing)) == {
        ("seven", "10"), ("twenty", "40"), (f"{60 - DRAWN} more", "18"),
    }  # fmt: skip
    everything = _Flows.between(own, own).drawn({}, {})
    assert everything.count("href=") == DRAWN
    assert "more" not in everything, "nothing goes between what is drawn and the rest"


def test_runs_without_a_common_image_and_none_to_compare_with_are_one_line(
    page: TestClient, config: RunConfig, vectors_run: Sealed
):
    assert "explore RUN --against OTHER" in page.get("/api/compare").json()["error"]
    with pytest.raises(DataError, match="has none of this run's images"):
        Explorer(config, vectors_run.config)


def test_selections_are_kept_beside_the_run(page: TestClient, config: RunConfig):
    assert get(page, "/api/selections") == {}
    assert post(page, "/api/selections/odd ones/set", {"rows": [15, 3, 15]}) == {"odd ones": 2}
    assert [image["row"] for image in get(page, "/api/selections/odd ones")] == [3, 15]
    assert (Path(config.run) / "selections" / "odd ones.txt").read_text().splitlines() == [
        get(page, f"/api/images/{row}")["key"] for row in (3, 15)
    ]
    for name in ("..", "a.b", "x" * 61, "é!"):
        answer = page.post(f"/api/selections/{name}/set", json={"rows": [1]}, headers=OWN)
        assert answer.status_code in (400, 404), name
    assert page.get("/api/selections/none").status_code == 400
    assert page.post("/api/selections/a/set", json={"rows": ["1"]}, headers=OWN).status_code == 400
    assert post(page, "/api/selections/odd ones/set", {"rows": []}) == {}


def test_a_run_at_work_shows_its_progress_until_it_has_clusters(config: RunConfig):
    run = Run(config.run)
    Path(run.manifest("label")).rename(Path(run.manifest("label") + ".kept"))
    shutil.rmtree(run.at("tensorboard"))
    fit = storage.read_json(run.tracking)["id"]
    for name, above in ((fit, 1), ("another", 2)):  # what an earlier fit has left is not shown
        with SummaryWriter(run.at("tensorboard"), filename_suffix=f".{name}.1") as writer:
            for step in range(5):
                writer.add_scalar("loss", above / (1 + step), step + above)
                writer.add_scalar("loss/3", 0.0, step)
    with (
        TestClient(
            create_app(Opening(config), hosts={"127.0.0.1"}, token=None), base_url="http://127.0.0.1:8008"
        ) as page,
    ):
        assert "is not labelled" in page.get("/api/run").json()["error"]
        found = get(page, "/api/progress")
        assert {stage["stage"]: stage["state"] for stage in found["stages"]}["label"] == "missing"
        assert [name.split()[0] for name in found["curves"]] == ["loss"]
        assert found["curves"]["loss 0.2 at step 5"].startswith("<svg")
        Path(run.manifest("label") + ".kept").rename(run.manifest("label"))
        assert get(page, "/api/run")["images"] == 24
        [file] = Path(run.at("tensorboard")).glob(f"*{fit}*")
        file.write_bytes(file.read_bytes()[:-3])
        assert get(page, "/api/progress")["curves"].keys() <= {"loss 0.25 at step 4", "loss 0.2 at step 5"}, "cut"


def test_a_run_without_images_is_known_as_one(page: TestClient, vectors_run: Sealed):
    assert get(page, "/api/run")["has_pictures"]
    assert not Explorer(vectors_run.config).facts()["has_pictures"]
