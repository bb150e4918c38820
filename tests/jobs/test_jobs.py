"""Every RUN.yaml of jobs/ can be read, and says in its head how it is submitted."""

from __future__ import annotations

from pathlib import Path

import pytest

from rayclust.config import parse
from rayclust.runtime.api import local_paths, with_absolute_paths
from rayclust.store import storage
from tests.cluster_configs import rendered

FOLDER = Path(__file__).resolve().parents[2] / "jobs"
JOBS = sorted(path.name for path in FOLDER.glob("*.yaml"))


def test_there_are_jobs():
    names = {
        "smoke",
        "cifar10_temi",
        "imagenet_temi",
        "imagenet_cpp",
        "imagenet_turtle",
        "imagenet_overcluster_25k",
        "laion_encode",
        "select_k",
        "cifar10_propos",
        "imagenet10_propos_spot",
    }
    assert {f"{name}.yaml" for name in names} <= set(JOBS)


@pytest.mark.parametrize("name", JOBS)
def test_a_job_is_read_and_needs_nothing_of_the_machine_it_comes_from(name: str):
    text = (FOLDER / name).read_text()
    config = with_absolute_paths(parse(rendered.text(FOLDER / name), source=name))
    assert all(storage.is_remote(place) for place in local_paths(config).values()), local_paths(config)
    assert text.startswith("# ")
    assert f"render.py jobs/{name} | rayclust submit -" in text


@pytest.mark.parametrize(
    ("name", "published"),
    [
        ("cifar10_propos", ("resnet18", 32, 512, 0.05, 1000, 50, 0.996, 0.996, 0.1, 0.001, "simclr", False)),
        ("imagenet10_propos_spot", ("resnet34", 96, 256, 0.05, 1000, 50, 0.996, 1.0, 0.1, 0.001, "simclr_blur", True)),
    ],
)
def test_jobs_of_propos_train_with_the_papers_numbers(name: str, published: tuple[object, ...]):
    config = parse(rendered.text(FOLDER / f"{name}.yaml"), source=name)
    c, side = config.method.resolved(60_000), config.encoder.image_size or 32
    found = (c.backbone, side, c.batch_size, c.learning_rate, c.epochs, c.warmup_epochs, c.momentum, c.final_momentum)
    assert (*found, c.scatter_weight, c.noise, c.augmentation, c.resample) == published
    assert (c.clusters, c.optimizer, c.weight_decay, c.temperature, c.reassign) == (10, "sgd", 5e-4, 0.5, 1)


@pytest.mark.parametrize("name", JOBS)
def test_a_job_is_yaml_before_its_bucket_is_filled_in(name: str):
    assert parse((FOLDER / name).read_text(), source=name).run.startswith("${RAYCLUST_BUCKET}/runs/")
