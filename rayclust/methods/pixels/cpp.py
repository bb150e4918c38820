"""CPP with its backbone inside: features of images as they are read, of random views of them, or of blocks that train.

With neither views nor trained blocks this is the published program's own mode (`main.py`), whose network without
gradient gives every step the features that the stage `encode` would have stored; that is dearer and no better. The mode
is worth it for views, which the frozen features cannot have, and for a backbone that knows such images poorly.

Source: arXiv 2306.05272; that the last blocks train is an addition.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any, cast

import torch
from torch import Tensor, nn

from rayclust.encoders.load import load_encoder
from rayclust.encoders.network import TorchEncoder
from rayclust.errors import ConfigError
from rayclust.kernels.screening import accum_dtype
from rayclust.methods.base import Batch, MethodState, Rows
from rayclust.methods.cpp import Cpp
from rayclust.methods.layers import matmul_dtype
from rayclust.methods.pixels.augment import FAMILIES, SquareImages, batch_view, keyed_seed
from rayclust.methods.pixels.settings import CppPixelsConfig
from rayclust.store import storage

BLOCK = 256
"""Images that go through the backbone at once outside of training."""
BACKBONE = "backbone."
"""Prefix of the trained blocks' tensors in a state."""


class CppPixels(Cpp):
    """CPP on images of D values.

    Args:
        config: the settings; a preset is written out for `count` rows.
        dimension: D = side² × 3 of the square images.
        count: N, the rows of all workers.
        seed: of the initial weights, the views and the final partition.

    Raises:
        ConfigError: D is not that of square colour images, or the backbone's weights are missing or do not take them.
    """

    config_type = CppPixelsConfig
    config: CppPixelsConfig
    mean: Tensor
    std: Tensor

    def __init__(self, config: CppPixelsConfig, dimension: int, count: int, seed: int) -> None:
        shape = SquareImages.of(dimension, config.name)
        if shape.channels != 3:
            raise ConfigError(f"method = {config.name}: its backbone reads colour; set encoder.grayscale: false")
        settings = config.encoder(shape.side)
        uri = settings.weights_uri
        with storage.local_copy(uri) if uri is not None else nullcontext() as path:
            encoder = cast(TorchEncoder, load_encoder(settings, weights=path))
        super().__init__(config, encoder.dimension, count, seed)
        self.dimension, self.shape, self.channels = dimension, shape, 3
        # Without a text tower.
        self.trunk: nn.Module = getattr(encoder.network, "visual", encoder.network).requires_grad_(False)
        """The backbone, Float[B 3 H W] to Float[B F]."""
        self.register_buffer("mean", torch.tensor(encoder.mean))
        self.register_buffer("std", torch.tensor(encoder.std))
        self.tuned: dict[str, nn.Parameter] = {}
        """The backbone's trained parameters by name."""
        if config.tune == "last_blocks":  # of the sequence of layers that holds most parameters
            layers = self.trunk.named_modules()
            sequences = {name: m for name, m in layers if name and isinstance(m, nn.Sequential | nn.ModuleList)}
            if not sequences:
                raise ConfigError("method.tune = last_blocks: the backbone has no sequence of blocks; set tune: none")
            longest = max(sequences, key=lambda each: sum(p.numel() for p in sequences[each].parameters()))
            for place, block in list(sequences[longest].named_children())[-config.tuned_blocks :]:
                block.requires_grad_(True)
                self.tuned |= {f"{longest}.{place}.{name}": parameter for name, parameter in block.named_parameters()}

    def train(self, mode: bool = True) -> CppPixels:
        """Set the mode of all but the backbone, whose norms and dropout stay as they are at inference."""
        super().train(mode)
        self.trunk.eval()
        return self

    def read(self, x: Tensor, batch: Batch | None = None) -> Tensor:
        """Map rows Float[B D] of pixels to the backbone's rows Float[B F]: of one view of each image in training."""
        if batch is None:
            with torch.no_grad():
                parts = [self._features(part) for part in torch.split(x, BLOCK) if len(part)]
                return torch.cat([self.mean.new_zeros((0, self.network.first.in_features)), *parts])
        dtype = torch.float16 if self.config.precision == "fp16" else matmul_dtype(self.config.precision, self.mean)
        with (
            torch.set_grad_enabled(bool(self.tuned)),
            torch.autocast(self.mean.device.type, dtype, enabled=dtype.itemsize == 2),
        ):
            return self._features(x, batch)

    def _features(self, x: Tensor, batch: Batch | None = None) -> Tensor:
        images = self.shape.images(x.to(self.mean))
        if batch is not None and self.config.augmentation != "none":
            options, seed = FAMILIES[self.config.augmentation][0], keyed_seed(self.seed, batch.step)
            images = batch_view(images, options, batch, self.plan.batch_size, seed)
        images = (images - self.mean[:, None, None]) / self.std[:, None, None]
        rows: Tensor = self.trunk(images.contiguous(memory_format=torch.channels_last))
        return rows.to(accum_dtype(rows.dtype))

    def inputs(self, rows: Rows) -> Callable[[], Iterator[Tensor]]:
        """Return what yields the backbone's rows of this worker's images; they pass through it once."""
        blocks = [self.read(block) for block in rows.blocks()]
        return lambda: iter(blocks)

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Return CPP's groups and the backbone's trained blocks."""
        groups = super().parameter_groups()
        if self.tuned:
            groups.append({"params": list(self.tuned.values()), "lr_scale": self.config.tune_rate})
        return groups

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """Return all tensors but those of the backbone's frozen layers, which every worker reads for itself."""
        own = super().state_dict(*args, **kwargs)
        kept = {f"trunk.{name}" for name in self.tuned}
        return {name: value for name, value in own.items() if not name.startswith("trunk.") or name in kept}

    def load_state_dict(self, state_dict: Any, strict: bool = True, assign: bool = False) -> Any:
        """Take what `state_dict` gave."""
        frozen = {name: value for name, value in super().state_dict().items() if name.startswith("trunk.")}
        return super().load_state_dict(frozen | dict(state_dict), strict=strict, assign=assign)

    def state(self) -> MethodState:
        """Return the network, the trained blocks and the spectral partition."""
        fitted = super().state()
        trained = {BACKBONE + name: parameter.detach().cpu().clone() for name, parameter in self.tuned.items()}
        return MethodState(fitted.settings, fitted.tensors | trained)

    def load_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Take the trained blocks, and the rest as CPP does."""
        with torch.no_grad():
            for name, parameter in self.tuned.items():
                parameter.copy_(tensors.pop(BACKBONE + name))
        super().load_tensors(tensors)
