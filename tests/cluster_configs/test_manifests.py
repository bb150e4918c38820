"""What describes clusters is taken by the tools that read it, and says what docs/operations.md says it does."""

from __future__ import annotations

import copy
import importlib.metadata
import inspect
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from ray._private import utils as ray_utils
from ray._private.label_utils import validate_node_labels
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.autoscaler.sdk import get_docker_host_mount_location
from ray.autoscaler.v2.instance_manager.config import AutoscalingConfig

import rayclust
from tests.cluster_configs.kuberay import SCHEMAS
from tests.cluster_configs.rendered import FOLDER, documents, read, script

LAUNCHER = ("aws.yaml", "gcp.yaml")
KUBERAY = ("kuberay-cluster.yaml", "kuberay-job.yaml")
KIND = "kuberay-kind.yaml"
KIND_SYSTEM_CORES, KIND_SYSTEM_MEBIBYTES = 1.05, 1400
"""What kind's own pods and KubeRay's operator ask for (0.95 and 0.1 cores), and the memory that is left to them."""
SMOKE_PEAK_MEBIBYTES = (2603, 1868)
"""Anonymous and shared memory of all processes of a head and of a worker of 2 CPUs, measured under jobs/smoke.yaml."""
SPOT_TAINTS = {
    "karpenter.sh/capacity-type",
    "cloud.google.com/gke-spot",
    "kubernetes.azure.com/scalesetpriority",
}


def pods(name: str) -> dict[str, Any]:
    spec = documents(name)[-1]["spec"]
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
    return on_aws or node.get("scheduling", {}).get("provisioningModel") == "SPOT"


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


@pytest.mark.parametrize("name", [*KUBERAY, KIND])
def test_kuberay_manifests_have_the_fields_of_its_types(name: str):
    for content in documents(name):
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
        taints = {taint["key"] for taint in pod.get("tolerations", [])}
        assert ("nvidia.com/gpu" in taints) == (group["labels"]["pool"] == "gpu")
        assert taints & SPOT_TAINTS == (SPOT_TAINTS if group["labels"]["market"] == "spot" else set())


def test_the_small_cluster_fits_a_laptop():
    spec = pods(KIND)
    [worker] = spec["workerGroupSpecs"]
    groups = [spec["headGroupSpec"], worker]
    containers = [group["template"]["spec"]["containers"][0] for group in groups]
    asked = [container["resources"]["requests"] for container in containers]
    assert sum(cores(request["cpu"]) for request in asked) <= 2 - KIND_SYSTEM_CORES
    assert sum(mebibytes(request["memory"]) for request in asked) <= 6 * 1024 - KIND_SYSTEM_MEBIBYTES
    assert sum(SMOKE_PEAK_MEBIBYTES) <= 6 * 1024 - KIND_SYSTEM_MEBIBYTES
    for group, container, peak in zip(groups, containers, SMOKE_PEAK_MEBIBYTES, strict=True):
        limits, parameters = container["resources"]["limits"], group["rayStartParams"]
        assert "nvidia.com/gpu" not in limits
        assert mebibytes(limits["memory"]) > 1.15 * peak
        store = int(parameters["object-store-memory"]) / 2**20
        assert store < mebibytes(limits["memory"]) / 4  # the rest is for processes
        assert container["image"].endswith("-cpu")
    assert cores(containers[1]["resources"]["limits"]["cpu"]) == int(worker["rayStartParams"]["num-cpus"]) == 2
    assert worker["replicas"] == worker["minReplicas"] == worker["maxReplicas"] == 1
    [claim] = [content["metadata"]["name"] for content in documents(KIND) if content["kind"] == "PersistentVolumeClaim"]
    for group in groups:
        pod = group["template"]["spec"]
        assert pod["volumes"] == [{"name": "data", "persistentVolumeClaim": {"claimName": claim}}]
        assert pod["containers"][0]["volumeMounts"] == [{"name": "data", "mountPath": "/data"}]


