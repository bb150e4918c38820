"""Measure the package as `docs/architecture.md` describes it, beside packages of the field that serve as anchors.

    python benchmarks/house.py [FOLDER]

Counted with `ast` over all modules of a package: lines, functions (methods and nested ones among them) per 100 lines of
code, lines of a body without its docstring, lines of a file, whole-line comments to lines of code, documented public
names, and the files to read for one method: all modules of the package that an import walk from its file reaches, and
those that `rayclust run` passes through on the way to it; then the same with where its heads start and the choice among
them, which are not the paper's. The anchors' figures were counted in the same way on their
main branches, before this package was restructured, and their files for one method by hand; "before" is this package
then, its files for one method counted by hand as well.
"""

from __future__ import annotations

import argparse
import ast
import io
import statistics
import tokenize
from collections.abc import Iterator, Sequence
from pathlib import Path

ANCHORS = {
    "before": ("225", "28,800", "10.7", "5 / 13 / 39", "114 / 295", "0.005", "94 / 100", "30, 80"),
    "lightly": ("", "", "5.9", "8 / 30 / 127", "116 / 1,564", "0.08", "78 / 96", "5 (DINO)"),
    "datatrove": ("", "", "5.1", "6 / 30 / 119", "91 / 4,113", "0.05", "44 / 67", "7 (MinHash)"),
    "NeMo Curator": ("", "", "6.2", "6 / 33 / 141", "116 / 798", "0.17", "51 / 88", ""),
    "nanochat": ("", "", "6.5", "9 / 39 / 98", "229 / 555", "0.20", "49 / 56", "7"),
    "sklearn.cluster": ("", "", "3.7", "11 / 70 / 191", "615 / 2,320", "0.12", "92 / 100", ""),
}
HEAD = (
    "package", "modules", "lines", "functions / 100", "body median / p90 / max", "file median / max",
    "comments : code", "documented functions / classes, %", "files for TEMI without Ray, through it; with its start",
)  # fmt: skip
METHOD = "rayclust.methods.temi"
START = "rayclust.methods.temi_start"
THROUGH_RAY = ("rayclust.runtime.api", "rayclust.runtime.pipeline", "rayclust.stages.train", METHOD)
"""What `rayclust run` passes through to the method; `cli` itself is counted as one more."""

Function = ast.FunctionDef | ast.AsyncFunctionDef


def modules_of(package: Path) -> dict[str, Path]:
    """Return the modules of a package by dotted name; `__init__` counts as its folder."""
    return {
        ".".join((package.name, *path.relative_to(package).with_suffix("").parts)).removesuffix(".__init__"): path
        for path in sorted(package.rglob("*.py"))
    }


def lines_of(text: str) -> tuple[int, int]:
    """Return lines with code (docstrings left out) and lines that are a comment and nothing else."""
    skipped = set[int]()
    for node in ast.walk(ast.parse(text)):
        body = getattr(node, "body", None)
        for statement in body if isinstance(body, list) else []:
            if isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant):
                skipped |= set(range(statement.lineno, (statement.end_lineno or statement.lineno) + 1))
    code, comments = set[int](), set[int]()
    layout = {tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER, tokenize.ENCODING}
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            comments.add(token.start[0])
        elif token.type not in layout:
            code |= set(range(token.start[0], token.end[0] + 1))
    code -= skipped
    return len(code), len(comments - code)


def body_lines(function: Function) -> int:
    """Return the lines from a function's first statement after the docstring to its last."""
    body = function.body[1:] if ast.get_docstring(function, clean=False) is not None else function.body
    return (body[-1].end_lineno or 0) - body[0].lineno + 1 if body else 0


def public(tree: ast.AST, kind: type[ast.AST] | tuple[type[ast.AST], ...]) -> Iterator[ast.AST]:
    """Yield public definitions of a kind at module level and in public classes."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.ClassDef | Function) and not node.name.startswith("_"):
            if isinstance(node, kind):
                yield node
            if isinstance(node, ast.ClassDef):
                yield from public(node, kind)


def reachable(modules: dict[str, Path], starts: Sequence[str]) -> set[str]:
    """Return the modules that an import walk reaches, by imports anywhere in a file.

    Args:
        modules: of the package.
        starts: where the walk begins.
    """
    seen, queue = set[str](), list(starts)
    while queue:
        name = queue.pop()
        if name in seen or name not in modules:
            continue
        seen.add(name)
        for node in ast.walk(ast.parse(modules[name].read_text())):
            if isinstance(node, ast.Import):
                queue += [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
                full = (f"{node.module}.{alias.name}" for alias in node.names)
                queue += [name if name in modules else node.module for name in full]
    # A package's `__init__` without code of its own is nothing to read.
    return {name for name in seen if lines_of(modules[name].read_text())[0]}


def measure(package: Path) -> tuple[str, ...]:
    """Return the row of the table for a package."""
    modules = modules_of(package)
    texts = {name: path.read_text() for name, path in modules.items()}
    trees = {name: ast.parse(text) for name, text in texts.items()}
    functions = [node for tree in trees.values() for node in ast.walk(tree) if isinstance(node, Function)]
    bodies = sorted(body_lines(function) for function in functions)
    files = [len(text.splitlines()) for name, text in texts.items() if not modules[name].name.startswith("__")]
    code, comments = (sum(counts) for counts in zip(*map(lines_of, texts.values()), strict=True))
    shares = []
    for kind in ((ast.FunctionDef, ast.AsyncFunctionDef), (ast.ClassDef,)):
        found = [node for tree in trees.values() for node in public(tree, kind)]
        documented = sum(ast.get_docstring(node) is not None for node in found)  # type: ignore[arg-type]
        shares.append(f"{100 * documented / max(len(found), 1):.0f}")
    walks = [
        f"{len(reachable(modules, [METHOD, *more]))}, {1 + len(reachable(modules, [*THROUGH_RAY, *more]))}"
        for more in ((), (START,))
    ]
    return (
        f"{len(files)}",
        f"{sum(len(text.splitlines()) for text in texts.values()):,}",
        f"{100 * len(functions) / code:.1f}",
        f"{statistics.median(bodies):.0f} / {bodies[int(0.9 * len(bodies))]} / {bodies[-1]}",
        f"{statistics.median(files):.0f} / {max(files)}",
        f"{comments / code:.3f}",
        " / ".join(shares),
        "; ".join(walks),
    )


def main() -> None:
    """Print the table: the package first, then itself before and the anchors."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, default=Path(__file__).parents[1] / "rayclust")
    folder: Path = parser.parse_args().folder
    print(f"| {' | '.join(HEAD)} |\n|{'---|' * len(HEAD)}")
    for name, row in {folder.name: measure(folder), **ANCHORS}.items():
        print(f"| {name} | {' | '.join(row)} |")


if __name__ == "__main__":
    main()
