"""Each preset, and each job that names one, resolved to numbers beside those of the papers and their programs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from rayclust.config import RunConfig, parse
from rayclust.methods.cpp_settings import CppConfig
from rayclust.methods.settings import Plan
from rayclust.methods.temi_settings import TemiConfig
from rayclust.methods.turtle_settings import TurtleConfig
from tests.cluster_configs import rendered

JOBS = Path(__file__).resolve().parents[2] / "jobs"

# TEMI: its README's example, and Table 10 of the paper. N, K; heads, neighbours, epochs, batch, warm-up epochs, β.
CIFAR10, CIFAR20, CIFAR100, STL10 = (50_000, 10), (50_000, 20), (50_000, 100), (5_000, 10)
BOTH_SPLITS = {CIFAR10: (60_000, 10), CIFAR20: (60_000, 20), CIFAR100: (60_000, 100), STL10: (13_000, 10)}
IN50, IN100, IN200, IN1K = (64_274, 50), (128_545, 100), (256_580, 200), (1_281_167, 1_000)
TABLE_10 = {
    CIFAR10: (50, 50, 200, 512, 20, 0.6),
    CIFAR20: (50, 50, 200, 512, 20, 0.55),
    CIFAR100: (50, 50, 200, 512, 20, 0.6),
    STL10: (50, 50, 800, 512, 20, 0.6),
    IN50: (50, 25, 200, 1024, 10, 0.6),
    IN100: (50, 25, 200, 1024, 10, 0.6),
    IN200: (50, 25, 200, 1024, 10, 0.6),
    IN1K: (50, 25, 200, 1024, 10, 0.6),
    (1_281_167, 25_000): (50, 25, 200, 1024, 10, 1.0),
}
README = {
    **dict.fromkeys((CIFAR10, CIFAR20, CIFAR100, STL10), (16, 50, 100, 1024, 20, 0.6)),
    **dict.fromkeys((IN50, IN100, IN200, IN1K), (16, 25, 100, 1024, 20, 0.6)),
    (1_281_167, 25_000): (16, 25, 100, 128, 20, 1.0),
}
EVERYWHERE = {
    "loss": "temi", "optimizer": "adamw", "steps": None, "warmup_steps": None, "clip_norm": None,
    "learning_rate": 1e-4, "min_learning_rate": 1e-4, "weight_decay": 1e-4, "final_weight_decay": 1e-4,
    "student_temperature": 0.1, "teacher_temperature": 0.1, "warmup_teacher_temperature": 0.1,
    "warmup_teacher_temperature_epochs": 30, "teacher_momentum": 0.996, "final_teacher_momentum": 0.996,
    "marginal_momentum": 0.9, "freeze_last_layer": 1, "hidden": 512, "bottleneck": 256, "layers": 2,
    "batch_norm": False, "dropout": 0.0, "final_gelu": False, "learn_scale": True, "noise": 0.0, "repeats": 1,
    "positive_pmi": False, "selection": "loss", "preset": "none",
}  # fmt: skip
"""What both leave at the published program's values."""


def temi_values(config: TemiConfig) -> tuple[Any, ...]:
    c = config
    return c.heads, c.neighbors, c.epochs, c.batch_size, c.warmup_epochs, c.beta


@pytest.mark.parametrize(("preset", "table"), [("paper", TABLE_10), ("readme", README)])
def test_temi_on_every_set_of_the_paper_with_train_alone_and_with_both_splits(preset: str, table: dict[Any, Any]):
    for size, wanted in table.items():
        for count, clusters in {size, BOTH_SPLITS.get(size, size)}:
            found = TemiConfig.model_validate({"clusters": clusters, "preset": preset}).resolved(count, 768)
            assert temi_values(found) == wanted, (count, clusters)
            assert {name: getattr(found, name) for name in EVERYWHERE} == EVERYWHERE


def test_temis_start_departs_from_the_published_one_below_3000_steps_only():
    warm = []
    for preset, table in (("paper", TABLE_10), ("readme", README)):
        for count, clusters in table:
            found = TemiConfig.model_validate({"clusters": clusters, "preset": preset}).resolved(count, 768)
            warm += [(preset, (count, clusters))] if found.warm_start == "kmeans" else []
    assert warm == [("readme", STL10)]


TURTLE = {
    "gamma": 10.0, "steps": 6_000, "inner_steps": 10, "batch_size": 10_000, "inner_rate": 1e-3, "outer_rate": 1e-3,
    "start": "cold", "sweep": (), "seeds": 1, "labels": "softmax", "prior": "uniform", "scale": "published",
    "components": None,
}  # fmt: skip
"""The published program's defaults, on every set of the paper."""


def test_turtle_on_every_set_of_the_paper():
    for count, clusters in ((50_000, 10), (75_750, 101), (1_281_167, 1_000)):
        config = TurtleConfig.model_validate({"clusters": clusters, "preset": "published"})
        found = config.resolved(count, [768, 1536])
        assert {name: getattr(found, name) for name in TURTLE} == TURTLE