def cores(quantity: str) -> float:
    return float(quantity[:-1]) / 1000 if quantity.endswith("m") else float(quantity)


def mebibytes(quantity: str) -> float:
    return float(quantity[:-2]) * {"Mi": 1, "Gi": 1024}[quantity[-2:]]


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
    assert {pods(name)["rayVersion"] for name in (*KUBERAY, KIND)} == {installed}


def release() -> str:
    return rayclust.__version__


@pytest.mark.parametrize("name", LAUNCHER)
def test_nodes_without_a_gpu_pull_the_small_image_and_those_with_one_cudas(name: str):
    config = AutoscalingConfig(read(name), skip_content_hash=True)
    for kind, settings in read(name)["available_node_types"].items():
        tag = f":{release()}-{'cuda' if 'GPU' in settings['resources'] else 'cpu'}"
        assert config.get_docker_config(kind)["image"].endswith(f"/rayclust{tag}"), kind


@pytest.mark.parametrize("name", KUBERAY)
def test_pods_without_a_gpu_pull_the_small_image_and_those_with_one_cudas(name: str):
    spec = pods(name)
    for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
        [container] = group["template"]["spec"]["containers"]
        tag = "cuda" if "nvidia.com/gpu" in container["resources"]["limits"] else "cpu"
        assert container["image"].endswith(f"/rayclust:{release()}-{tag}")


@pytest.mark.parametrize("name", LAUNCHER)
def test_what_a_node_does_first_is_done_by_those_with_a_gpu_as_well(name: str):
    config = read(name)
    for kind, settings in config["available_node_types"].items():
        own = settings.get("initialization_commands")  # these replace the common ones
        assert (own is not None) == ("GPU" in settings["resources"]), kind
        assert own is None or own[: len(config["initialization_commands"])] == config["initialization_commands"]


@pytest.mark.parametrize("name", LAUNCHER)
def test_the_token_can_be_read_by_the_images_user_where_ray_puts_it(name: str):
    config = read(name)
    [place] = config["file_mounts"]
    host = get_docker_host_mount_location(config["cluster_name"]) + place
    assert f"chmod a+r {host}" in config["initialization_commands"]
    dockerfile = (FOLDER / "Dockerfile").read_text()
    assert f"--owner=ray --group=users {Path(place).parent}" in dockerfile  # else Docker makes the folder, as root


def test_both_images_hold_the_pinned_versions():
    installs = re.findall(r"pip install (.*)", (FOLDER / "Dockerfile").read_text())
    assert len(installs) == 3
    assert all("--constraint constraints.txt" in line for line in installs), installs


def test_nodes_of_both_images_join_one_cluster():
    text = (FOLDER / "Dockerfile").read_text()
    base = text[: text.index("FROM base")]
    assert "RAY_DEFAULT_PYTHON_VERSION_MATCH_LEVEL=minor" in base
    assert text.count("FROM python:") == 1
    source = inspect.getsource(ray_utils.check_version_info)
    assert '"RAY_DEFAULT_PYTHON_VERSION_MATCH_LEVEL", "patch"' in source  # Ray's own default would refuse some


POLICIES = sorted(f"policies/{path.name}" for path in (FOLDER / "policies").iterdir())


@pytest.mark.parametrize("name", [*LAUNCHER, *KUBERAY, KIND, *POLICIES, "Dockerfile", "local.py", "render.py"])
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
    local = script("local")
    head = local.head_command(8265, Path("/tmp/x"))  # noqa: S108 - a name in a command line
    assert {"--num-cpus=0", "--dashboard-host=127.0.0.1", "--labels=pool=head,market=on-demand"} <= set(head)
    worker = local.worker_command("10.0.0.1:6379", "gpu", 4, 1)
    assert worker == ["--address=10.0.0.1:6379", "--num-cpus=4", "--num-gpus=1", "--labels=pool=gpu,market=on-demand"]
