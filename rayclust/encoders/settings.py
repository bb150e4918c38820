"""Settings of an encoder, or of several with a space each.

Apart from the encoders, so that a config is read without torch and image libraries.
"""

from __future__ import annotations

import re
from contextlib import suppress
from pathlib import PurePath
from typing import Any, Final, Literal

from pydantic import Field, model_validator

from rayclust.features import SpaceFeatures
from rayclust.settings import Config

Colour = tuple[float, float, float]
"""One value each for red, green and blue."""
PIXEL_CEILING: Final = 178_956_970
"""The largest `max_pixels`: above it Pillow itself refuses to open a file."""
_WEIGHT_SUFFIXES = {".safetensors", ".pt", ".pth", ".bin", ".ckpt", ".tar", ".th", ".torch"}


class EncoderConfig(Config):
    """What turns one image, or one phrase, into one row."""

    name: str = "auto"
    """open_clip/<architecture>, timm/<architecture>, or pixels, which needs no weights. `.<tag>` may follow, as in
    open_clip/ViT-L-14.openai: published weights, or, with a file in `pretrained`, how such weights see images.
    auto: the one that the run has; for a new run open_clip/ViT-L-14 on GPUs, open_clip/ViT-B-32 on CPUs, and unknown
    for ready embeddings. unknown: no names from words alone, and no search by text or image. run: the network that the
    run in `pretrained` has learnt from pixels."""
    pretrained: str | None = None
    """A tag of published weights (openai, laion2b_s32b_b82k, dino …), or a path or URI of a file with weights,
    safetensors or a torch file of tensors; for `run`, the folder or URI of a run. Absent: `openai` for open_clip, the
    architecture's own default for timm."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Passed to the model's constructor, e.g. `pad_type: same`."""
    image_size: int | tuple[int, int] | None = None
    """Side of the square, or [height, width], pixels. Absent: the model's own; 32 for pixels."""
    resize: Literal["crop", "squash"] | None = None
    """crop: the shorter side to the size, then the centre. squash: both sides to the size. Absent: the model's own."""
    crop_fraction: float | None = Field(None, gt=0, le=1)
    """For crop: the share of the shorter side that is kept. Absent: the model's own, or 1 where `resize` is given."""
    mean: Colour | None = None
    """Subtracted from red, green and blue, which run from 0 to 1. Absent: the model's own; 0 for pixels."""
    std: Colour | None = None
    """What red, green and blue are then divided by; not 0. Absent: the model's own; 1 for pixels."""
    normalize: bool = True
    """Whether rows have length 1."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Of the network's products. auto: bf16 on GPUs that have it, else fp16; fp32 on CPUs."""
    engine: Literal["auto", "torch", "openvino"] = "auto"
    """What computes the network on CPUs. openvino: 1.4 to 2.3 times as fast (extra `cpu`); rows agree with torch's to a
    cosine of 0.99999. auto: the faster, measured as a run of 1,000 images or more begins, and kept with the run;
    torch for fewer, without the extra, and on GPUs."""
    compile: bool = False
    """Compile the network with torch.compile: slow to start, faster afterwards; worth it from some 100,000 images."""
    batch_size: int | None = Field(None, ge=1)
    """Images per pass through the network. Absent: 256 on a GPU; 1 on a CPU, which is the fastest there. A row's last
    bits may depend on it; short passes are filled up, so they do not depend on how many images there are."""
    threads: int = Field(1, ge=1)
    """CPU threads of one encoder. A row's last bits may depend on it."""
    grayscale: bool = False
    """pixels only: one channel instead of three."""
    jpeg_draft: bool = False
    """Decode JPEGs of twice the wanted size and more at 1/2, 1/4 or 1/8: faster, but rows move a little."""

    @model_validator(mode="before")
    @classmethod
    def _read(cls, tree: Any) -> Any:
        return {"name": tree} if isinstance(tree, str) else tree  # `encoder: auto`

    @model_validator(mode="after")
    def _check(self) -> EncoderConfig:
        family, _, architecture = self.name.partition("/")
        if self.name == "run" and self.pretrained is None:
            raise ValueError("name = run: set encoder.pretrained to the run whose network encodes")
        if self.name not in ("auto", "unknown", "pixels", "run") and (
            family not in ("open_clip", "timm") or not architecture
        ):
            raise ValueError(
                f"name = {self.name}: must be auto, open_clip/<architecture>, timm/<architecture>, pixels, run, or "
                "unknown for ready embeddings"
            )
        if self.name in ("auto", "unknown") and self.pretrained is not None:
            raise ValueError(f"pretrained = {self.pretrained}: needs encoder.name, of which {self.name} says nothing")
        if self.weights_uri is None and self.pretrained and self.tag != self.pretrained:
            raise ValueError(f"pretrained = {self.pretrained}: contradicts the tag in name = {self.name}")
        if self.compile and self.engine == "openvino":
            raise ValueError("compile = true: compiles for torch; leave it out with engine = openvino")
        if self.grayscale and self.name != "pixels":
            raise ValueError(f"grayscale = true: only pixels can do without colour, not {self.name}")
        if self.std is not None and 0 in self.std:
            raise ValueError(f"std = {list(self.std)}: must not hold 0")
        sides = (self.image_size,) if isinstance(self.image_size, int) else self.image_size or ()
        if any(not 1 <= side <= 16384 for side in sides):
            raise ValueError(f"image_size = {self.image_size}: must be from 1 to 16384")
        return self

    @property
    def family(self) -> str:
        """open_clip, timm, pixels, run, auto or unknown."""
        return self.name.partition("/")[0]

    @property
    def architecture(self) -> str:
        """The name without its family and tag."""
        return self.name.partition("/")[2].partition(".")[0]

    @property
    def tag(self) -> str | None:
        """The tag of published weights: the one in `name`, else `pretrained` unless that is a file."""
        return self.name.partition("/")[2].partition(".")[2] or (None if self.weights_uri else self.pretrained)

    @property
    def weights_uri(self) -> str | None:
        """Path or URI of the weights; None where they come from a hub, or where none are needed.

        `pretrained` names a file where it has a slash or the suffix of a file of weights.
        """
        given = self.pretrained
        if given is None or self.family == "pixels":
            return None
        if self.family == "run":
            return f"{self.run_uri}/model/weights.safetensors"
        looks_like_path = "/" in given or "\\" in given or given.startswith(("~", "."))
        return given if looks_like_path or PurePath(given).suffix.lower() in _WEIGHT_SUFFIXES else None

    @property
    def run_uri(self) -> str:
        """Folder or URI of the run whose network encodes, for `run`: `pretrained`, which may also name its model."""
        return str(self.pretrained).rstrip("/").removesuffix("/weights.safetensors").removesuffix("/model")