# CPP: section 2.7 of the specification. N; variant, h, d, batch, η, epochs, steps of expansion.
CPP_TABLE = {
    "cifar10": (50_000, ("two_head", 4096, 128, 1024, 0.175, 15, 50)),
    "cifar20": (50_000, ("two_head", 4096, 128, 1024, 0.13, 15, 48)),
    "cifar100": (50_000, ("two_head", 4096, 128, 1500, 0.10, 50, 33)),
    "imagenet": (1_281_167, ("single_head", 2048, 1024, 1024, 0.12, 20, 2_000)),
}
CPP_EVERYWHERE = {
    "distortion": 0.1, "compression_weight": 1.0, "membership_weight": 0.05, "half_steps": 5, "start": "random",
    "extra_expansion_step": True, "optimizer": "sgd", "warmup_epochs": 0, "steps": None, "patience": None,
    "weight_decay": 1e-4, "final_weight_decay": 1e-4, "code_rate": 1.0, "code_weight_decay": 5e-3, "clip_norm": None,
    "top_entries": None, "final_temperature": 0.15, "preset": "none",
}  # fmt: skip


@pytest.mark.parametrize("preset", CPP_TABLE)
def test_cpp_on_every_set_of_the_paper(preset: str):
    count, wanted = CPP_TABLE[preset]
    c = CppConfig.model_validate({"clusters": 10, "preset": preset}).resolved(count)
    assert (c.variant, c.hidden, c.width, c.batch_size, c.temperature, c.epochs, c.expansion_steps) == wanted
    assert {name: getattr(c, name) for name in CPP_EVERYWHERE} == CPP_EVERYWHERE
    assert c.learning_rate * c.batch_size / 256 == pytest.approx(1e-4)
    assert c.min_learning_rate == c.learning_rate
    assert Plan.of(c, count).steps == wanted[5] * (count // wanted[3])


def test_cpps_final_partition_takes_every_setting_of_spectral_clustering():
    settings = {"beyond": "tiles", "dense_rows": 500, "restarts": 3, "tolerance": 1e-4, "confidence": 0.2}
    made = CppConfig.model_validate({"clusters": 3, "preset": "cifar10", "final_half_steps": 5, **settings})
    options = made.resolved(50_000).spectral_options()
    assert options.model_dump() == {"temperature": 0.15, "half_steps": 5, **settings}
    plain = CppConfig(clusters=3, preset="none", temperature=0.2).spectral_options()
    assert (plain.temperature, plain.half_steps, plain.dense_rows, plain.beyond) == (0.2, None, 15_000, "sample")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"code_rate": 2.0}, "code_rate = 2: there is no cluster head, set variant: two_head"),
        ({"preset": "imagenet", "code_weight_decay": 0.1}, "code_weight_decay = 0.1: there is no cluster head"),
        ({"preset": "cifar10", "variant": "single_head", "code_rate": 2.0}, "code_rate = 2"),
        ({"half_steps": 4}, "must be odd, rows are normalised last"),
        ({"final_half_steps": 2}, "must be odd, rows are normalised last"),
    ],
)
def test_settings_of_cpp_without_effect_are_refused(settings: dict[str, Any], message: str):
    with pytest.raises(ValidationError, match=message):
        CppConfig.model_validate({"clusters": 3, **settings})
    assert CppConfig(clusters=3, preset="cifar10", code_rate=2.0).resolved(50_000).code_rate == 2.0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"entropy_weight": 0.5}, "entropy_weight = 0.5: is for loss: wmi and scan"),
        ({"loss": "scan", "beta": 0.7}, "beta = 0.7: is not for loss: scan"),
        ({"loss": "scan", "positive_pmi": True}, "positive_pmi = True: is not for loss: scan"),
        ({"layers": 1, "batch_norm": True}, "batch_norm = True: there is no hidden layer"),
        ({"layers": 1, "dropout": 0.1}, "dropout = 0.1: there is no hidden layer"),
    ],
)
def test_settings_of_temi_without_effect_are_refused(settings: dict[str, Any], message: str):
    with pytest.raises(ValidationError, match=message):
        TemiConfig.model_validate({"clusters": 3, **settings})


def job(name: str) -> RunConfig:
    return parse(rendered.text(JOBS / f"{name}.yaml"), source=name)


@pytest.mark.parametrize(
    ("name", "standardize"),
    [("imagenet_temi", False), ("imagenet_overcluster_25k", True), ("imagenet_cpp", False), ("imagenet_turtle", False)],
)
def test_jobs_that_are_called_published_train_on_rows_that_nothing_scales_to_length_1(name: str, standardize: bool):
    config = job(name)
    assert not any(encoder.normalize for encoder in config.each_encoder)
    assert config.neighbors.features == "raw" or not standardize
    assert config.features.model_dump() == {"center": False, "normalize": False, "standardize": standardize}


def test_jobs_resolve_to_the_published_settings():
    temi, fine = job("imagenet_temi"), job("imagenet_overcluster_25k")
    for config, wanted in ((temi, TABLE_10[IN1K]), (fine, README[1_281_167, 25_000])):
        assert isinstance(config.method, TemiConfig)
        assert temi_values(config.method.resolved(1_281_167, 768)) == wanted
        assert config.neighbors.k >= wanted[1]
    cpp = job("imagenet_cpp").method
    assert isinstance(cpp, CppConfig)
    c = cpp.resolved(1_281_167)
    assert (c.variant, c.hidden, c.width, c.batch_size, c.temperature, c.epochs, c.expansion_steps) == (
        CPP_TABLE["imagenet"][1]
    )
