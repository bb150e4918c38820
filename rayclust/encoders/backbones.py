"""The backbones of the TEMI paper under this library's names."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Backbone:
    """One backbone of TEMI's code and the settings that give it here."""

    temi: str
    """Its name in TEMI's code."""
    name: str
    """`encoder.name`. A tag in it, beside a file, only says how images are prepared: with ImageNet's colours."""
    tag: str | None
    """`encoder.pretrained`; None where no hub has the weights and `file` must be fetched."""
    file: str = ""
    """File that its authors publish, for `encoder.pretrained`."""
    options: dict[str, Any] = field(default_factory=dict)
    """`encoder.options`."""
    note: str = ""
    """What differs from TEMI's own, if anything."""


_NO_LAST_NORM = "another training run than torchvision's, which TEMI took without the last LayerNorm"
_COLOURS = "its own colours (0.5); TEMI gave it ImageNet's"
_TRANSLATED = "torchvision's file; its names are translated"

BACKBONES: tuple[Backbone, ...] = (
    Backbone("dino_resnet50", "timm/resnet50", None, "dino_resnet50_pretrain.pth"),
    Backbone("dino_vits16", "timm/vit_small_patch16_224", "dino"),
    Backbone("dino_vitb16", "timm/vit_base_patch16_224", "dino"),
    Backbone("timm_resnet50", "timm/resnet50", "a1_in1k"),
    Backbone("timm_vit_small_patch16_224", "timm/vit_small_patch16_224", "augreg_in21k_ft_in1k", note=_COLOURS),
    Backbone("timm_vit_base_patch16_224", "timm/vit_base_patch16_224", "augreg_in21k_ft_in1k", note=_COLOURS),
    Backbone("timm_vit_large_patch16_224", "timm/vit_large_patch16_224", "augreg_in21k_ft_in1k", note=_COLOURS),
    Backbone("convnext_small", "timm/convnext_small", "fb_in1k", note=_NO_LAST_NORM),
    Backbone("convnext_base", "timm/convnext_base", "fb_in1k", note=_NO_LAST_NORM),
    Backbone("convnext_large", "timm/convnext_large", "fb_in1k", note=_NO_LAST_NORM),
    Backbone("msn_vit_small", "timm/vit_small_patch16_224.dino", None, "vits16_800ep.pth.tar"),
    Backbone("msn_vit_base", "timm/vit_base_patch16_224.dino", None, "vitb16_600ep.pth.tar"),
    Backbone("msn_vit_large", "timm/vit_large_patch16_224.mae", None, "vitl16_600ep.pth.tar"),
    Backbone(
        "mocov3_vit_small",
        "timm/vit_small_patch16_224.dino",
        None,
        "vit-s-300ep.pth.tar",
        {"num_heads": 12},
        "MoCo v3 trained it with 12 heads; TEMI's code builds it with 6",
    ),
    Backbone("mocov3_vit_base", "timm/vit_base_patch16_224.dino", None, "vit-b-300ep.pth.tar"),
    Backbone("clip_ViT-B/16", "open_clip/ViT-B-16", "openai"),
    Backbone("clip_ViT-L/14", "open_clip/ViT-L-14", "openai"),
    Backbone("clip_RN50", "open_clip/RN50", "openai"),
    Backbone("mae_vit_base", "timm/vit_base_patch16_224", "mae"),
    Backbone("mae_vit_large", "timm/vit_large_patch16_224", "mae"),
    Backbone("mae_vit_huge", "timm/vit_huge_patch14_224", "mae"),
    Backbone("clip_ViT-B/32", "open_clip/ViT-B-32", "openai"),
    Backbone("swag_regnety_16gf", "timm/regnety_160", "swag_lc_in1k"),
    Backbone("swag_regnety_32gf", "timm/regnety_320", "swag_lc_in1k"),
    Backbone("swag_vit_b16", "timm/vit_base_patch16_224.dino", None, "vit_b_16_lc_swag-4e70ced5.pth", note=_TRANSLATED),
    Backbone("swag_vit_l16", "timm/vit_large_patch16_224.mae", None, "vit_l_16_lc_swag-4d563306.pth", note=_TRANSLATED),
    Backbone("resnet50 (torchvision)", "timm/resnet50", "tv_in1k", note="TEMI's code leaves it untrained"),
)
"""The 21 names that TEMI lists, then others that its code can load."""


def backbone_table() -> str:
    """The table of docs/methods.md, in Markdown."""
    lines = ["| TEMI | `encoder.name` | `encoder.pretrained` | `encoder.options` | note |", "|---|---|---|---|---|"]
    for b in BACKBONES:
        pretrained = f"`{b.tag}`" if b.tag else f"path to `{b.file}`"
        options = ", ".join(f"{key}: {value}" for key, value in b.options.items())
        lines.append(f"| {b.temi} | `{b.name}` | {pretrained} | {options} | {b.note} |")
    return "\n".join(lines) + "\n"
