"""AWS's nodes are such as its API takes, and the rights in policies/ are those that Ray's launcher uses."""

from __future__ import annotations

import fnmatch
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import boto3
import botocore.client
import pytest
from moto import mock_aws
from ray.autoscaler._private.aws.config import bootstrap_aws
from ray.autoscaler._private.aws.node_provider import AWSNodeProvider
from ray.autoscaler._private.aws.utils import resource_cache
from ray.autoscaler._private.util import prepare_config

from tests.cluster_configs.rendered import ACCOUNT, FOLDER, read, text

REGION = ACCOUNT["RAYCLUST_REGION"]
MY_ADDRESS = "203.0.113.7/32"
RIGHTS_OF_CALLS = {
    "ListObjectsV2": "s3:ListBucket",
    "ListMultipartUploads": "s3:ListBucketMultipartUploads",
    "GetObject": "s3:GetObject",
    "HeadObject": "s3:GetObject",
    "PutObject": "s3:PutObject",
    "CreateMultipartUpload": "s3:PutObject",
    "UploadPart": "s3:PutObject",
    "CompleteMultipartUpload": "s3:PutObject",
    "AbortMultipartUpload": "s3:AbortMultipartUpload",
    "DeleteObject": "s3:DeleteObject",
}
"""What rayclust/store/s3.py asks of a bucket, and the right that each call needs."""


def statements(role: str) -> list[dict[str, Any]]:
    policy = json.loads(text(FOLDER / "policies" / f"aws-{role}.json"))
    assert policy["Version"] == "2012-10-17"
    found: list[dict[str, Any]] = policy["Statement"]
    return found


def allowed(*roles: str) -> set[str]:
    return {action for role in roles for statement in statements(role) for action in statement["Action"]}


@dataclass
class Account:
    """What Ray's launcher did in an AWS that moto plays, in an account that is set up as docs/first_contact.md says."""

    config: dict[str, Any] = field(default_factory=dict)
    """As `ray up` completes it."""
    calls: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    by_user: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    by_head: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    groups: list[dict[str, Any]] = field(default_factory=list)
    machines: dict[str, dict[str, Any]] = field(default_factory=dict)

    def taken(self) -> list[tuple[str, dict[str, Any]]]:
        """Return the calls since the last time."""
        made, self.calls = self.calls, []
        return made


@pytest.fixture(scope="module")
def account(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Account]:
    there, real = Account(), botocore.client.BaseClient._make_api_call

    def record(client: Any, operation: str, arguments: dict[str, Any]) -> Any:
        there.calls.append((f"{client.meta.service_model.service_name}:{operation}", arguments))
        answer = real(client, operation, arguments)
        if operation == "DescribeInstanceTypes":
            there.machines |= {machine["InstanceType"]: machine for machine in answer["InstanceTypes"]}
        return answer

    resource_cache.cache_clear()
    with pytest.MonkeyPatch.context() as patch, mock_aws():
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            patch.setenv(name, "testing")
        patch.setenv("AWS_DEFAULT_REGION", REGION)
        patch.setenv("MOTO_EC2_LOAD_DEFAULT_AMIS", "false")
        patch.setenv("HOME", str(tmp_path_factory.mktemp("home")))
        patch.setattr(botocore.client.BaseClient, "_make_api_call", record)
        # 1. The account.
        for profile in ("rayclust-head", "rayclust-worker"):
            boto3.client("iam").create_instance_profile(InstanceProfileName=profile)
        ec2 = boto3.client("ec2")
        network = ec2.describe_vpcs()["Vpcs"][0]["VpcId"]
        group = ec2.create_security_group(GroupName="rayclust", Description="rayclust", VpcId=network)["GroupId"]
        ssh = {"IpProtocol": "tcp", "FromPort": 22, "ToPort": 22, "IpRanges": [{"CidrIp": MY_ADDRESS}]}
        ec2.authorize_security_group_ingress(GroupId=group, IpPermissions=[ssh])
        there.taken()
        # 2. `ray up` and `ray down`, which start and end the head; then the head, with its workers.
        config = prepare_config(read("aws.yaml"))
        there.config = bootstrap_aws(AWSNodeProvider.fillout_available_node_types_resources(config))
        live(there.config, "head")
        there.by_user = there.taken()
        live(there.config, *(kind for kind in there.config["available_node_types"] if kind != "head"))
        there.by_head = there.taken()
        # 3. What is left.
        there.groups = ec2.describe_security_groups(Filters=[{"Name": "vpc-id", "Values": [network]}])["SecurityGroups"]
        yield there
    resource_cache.cache_clear()


def live(config: dict[str, Any], *kinds: str) -> None:
    """Start a node of each kind, tag it as Ray does, and end it."""
    provider = AWSNodeProvider(config["provider"], config["cluster_name"])
    for kind in kinds:
        provider.create_node(config["available_node_types"][kind]["node_config"], {"ray-node-name": kind}, 1)
    nodes = provider.non_terminated_nodes({})
    assert len(nodes) == len(kinds)
    for node in nodes:
        provider.set_node_tags(node, {"ray-node-status": "setting-up"})
        provider.node_tags(node)
    provider.terminate_nodes(nodes)


