"""Files of tensors, read without running code that they might carry."""

from __future__ import annotations

import argparse
import pickle
import warnings
import zipfile
from contextlib import suppress
from pathlib import Path
from typing import Any

from rayclust.errors import DataError


def load_tensors(path: Path | str) -> Any:
    """Read a local file of tensors: safetensors, or torch's own format without unpickling code; its name is free.

    Returns:
        A tensor, or dicts and lists of tensors and plain values, on the CPU.

    Raises:
        DataError: the file is missing, damaged, of another format, or holds objects that only code can build.
    """
    # Imported only now: most tables of embeddings are read by workers without torch.
    import safetensors
    import torch
    from safetensors.torch import load_file

    path = Path(path)
    try:
        with path.open("rb") as file:
            head = file.read(16)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error}); check the path") from error
    if len(head) > 8 and head[8:9] == b"{":
        try:
            return load_file(path)
        except (safetensors.SafetensorError, OSError, ValueError) as error:
            raise DataError(f"{path}: damaged safetensors file ({error}); fetch it again") from error
    if not head.startswith((b"PK", b"\x80")):
        what = f"starts with {head.hex(' ')}" if head else "is empty"
        raise DataError(f"{path}: {what}: neither a safetensors nor a torch file")
    try:
        # Training scripts store their arguments beside the weights.
        with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of TorchScript, which has its own message below
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        names = []
        with suppress(RuntimeError, ValueError, OSError, pickle.UnpicklingError):
            names = sorted(torch.serialization.get_unsafe_globals_in_checkpoint(str(path)))
        objects = f"objects of {', '.join(names[:3])}" if names else "objects other than tensors"
        what = f"{objects}, which are not read; save its tensors alone, as safetensors"
        raise DataError(f"{path}: holds {what}") from error
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        what = " ".join(str(error).split())[:120]
        if "TorchScript" in what:
            raise DataError(
                f"{path}: a TorchScript archive, which is a program and is not read; OpenAI's CLIP is on the hub as "
                "safetensors (encoder.name: open_clip/ViT-L-14.openai), for others save `state_dict()` as safetensors"
            ) from error
        raise DataError(f"{path}: damaged torch file ({what}); fetch it again") from error
