"""CPP's optimiser steps: stochastic gradient descent with a rate and a decay of their own for the cluster head."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from rayclust import collectives
from rayclust.methods.base import Batch

if TYPE_CHECKING:
    from rayclust.methods.cpp import Cpp

FIRST_SCALE, GROWS_AFTER, FACTOR = 2.0**12, 2_000, 2.0
"""Of the loss in fp16: grows after so many good steps, shrinks at once where a gradient is not finite."""


class CppSteps:
    """Steps with gradients averaged over the workers, and a scaled loss for fp16; see `Steps`.

    Args:
        method: on its device.
    """

    def __init__(self, method: Cpp) -> None:
        self.method = method
        codes = [] if method.network.codes is None else list(method.network.codes.parameters())
        own = {id(parameter) for parameter in codes}
        features = [parameter for parameter in method.parameters() if id(parameter) not in own]
        groups = [{"params": group} for group in (features, codes) if group]
        self.optimizer = torch.optim.SGD(groups, lr=0.0, momentum=0.9, fused=True)
        self._parameters: list[nn.Parameter] = [*features, *codes]
        scale = FIRST_SCALE if method.config.precision == "fp16" else 1.0
        self._scale = torch.tensor([scale, 0.0], dtype=torch.float64)
        """The factor, and good steps since it changed."""

    def take(self, batch: Batch, learning_rate: float, weight_decay: float) -> dict[str, Tensor]:
        """One whole step."""
        config = self.method.config
        rates = ((learning_rate, weight_decay), (learning_rate * config.code_rate, config.code_weight_decay))
        for group, (rate, decay) in zip(self.optimizer.param_groups, rates, strict=False):
            group["lr"], group["weight_decay"] = rate, decay
        losses = self.method.losses(batch)
        self.optimizer.zero_grad(set_to_none=True)
        scaled: Tensor = losses["loss"] * (batch.share * float(self._scale[0]))
        torch.autograd.backward(scaled)
        gradients = [p.grad for p in self._parameters if p.grad is not None]
        if collectives.world_size() > 1:
            _average(gradients)
        if self._unscaled(gradients):
            self.optimizer.step()
        self.method.after_step(batch.step)
        return {name: value.detach() for name, value in losses.items()}

    def _unscaled(self, gradients: list[Tensor]) -> bool:
        """Divides by the factor; whether all gradients are finite, which they count as where there is no factor."""
        if self.method.config.precision != "fp16":
            return True
        if not all(bool(gradient.isfinite().all()) for gradient in gradients):
            self._scale = torch.tensor([max(1.0, float(self._scale[0]) / FACTOR), 0.0], dtype=torch.float64)
            return False
        for gradient in gradients:
            gradient.div_(float(self._scale[0]))
        self._scale[1] += 1.0
        if self._scale[1] >= GROWS_AFTER:
            self._scale = torch.tensor([float(self._scale[0]) * FACTOR, 0.0], dtype=torch.float64)
        return True

    def state(self) -> dict[str, Tensor]:
        """Each parameter's momentum as "position.momentum_buffer", and the loss's scale."""
        state = {"scale": self._scale.clone()}
        for position, parameter in enumerate(self._parameters):
            found = self.optimizer.state.get(parameter, {}).get("momentum_buffer")
            if found is not None:
                state[f"{position}.momentum_buffer"] = found
        return state

    def load(self, state: dict[str, Tensor]) -> None:
        """Takes back what `state` gave."""
        self._scale = state["scale"].clone()
        self.optimizer.state.clear()
        for position, parameter in enumerate(self._parameters):
            found = state.get(f"{position}.momentum_buffer")
            if found is not None:
                self.optimizer.state[parameter] = {"momentum_buffer": found.to(parameter, copy=True)}


def _average(gradients: list[Tensor]) -> None:
    """Means over workers, in one exchange."""
    flat = collectives.all_mean(torch.cat([gradient.flatten() for gradient in gradients]))
    for gradient, mean in zip(gradients, torch.split(flat, [gradient.numel() for gradient in gradients]), strict=True):
        gradient.copy_(mean.view_as(gradient))