@pytest.mark.parametrize("role", ["user", "head"])
def test_the_user_and_the_head_may_do_on_ec2_what_ray_does_and_nothing_else(account: Account, role: str):
    asked = {name for name, _ in (account.by_user if role == "user" else account.by_head)}
    assert asked == {action for action in allowed(role) if action.startswith("ec2:")}


def test_ec2_starts_every_kind_of_worker(account: Account):
    started = [arguments for name, arguments in account.by_head if name == "ec2:RunInstances"]
    assert len(started) == 4
    assert sum("InstanceMarketOptions" in arguments for arguments in started) == 2
    for arguments in started:  # botocore has compared each with EC2's own description of the call
        assert arguments["ImageId"].startswith("resolve:ssm:")
        assert arguments["IamInstanceProfile"] == {"Name": "rayclust-worker"}


def test_the_security_group_stays_closed_to_all_but_one_address(account: Account):
    [used] = {kind["node_config"]["SecurityGroupIds"][0] for kind in account.config["available_node_types"].values()}
    [group] = [group for group in account.groups if group["GroupId"] == used]
    assert group["GroupName"] == "rayclust"
    assert [source["CidrIp"] for rule in group["IpPermissions"] for source in rule["IpRanges"]] == [MY_ADDRESS]
    assert not {"ec2:CreateSecurityGroup", "ec2:AuthorizeSecurityGroupIngress"} & allowed("user", "head")


def test_a_worker_offers_the_cpus_and_gpus_of_its_machine(account: Account):
    kinds = read("aws.yaml")["available_node_types"]
    for name in kinds.keys() - {"head"}:
        machine = account.machines[kinds[name]["node_config"]["InstanceType"]]
        assert kinds[name]["resources"]["CPU"] == machine["VCpuInfo"]["DefaultVCpus"]
        gpus = sum(gpu["Count"] for gpu in machine.get("GpuInfo", {}).get("Gpus", []))
        assert kinds[name]["resources"].get("GPU", 0) == gpus


def test_roles_are_given_to_nodes_alone_and_each_by_its_own():
    for role, given in (("user", "rayclust-head"), ("head", "rayclust-worker")):
        [statement] = [entry for entry in statements(role) if "iam:PassRole" in entry["Action"]]
        assert statement["Resource"] == [f"arn:aws:iam::*:role/{given}"]
        assert statement["Condition"] == {"StringEquals": {"iam:PassedToService": "ec2.amazonaws.com"}}
    [trust] = json.loads((FOLDER / "policies/aws-trust.json").read_text())["Statement"]
    assert (trust["Principal"], trust["Action"]) == ({"Service": "ec2.amazonaws.com"}, "sts:AssumeRole")


def test_the_parameter_that_names_the_machine_image_may_be_read():
    parameter = read("aws.yaml")["available_node_types"]["head"]["node_config"]["ImageId"].removeprefix("resolve:ssm:")
    for role in ("user", "head"):
        [statement] = [entry for entry in statements(role) if "ssm:GetParameters" in entry["Action"]]
        assert any(fnmatch.fnmatch(f"arn:aws:ssm:{REGION}::parameter{parameter}", arn) for arn in statement["Resource"])


def test_nodes_pull_the_image_and_reach_the_bucket_and_the_user_pushes_as_well():
    pull = {"ecr:BatchCheckLayerAvailability", "ecr:GetDownloadUrlForLayer", "ecr:BatchGetImage"}
    pull |= {"ecr:GetAuthorizationToken"}
    push = {"ecr:InitiateLayerUpload", "ecr:UploadLayerPart", "ecr:CompleteLayerUpload", "ecr:PutImage"}
    assert pull == {action for action in allowed("node", "head") if action.startswith("ecr:")}
    assert pull | push == {action for action in allowed("user") if action.startswith("ecr:")}
    for role in ("node", "user"):
        assert {action for action in allowed(role) if action.startswith("s3:")} == set(RIGHTS_OF_CALLS.values())


@pytest.mark.parametrize("role", ["user", "head", "node"])
def test_rights_are_named_one_by_one_and_bound_to_this_cluster(role: str):
    for statement in statements(role):
        assert statement["Effect"] == "Allow"
        assert not any("*" in action for action in statement["Action"])
        if "*" in statement["Resource"]:  # what AWS cannot bind to a resource
            named = {action.partition(":")[2] for action in statement["Action"]}
            assert all(name.startswith("Describe") or name == "GetAuthorizationToken" for name in named)
        for arn in statement["Resource"]:
            if arn.startswith("arn:aws:s3:::"):
                assert arn.removesuffix("/*") == "arn:aws:s3:::my-bucket"
        if "ec2:TerminateInstances" in statement["Action"]:
            tag = {"ec2:ResourceTag/ray-cluster-name": read("aws.yaml")["cluster_name"]}
            assert statement["Condition"] == {"StringEquals": tag}
