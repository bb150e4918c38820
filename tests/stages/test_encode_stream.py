from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import ray

from rayclust.config import validate
from rayclust.errors import DataError
from rayclust.runtime.pipeline import StageContext
from rayclust.runtime.tasks import Task
from rayclust.stages.encode import STAGE, Crew, _items
from rayclust.store import filesystem
from rayclust.store.layout import Run
from rayclust.store.sources import Shard
from tests.stages.runs import tree, write_tars


@pytest.fixture
def images(tmp_path: Path) -> Path:
    return write_tars(tmp_path / "images", shards=3, per_shard=2)


def planned(images: Path) -> tuple[StageContext, list[Task]]:
    config = validate(tree(str(images.parent / "run"), str(images)))
    listed = STAGE.plan(config)
    units = [Task(shard.index, digest, shard) for shard, digest in zip(listed.shards, listed.digests, strict=True)]
    return StageContext(config, Run(config.run), "digest", {}, listed), units


def test_an_item_names_unit_and_shard_of_what_is_left(images: Path):
    context, units = planned(images)
    items = _items(context, [units[0], units[2]])
    assert [json.loads(item["unit"]) for item in items] == [
        {"index": 0, "digest": units[0].digest, "row_start": 0},
        {"index": 2, "digest": units[2].digest, "row_start": units[2].payload.first},
    ]
    shards = [Shard.from_json(filesystem.read_json(item["shard"])) for item in items]
    assert [shard.name for shard in shards] == ["shard-000", "shard-002"]


def test_an_input_that_changes_between_listing_and_reading_is_refused(images: Path):
    context, units = planned(images)
    (images / "shard-000b.tar").write_bytes((images / "shard-001.tar").read_bytes())
    assert len(_items(context, units[:1])) == 1, "what has not moved may be read"
    with pytest.raises(DataError, match=r"shard-000b\.tar: the input has changed since it was listed"):
        _items(context, units)


def test_an_input_that_shrinks_between_listing_and_reading_is_refused(images: Path):
    context, units = planned(images)
    (images / "shard-002.tar").unlink()
    with pytest.raises(DataError, match="has changed since it was listed"):
        _items(context, units)


@pytest.mark.parametrize(
    ("placement", "crew"),
    [
        ({}, Crew(1, 2, 0.66)),
        ({"decode": {"pool": "cpu"}, "encode": {"pool": "gpu"}}, Crew(1, 1, 1.0)),
        ({"encode": {"pool": "gpu"}}, Crew(1, 1, 0.5)),  # decoders may be on the encoder's node
        ({"decode": {"pool": "gpu"}, "encode": {"pool": "gpu"}}, Crew(1, 1, 0.5)),
    ],
)
def test_actors_that_may_share_a_node_all_have_a_place_there(
    monkeypatch: pytest.MonkeyPatch, placement: dict[str, Any], crew: Crew
):
    nodes = [{"Labels": {"pool": pool}, "Resources": {"CPU": 1}, "Alive": True} for pool in ("cpu", "gpu")]
    monkeypatch.setattr(ray, "nodes", lambda: nodes)
    assert Crew.of(validate(tree("/run", "/images", resources={"placement": placement}))) == crew
