from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import timm
import torch
import yaml
from safetensors.torch import save_file
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torchvision.models import vision_transformer as torchvision_vit

from rayclust.encoders.decode import decode
from rayclust.encoders.network import TorchEncoder
from rayclust.encoders.settings import EncoderConfig
from rayclust.encoders.timm import build_timm, fold_batch_norms, from_torchvision
from rayclust.errors import ConfigError
from tests.encoders.networks import hub_file, noise, seen, tiny_timm


def built(folder: Path, state: Any, name: str = "timm/test_vit", **options: Any) -> TorchEncoder:
    torch.save(state, folder / "w.pt")
    return build_timm(EncoderConfig(name=name, pretrained="w.pt", **options), folder / "w.pt", "cpu")


def rows_of(network: Any, encoder: TorchEncoder, images: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        rows = network(seen(images, encoder.mean, encoder.std)).numpy()
    return np.asarray(rows / np.linalg.norm(rows, axis=1, keepdims=True))


@pytest.mark.parametrize("name", ["test_vit", "test_resnet", "test_convnext", "test_efficientnet"])
def test_rows_are_timms_own(tmp_path: Path, name: str) -> None:
    network = tiny_timm(name)
    encoder = built(tmp_path, network.state_dict(), f"timm/{name}")
    images = noise(3, encoder.preprocess.shape[0])
    assert encoder.preprocess.shape == (*network.pretrained_cfg["input_size"][1:], 3)
    assert np.allclose(encoder.encode_images(images), rows_of(network, encoder, images), atol=1e-5)
    assert encoder.dimension == network.num_features


def test_safetensors_and_torch_files_give_the_same_bytes(tmp_path: Path) -> None:
    state = tiny_timm().state_dict()
    save_file({key: value.contiguous() for key, value in state.items()}, tmp_path / "w.safetensors")
    config = EncoderConfig(name="timm/test_vit", pretrained="w.safetensors")
    safe, images = build_timm(config, tmp_path / "w.safetensors", "cpu"), noise(2, 160)
    assert np.array_equal(safe.encode_images(images), built(tmp_path, state).encode_images(images))


def test_checkpoints_of_training_scripts(tmp_path: Path) -> None:
    images, state = noise(2, 160), tiny_timm().state_dict()
    plain = built(tmp_path, state).encode_images(images)
    other = {key: torch.zeros_like(value) for key, value in state.items()}

    def under(prefix: str, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {prefix + key: value for key, value in tensors.items()}

    head = {"head.weight": torch.ones(5, 64), "head.bias": torch.ones(5)}
    for checkpoint in (
        {"model": state | head},  # MAE, DeiT
        {"teacher": under("backbone.", state) | under("head.", head), "args": argparse.Namespace()},  # DINO
        {
            "encoder": under("module.", other),
            "target_encoder": under("module.", state | {"fc.fc1.weight": head["head.weight"]}),
        },
        {
            "state_dict": under("module.base_encoder.", other | head)
            | under("module.momentum_encoder.", state | head)
            | {"module.predictor.0.weight": torch.ones(3, 3)}
        },  # MoCo v3
    ):
        assert np.array_equal(built(tmp_path, checkpoint).encode_images(images), plain)


def test_other_image_sizes(tmp_path: Path) -> None:
    encoder = built(tmp_path, tiny_timm().state_dict(), image_size=96)
    assert encoder.preprocess.shape == (96, 96, 3)
    wide = built(tmp_path, tiny_timm("test_resnet").state_dict(), "timm/test_resnet", image_size=(64, 128))
    assert wide.encode_images(np.zeros((1, 64, 128, 3), np.uint8)).shape == (1, wide.dimension)
    with pytest.raises(ConfigError, match=r"encoder\.image_size = 3: timm/test_vit does not take it"):
        built(tmp_path, tiny_timm().state_dict(), image_size=3)


def test_the_architecture_says_how_it_sees_unless_told(tmp_path: Path) -> None:
    own = built(tmp_path, tiny_timm().state_dict()).preprocess
    assert (own.resize, own.interpolation, own.crop_fraction) == ("crop", "bicubic", 0.95)
    told = built(tmp_path, tiny_timm().state_dict(), resize="crop", mean=(0.1, 0.2, 0.3), std=(1.0, 1.0, 2.0))
    assert told.preprocess.crop_fraction == 1.0
    assert (told.mean, told.std) == ((0.1, 0.2, 0.3), (1.0, 1.0, 2.0))
    assert built(tmp_path, tiny_timm().state_dict(), resize="squash").preprocess.resize == "squash"


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("timm/test_vitt", {}, "encoder.name = timm/test_vitt: timm has no such architecture; near: test_vit"),
        ("timm/test_vit.nope", {}, "encoder.pretrained = nope: not a tag of timm/test_vit; it has: r160_in1k"),
        (
            "timm/test_vit",
            {"options": {"no_such": 1}},
            "encoder.options = {'no_such': 1}: timm/test_vit cannot be built so",
        ),
        ("timm/test_vit2", {}, "encoder.pretrained = w.pt: does not fit timm/test_vit2: missing: "),
    ],
)
def test_mistakes_give_one_clear_line(tmp_path: Path, name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        built(tmp_path, tiny_timm().state_dict(), name, **options)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_tags_say_where_their_weights_are() -> None:
    for config in (
        EncoderConfig(name="timm/vit_small_patch16_224", pretrained="dino"),
        EncoderConfig(name="timm/vit_small_patch16_224.dino"),
    ):
        file = hub_file(config)
        assert (file.repository, file.names[0]) == ("timm/vit_small_patch16_224.dino", "model.safetensors")
        assert file.name == "timm/vit_small_patch16_224.dino"
    assert hub_file(EncoderConfig(name="timm/mobilenetv2_100")).name == "timm/mobilenetv2_100.ra_in1k"


def test_weights_on_no_hub_are_asked_for() -> None:
    with pytest.raises(ConfigError, match="are on no hub: fetch gcvit_base"):
        hub_file(EncoderConfig(name="timm/gcvit_base.in1k"))
    with pytest.raises(ConfigError, match="timm knows no weights of timm/test_vit_relpos"):
        hub_file(EncoderConfig(name="timm/test_vit_relpos"))


@pytest.mark.parametrize(
    ("weights", "data", "settings"),
    [
        ("a", "imagenette_val3k", {"image_size": 224}),
        ("a", "cifar10_test", {"image_size": 160}),
        ("b", "imagenette_val3k", {"image_size": 224}),
    ],
)
def test_photographs_give_their_stored_features(
    shared_data: Path, weights: str, data: str, settings: dict[str, Any]
) -> None:
    path = shared_data / "encoder" / f"mobilenetv2_100_{weights}.safetensors"
    if weights == "a":
        settings = settings | {"options": {"pad_type": "same"}, "mean": (0.5,) * 3, "std": (0.5,) * 3}
    config = EncoderConfig(name="timm/mobilenetv2_100", pretrained=str(path), resize="squash", **settings)
    encoder = build_timm(config, path, "cpu")
    files = pq.read_table(shared_data / data / "images.parquet", columns=["image"])["image"][::100].to_pylist()[:30]
    images = np.stack([decode(file, encoder.preprocess) for file in files])
    stored = np.load(shared_data / data / f"features_mnv2{weights}_f16.npy")[::100][:30].astype(np.float32)
    stored /= np.linalg.norm(stored, axis=1, keepdims=True)
    assert (encoder.encode_images(images) * stored).sum(1).min() > 0.9998


# The backbones of the TEMI paper


def backbones() -> list[dict[str, str]]:
    """The table in docs/methods.md of the backbones of the TEMI paper, by its column names."""
    page = (Path(__file__).parents[2] / "docs" / "methods.md").read_text(encoding="utf-8")
    lines = page[page.index("| TEMI | `encoder.name`") :].partition("\n\n")[0].splitlines()
    columns, _, *rows = ([cell.strip().replace("`", "") for cell in line.split("|")[1:-1]] for line in lines)
    return [dict(zip(columns, row, strict=True)) for row in rows]


def test_the_documented_backbones_are_those_of_temi_and_more() -> None:
    names = [backbone["TEMI"] for backbone in backbones()]
    assert len(set(names)) == len(names) >= 27
    assert set(names) >= {"dino_vitb16", "msn_vit_large", "mocov3_vit_small", "clip_ViT-B/16", "mae_vit_huge"}


@pytest.mark.parametrize("backbone", backbones(), ids=lambda backbone: backbone["TEMI"])
def test_each_documented_backbone_exists(backbone: dict[str, str]) -> None:
    pretrained = backbone["encoder.pretrained"]
    options = yaml.safe_load(f"{{{backbone['encoder.options']}}}")
    name, file = backbone["encoder.name"], pretrained.removeprefix("path to ")
    config = EncoderConfig(name=name, pretrained=file, options=options)
    assert (config.weights_uri is None) == (file == pretrained)
    if config.weights_uri is None:
        assert hub_file(config).name == f"{name}.{pretrained}"
    else:
        assert timm.is_model(config.architecture)


# Weights of torchvision's and SWAG's transformers


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
    ours.load_state_dict(from_torchvision(as_swag(state) if swag else state))
    x = torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        assert torch.allclose(ours(x), network(x), atol=1e-5)


def test_other_weights_pass_unchanged() -> None:
    state = {"blocks.0.ln_1.weight": torch.ones(1)}
    assert from_torchvision(state) is state


# Folding of batch norms


EXAMPLE = torch.linspace(-1, 1, 3 * 32 * 32).view(1, 3, 32, 32)


def stirred(network: nn.Module) -> nn.Module:
    """Norms as after training: no statistic is what it was at the start."""
    torch.manual_seed(3)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.weight, module.bias, module.running_mean, module.running_var):
                assert tensor is not None
                tensor.data.uniform_(0.5, 1.5)
    return network.eval()


