"""Google Cloud's nodes are such as its API takes."""

from __future__ import annotations

from typing import Any

import pytest

from tests.cluster_configs.rendered import ACCOUNT, read

PERSISTENT_DISKS = {
    "n2": {"pd-standard", "pd-balanced", "pd-ssd"},
    "c3": {"pd-balanced", "pd-ssd"},
    "g2": {"pd-balanced", "pd-ssd"},
}
"""Types of persistent disk that a series of machines boots from.

Sources: Compute Engine's API (compute v1, `AttachedDiskInitializeParams.diskType`: C3 starts from pd-balanced, N2 from
pd-standard where none is given); github.com/skypilot-org/skypilot/pull/5457 (N2 and G2; G2 takes no pd-standard).
"""
CPUS = {"n2-standard-8": 8, "c3-highcpu-44": 44, "g2-standard-16": 16}


def nodes() -> dict[str, dict[str, Any]]:
    return {name: kind["node_config"] for name, kind in read("gcp.yaml")["available_node_types"].items()}


@pytest.mark.parametrize("kind", nodes())
def test_a_machine_boots_from_a_disk_that_its_series_takes(kind: str):
    node = nodes()[kind]
    [disk] = node["disks"]
    folder, _, disk_type = disk["initializeParams"]["diskType"].rpartition("/")  # the API's default is not for all
    assert folder == f"zones/{ACCOUNT['RAYCLUST_ZONE']}/diskTypes"
    assert disk_type in PERSISTENT_DISKS[node["machineType"].partition("-")[0]]


def test_a_worker_offers_the_cpus_of_its_machine():
    kinds = read("gcp.yaml")["available_node_types"]
    for name in kinds.keys() - {"head"}:
        assert kinds[name]["resources"]["CPU"] == CPUS[kinds[name]["node_config"]["machineType"]]


@pytest.mark.parametrize("kind", nodes())
def test_a_node_reaches_its_bucket_as_a_service_account(kind: str):
    [account] = nodes()[kind]["serviceAccounts"]
    role = "head" if kind == "head" else "worker"
    assert account["email"] == f"rayclust-{role}@{ACCOUNT['RAYCLUST_PROJECT']}.iam.gserviceaccount.com"
    assert account["scopes"] == ["https://www.googleapis.com/auth/cloud-platform"]


def test_scheduling_is_one_object_and_a_spot_node_leaves_no_disk():
    for name, node in nodes().items():
        scheduling = node.get("scheduling", {})
        assert isinstance(scheduling, dict)
        if name.startswith("gpu"):
            assert scheduling["onHostMaintenance"] == "TERMINATE"  # a GPU cannot be moved
        if name.endswith("-spot"):
            assert scheduling["instanceTerminationAction"] == "DELETE"
            assert scheduling["automaticRestart"] is False
