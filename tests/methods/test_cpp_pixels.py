"""CPP with its backbone inside: the features of the frozen network, views, trained blocks, any number of workers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import save_file
from torch import Tensor

from rayclust.encoders.load import load_encoder
from rayclust.errors import ConfigError
from rayclust.methods import build, load
from rayclust.methods.base import CheckpointInterval
from rayclust.methods.cpp import Cpp
from rayclust.methods.cpp_settings import CppConfig
from rayclust.methods.pixels.cpp import CppPixels
from rayclust.methods.pixels.settings import CppPixelsConfig
from rayclust.training.loop import Trainer
from rayclust.training.sampling import ArrayRows
from tests.encoders.networks import tiny_timm
from tests.stores import MemoryStore
from tests.workers import on_two_workers

N, SIDE, K = 36, 32, 3
SETTINGS: dict[str, Any] = {
    "clusters": K, "preset": "none", "variant": "two_head", "hidden": 12, "width": 6, "batch_size": 12, "epochs": 2,
    "expansion_steps": 1, "learning_rate": 0.1, "precision": "fp32",
}  # fmt: skip
TUNED = {"tune": "last_blocks", "augmentation": "weak"}


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("weights") / "vit.safetensors"
    save_file(tiny_timm("test_vit").state_dict(), path)
    return str(path)


def _images() -> Tensor:
    """Images of three colours with noise, as rows."""
    draw = np.random.default_rng(0)
    pixels = np.eye(3)[np.arange(N) % K][:, None, None] * 0.6 + 0.2 + 0.1 * draw.normal(size=(N, SIDE, SIDE, 3))
    return torch.from_numpy((pixels.clip(0, 1) * 255).round().astype(np.float32) / np.float32(255)).reshape(N, -1)


def _build(weights: str, **more: Any) -> CppPixels:
    settings = SETTINGS | {"name": "cpp_pixels", "backbone": "timm/test_vit", "pretrained": weights} | more
    method = build(CppPixelsConfig.model_validate(settings), SIDE * SIDE * 3, N, seed=1)
    assert isinstance(method, CppPixels)
    return method


def _fit(weights: str, store: MemoryStore | None = None, dtype: torch.dtype = torch.float32, **more: Any) -> CppPixels:
    method = _build(weights, **more).to(dtype)
    method.fit(ArrayRows(_images().to(dtype)), Trainer(1, store=store, every=CheckpointInterval(epochs=1)))
    return method.eval()


def test_without_views_and_trained_blocks_it_is_cpp_on_the_encoder_s_rows(weights: str):
    method = _fit(weights)
    encoder = load_encoder(method.config.encoder(SIDE))
    pixels = (_images().reshape(N, SIDE, SIDE, 3) * 255).round().to(torch.uint8).numpy()
    rows = torch.from_numpy(encoder.encode_images(pixels))
    torch.testing.assert_close(method.read(_images()), rows, rtol=1e-4, atol=1e-4)
    plain = build(CppConfig.model_validate(SETTINGS), rows.shape[1], N, seed=1)
    assert isinstance(plain, Cpp)
    plain.fit(ArrayRows(rows), Trainer(1))
    torch.testing.assert_close(method.transform(_images()), plain.transform(rows), rtol=1e-3, atol=1e-3)


def test_the_last_block_trains_and_no_other(weights: str):
    before, method = dict(_build(weights).trunk.named_parameters()), _fit(weights, **TUNED)
    changed = {name for name, value in method.trunk.named_parameters() if not torch.equal(value, before[name])}
    last = max(int(name.split(".")[1]) for name in before if name.startswith("blocks."))
    assert changed
    assert all(name.startswith(f"blocks.{last}.") for name in changed)


def test_a_fitted_method_gives_the_same_after_it_was_stored(weights: str):
    method, x = _fit(weights, **TUNED), _images()
    expected = method.predict_proba(x)
    assert expected.shape == (N, K)
    state = method.state()
    assert torch.equal(load(state).predict_proba(x), expected)
    assert sum("blocks.0." in name for name in state.tensors) == 0, "frozen layers are read again"
    assert method.predict_proba(x[:0]).shape == (0, K)


def test_views_are_drawn_anew_in_every_step(weights: str):
    plain, viewed = _fit(weights), _fit(weights, augmentation="weak")
    assert not torch.equal(plain.network.first.weight, viewed.network.first.weight)


def _weights_of(rank: int, world: int, weights: str) -> dict[str, Tensor]:
    return dict(_fit(weights, dtype=torch.float64, **TUNED).state_dict())


def test_two_workers_end_at_the_weights_of_one(weights: str):
    alone = _fit(weights, dtype=torch.float64, **TUNED).state_dict()
    for states in on_two_workers(_weights_of, weights):
        for key, value in alone.items():
            torch.testing.assert_close(states[key], value, rtol=1e-6, atol=1e-8, msg=key)


def test_a_training_that_was_killed_ends_at_the_same_bits(weights: str):
    whole, store = _fit(weights, **TUNED).state_dict(), MemoryStore(stop_after=1)
    with pytest.raises(KeyboardInterrupt):
        _fit(weights, store, **TUNED)
    resumed = _fit(weights, store, **TUNED).state_dict()
    for key, value in whole.items():
        assert torch.equal(resumed[key], value), key


def test_what_cannot_be_read_is_refused(weights: str, tmp_path: Path):
    with pytest.raises(ConfigError, match="reads colour"):
        build(CppPixelsConfig(clusters=2, backbone="timm/test_vit", pretrained=weights), 32 * 32, N, 0)
    with pytest.raises(ValidationError, match="backbone = pixels"):
        CppPixelsConfig(clusters=2, backbone="pixels")
    with pytest.raises(ValidationError, match="no effect"):
        CppPixelsConfig(clusters=2, tuned_blocks=2)
