"""Networks that learn from pixels: residual networks with stems for small images, a small one for CPUs, timm's.

Batch norm takes the statistics of all workers' rows, so that a training does not depend on their number.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
import torchvision
from torch import Tensor, fx, nn
from torch.nn import functional
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval

from rayclust.distributed import all_reduce, data_group, differentiable_all_reduce
from rayclust.errors import ConfigError
from rayclust.kernels.screening import accum_dtype

SMALL_IMAGE = 64
"""Side up to which a residual network gets the stem for small images: 3×3 with stride 1, and no pooling."""
RESIDUAL = ("resnet18", "resnet34", "resnet50")
SMALL_WIDTHS = (32, 64, 128)
"""Channels of `small`'s stages, each of half the side of the one before."""


class SyncedBatchNorm2d(nn.BatchNorm2d):
    """Batch norm over the rows of all workers, or over each of several groups of them, on any device.

    A batch's row belongs to the group row mod `groups`. Running statistics are means over the groups.
    """

    groups: int = 1
    """Groups of a batch with statistics of their own; a multiple of the workers, unless it is 1."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalise Float[B C H W]."""
        workers, is_synced = data_group().size, self.groups == 1
        if not self.training or (is_synced and workers == 1):
            return super().forward(x)
        # This worker's groups, rows of one at equal distances as workers take theirs: Float[B/g g C H W].
        wide = x.to(accum_dtype(x.dtype))  # a half type has not the digits for these sums
        wide = wide.view(-1, 1 if is_synced else self.groups // workers, *x.shape[1:])
        sizes = torch.tensor(float(wide[:, 0, 0].numel()), dtype=wide.dtype, device=x.device)
        values = all_reduce(sizes) if is_synced else sizes
        total = differentiable_all_reduce if is_synced else nn.Identity()
        mean: Tensor = total(wide.sum((0, 3, 4))) / values
        var: Tensor = total((wide - mean[..., None, None]).square().sum((0, 3, 4))) / values
        with torch.no_grad():
            moments = torch.stack([mean, var * values / (values - 1)])
            moments = (moments if is_synced else all_reduce(moments.sum(1, keepdim=True)) / self.groups)[:, 0]
            self.running_mean.lerp_(moments[0], self.momentum)  # type: ignore[union-attr, arg-type]
            self.running_var.lerp_(moments[1], self.momentum)  # type: ignore[union-attr, arg-type]
            self.num_batches_tracked.add_(1)  # type: ignore[union-attr]
        scale = self.weight * torch.rsqrt(var + self.eps)
        normalized = wide * scale[..., None, None] + (self.bias - mean * scale)[..., None, None]
        return normalized.flatten(0, 1).to(x.dtype)


class SyncedBatchNorm1d(SyncedBatchNorm2d):
    """The same for rows."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalise Float[B F]."""
        normalized: Tensor = super().forward(x[:, :, None, None])
        return normalized[:, :, 0, 0]


class _Small(nn.Module):
    """Three stages of a strided convolution and a residual block: some 5 million multiplications at 32 pixels."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        widths = (channels, *SMALL_WIDTHS)
        self.down = nn.ModuleList(nn.Conv2d(i, o, 3, 2, 1, bias=False) for i, o in pairwise(widths))
        self.block = nn.ModuleList(nn.Conv2d(o, o, 3, 1, 1, bias=False) for o in SMALL_WIDTHS)
        self.norms = nn.ModuleList(SyncedBatchNorm2d(o) for o in SMALL_WIDTHS for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for stage, (down, block) in enumerate(zip(self.down, self.block, strict=True)):
            x = functional.relu(self.norms[2 * stage](down(x)), inplace=True)
            x = functional.relu(x + self.norms[2 * stage + 1](block(x)), inplace=True)
        return x.mean((2, 3))


class _PreActivation(nn.Module):
    """A block of the pre-activation residual network (arXiv 1603.05027)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.first_norm, self.second_norm = SyncedBatchNorm2d(inputs), SyncedBatchNorm2d(outputs)
        self.first = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.second = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        is_same = stride == 1 and inputs == outputs
        self.shortcut = None if is_same else nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        active = functional.relu(self.first_norm(x), inplace=True)
        residual = x if self.shortcut is None else self.shortcut(active)
        out: Tensor = residual + self.second(functional.relu(self.second_norm(self.first(active)), inplace=True))
        return out


def build_backbone(name: str, side: int, channels: int, seed: int) -> tuple[nn.Module, int]:
    """Build a network without its classifier, with random weights that depend on the seed alone.

    Args:
        name: small; resnet18, resnet34, resnet50, preact_resnet18; or timm/<architecture>.
        side: of the square images, pixels.
        channels: 1 or 3.
        seed: of the weights.

    Returns:
        The network, Float[B C H W] to Float[B F], and F.

    Raises:
        ConfigError: there is no network of that name.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = _build(name, side, channels)
    with torch.no_grad():
        network.eval()
        width = int(network(torch.zeros(1, channels, side, side)).shape[1])
    return network.train(), width


def _build(name: str, side: int, channels: int) -> nn.Module:
    family, _, architecture = name.partition("/")
    if family == "timm" and architecture:
        import timm

        try:
            network: Any = timm.create_model(architecture, pretrained=False, num_classes=0, in_chans=channels)
            if hasattr(network, "set_input_size"):
                network.set_input_size(img_size=side)
        except (RuntimeError, TypeError, ValueError, AssertionError) as error:
            raise ConfigError(f"method.backbone = {name}: timm does not build it: {error}") from error
        return _synced(network)
    if name == "small":
        return _Small(channels)
    if name == "preact_resnet18":
        layers: list[nn.Module] = [nn.Conv2d(channels, 64, 3, 1, 1, bias=False)]
        for inputs, outputs, stride in ((64, 64, 1), (64, 128, 2), (128, 256, 2), (256, 512, 2)):
            layers += [_PreActivation(inputs, outputs, stride), _PreActivation(outputs, outputs, 1)]
        return nn.Sequential(*layers, SyncedBatchNorm2d(512), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    if name not in RESIDUAL:
        known = ", ".join(["small", *RESIDUAL, "preact_resnet18", "timm/<architecture>"])
        raise ConfigError(f"method.backbone = {name}: must be one of {known}")
    residual: Any = getattr(torchvision.models, name)(norm_layer=SyncedBatchNorm2d)
    residual.fc = nn.Identity()
    if side <= SMALL_IMAGE:
        residual.conv1 = nn.Conv2d(channels, 64, 3, 1, 1, bias=False)
        residual.maxpool = nn.Identity()
    elif channels != 3:
        residual.conv1 = nn.Conv2d(channels, 64, 7, 2, 3, bias=False)
    built: nn.Module = residual
    return built


def _synced(network: nn.Module) -> nn.Module:
    """Let every batch norm of a network take the statistics of all workers' rows; timm's hold their activation."""
    for name, child in network.named_children():
        if not isinstance(child, nn.BatchNorm2d):
            _synced(child)
            continue
        norm = SyncedBatchNorm2d(child.num_features, child.eps, child.momentum)
        norm.load_state_dict({key: value for key, value in child.state_dict().items() if key in norm.state_dict()})
        activation = list(child.children())
        setattr(network, name, nn.Sequential(norm, *activation) if activation else norm)
    return network


class _LayerTracer(fx.Tracer):
    """Follows a network down to its layers, our norms among them."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, nn.BatchNorm2d) or super().is_leaf_module(m, module_qualified_name)


def folded(network: nn.Module) -> nn.Module:
    """Return a network for inference whose batch norms are part of the layers before them.

    In eval mode a norm is an affine map of channels, and goes into the weights of the convolution or linear layer
    before it where nothing else reads that layer's output. The result maps as the network does, to rounding, with fewer
    passes over memory.

    Args:
        network: in eval mode, whose forward is the same layers for any input; not to be used any more.
    """
    graph, layers = _LayerTracer().trace(network), dict(network.named_modules())
    for node in graph.nodes:
        norm = layers[str(node.target)] if node.op == "call_module" else None
        if not isinstance(norm, nn.BatchNorm2d):
            continue
        before = node.all_input_nodes[0]
        layer = layers[str(before.target)] if before.op == "call_module" else None
        if not isinstance(layer, nn.Conv2d | nn.Linear) or len(before.users) > 1:
            continue
        fuse: Any = fuse_conv_bn_eval if isinstance(layer, nn.Conv2d) else fuse_linear_bn_eval
        network.set_submodule(str(before.target), fuse(layer, norm))
        node.replace_all_uses_with(before)
        graph.erase_node(node)
    return fx.GraphModule(network, graph)


def mlp(*widths: int, bias: bool = True, norm: bool = True, last_norm: bool = False) -> nn.Sequential:
    """Build linear layers with batch norm (if any) and ReLU between them.

    Args:
        widths: of the input and of every layer's output.
        bias: whether the layers before a norm have one.
        norm: whether there is batch norm between layers.
        last_norm: whether the last layer is followed by batch norm as well.
    """
    layers: list[nn.Module] = []
    for place, (i, o) in enumerate(pairwise(widths)):
        is_last = place == len(widths) - 2
        layers.append(nn.Linear(i, o, bias=bias or (is_last and not last_norm)))
        if norm and (not is_last or last_norm):
            layers.append(SyncedBatchNorm1d(o))
        if not is_last:
            layers.append(nn.ReLU())
    return nn.Sequential(*layers)