def norms(network: nn.Module) -> int:
    return sum(isinstance(module, nn.BatchNorm2d) for module in network.modules())


class Backwards(nn.Module):
    """Its norm comes first, though it is named after the convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.conv(self.norm(x)).mean((2, 3))
        return y


@pytest.mark.parametrize("name", ["test_resnet", "test_efficientnet", "test_byobnet"])
def test_the_function_stays_and_the_norms_go(name: str) -> None:
    network = stirred(tiny_timm(name))
    shorter = fold_batch_norms(network, EXAMPLE)
    assert norms(shorter) < norms(network)
    with torch.inference_mode():
        x = torch.randn(2, 3, 32, 32)
        assert torch.allclose(shorter(x), network(x), rtol=1e-3, atol=1e-4)


def test_the_network_itself_is_not_changed() -> None:
    network = stirred(tiny_timm("test_resnet"))
    before = {key: value.clone() for key, value in network.state_dict().items()}
    fold_batch_norms(network, EXAMPLE)
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())


def test_what_cannot_be_folded_is_left_alone() -> None:
    backwards = stirred(Backwards())
    assert fold_batch_norms(backwards, EXAMPLE) is backwards
    plain = tiny_timm("test_vit")
    assert fold_batch_norms(plain, EXAMPLE) is plain
