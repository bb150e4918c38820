"""One set of variables fills every file, and what could go wrong with one is said in a line."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from rayclust.config import parse
from tests.cluster_configs.rendered import ACCOUNT, FOLDER, ROOT, script, text

JOBS = sorted((ROOT / "jobs").glob("*.yaml"))
FILES = sorted([*FOLDER.glob("*.yaml"), *FOLDER.glob("policies/*.json"), *JOBS])
render = script("render").render


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_every_file_is_filled_by_the_same_variables(path: Path):
    filled = text(path)
    assert "${RAYCLUST" not in filled
    assert list(yaml.safe_load_all(filled))  # JSON is YAML


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_no_file_names_a_bucket_by_itself(path: Path):
    settings = "\n".join(line for line in path.read_text().splitlines() if not line.lstrip().startswith("#"))
    assert not re.search(r"(s3|gs)://|arn:aws:s3:::(?!\$\{RAYCLUST_BUCKET_NAME\})", settings)


@pytest.mark.parametrize("path", JOBS, ids=lambda path: path.name)
@pytest.mark.parametrize("bucket", ["s3://one-bucket", "gs://one-bucket"])
def test_a_job_lives_in_the_one_bucket(path: Path, bucket: str):
    config = parse(render(path.read_text(), {"RAYCLUST_BUCKET": bucket}), source=path.name)
    assert config.run.startswith(f"{bucket}/runs/")
    assert config.images.uri.startswith((f"{bucket}/", "dataset:"))


def test_only_rayclusts_variables_are_replaced():
    given = "a ${RAYCLUST_BUCKET}/cache $RAY_HEAD_IP ${driver%%.*} $(seq 3) ${HOME} $RAYCLUST_BUCKET"
    assert render(given, ACCOUNT) == given.replace("${RAYCLUST_BUCKET}", "s3://my-bucket")


def test_names_derived_from_others():
    assert render("${RAYCLUST_BUCKET_NAME} ${RAYCLUST_REGISTRY}", ACCOUNT) == (
        "my-bucket 123456789012.dkr.ecr.us-east-1.amazonaws.com"
    )


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("RAYCLUST_BUCKET", ""),
        ("RAYCLUST_BUCKET", "my-bucket"),
        ("RAYCLUST_BUCKET", "s3://my-bucket/"),
        ("RAYCLUST_BUCKET", "s3://my-bucket/team"),
        ("RAYCLUST_BUCKET", "s3://key@my-bucket"),
        ("RAYCLUST_BUCKET", "s3://my-bucket\nrun: x"),
        ("RAYCLUST_IMAGE", "rayclust"),
        ("RAYCLUST_IMAGE", "registry.example.org/rayclust:0.1.0"),
        ("RAYCLUST_IMAGE", "registry.example.org/rayclust; true"),
        ("RAYCLUST_REGION", "us east"),
        ("RAYCLUST_PROJECT", "$(id)"),
    ],
)
def test_a_value_of_another_form_is_refused(name: str, value: str):
    with pytest.raises(ValueError, match=rf"(?s)^{name} = .*: must be ") as refusal:
        render(f"${{{name}}}", ACCOUNT | {name: value})
    assert value or "(not set)" in str(refusal.value)


def test_all_that_is_missing_is_named_at_once():
    with pytest.raises(ValueError, match="RAYCLUST_BUCKT: no such variable") as refusal:
        render("${RAYCLUST_BUCKT} ${RAYCLUST_BUCKET_NAME} ${RAYCLUST_IMAGE}", {})
    named = [line.split(" =")[0] for line in str(refusal.value).splitlines()[1:]]
    assert named == ["RAYCLUST_BUCKET", "RAYCLUST_IMAGE"]


def run(*arguments: str, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, str(FOLDER / "render.py"), *arguments]
    return subprocess.run(line, env=environment, capture_output=True, text=True, check=False)


def test_the_command(tmp_path: Path):
    job, cluster = str(ROOT / "jobs/smoke.yaml"), str(FOLDER / "kuberay-cluster.yaml")
    assert run(job, environment=ACCOUNT).stdout == text(Path(job))
    assert run(job, cluster, "--out", str(tmp_path / "mine"), environment=ACCOUNT).returncode == 0
    assert (tmp_path / "mine/kuberay-cluster.yaml").read_text() == text(Path(cluster))
    assert run(job, cluster, environment=ACCOUNT).returncode == 2  # two files run together would be one
    refused = run(job, environment={})
    assert (refused.returncode, refused.stdout) == (2, "")
    assert refused.stderr.startswith(f"{job}: RAYCLUST_BUCKET = (not set): must be a bucket with its scheme")
    assert run(str(tmp_path / "none.yaml"), environment=ACCOUNT).returncode == 2
