from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from rayclust.config import validate
from rayclust.runtime import demo
from rayclust.store import filesystem


def test_the_settings_of_the_demo_hold(tmp_path: Path):
    config = validate(demo.demo_tree("/images", "/run", "temi", 2))
    assert (config.method.name, config.method.clusters, config.seed) == ("temi", 10, 2)


def test_the_table_shows_mean_and_deviation_in_percent():
    scores = {"kmeans": [{"accuracy": 0.5, "nmi": 0.5, "ari": 0.5}, {"accuracy": 0.7, "nmi": 0.5, "ari": 0.5}]}
    head, line = demo.table(scores).splitlines()
    assert head.split() == ["method", "ACC", "NMI", "ARI"]
    assert line.split() == ["kmeans", "60.0", "±", "10.0", "50.0", "±", "0.0", "50.0", "±", "0.0"]


def test_a_killed_demo_goes_on_and_a_finished_one_does_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(demo, "write_digits", lambda folder: None)
    done = list[tuple[str, int]]()

    def run_all(config: Any, *, stop_after: str | None = None) -> None:
        assert Path(config.run).is_absolute()
        if stop_after is None and (config.method.name, config.seed) in done:
            return
        done.append((config.method.name, config.seed))
        if len(done) == 2:
            raise KeyboardInterrupt
        metrics = {"accuracy": len(done) / 10, "nmi": 0.5, "ari": 0.5, "silhouette": None}
        filesystem.write_json(f"{config.run}/metrics.json", metrics)

    monkeypatch.setattr(demo, "run_all", run_all)
    with pytest.raises(KeyboardInterrupt):
        demo.demo("demo")
    uri, scores = demo.demo("demo")
    plan = [(method, seed) for method in ("kmeans", "temi") for seed in demo.SEEDS]
    assert done == [plan[0], plan[1], *plan[1:]]
    assert uri == str(tmp_path / "demo" / "run")
    assert [score["accuracy"] for score in scores["kmeans"]] == [0.1, 0.3, 0.4]
    assert set(scores) == {"kmeans", "temi"}
    beside = filesystem.read_json(f"{uri}/beside.json")
    assert len(beside["kmeans"]) == 3
    assert len(done) == 7
    assert demo.demo("demo") == (uri, scores)
    assert len(done) == 7
