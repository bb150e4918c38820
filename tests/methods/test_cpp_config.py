from __future__ import annotations

import pytest
from pydantic import ValidationError

from rayclust.methods.cpp import CppConfig


def test_written_keys_win_over_the_preset():
    config = CppConfig(clusters=10, preset="cifar100", temperature=0.3, learning_rate=1e-3).settled(50_000)
    assert (config.temperature, config.batch_size, config.epochs) == (0.3, 1500, 50)
    assert config.learning_rate == config.min_learning_rate == 1e-3
    assert config.preset == "none"
    assert config.settled(10) == config


def test_half_steps_are_odd():
    with pytest.raises(ValidationError, match="half_steps = 4: must be odd"):
        CppConfig(clusters=2, half_steps=4)


def test_memory_and_truncation_reach_the_compression_term():
    options = CppConfig(clusters=2, memory_gib=0.5, top_entries=7).compression()
    assert (options.memory, options.top) == (2**29, 7)
