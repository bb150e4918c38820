from __future__ import annotations

import pytest
from pydantic import ValidationError

from rayclust.errors import ConfigError
from rayclust.methods.temi_config import TemiConfig
from rayclust.methods.temi_plan import Layout


def test_what_is_written_wins_over_the_preset():
    settled = TemiConfig(clusters=10, preset="paper", heads=3).settled(50_000, 768)
    assert (settled.heads, settled.preset, settled.batch_size) == (3, "none", 512)


@pytest.mark.parametrize("wrong", ["rows", "2x", "0x4", "2x2x2x2", "2x2x0", ""])
def test_a_layout_is_a_word_or_a_grid(wrong: str):
    with pytest.raises(ValidationError):
        TemiConfig(clusters=4, parallel=wrong)


def test_cut_gradients_need_all_heads_on_every_worker():
    config = TemiConfig(clusters=1000, preset="none", clip_norm=1.0, batch_size=64)
    assert config.layout(5000, 768, 4)[1] == Layout(1, 4)
    assert config.model_copy(update={"clip_norm": None}).layout(5000, 768, 4)[1] == Layout(4, 1)
    with pytest.raises(ConfigError, match="clip_norm needs every head's gradient"):
        config.model_copy(update={"parallel": "heads"}).layout(5000, 768, 4)


def test_divided_clusters_need_an_optimiser_without_norms_of_whole_layers():
    config = TemiConfig(clusters=1000, preset="none", batch_size=64, parallel="1x2x2")
    assert config.layout(5000, 768, 4)[1] == Layout(1, 2, 2)
    for settings, name in (({"optimizer": "lars"}, "optimizer = lars"), ({"clip_norm": 1.0}, "clip_norm")):
        with pytest.raises(ConfigError, match=f"parallel = 1x2x2: {name} needs whole heads on every worker, set data"):
            config.model_copy(update=settings).layout(5000, 768, 4)


def test_the_memory_of_a_worker_is_told_in_gigabytes():
    config = TemiConfig(clusters=10_000_000, preset="none", heads=1, batch_size=1024)
    assert config.layout(20_000_000, 768, 8)[1] == Layout(1, 1, 8)
    assert config.model_copy(update={"worker_memory": 141.0}).layout(20_000_000, 768, 8)[1] == Layout(1, 8)
    with pytest.raises(
        ConfigError, match=r"clip_norm needs whole heads; do without it, or raise method\.worker_memory"
    ):
        config.model_copy(update={"clip_norm": 1.0}).layout(20_000_000, 768, 8)


def test_the_outlook_is_that_of_the_settled_config():
    assert TemiConfig(clusters=1000).outlook(200_000, 768, 4).startswith("heads over 4 workers: ")


def test_entropy_is_rewarded_in_scan_alone():
    assert TemiConfig(clusters=4).head_shape(6).widths == [6, 512, 256]
