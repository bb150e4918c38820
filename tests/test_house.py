"""Structure of the package: no import circles, documented public names, Ray in two folders, pages for every stage."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from rayclust.stages import NAMES

ROOT = Path(__file__).resolve().parents[1]
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted((ROOT / "rayclust").rglob("*.py"))
}
TREES = {name: ast.parse(path.read_text()) for name, path in MODULES.items()}


def test_there_are_modules_to_look_at():
    assert len(MODULES) > 80


def imports(name: str) -> Iterator[tuple[str, int]]:
    """Modules that a module imports anywhere, also in functions and behind TYPE_CHECKING, with the line."""
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                yield (full if full in MODULES else node.module), node.lineno


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Groups of nodes that reach each other (Tarjan's strongly connected components of more than one node)."""
    found, stack, numbers, lows = list[list[str]](), list[str](), dict[str, int](), dict[str, int]()

    def visit(node: str) -> None:
        numbers[node] = lows[node] = len(numbers)
        stack.append(node)
        for other in graph[node]:
            if other not in numbers:
                visit(other)
                lows[node] = min(lows[node], lows[other])
            elif other in stack:
                lows[node] = min(lows[node], numbers[other])
        if lows[node] == numbers[node]:
            place = stack.index(node)
            if len(stack) - place > 1:
                found.append(sorted(stack[place:]))
            del stack[place:]

    for node in graph:
        if node not in numbers:
            visit(node)
    return found


def test_circles_are_found():
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": set()}) == [["b", "c"]]


def test_modules_do_not_import_each_other_in_circles():
    graph = {name: {other for other, _ in imports(name) if other in MODULES and other != name} for name in MODULES}
    assert circles(graph) == []


def undocumented(node: ast.AST, path: str) -> Iterator[str]:
    """Public classes, functions and methods below a node that have no docstring."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and not child.name.startswith("_"):
            if ast.get_docstring(child) is None:
                yield f"{path}.{child.name}"
            if isinstance(child, ast.ClassDef):
                yield from undocumented(child, f"{path}.{child.name}")


def test_every_public_name_is_documented():
    assert [name for name, tree in TREES.items() if ast.get_docstring(tree) is None] == []
    assert [missing for name, tree in TREES.items() for missing in undocumented(tree, name)] == []


def test_ray_is_imported_in_runtime_and_stages_only_and_where_it_is_used():
    """A no-op run, `status` and `search` then start without the seconds that Ray takes."""
    found = [(name, line) for name in MODULES for other, line in imports(name) if other.partition(".")[0] == "ray"]
    assert [name for name, _ in found if name.split(".")[1] not in ("runtime", "stages")] == []
    at_the_top = [
        name
        for name, tree in TREES.items()
        for node in tree.body
        if isinstance(node, ast.Import | ast.ImportFrom)
        and (getattr(node, "module", None) or node.names[0].name).partition(".")[0] == "ray"
    ]
    assert at_the_top == []


def test_nothing_prints():
    found = [
        f"{name}:{node.lineno}"
        for name, tree in TREES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
    ]
    assert found == []


def test_callers_mistakes_are_errors_not_assertions():
    found = [
        f"{name}:{node.lineno}"
        for name, tree in TREES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Assert)
    ]
    assert found == []


def test_only_the_command_line_sets_up_logging():
    words = ("basicConfig(", "StreamHandler(")
    found = {name for name, path in MODULES.items() if any(word in path.read_text() for word in words)}
    assert found <= {"rayclust.runtime.log", "rayclust.estimators.base"}  # the latter for as long as a verbose fit runs


def test_no_module_is_named_after_nothing():
    assert [name for name, path in MODULES.items() if path.stem in {"utils", "util", "common", "helpers", "misc"}] == []


def test_every_stage_has_its_file():
    assert {f"rayclust.stages.{name.replace('-', '_')}" for name in NAMES} <= set(MODULES)


@pytest.mark.parametrize(
    "page", ["README.md", "docs/artefacts.md", "docs/operations.md", "docs/architecture.md", "docs/security.md"]
)
def test_pages_are_there(page: str):
    assert len((ROOT / page).read_text()) > 500


def test_docs_and_readme_tell_of_every_stage():
    pages = {path.name: path.read_text() for path in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]}
    for stage in NAMES:
        assert stage in pages["artefacts.md"], stage
        assert any(stage in text for page, text in pages.items() if page != "artefacts.md"), stage
