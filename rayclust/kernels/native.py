"""C sources beside this file, compiled once for this processor and kept in the user's cache.

Where there is no compiler, or the processor has no matrix tiles for bf16, `library` is None and callers use torch
alone; the results differ by rounding only.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

SOURCES = ("head.c", "adamw.h", "definite.h", "layers.h", "information.h", "products.h", "tiles.h")
"""The first is compiled; it includes the others."""
FLAGS = ("-O3", "-march=native", "-ffast-math", "-mprefer-vector-width=512", "-shared", "-fPIC")
COMPILERS = ("cc", "gcc", "clang")
SWITCH = "RAYCLUST_NATIVE"
"""Environment variable; 0 keeps to torch alone."""

Argument = Tensor | ctypes.Structure | int | float | None


@lru_cache
def library() -> ctypes.CDLL | None:
    """The compiled sources, or None where they cannot be had. Asked once per process."""
    compiler = next(filter(None, map(shutil.which, COMPILERS)), None)
    if os.environ.get(SWITCH) == "0" or compiler is None or not torch.cpu._is_amx_tile_supported():
        return None
    try:
        loaded = ctypes.CDLL(str(_compiled(compiler)))
    except (OSError, subprocess.SubprocessError) as error:
        logger.info("native kernels: not compiled, using torch alone: %s", error)
        return None
    loaded.room_size.restype = ctypes.c_long
    return loaded if loaded.allow_tiles() == 0 else None


def call(name: str, *arguments: Argument) -> int:
    """Calls a compiled function with tensors as pointers, ints as long, floats as float, None as null.

    Raises:
        RuntimeError: there is no library; ask `library` first.
    """
    loaded = library()
    if loaded is None:
        raise RuntimeError(f"native kernels: {name} was called although they could not be compiled")
    result: int = getattr(loaded, name)(*map(_converted, arguments))
    return result


def _converted(argument: Argument) -> object:
    if isinstance(argument, Tensor):
        return ctypes.c_void_p(argument.data_ptr())
    if isinstance(argument, int):
        return ctypes.c_long(argument)
    if isinstance(argument, float):
        return ctypes.c_float(argument)
    return None if argument is None else ctypes.byref(argument)


def _compiled(compiler: str) -> Path:
    """The shared library for these sources on this processor; built elsewhere and moved, so that many may build it."""
    folder = Path(__file__).parent
    identity = "\n".join([*((folder / name).read_text() for name in SOURCES), *FLAGS, compiler, _processor()])
    target = _cache() / f"{hashlib.sha256(identity.encode()).hexdigest()[:16]}.so"
    if not target.exists():
        with tempfile.TemporaryDirectory(dir=target.parent) as workshop:
            built = Path(workshop) / target.name
            command = [compiler, *FLAGS, str(folder / SOURCES[0]), "-o", str(built), "-lm"]
            subprocess.run(command, check=True, capture_output=True, timeout=120)  # noqa: S603 - our own sources
            built.replace(target)
    return target


def _processor() -> str:
    """What -march=native depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
    except OSError:
        return platform.processor()
    return "\n".join(line for line in lines if line.startswith(("model", "flags", "vendor_id")))


def _cache() -> Path:
    """A folder that this user can write to, kept where possible."""
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rayclust" / "native"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return Path(tempfile.mkdtemp(prefix="rayclust-native-"))
    return folder if os.access(folder, os.W_OK) else Path(tempfile.mkdtemp(prefix="rayclust-native-"))
