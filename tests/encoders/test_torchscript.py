from __future__ import annotations

import warnings
import zipfile
from pathlib import Path

import pytest
import torch
from torch import nn

from rayclust.encoders.torchscript import is_torchscript, read_torchscript
from rayclust.errors import DataError


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, nn.Module]:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 2).half()).eval()
    network.register_buffer("context_length", torch.tensor(77))
    path = tmp_path_factory.mktemp("program") / "network.pt"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.script(network).save(str(path))
    return path, network


def test_tensors_come_out_as_they_went_in(program: tuple[Path, nn.Module]) -> None:
    path, network = program
    state = read_torchscript(path)
    assert is_torchscript(path)
    assert state.keys() == network.state_dict().keys()
    for key, value in network.state_dict().items():
        assert state[key].dtype == value.dtype
        assert torch.equal(state[key], value)


def test_other_files_are_told_apart(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(1)}, tmp_path / "w.pt")
    (tmp_path / "x.pt").write_bytes(b"no zip")
    assert not is_torchscript(tmp_path / "w.pt")
    assert not is_torchscript(tmp_path / "x.pt")


@pytest.mark.parametrize("name", ["os.system", "builtins.eval", "torch.load"])
def test_code_in_an_archive_is_not_run(tmp_path: Path, name: str) -> None:
    module, _, function = name.rpartition(".")
    path = tmp_path / "evil.pt"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("evil/data.pkl", f"c{module}\n{function}\n(V{tmp_path}/made\ntR.".encode())
        archive.writestr("evil/constants.pkl", b"")
    with pytest.raises(DataError, match=f"holds {name}"):
        read_torchscript(path)
    assert not (tmp_path / "made").exists()


def test_damaged_archives_are_refused(tmp_path: Path, program: tuple[Path, nn.Module]) -> None:
    path = tmp_path / "damaged.pt"
    with zipfile.ZipFile(program[0]) as source, zipfile.ZipFile(path, "w") as target:
        for name in source.namelist():
            if "/data/" not in name:
                target.writestr(name, source.read(name))
    with pytest.raises(DataError, match="cannot be read as a TorchScript archive"):
        read_torchscript(path)


def test_a_damaged_archive_is_no_torchscript(tmp_path: Path):
    path = tmp_path / "weights.pt"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("model/constants.pkl", b"x" * 100)
    assert is_torchscript(path)
    whole = path.read_bytes()
    path.write_bytes(whole[:40] + b"\xff" * 60 + whole[100:-30])
    assert not is_torchscript(path)
