from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from rayclust.methods.cpp import CppConfig
from rayclust.methods.cpp_network import CppNetwork


def network(variant: str = "two_head", precision: str = "fp32") -> CppNetwork:
    settings = {"clusters": 2, "preset": "none", "hidden": 12, "width": 5, "variant": variant, "precision": precision}
    return CppNetwork(CppConfig.model_validate(settings), 7, seed=0)


def rows(count: int = 20) -> torch.Tensor:
    return torch.randn(count, 7, generator=torch.Generator().manual_seed(0))


def test_is_the_published_network_in_torchs_own_layers():
    ours, x = network(), rows()
    trunk = nn.Sequential(ours.first, nn.BatchNorm1d(12), nn.ReLU(), ours.second, nn.ReLU())
    assert ours.codes is not None
    for training in (True, False):
        trunk.train(training)
        hidden = trunk(x)
        for found, head in zip(ours(x, training=training), (ours.features, ours.codes), strict=True):
            torch.testing.assert_close(found, nn.functional.normalize(head(hidden), dim=1))


def test_starts_within_torchs_default_bounds_and_by_the_seed():
    ours = network()
    assert ours.first.weight.abs().max() <= 1 / math.sqrt(7)
    assert ours.first.weight.abs().max() > 0.9 / math.sqrt(7)
    assert torch.equal(ours.second.bias, network().second.bias)


def test_one_head_gives_the_features_as_codes():
    ours = network("single_head")
    z, codes = ours(rows())
    assert codes is z
    ours.copy_features_to_codes()


@pytest.mark.parametrize("variant", ["single_head", "two_head"])
def test_the_principal_start_is_the_direction_of_the_rows_components(variant: str):
    ours, x = network(variant), rows(200) * torch.tensor([9.0, 7, 5, 3, 2, 1, 0.5]) + 4.0
    ours.start_from_principal(lambda: iter([x[:50], x[50:]]))
    centered = x - x.mean(0)
    components = centered @ torch.linalg.svd(centered, full_matrices=False).Vh[:5].T
    wanted = nn.functional.normalize(components, dim=1)
    for found in ours(x, training=True):
        torch.testing.assert_close(found @ found.T, wanted @ wanted.T, atol=1e-3, rtol=0)


def test_the_principal_start_bears_rows_of_fewer_dimensions_than_outputs():
    ours, x = network(), rows(40)
    x[:, 3:] = 1.0
    ours.start_from_principal(lambda: iter([x]))
    z, _ = ours(x, training=True)
    assert z.isfinite().all()
    assert z.norm(dim=1).allclose(torch.ones(40), atol=1e-5)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_narrow_products_give_float32_unit_rows_near_the_wide_ones(precision: str):
    z, _ = network(precision=precision)(rows(), training=True)
    wide, _ = network()(rows(), training=True)
    assert z.dtype == torch.float32
    assert z.norm(dim=1).allclose(torch.ones(20), atol=1e-6)
    torch.testing.assert_close(z, wide, atol=0.05, rtol=0)
