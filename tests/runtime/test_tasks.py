"""Tasks with a mark are not done again; whatever casts doubt on a mark has its task done again."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import ray

from rayclust.errors import DataError
from rayclust.runtime import progress
from rayclust.runtime.tasks import (
    Task,
    TaskResult,
    finished_tasks,
    map_tasks,
    read_mark,
    run_and_mark,
    run_tasks,
    write_mark,
)
from rayclust.store import storage
from rayclust.store.manifest import put_bytes
from rayclust.store.run import Run


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(str(tmp_path / "run"))


def work(run: Run, unit: Task) -> TaskResult:
    """Writes a file that holds the unit's digest."""
    outputs = put_bytes(run, run.at("out", f"{unit.index}.bin"), unit.digest.encode())
    return TaskResult(outputs, {"rows": unit.size}, {"payload": unit.payload})


def marked(run: Run, *digests: str) -> list[Task]:
    units = [Task(i, digest, payload=i, size=i + 1) for i, digest in enumerate(digests)]
    for unit in units:
        run_and_mark(run.mark(unit.index, "stage"), unit, lambda unit=unit: work(run, unit))
    return units


def test_a_marker_reads_back_as_written(run: Run):
    result = TaskResult({"a/b": {"digest": "d", "size": 3}}, {"rows": 2}, {"note": [1, None]})
    write_mark(run.at("m.json"), Task(4, "digest"), result)
    assert read_mark(run.at("m.json")) == ("digest", result)


DAMAGED: dict[str, bytes] = {
    "nothing": b"",
    "no JSON": b"{half",
    "another kind of JSON": b"[1, 2]",
    "a number": b"7",
    "a key missing": b'{"digest": "d", "outputs": {}, "counts": {}}',
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_marker_counts_as_none(name: str, run: Run):
    storage.write_bytes(run.at("m.json"), DAMAGED[name])
    assert read_mark(run.at("m.json")) is None
    assert read_mark(run.at("missing.json")) is None


def test_finished_are_those_with_equal_digest_and_whole_outputs(run: Run):
    units = marked(run, "one", "two", "three", "four", "five")
    units[1] = Task(1, "changed")
    storage.remove(run.at("out", "2.bin"))
    storage.write_bytes(run.at("out", "3.bin"), b"longer than it was")
    storage.remove(run.mark(4, "stage"))
    assert list(finished_tasks(run, "stage", units)) == [0]
    assert finished_tasks(run, "another stage", units) == {}


def test_a_marker_of_other_work_is_gone_before_its_output_is_touched(run: Run):
    [unit] = marked(run, "digest-a")

    def killed_half_way() -> TaskResult:
        put_bytes(run, run.at("out", "0.bin"), b"digest-b")  # as long as what was there
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_and_mark(run.mark(0, "stage"), Task(0, "digest-b"), killed_half_way)
    assert finished_tasks(run, "stage", [unit]) == {}


def test_the_same_work_again_keeps_its_marker_while_it_goes_on(run: Run):
    [unit] = marked(run, "digest-a")
    marker = run.mark(0, "stage")

    def look() -> TaskResult:
        assert storage.exists(marker)
        return work(run, unit)

    run_and_mark(marker, unit, look)


def test_results_come_in_order_of_the_units_and_only_the_rest_is_done(in_process: None, run: Run):
    units = marked(run, "one", "two", "three")
    storage.remove(run.mark(1, "stage"))
    done = list[int]()

    def note(unit: Task) -> TaskResult:
        done.append(unit.index)
        return work(run, unit)

    results = run_tasks(run, "stage", units, note)
    assert done == [1]
    assert [result.extra["payload"] for result in results] == [0, 1, 2]
    assert run_tasks(run, "stage", units, note) == results
    assert done == [1]


@pytest.mark.ray
@pytest.mark.usefixtures("ray_session")
def test_tasks_with_a_gpu_share_their_process(monkeypatch: pytest.MonkeyPatch):
    # Ray's own default for them is a process each, which imports torch and opens the GPU every time.
    seen, remote = dict[str, Any](), ray.remote

    def without_gpus(**options: Any) -> Any:
        seen.update(options)
        return remote(**{**options, "num_gpus": 0})

    monkeypatch.setattr(ray, "remote", without_gpus)
    assert list(map_tasks(lambda item: 2 * item, [1, 2], in_order=True, gpus=1)) == [(1, 2), (2, 4)]
    assert seen["num_gpus"] == 1
    assert seen["max_calls"] == 0


@pytest.mark.ray
@pytest.mark.usefixtures("ray_session")
def test_over_a_cluster_every_unit_is_done_once_and_an_error_is_the_one_raised(run: Run):
    def work_or_fail(unit: Task) -> TaskResult:
        if unit.payload == "bad":
            # Not before the others have ended: what is under way when a unit fails goes on writing.
            deadline = time.monotonic() + 60
            while not all(storage.exists(run.mark(i, "stage")) for i in range(9)):
                assert time.monotonic() < deadline, "the others do not end"
                time.sleep(0.02)
            raise DataError("the third part: cannot be used")
        return put_and_count(unit)

    def put_and_count(unit: Task) -> TaskResult:
        path = run.at("out", f"{unit.index}.bin")
        assert not storage.exists(path)
        return TaskResult(put_bytes(run, path, b"x"), {"rows": unit.size})

    units: list[Any] = [Task(i, f"digest {i}", "bad" if i == 9 else None, size=i) for i in range(10)]
    with pytest.raises(DataError) as caught:
        run_tasks(run, "stage", units, work_or_fail)
    assert str(caught.value) == "the third part: cannot be used"
    units[9] = Task(9, "mended", size=9)
    results = run_tasks(run, "stage", units, work_or_fail)
    assert [result.counts["rows"] for result in results] == list(range(10))


def test_what_is_taken_out_of_a_result_is_seen_once_a_call_and_not_held(in_process: None, run: Run):
    units = marked(run, "one", "two", "three")
    storage.remove(run.mark(0, "stage"))
    taken = dict[int, int]()

    def take(unit: Task, result: TaskResult) -> None:
        assert unit.index not in taken
        taken[unit.index] = result.extra.pop("payload")

    results = run_tasks(run, "stage", units, lambda unit: work(run, unit), on_result=take)
    assert taken == {0: 0, 1: 1, 2: 2}
    assert [result.extra for result in results] == [{}, {}, {}]
    found = read_mark(run.mark(0, "stage"))
    assert found is not None
    assert found[1].extra == {"payload": 0}


def test_a_stage_with_several_kinds_of_units_measures_each(in_process: None, run: Run):
    with progress.context_value(progress.stage_timings, []) as found:
        for section in ("sorting", "searching"):
            units = [Task(i, f"{section} {i}", size=5) for i in range(2)]
            run_tasks(run, "stage", units, lambda unit: TaskResult({}, {"rows": unit.size}), section=section)
    assert [(part.name, part.done) for part in found] == [("sorting", 10), ("searching", 10)]
