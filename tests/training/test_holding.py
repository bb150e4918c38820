from __future__ import annotations

from pathlib import Path

import pytest
import torch

from rayclust.training import holding
from rayclust.training.holding import held, host_free, place_for, taken

CPU = torch.device("cpu")


def test_rows_go_to_the_first_place_that_holds_them_well():
    assert place_for(50, gpu_free=100, host_free=0) == "gpu"
    assert place_for(51, gpu_free=100, host_free=102) == "pinned"
    assert place_for(52, gpu_free=100, host_free=102) == "mapped"


def test_workers_on_the_cpu_take_rows_from_where_they_are():
    x = torch.arange(12.0).view(4, 3)
    assert held(x, CPU) is x
    assert taken(x, torch.tensor([2, 0, 2]), CPU).equal(x[[2, 0, 2]])


@pytest.mark.gpu
@pytest.mark.parametrize("place", ["gpu", "pinned", "mapped"])
def test_the_same_rows_reach_the_gpu_from_every_place(place: str, monkeypatch: pytest.MonkeyPatch):
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    monkeypatch.setattr(holding, "place_for", lambda *_: place)
    device, x = torch.device("cuda", 0), torch.randn(1000, 7)
    kept = held(x, device)
    assert (kept.is_cuda, kept.is_pinned()) == (place == "gpu", place == "pinned")
    rows = torch.randint(1000, (64,))
    found = taken(kept, rows.to(kept.device), device)
    assert found.device == device
    assert found.cpu().equal(x[rows])


def test_a_workers_memory_is_its_part_of_what_node_and_container_have_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(holding, "_MEMORY", tmp_path / "meminfo")
    monkeypatch.setattr(holding, "_CGROUP", tmp_path)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    assert host_free() == 0
    (tmp_path / "meminfo").write_text("MemTotal:  64 kB\nMemAvailable:   48 kB\n")
    assert host_free() == 48 * 1024
    for name, content in (("max", "40960"), ("current", "30000"), ("stat", "anon 9\ninactive_file 40")):
        (tmp_path / f"memory.{name}").write_text(content + "\n")
    assert host_free() == 11_000
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert host_free() == 2750
    (tmp_path / "memory.max").write_text("max\n")
    assert host_free() == 12 * 1024
