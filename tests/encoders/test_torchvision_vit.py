from __future__ import annotations

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn
from torchvision.models import vision_transformer as torchvision_vit

from rayclust.encoders.torchvision_vit import renamed


def theirs() -> torchvision_vit.VisionTransformer:
    torch.manual_seed(0)
    network = torchvision_vit.VisionTransformer(32, 8, 2, 2, 16, 24)
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.3)
    network.heads = nn.Identity()
    return network.eval()


def as_swag(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The names and the layout of the position embedding that SWAG's own files have."""
    names = {key.replace("encoder_layer_", "layer_"): value for key, value in state.items()}
    names = {key.replace("mlp.0.", "mlp.linear_1.").replace("mlp.3.", "mlp.linear_2."): v for key, v in names.items()}
    return {key: value.transpose(0, 1) if key == "encoder.pos_embedding" else value for key, value in names.items()}


@pytest.mark.parametrize("swag", [False, True])
def test_the_same_rows_under_other_names(swag: bool) -> None:
    network = theirs()
    state = network.state_dict()
    ours = VisionTransformer(
        img_size=32, patch_size=8, depth=2, num_heads=2, embed_dim=16, mlp_ratio=1.5, num_classes=0
    ).eval()
    ours.load_state_dict(renamed(as_swag(state) if swag else state))
    x = torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        assert torch.allclose(ours(x), network(x), atol=1e-5)


def test_other_weights_pass_unchanged() -> None:
    state = {"blocks.0.ln_1.weight": torch.ones(1)}
    assert renamed(state) is state
