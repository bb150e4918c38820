"""docs/first_contact.md names what there is: files, variables, accounts and kinds of nodes."""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path

import pytest
import ray

from tests.cluster_configs.rendered import FOLDER, ROOT, documents, read, script, text

PAGE = (ROOT / "docs/first_contact.md").read_text()
LINES = "\n".join(re.findall(r"^```\w*\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL))


def test_every_file_that_is_named_is_there():
    named = set(re.findall(r"(?:cluster_configs|jobs|benchmarks|docs)/[\w./*-]*\w", PAGE))
    assert {"cluster_configs/render.py", "cluster_configs/aws.yaml", "jobs/smoke.yaml"} <= named
    missing = {name for name in named if not list(ROOT.glob(name))}
    assert not missing


def test_every_file_of_cluster_configs_is_spoken_of():
    operations = (ROOT / "docs/operations.md").read_text()
    for path in sorted(FOLDER.iterdir()):
        assert path.name in operations or path.name == "__pycache__", path.name
    for path in (FOLDER / "policies").iterdir():
        assert f"`{path.name}`" in PAGE


def test_variables_are_those_that_files_are_filled_with():
    known = set(script("render").PATTERNS)
    assert set(re.findall(r"RAYCLUST_[A-Z]+", PAGE)) == known
    assert {name for name in known if re.search(rf"export .*{name}=", LINES)} == known


def test_the_image_is_the_one_that_nodes_pull():
    pushed = set(re.findall(r"docker push (\S+)", LINES))
    pulled = {
        f"$RAYCLUST_IMAGE:{image.rpartition(':')[2]}"
        for name in ("aws.yaml", "gcp.yaml")
        for image in re.findall(r'image: "?([^"\s}]+)', text(FOLDER / name))
    }
    assert pushed == pulled
    [loaded] = set(re.findall(r"kind load docker-image (\S+)", LINES))
    spec = documents("kuberay-kind.yaml")[-1]["spec"]
    for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
        assert [container["image"] for container in group["template"]["spec"]["containers"]] == [loaded]


def test_roles_and_the_group_are_those_that_nodes_take():
    kinds = read("aws.yaml")["available_node_types"].values()
    profiles = {kind["node_config"]["IamInstanceProfile"]["Name"] for kind in kinds}
    assert profiles == {"rayclust-head", "rayclust-worker"}
    assert "for role in head worker; do\n  aws iam create-role --role-name rayclust-$role" in LINES
    assert f"--group-name {read('aws.yaml')['provider']['security_group']['GroupName']} " in LINES
    assert "for role in head worker; do\n  gcloud iam service-accounts create rayclust-$role" in LINES


def test_google_gets_the_account_that_ray_asks_for_with_the_roles_that_ray_asks_for():
    # The module needs Google's packages to be imported, so it is read.
    module = ast.parse((Path(ray.__file__).parent / "autoscaler/_private/gcp/config.py").read_text())
    assigned = {
        node.targets[0].id: node.value
        for node in module.body
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)
    }
    roles = ast.literal_eval(assigned["DEFAULT_SERVICE_ACCOUNT_ROLES"])
    [line] = re.findall(r"create ray-autoscaler-sa-v1\nfor role in (.*); do", LINES)
    assert [f"roles/{role}" for role in line.split()] == roles
    assert ast.literal_eval(assigned["RAY"]) == "ray-autoscaler"
    assert ast.literal_eval(assigned["VERSION"]) == "v1"


def size(*names: str) -> int:
    """Return the characters of policies as AWS counts them."""
    return sum(len(re.sub(r"\s", "", text(FOLDER / "policies" / f"aws-{name}.json"))) for name in names)


def test_policies_are_of_a_size_that_aws_takes():
    assert size("user") <= 6144  # a managed policy
    assert size("head", "node") <= 10240  # all inline policies of a role


@pytest.mark.parametrize("path", sorted((FOLDER / "policies").iterdir()), ids=lambda path: path.name)
def test_policies_are_json(path: Path):
    assert set(json.loads(path.read_text())) == {"Version", "Statement"}


def test_prices_are_marked_as_assumed():
    for paragraph in PAGE.split("\n\n"):
        if re.search(r"\bp_\w+ = [0-9]", paragraph):
            assert "assum" in paragraph.lower()
