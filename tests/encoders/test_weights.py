from __future__ import annotations

import argparse
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from rayclust.encoders.weights import fit, load_state, load_tensors, without_prefix
from rayclust.errors import ConfigError, DataError

TENSORS = {"a.weight": torch.arange(6.0).view(2, 3), "a.bias": torch.tensor([1.0, 2.0])}


class Evil:
    """Makes a file when it is unpickled as pickles are."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.path),)


def same(state: dict[str, torch.Tensor]) -> bool:
    return state.keys() == TENSORS.keys() and all(torch.equal(state[key], TENSORS[key]) for key in TENSORS)


def test_safetensors(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "no_suffix")
    assert same(load_state(tmp_path / "no_suffix"))


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize(
    "wrapped",
    [
        TENSORS,
        {"state_dict": TENSORS, "epoch": 3},
        {"model": TENSORS, "args": argparse.Namespace(lr=0.1)},
        {"student": {}, "teacher": TENSORS},
        {"encoder": {}, "target_encoder": {f"module.{key}": value for key, value in TENSORS.items()}},
        {"state_dict": {f"module.{key}": value for key, value in TENSORS.items()}, "optimizer": {"state": {}}},
        {"state_dict_ema": TENSORS, "state_dict": {"x": torch.ones(1)}},
        {"model": {"state_dict": TENSORS}},
        TENSORS | {"step": 4},
    ],
)
def test_torch_files_of_training_scripts(tmp_path: Path, wrapped: dict[str, object], old: bool) -> None:
    torch.save(wrapped, tmp_path / "w.pt", _use_new_zipfile_serialization=not old)
    assert same(load_state(tmp_path / "w.pt"))


def test_tables_of_tensors(tmp_path: Path) -> None:
    torch.save(torch.eye(3), tmp_path / "x.pt")
    assert torch.equal(load_tensors(tmp_path / "x.pt"), torch.eye(3))
    torch.save({"embeddings": torch.eye(2), "labels": [1, 0]}, tmp_path / "y.pt")
    assert load_tensors(tmp_path / "y.pt")["labels"] == [1, 0]
    with pytest.raises(DataError, match="holds no weights by name, but Tensor"):
        load_state(tmp_path / "x.pt")
    torch.save({"a": 1}, tmp_path / "z.pt")
    with pytest.raises(DataError, match="holds no weights by name, but dict"):
        load_state(tmp_path / "z.pt")


@pytest.mark.parametrize("old", [False, True])
def test_code_in_a_file_is_not_run(tmp_path: Path, old: bool) -> None:
    made = tmp_path / "made"
    torch.save({"w": torch.ones(1), "evil": Evil(made)}, tmp_path / "w.pt", _use_new_zipfile_serialization=not old)
    with pytest.raises(DataError, match="which are not read; save its tensors alone, as safetensors") as caught:
        load_tensors(tmp_path / "w.pt")
    assert not made.exists()
    assert "\n" not in str(caught.value)
    if not old:
        assert "objects of" in str(caught.value)
        assert "mkdir" in str(caught.value)


def test_arrays_of_numpy_are_objects_too(tmp_path: Path) -> None:
    torch.save({"mean": np.float64(1.0)}, tmp_path / "w.pt")
    with pytest.raises(DataError, match="save its tensors alone"):
        load_tensors(tmp_path / "w.pt")


def test_bad_files_give_one_clear_line(tmp_path: Path) -> None:
    torch.save(TENSORS, tmp_path / "whole.pt")
    whole = (tmp_path / "whole.pt").read_bytes()
    save_file(TENSORS, tmp_path / "whole.safetensors")
    safe = (tmp_path / "whole.safetensors").read_bytes()
    for data, message in (
        (b"", "is empty: neither a safetensors nor a torch file"),
        (b"<html>404</html>", "neither a safetensors nor a torch file"),
        (whole[: len(whole) // 2], "damaged torch file"),
        (whole[:6], "damaged torch file"),
        (b"\x80\x02garbage", "w"),
        (safe[:40], "damaged safetensors file"),
        (safe[:-3], "damaged safetensors file"),
    ):
        (tmp_path / "w").write_bytes(data)
        with pytest.raises(DataError, match=message) as caught:
            load_tensors(tmp_path / "w")
        assert "\n" not in str(caught.value)
    with pytest.raises(DataError, match="cannot be read"):
        load_tensors(tmp_path / "absent")
    with pytest.raises(DataError, match="cannot be read"):
        load_tensors(tmp_path)


WANTED = {"stem.weight": 0, "blocks.0.weight": 0, "norm.weight": 0}


@pytest.mark.parametrize(
    ("prefixes", "expected"),
    [
        (["", "x."], ""),
        (["backbone."], "backbone."),
        (["base_encoder.", "momentum_encoder."], "momentum_encoder."),
        (["student.backbone.", "teacher.backbone."], "teacher.backbone."),
        (["visual.trunk."], "visual.trunk."),
    ],
)
def test_one_network_of_a_checkpoint(prefixes: list[str], expected: str) -> None:
    state = {p + key: torch.tensor(i) for i, p in enumerate(prefixes) for key in WANTED}
    state |= {p + "head.weight": torch.tensor(9) for p in prefixes}
    found = without_prefix(state, WANTED)
    wanted = prefixes.index(expected)
    assert {key: int(found[key]) for key in WANTED} == dict.fromkeys(WANTED, wanted)
    assert int(found["head.weight"]) == 9


def test_names_that_fit_nothing_stay() -> None:
    assert without_prefix({"a": torch.ones(1)}, WANTED) == {"a": torch.ones(1)}


def test_weights_are_loaded() -> None:
    network = nn.ModuleDict({"a": nn.Linear(3, 2)})
    fit(network, TENSORS, encoder="timm/x", source="w.pt")
    assert same(dict(network.state_dict()))


def test_counters_of_batches_may_be_absent() -> None:
    norm = nn.BatchNorm1d(2)
    state = {key: value for key, value in norm.state_dict().items() if key != "num_batches_tracked"}
    fit(norm, state, encoder="timm/x", source="w.pt")


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"a.bias": TENSORS["a.bias"]}, "missing: a.weight"),
        (TENSORS | {"head.w": torch.ones(1)}, "not wanted: head.w"),
        (TENSORS | {"a.bias": torch.ones(5)}, r"of another shape: a.bias \(5,\) instead of \(2,\)"),
        ({}, "missing: a.weight, a.bias"),
        (TENSORS | {f"x{i}": torch.ones(1) for i in range(9)}, "not wanted: x0, x1, x2 and 6 more"),
    ],
)
def test_weights_that_do_not_fit_are_refused(state: dict[str, torch.Tensor], message: str) -> None:
    network = nn.ModuleDict({"a": nn.Linear(3, 2)})
    before = network["a"].weight.clone()
    with pytest.raises(ConfigError, match=f"encoder.pretrained = w.pt: does not fit timm/x: {message}") as caught:
        fit(network, state, encoder="timm/x", source="w.pt")
    assert "\n" not in str(caught.value)
    assert torch.equal(network["a"].weight, before)
