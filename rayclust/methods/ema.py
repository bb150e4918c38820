"""The teacher as the moving average of the student, and the cosine by which its momentum moves."""

from __future__ import annotations

import math

import torch
from torch import nn


def cosine(start: float, end: float, step: int, steps: int) -> float:
    """Half a cosine from `start` at step 0 towards `end`, which it would reach at step `steps`.

    Args:
        start: value at step 0.
        end: value at and after `steps`.
        step: from 0.
        steps: length; 0 is over at once.

    Source: arXiv 1608.03983, eq. 5, without restarts.
    """
    if start == end or step >= steps:
        return end
    return end + 0.5 * (start - end) * (1.0 + math.cos(math.pi * step / steps))


@torch.no_grad()
def follow(teacher: nn.Module, student: nn.Module, momentum: float) -> None:
    """θ_t ← m·θ_t + (1−m)·θ_s over all parameters; buffers stay the teacher's own.

    Args:
        teacher: changed in place.
        student: of the same class and sizes.
        momentum: m in [0, 1]; 1 leaves the teacher as it is.

    Source: arXiv 1703.01780, eq. 2.
    """
    if momentum < 1.0:
        theirs = [p.detach() for p in student.parameters()]
        torch._foreach_lerp_(list(teacher.parameters()), theirs, 1.0 - momentum)
