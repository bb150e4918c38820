"""Optimiser steps on any method by autograd, over one worker or many."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from rayclust import collectives
from rayclust.methods.base import Batch, Method, TrainedConfig
from rayclust.training.optimizer import build_optimizer, set_rates


class GradientSteps:
    """Steps with gradients averaged over the workers.

    Args:
        method: on its device.
        config: the optimiser's settings.
    """

    def __init__(self, method: Method, config: TrainedConfig) -> None:
        self.method, self.config = method, config
        self.optimizer = build_optimizer(method, config)
        self.module = _parallel(method)

    def take(self, batch: Batch, learning_rate: float, weight_decay: float) -> dict[str, Tensor]:
        """One whole step; see `Steps`."""
        set_rates(self.optimizer, learning_rate, weight_decay)
        losses = self.module(batch)
        self.optimizer.zero_grad(set_to_none=True)
        (losses["loss"] * batch.share).backward()
        if self.config.clip_norm is not None:
            nn.utils.clip_grad_norm_(self.method.parameters(), self.config.clip_norm)
        for parameter in self.method.frozen(batch):
            parameter.grad = None
        self.optimizer.step()
        self.method.after_step(batch.step)
        return {name: value.detach() for name, value in losses.items()}

    def state(self) -> dict[str, Tensor]:
        """Each parameter's state as "position.key"; positions run through the groups, numbers become float64."""
        state = self.optimizer.state_dict()["state"]
        return {f"{n}.{key}": _as_tensor(value) for n, entries in state.items() for key, value in entries.items()}

    def load(self, state: dict[str, Tensor]) -> None:
        """Takes back what `state` gave."""
        nested: dict[int, dict[str, Tensor]] = {}
        for name, value in state.items():
            position, _, key = name.partition(".")
            nested.setdefault(int(position), {})[key] = value
        self.optimizer.load_state_dict({"state": nested, "param_groups": self.optimizer.state_dict()["param_groups"]})


def _parallel(method: Method) -> nn.Module:
    if collectives.world_size() == 1:
        return method
    device = next(method.parameters()).device
    return DistributedDataParallel(
        method,
        device_ids=[device] if device.type == "cuda" else None,
        broadcast_buffers=False,
        process_group=collectives.team().group,
    )


def _as_tensor(value: object) -> Tensor:
    return value if isinstance(value, Tensor) else torch.tensor(value, dtype=torch.float64)
