from __future__ import annotations

from typing import Any

import pytest
import torch

from rayclust.methods import Temi, TemiConfig, build, temi_losses
from rayclust.methods.base import Batch
from rayclust.methods.temi_losses import goes_in_chunks

D, K, B = 6, 4, 9


def _method(**settings: Any) -> Temi:
    written = {"clusters": K, "preset": "none", "heads": 3, "hidden": 8, "bottleneck": 5, "batch_size": B, **settings}
    method = build(TemiConfig.model_validate(written), D, 50, seed=0).double()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in method.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    assert isinstance(method, Temi)
    return method


def _batch(views: int = 2) -> Batch:
    x = torch.randn(views, B, D, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    return Batch(x, torch.arange(B), 0, 0)


@pytest.mark.parametrize("settings", [{}, {"loss": "pmi"}, {"loss": "wmi"}, {"layers": 3, "final_gelu": True}])
def test_chunks_have_losses_gradients_agreement_and_marginal_of_the_whole(settings: dict[str, Any]):
    found = []
    for form in (temi_losses.whole, temi_losses.in_chunks):
        method = _method(**settings)
        losses, trust = form(method, _batch())
        losses.sum().backward()
        gradients = [p.grad for p in method.student.parameters()]
        found.append([losses.detach(), trust, method.marginal.shares, *gradients])
    for plain, chunked in zip(*found, strict=True):
        torch.testing.assert_close(chunked, plain, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    ("settings", "views", "expected"),
    [
        ({}, 2, True),
        ({"loss": "pmi"}, 2, True),
        ({"loss": "wmi"}, 2, True),
        ({"loss": "wmi", "entropy_weight": 1.0}, 2, False),
        ({"loss": "scan"}, 2, False),
        ({"positive_pmi": True}, 2, False),
        ({}, 4, False),
    ],
)
def test_which_losses_add_up(monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any], views: int, expected: bool):
    method = _method(**settings)
    assert not goes_in_chunks(method, _batch(views))
    monkeypatch.setattr(temi_losses, "LEAST_LOGITS", 3 * 2 * B * K)
    assert goes_in_chunks(method, _batch(views)) == expected


def test_a_method_takes_chunks_by_itself(monkeypatch: pytest.MonkeyPatch):
    plain = _method().losses(_batch())
    monkeypatch.setattr(temi_losses, "LEAST_LOGITS", 0)
    chunked = _method().losses(_batch())
    assert plain.keys() == chunked.keys() == {"loss", "head_loss", "head_agreement"}
    for name, value in plain.items():
        torch.testing.assert_close(chunked[name], value)