def with_space(tree: Any) -> Any:
    """Return an entry of `encoders` with the name of its space; raise `ValueError` if it names no encoder either."""
    tree = {"name": tree} if isinstance(tree, str) else tree
    if not isinstance(tree, dict) or "space" in tree:
        return tree
    name = str(tree.get("name", "auto"))
    if name in ("auto", "unknown"):
        raise ValueError("space: is missing; an encoder without a name needs one, such as `space: a`")
    architecture = name.partition("/")[2].partition(".")[0] or name
    return {"space": re.sub(r"[^a-z0-9_]+", "-", architecture.lower()).strip("-")} | tree


class SpaceConfig(EncoderConfig):
    """One of several encoders: an encoder, and the space of its rows."""

    space: str = Field(pattern=r"^[a-z0-9_-]+$")
    """Name of the space, of letters a–z, digits, _ and -. By default that of the architecture."""
    features: SpaceFeatures | None = None
    """Features of this space; None takes the run's."""
    embeddings: str | None = None
    """Ready embeddings of this space, in any format that `images.uri` takes for them: the rows with the keys of the
    run's. None encodes the images; the first space of a run of ready embeddings is at `images.uri`."""

    _name_space = model_validator(mode="before")(with_space)


def normalize_encoders(tree: dict[str, Any]) -> dict[str, Any]:
    """Read a list of one encoder as `encoder`, and copy the features of spaces to `features.spaces`.

    Raises:
        ValueError: both keys are given, or a space's features are written where they are copied to.
    """
    given, features = tree.get("encoders"), tree.get("features")
    if isinstance(features, dict) and features.get("spaces"):
        raise ValueError("features.spaces: write `features` of an entry of `encoders`")
    if not isinstance(given, list | tuple) or not given:
        return {key: value for key, value in tree.items() if key != "encoders"} if given in ([], ()) else tree
    if "encoder" in tree:
        raise ValueError("encoders: is given beside encoder; keep one of them")
    if len(given) == 1:
        entry = dict(given[0]) if isinstance(given[0], dict) else {"name": given[0]}
        if entry.get("embeddings") is not None:
            raise ValueError("encoders.0.embeddings: a run with one space takes ready embeddings from images.uri")
        own = entry.pop("features", None)
        encoder = {key: value for key, value in entry.items() if key not in ("space", "embeddings")}
        rest = {key: value for key, value in tree.items() if key != "encoders"}
        return rest | {"encoder": encoder} | ({} if own is None else {"features": own})
    spaces = dict[str, Any]()
    for entry in given:
        if isinstance(entry, dict) and isinstance(entry.get("features"), dict):
            with suppress(ValueError):  # reported where the entry itself is validated
                spaces[with_space(entry)["space"]] = entry["features"]
    if not spaces or not isinstance(features, dict | None):
        return tree
    return tree | {"features": (features or {}) | {"spaces": spaces}}
