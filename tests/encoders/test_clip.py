from __future__ import annotations

import logging
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from rayclust.encoders.clip import ClipEncoder, build_clip
from rayclust.encoders.decode import decode
from rayclust.encoders.settings import EncoderConfig
from rayclust.errors import ConfigError
from tests.encoders import picture_files as make
from tests.encoders.networks import hub_file, noise, tiny_clip

PHRASES = ["a photo of a cat", "a dog", "a very " + "long " * 100 + "phrase", ""]


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("clip") / "w.safetensors"
    save_file({key: value.contiguous() for key, value in tiny_clip().state_dict().items()}, path)
    return path


def built(path: Path, **options: Any) -> ClipEncoder:
    return build_clip(EncoderConfig(name="open_clip/tiny-clip", pretrained=str(path), **options), path, "cpu")


def test_images_give_open_clips_own_rows(weights: Path) -> None:
    encoder = built(weights)
    transform = open_clip.image_transform(32, is_train=False)
    photographs = [Image.fromarray(image // 2 + 64) for image in (noise(1, 40)[0], noise(1, 70)[0][:50])]
    images = np.stack([decode(make.saved(photo, "PNG"), encoder.preprocess) for photo in photographs])
    with torch.no_grad():
        wanted = tiny_clip().encode_image(torch.stack([transform(p) for p in photographs]), normalize=True).numpy()
    # Pixels may differ by one step out of 255, see decode.
    assert np.abs(encoder.encode_images(images) - wanted).max() < 2e-3
    assert np.abs((encoder.encode_images(images) * wanted).sum(1) - 1).max() < 1e-5


def test_phrases_give_open_clips_own_rows(weights: Path) -> None:
    encoder = built(weights)
    with torch.no_grad():
        wanted = tiny_clip().encode_text(open_clip.get_tokenizer("tiny-clip")(PHRASES), normalize=True).numpy()
    rows = encoder.encode_texts(PHRASES)
    assert encoder.has_text
    assert rows.shape == (4, encoder.dimension) == (4, 16)
    assert np.allclose(rows, wanted, atol=1e-6)
    assert np.allclose(encoder.encode_texts(PHRASES * 40)[-4:], rows, atol=1e-6)
    assert encoder.encode_texts([]).shape == (0, 16)
    # A phrase alone has the same row, from its own tokens: start, "a", "dog", end.
    seen = list[int]()
    encoder.network.transformer.register_forward_pre_hook(lambda _, given: seen.append(given[0].shape[1]))
    alone = np.concatenate([encoder.encode_texts([phrase]) for phrase in PHRASES])
    assert np.allclose(alone, rows, atol=1e-6)
    assert seen == [7, 4, 77, 2]


def test_all_kinds_of_files_give_the_same_bytes(tmp_path: Path, weights: Path) -> None:
    images, rows = noise(3, 32), built(weights).encode_images(noise(3, 32))
    state = tiny_clip().state_dict()
    for checkpoint in (
        state,
        {"epoch": 1, "state_dict": {f"module.{key}": value for key, value in state.items()}},
        {key: value.reshape(1) if key == "logit_scale" else value for key, value in state.items()},
    ):
        torch.save(checkpoint, tmp_path / "w.pt")
        assert np.array_equal(built(tmp_path / "w.pt").encode_images(images), rows)


def test_openais_own_weights_bring_their_activation(tmp_path: Path, weights: Path) -> None:
    extras = {"input_resolution": 32, "context_length": 77, "vocab_size": 49408}
    torch.save(tiny_clip().state_dict() | {k: torch.tensor(v) for k, v in extras.items()}, tmp_path / "w.pt")
    plain, theirs, images = built(weights), built(tmp_path / "w.pt"), noise(3, 32)
    quick = built(weights, options={"quick_gelu": True})
    assert np.array_equal(theirs.encode_images(images), quick.encode_images(images))
    assert not np.allclose(theirs.encode_images(images), plain.encode_images(images), atol=1e-4)


def test_other_image_sizes(weights: Path) -> None:
    encoder = built(weights, image_size=48)
    assert encoder.preprocess.shape == (48, 48, 3)
    assert encoder.encode_images(noise(1, 48)).shape == (1, 16)


def test_a_file_without_a_tag_sees_as_all_tags_of_its_architecture_do(weights: Path) -> None:
    encoder = built(weights)
    assert (encoder.mean, encoder.std) == (open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD)
    assert (encoder.preprocess.resize, encoder.preprocess.interpolation) == ("crop", "bicubic")
    assert built(weights, resize="squash", mean=(0.5,) * 3).mean == (0.5,) * 3


def test_building_says_nothing_and_leaves_logging_alone(weights: Path, caplog: pytest.LogCaptureFixture) -> None:
    handlers = list(logging.getLogger().handlers)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        built(weights)
    assert not [record for record in caplog.records if record.name == "root"]
    assert logging.getLogger().handlers == handlers


def test_the_seed_of_the_process_is_left_alone(weights: Path) -> None:
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    built(weights)
    assert torch.equal(torch.rand(1), expected)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("open_clip/ViT-L-15", {}, "open_clip has no such architecture; near: ViT-L-"),
        ("open_clip/tiny-clip", {"options": {"no_such": 1}}, "open_clip/tiny-clip cannot be built so: "),
        (
            "open_clip/ViT-B-32.nope",
            {},
            "encoder.pretrained = nope: not a tag of open_clip/ViT-B-32.nope; it has: openai",
        ),
    ],
)
def test_mistakes_give_one_clear_line(weights: Path, name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        build_clip(EncoderConfig(name=name, pretrained=str(weights), **options), weights, "cpu")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_weights_of_another_network_are_refused(tmp_path: Path) -> None:
    state = dict(tiny_clip().state_dict())
    state["visual.proj"] = torch.ones(32, 99)
    del state["text_projection"]
    torch.save(state, tmp_path / "w.pt")
    message = r"does not fit open_clip/tiny-clip: missing: text_projection; of another shape: visual.proj \(32, 99\)"
    with pytest.raises(ConfigError, match=message):
        built(tmp_path / "w.pt")


def test_tokenizers_that_are_not_here_are_asked_for(weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> None:
        raise OSError(f"no tokenizer\nfor {name}")

    monkeypatch.setattr(open_clip, "get_tokenizer", absent)
    with pytest.raises(
        ConfigError, match=r"its tokenizer cannot be loaded \(no tokenizer for tiny-clip\); install transformers"
    ):
        built(weights).encode_texts(["x"])


@pytest.mark.parametrize(
    ("name", "pretrained", "repository", "full"),
    [
        ("open_clip/ViT-L-14", None, "timm/vit_large_patch14_clip_224.openai", "open_clip/ViT-L-14.openai"),
        ("open_clip/ViT-L-14", "openai", "timm/vit_large_patch14_clip_224.openai", "open_clip/ViT-L-14.openai"),
        ("open_clip/ViT-B-16-SigLIP", None, "timm/ViT-B-16-SigLIP", "open_clip/ViT-B-16-SigLIP.webli"),
    ],
)
def test_tags_say_where_their_weights_are(name: str, pretrained: str | None, repository: str, full: str) -> None:
    file = hub_file(EncoderConfig(name=name, pretrained=pretrained))
    assert (file.repository, file.name) == (repository, full)
    assert file.names[0] == "open_clip_model.safetensors"


def test_architectures_without_weights_need_a_file() -> None:
    tiny_clip()
    with pytest.raises(ConfigError, match="open_clip/tiny-clip needs a file or one of: no tags exist"):
        hub_file(EncoderConfig(name="open_clip/tiny-clip"))
