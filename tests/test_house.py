"""The rules of the house: mirrored tests, small files and functions, Ray in one folder, pages for every stage."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from rayclust.runtime.pipeline import STAGES

ROOT = Path(__file__).resolve().parents[1]
MODULES = sorted(path for path in (ROOT / "rayclust").rglob("*.py") if path.name not in ("__init__.py", "__main__.py"))
FILE_LINES, BODY_LINES, PARAMETERS = 300, 40, 6

Function = ast.FunctionDef | ast.AsyncFunctionDef


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def functions(path: Path) -> Iterator[Function]:
    return (node for node in ast.walk(tree(path)) if isinstance(node, Function))


def test_there_are_modules_to_look_at():
    assert len(MODULES) > 80


def test_every_module_has_its_test():
    missing = []
    for path in MODULES:
        below = path.relative_to(ROOT / "rayclust")
        if not (ROOT / "tests" / below.with_name(f"test_{below.name}")).exists():
            missing.append(name(path))
    assert missing == []


def test_every_test_of_one_module_has_its_module():
    folders = {path.parent.relative_to(ROOT / "rayclust") for path in MODULES}
    whole = {"test_house.py", "stages/test_bad_inputs.py", "stages/test_faults.py", "stages/test_whole_run.py"}
    whole |= {"store/test_bad_inputs.py", "test_real_photos.py", "test_dependencies.py"}
    orphans = []
    for path in sorted((ROOT / "tests").rglob("test_*.py")):
        below = path.relative_to(ROOT / "tests")
        module = ROOT / "rayclust" / below.with_name(below.name.removeprefix("test_"))
        if below.as_posix() not in whole and below.parent in folders and not module.exists():
            orphans.append(below.as_posix())
    assert orphans == []


def test_files_are_read_in_one_sitting():
    assert {name(path): n for path in MODULES if (n := len(path.read_text().splitlines())) > FILE_LINES} == {}


def body_lines(function: Function) -> int:
    """Lines from the first statement after the docstring to the last."""
    body = function.body[1:] if ast.get_docstring(function, clean=False) is not None else function.body
    return (body[-1].end_lineno or 0) - body[0].lineno + 1 if body else 0


def test_functions_fit_on_a_screen():
    long = {
        f"{name(path)}:{function.name}": lines
        for path in MODULES
        for function in functions(path)
        if (lines := body_lines(function)) > BODY_LINES
    }
    assert long == {}


def test_a_body_is_counted_without_its_docstring():
    [function] = ast.parse('def f():\n    """One.\n\n    Two.\n    """\n    a = 1\n    return a\n').body
    assert isinstance(function, ast.FunctionDef)
    assert body_lines(function) == 2


def calls(path: Path, wanted: str) -> list[str]:
    return [
        f"{name(path)}:{node.lineno}"
        for node in ast.walk(tree(path))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == wanted
    ]


def test_nothing_prints():
    assert [place for path in MODULES for place in calls(path, "print")] == []


def test_callers_mistakes_are_errors_not_assertions():
    found = [
        f"{name(path)}:{node.lineno}"
        for path in MODULES
        for node in ast.walk(tree(path))
        if isinstance(node, ast.Assert)
    ]
    assert found == []


def imported(path: Path) -> set[str]:
    """Top-level packages that a module imports anywhere."""
    found = set[str]()
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            found.add(node.module.partition(".")[0])
    return found


def test_ray_is_in_the_stages_only():
    assert [name(p) for p in MODULES if "ray" in imported(p) and p.parent.name != "stages"] == []


def test_stages_import_ray_only_where_it_is_used():
    """A no-op run, `status` and `search` then start without the seconds that Ray takes."""
    at_the_top = [
        name(path)
        for path in MODULES
        for node in tree(path).body
        if isinstance(node, ast.Import | ast.ImportFrom)
        and (getattr(node, "module", None) or node.names[0].name).partition(".")[0] == "ray"
    ]
    assert at_the_top == []


@pytest.mark.parametrize("folder", ["store", "report"])
def test_storage_and_page_do_without_torch(folder: str):
    assert [name(p) for p in MODULES if p.is_relative_to(ROOT / "rayclust" / folder) and "torch" in imported(p)] == []


def test_only_the_command_line_sets_up_logging():
    found = [
        name(path) for path in MODULES if any(word in path.read_text() for word in ("basicConfig(", "StreamHandler("))
    ]
    assert set(found) <= {"rayclust/cli.py"}


def test_no_module_is_named_after_nothing():
    assert [name(p) for p in MODULES if p.stem in {"utils", "util", "common", "helpers", "misc"}] == []


@pytest.mark.parametrize(
    "page", ["README.md", "docs/artefacts.md", "docs/operations.md", "docs/architecture.md", "docs/security.md"]
)
def test_pages_are_there(page: str):
    assert len((ROOT / page).read_text()) > 500


def test_docs_and_readme_tell_of_every_stage():
    pages = {path.name: path.read_text() for path in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]}
    for stage in STAGES:
        assert stage in pages["artefacts.md"], stage
        assert any(stage in text for page, text in pages.items() if page != "artefacts.md"), stage


def test_functions_take_few_arguments():
    """Kernels are left out: theirs are the arguments of the code that they call."""
    many = {
        f"{name(path)}:{function.name}": count
        for path in MODULES
        if path.parent.name != "kernels"
        for function in functions(path)
        if (count := len([a for a in function.args.posonlyargs + function.args.args if a.arg not in ("self", "cls")]))
        > PARAMETERS
    }
    assert many == {}
