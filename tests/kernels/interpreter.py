"""Triton's kernels without a GPU: run in its interpreter, and compiled as far as machine code."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


def run_interpreted(*modules: str) -> None:
    """Runs the `main` of test modules where kernels are interpreted: that is asked for before they are read."""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    lines = "".join(f"import {module}; {module}.main()\n" for module in modules)
    command = [sys.executable, "-W", "ignore", "-c", lines]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]


def compiled_for_hopper(kernel: Any, types: dict[str, str], constants: dict[str, int], warps: int) -> Any:
    """What Triton makes of a kernel for compute capability 9.0, which needs no GPU.

    `types` of all arguments but the constants; pointers and strides count as multiples of 16.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = kernel.arg_names
    signature = {name: "constexpr" if name in constants else types[name] for name in names}
    aligned = [name for name in names if signature[name].startswith("*") or name.endswith("stride")]
    source = ASTSource(
        kernel,
        signature,
        {(names.index(name),): value for name, value in constants.items()},
        {(names.index(name),): [["tt.divisibility", 16]] for name in aligned},
    )
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": warps})
