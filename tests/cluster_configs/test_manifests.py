"""What describes clusters is taken by the tools that read it, and says what docs/operations.md says it does."""

from __future__ import annotations

import copy
import importlib.metadata
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from ray._private.label_utils import validate_node_labels
from ray.autoscaler._private.util import prepare_config, validate_config

from tests.cluster_configs.kuberay import SCHEMAS

FOLDER = Path(__file__).resolve().parents[2] / "cluster_configs"
LAUNCHER = ("aws.yaml", "gcp.yaml")
KUBERAY = ("kuberay-cluster.yaml", "kuberay-job.yaml")


def read(name: str) -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load((FOLDER / name).read_text())
    return content


def pods(name: str) -> dict[str, Any]:
    spec = read(name)["spec"]
    cluster: dict[str, Any] = spec.get("rayClusterSpec", spec)
    return cluster


@pytest.mark.parametrize("name", LAUNCHER)
def test_rays_launcher_takes_the_file(name: str):
    prepared = prepare_config(copy.deepcopy(read(name)))
    validate_config(prepared)
    assert set(prepared["available_node_types"]) == set(
        read(name)["available_node_types"]
    )  # none of Ray's own defaults
    assert prepared["setup_commands"] == []


@pytest.mark.parametrize("name", LAUNCHER)
def test_rays_launcher_refuses_a_mistyped_key(name: str):
    broken = prepare_config(read(name))
    broken["available_node_types"]["gpu-spot"]["max_worker"] = 3
    with pytest.raises(jsonschema.ValidationError):
        validate_config(broken)


@pytest.mark.parametrize("name", LAUNCHER)
def test_the_head_only_drives_and_workers_are_spot_first_with_something_to_fall_back_on(name: str):
    config = read(name)
    types = config["available_node_types"]
    assert types[config["head_node_type"]]["resources"] == {"CPU": 0}
    assert types[config["head_node_type"]]["labels"] == {"pool": "head", "market": "on-demand"}
    for pool in ("cpu", "gpu"):
        spot, steady = types[f"{pool}-spot"], types[f"{pool}-on-demand"]
        assert spot["priority"] > steady["priority"]
        assert (spot["labels"], steady["labels"]) == (
            {"pool": pool, "market": "spot"},
            {"pool": pool, "market": "on-demand"},
        )
        assert spot["min_workers"] == steady["min_workers"] == 0
        assert ("GPU" in spot["resources"]) == (pool == "gpu")
    assert sum(kind.get("max_workers", 0) for kind in types.values()) <= config["max_workers"]
    for kind in types.values():
        validate_node_labels(kind["labels"])


def is_spot(node: dict[str, Any]) -> bool:
    on_aws = node.get("InstanceMarketOptions", {}).get("MarketType") == "spot"
    return on_aws or any(entry.get("preemptible") for entry in node.get("scheduling", []))


@pytest.mark.parametrize("name", LAUNCHER)
def test_what_is_labelled_spot_is_bought_so(name: str):
    for kind in read(name)["available_node_types"].values():
        assert is_spot(kind["node_config"]) == (kind["labels"]["market"] == "spot")


@pytest.mark.parametrize("name", LAUNCHER)
def test_the_token_goes_to_every_node_and_the_dashboard_to_nobody(name: str):
    config = read(name)
    assert list(config["file_mounts"]) == ["/home/ray/.ray/auth_token"]
    starts = [
        line for kind in ("head", "worker") for line in config[f"{kind}_start_ray_commands"] if "ray start" in line
    ]
    assert len(starts) == 2
    assert all("RAY_AUTH_MODE=token" in line for line in starts)
    assert "--dashboard-host=127.0.0.1" in starts[0]
    assert config["idle_timeout_minutes"] <= 10


@pytest.mark.parametrize("name", KUBERAY)
def test_kuberay_manifests_have_the_fields_of_its_types(name: str):
    content = read(name)
    jsonschema.Draft202012Validator.check_schema(SCHEMAS[content["kind"]])
    jsonschema.validate(content, SCHEMAS[content["kind"]])


