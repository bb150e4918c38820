"""Optimisers over a method's parameters: AdamW, SGD and LARS, with weight decay on matrices only."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from rayclust.methods.base import Method, TrainedConfig


class Lars(torch.optim.Optimizer):
    """Layer-wise adaptive rates with momentum.

    Groups with `adapts` scale each step by η·‖w‖/‖g‖; tensors in `stacked` hold one layer per first index, each with
    its own norms.

    Source: arXiv 1708.03888, algorithm 1.
    """

    def __init__(
        self,
        groups: Iterable[dict[str, Any]],
        momentum: float = 0.9,
        trust: float = 0.001,
        stacked: Iterable[nn.Parameter] = (),
    ) -> None:
        self._stacked = {id(parameter) for parameter in stacked}
        defaults = {"lr": 0.0, "weight_decay": 0.0, "momentum": momentum, "trust": trust, "adapts": True}
        super().__init__(groups, defaults)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One step for every parameter that has a gradient."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._step(parameter, parameter.grad, group)

    def _step(self, parameter: nn.Parameter, gradient: Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if group["adapts"]:
            gradient = gradient + group["weight_decay"] * parameter
            axes = tuple(range(1 if id(parameter) in self._stacked else 0, parameter.dim()))
            gradient = gradient * _trust_ratio(parameter, gradient, group["trust"], axes)
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        velocity: Tensor = state["momentum_buffer"]
        velocity.mul_(group["momentum"]).add_(gradient)
        parameter.add_(velocity, alpha=-group["lr"])


def _trust_ratio(parameter: Tensor, gradient: Tensor, trust: float, axes: tuple[int, ...]) -> Tensor:
    """η·‖w‖/‖g‖ over the axes of a layer, 1 where either is zero."""
    length = torch.linalg.vector_norm(parameter, dim=axes, keepdim=True)
    slope = torch.linalg.vector_norm(gradient, dim=axes, keepdim=True)
    ratio = trust * length / slope
    return torch.where((length > 0) & (slope > 0), ratio, torch.ones_like(ratio))


def build_optimizer(method: Method, config: TrainedConfig) -> torch.optim.Optimizer:
    """The config's optimiser over the method's trainable parameters.

    Returns:
        An optimiser with two groups, each with a flag `decays`; learning rate and decay are set before every step.
    """
    decayed: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    stacked: list[nn.Parameter] = []
    for name, parameter in method.named_parameters():
        if parameter.requires_grad:
            (decayed if method.is_decayed(name, parameter) else others).append(parameter)
            if method.is_stacked(name, parameter):
                stacked.append(parameter)
    groups = [{"params": decayed, "decays": True}, {"params": others, "decays": False, "weight_decay": 0.0}]
    if config.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=0.0, momentum=0.9)
    if config.optimizer == "lars":
        return Lars([{**group, "adapts": group["decays"]} for group in groups], stacked=stacked)
    return torch.optim.AdamW(groups, lr=0.0, weight_decay=0.0, fused=True)  # one pass over memory


def set_rates(optimizer: torch.optim.Optimizer, learning_rate: float, weight_decay: float) -> None:
    """Sets the learning rate of all groups, and the weight decay of those that decay."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
        if group["decays"]:
            group["weight_decay"] = weight_decay
