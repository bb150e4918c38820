"""Vision transformers saved under torchvision's or SWAG's names, under timm's names."""

from __future__ import annotations

import re

from torch import Tensor

_RULES = (
    (r"^conv_proj\.", "patch_embed.proj."),
    (r"^class_token$", "cls_token"),
    (r"^encoder\.pos_embedding$", "pos_embed"),
    (r"^encoder\.ln\.", "norm."),
    (r"^encoder\.layers\.(?:encoder_)?layer_(\d+)\.", r"blocks.\1."),
    (r"\.ln_([12])\.", r".norm\1."),
    (r"\.self_attention\.in_proj_", ".attn.qkv."),
    (r"\.self_attention\.out_proj\.", ".attn.proj."),
    (r"\.mlp\.(?:linear_1|0)\.", ".mlp.fc1."),
    (r"\.mlp\.(?:linear_2|3)\.", ".mlp.fc2."),
)


def renamed(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights by timm's names.

    Args:
        state: any weights by name; returned as they are unless they are such a transformer's.

    Returns:
        The same tensors. SWAG's position embedding [1+P, 1, D] becomes [1, 1+P, D].
    """
    if "encoder.pos_embedding" not in state or "conv_proj.weight" not in state:
        return state
    result = {}
    for key, value in state.items():
        name = key
        for pattern, replacement in _RULES:
            name = re.sub(pattern, replacement, name)
        result[name] = value.transpose(0, 1) if name == "pos_embed" and value.shape[1] == 1 else value
    return result