@pytest.mark.parametrize("name", KUBERAY)
def test_kuberay_groups_are_spot_first_and_ask_for_a_token(name: str):
    spec = pods(name)
    assert spec["authOptions"] == {"mode": "token"}
    assert spec["enableInTreeAutoscaling"]
    assert spec["autoscalerOptions"]["version"] == "v2"
    assert spec["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    assert spec["headGroupSpec"]["serviceType"] == "ClusterIP"
    groups = {group["groupName"]: group for group in spec["workerGroupSpecs"]}
    assert set(groups) == {f"{pool}-{market}" for pool in ("cpu", "gpu") for market in ("spot", "on-demand")}
    for group_name, group in groups.items():
        pod = group["template"]["spec"]
        assert group_name == f"{group['labels']['pool']}-{group['labels']['market']}"
        assert group["priority"] == (20 if group["labels"]["market"] == "spot" else 10)
        assert pod["nodeSelector"]["karpenter.sh/capacity-type"] == group["labels"]["market"]
        [container] = pod["containers"]
        assert container["resources"]["requests"] == container["resources"]["limits"]  # Ray counts the limits
        assert ("nvidia.com/gpu" in container["resources"]["limits"]) == (group["labels"]["pool"] == "gpu")
        assert pod["securityContext"]["runAsNonRoot"]


def test_a_lost_job_starts_again_on_a_cluster_of_the_same_kind():
    spec = read("kuberay-job.yaml")["spec"]
    assert spec["backoffLimit"] > 0
    assert spec["shutdownAfterJobFinishes"]
    job, cluster = pods("kuberay-job.yaml"), pods("kuberay-cluster.yaml")
    assert job["workerGroupSpecs"] == cluster["workerGroupSpecs"]
    [head] = job["headGroupSpec"]["template"]["spec"]["containers"]
    [mount] = head["volumeMounts"]
    assert spec["entrypoint"] == f"python -m rayclust run {mount['mountPath']}/RUN.yaml"


def test_rays_version_is_the_one_that_is_installed():
    installed = importlib.metadata.version("ray")
    assert {pods(name)["rayVersion"] for name in KUBERAY} == {installed}
    release = re.search(r'^version = "(.+)"', (FOLDER.parent / "pyproject.toml").read_text(), re.MULTILINE)
    assert release is not None
    for name in (*LAUNCHER, *KUBERAY):
        images = re.findall(r"image: (\S+)", (FOLDER / name).read_text())
        assert images
        assert all(image.endswith(f":{release[1]}-cuda") for image in images), images


@pytest.mark.parametrize("name", [*LAUNCHER, *KUBERAY, "Dockerfile", "local.py"])
def test_no_secret_is_written_down(name: str):
    text = (FOLDER / name).read_text()
    assert not re.search(r"AKIA[0-9A-Z]{16}|aws_secret_access_key|AWS_SECRET_ACCESS_KEY *[:=]", text)
    assert not re.search(r"auth_token: *['\"]?[0-9a-f]{16}", text)


def test_the_image_is_as_a_linter_wants_it():
    linter = shutil.which("hadolint", path=str(Path(sys.executable).parent)) or shutil.which("hadolint")
    if linter is None:
        pytest.skip("hadolint is not installed")
    done = subprocess.run([linter, str(FOLDER / "Dockerfile")], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")


def test_the_image_has_both_kinds_and_no_root():
    text = (FOLDER / "Dockerfile").read_text()
    assert re.findall(r"^FROM base AS (\S+)$", text, re.MULTILINE) == ["cpu", "cuda"]
    assert text.count("\nUSER 1000\n") == 2
    assert "RAY_AUTH_MODE=token" in text


def test_the_local_cluster_is_labelled_like_the_others():
    import importlib.util

    spec = importlib.util.spec_from_file_location("local_cluster", FOLDER / "local.py")
    assert spec is not None
    assert spec.loader is not None
    local = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(local)
    head = local.head_command(8265, Path("/tmp/x"))  # noqa: S108 - a name in a command line
    assert {"--num-cpus=0", "--dashboard-host=127.0.0.1", "--labels=pool=head,market=on-demand"} <= set(head)
    worker = local.worker_command("10.0.0.1:6379", "gpu", 4, 1)
    assert worker == ["--address=10.0.0.1:6379", "--num-cpus=4", "--num-gpus=1", "--labels=pool=gpu,market=on-demand"]
