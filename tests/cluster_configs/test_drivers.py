"""Nodes with a GPU start only with a driver that the image's CUDA can use."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from tests.cluster_configs.rendered import FOLDER, ROOT, read

MINIMUM_DRIVER = {11: 450, 12: 525, 13: 580}
"""Branch of NVIDIA's Linux driver from which every release of a major version of CUDA runs.

Source: NVIDIA, "CUDA Compatibility", table 1 of "Minor Version Compatibility"
(docs.nvidia.com/deploy/cuda-compatibility/minor-version-compatibility.html).
"""
GPU_KINDS = [(name, kind) for name in ("aws.yaml", "gcp.yaml") for kind in ("gpu-spot", "gpu-on-demand")]


def cuda_of_the_image() -> int:
    """Return the major version of CUDA that the pinned torch brings: the one its wheel of cuDNN is named after."""
    pins = (ROOT / "constraints.txt").read_text()
    [toolkit] = re.findall(r"^cuda-toolkit==(\d+)\.", pins, re.MULTILINE)
    assert set(re.findall(r"^nvidia-[a-z]+-cu(\d+)==", pins, re.MULTILINE)) == {toolkit}
    return int(toolkit)


def check_of(name: str, kind: str) -> str:
    [line] = [line for line in read(name)["available_node_types"][kind]["initialization_commands"] if "-ge" in line]
    command: str = line
    return command


@pytest.mark.parametrize(("name", "kind"), GPU_KINDS)
def test_the_driver_that_is_asked_for_is_the_one_that_the_pinned_cuda_needs(name: str, kind: str):
    cuda = cuda_of_the_image()
    assert re.findall(r"-ge (\d+) \]", check_of(name, kind)) == [str(MINIMUM_DRIVER[cuda])]
    assert f"CUDA {cuda} needs {MINIMUM_DRIVER[cuda]} or newer" in check_of(name, kind)


def test_the_machine_images_drivers_are_named_or_newest():
    cuda = cuda_of_the_image()
    google = {kind["node_config"]["disks"][0]["initializeParams"]["sourceImage"] for kind in kinds("gcp.yaml")}
    [driver] = {re.findall(r"-nvidia-(\d+)$", source)[0] for source in google}
    assert int(driver) >= MINIMUM_DRIVER[cuda]
    amazon = {kind["node_config"]["ImageId"] for kind in kinds("aws.yaml")}
    assert all(re.fullmatch(r"resolve:ssm:/aws/service/deeplearning/ami/\S+/latest/ami-id", ami) for ami in amazon)
    for path in (FOLDER / "Dockerfile", FOLDER / "kuberay-cluster.yaml", ROOT / "docs/first_contact.md"):
        assert f"{MINIMUM_DRIVER[cuda]} or newer" in path.read_text(), path


def kinds(name: str) -> list[dict[str, dict[str, list[dict[str, dict[str, str]]]]]]:
    return list(read(name)["available_node_types"].values())


@pytest.mark.parametrize(
    ("answers", "passes"),
    [
        (["580.65.06"], True),
        (["595.91.07"], True),
        (["1000.1"], True),
        (["-", "-", "580.105.08"], True),  # the driver is being installed
        (["570.133.20"], False),
        (["99.1"], False),
        (["-"], False),  # never comes
    ],
)
@pytest.mark.parametrize("name", ["aws.yaml", "gcp.yaml"])
def test_a_node_waits_for_its_driver_and_refuses_an_old_one(
    name: str, answers: list[str], *, passes: bool, tmp_path: Path
):
    tools = tmp_path / "bin"
    tools.mkdir()
    (tmp_path / "answers").write_text("\n".join(answers) + "\n")
    # Gives one answer after the other while it is waited for, the last one for ever; - is a driver that is not there.
    further = "[ $(wc -l < answers) -gt 1 ] && [ -e asked ] && sed -i 1d answers; touch asked"
    answer = "read -r answer < answers; [ $answer != - ] && echo $answer"
    tool(tools / "nvidia-smi", f'cd {tmp_path}; [ "$1" ] || {{ {further}; }}; {answer}')
    tool(tools / "sleep", "true")
    line = ["bash", "-c", f"export RAY_HEAD_IP=10.0.0.1; {check_of(name, 'gpu-spot')}"]
    done = subprocess.run(line, env={"PATH": f"{tools}:/usr/bin:/bin"}, capture_output=True, text=True, check=False)
    assert (done.returncode == 0) == passes, done
    if not passes:
        shown = "" if answers[-1] == "-" else answers[-1]
        assert f"driver '{shown}': the image's CUDA 13 needs 580 or newer" in done.stderr


def tool(path: Path, body: str) -> None:
    path.write_text(f"#!/bin/bash\n{body}\n")
    path.chmod(0o755)
