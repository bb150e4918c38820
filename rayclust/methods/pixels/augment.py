"""Random views of a whole batch of images on its device: one crop, one colour map, one blur for each image.

The numbers behind a view are drawn for the whole batch from a keyed generator, of which each worker takes its rows.
Brightness, contrast, saturation, hue and greyness of an image are one affine map of its colours, so that they cost one
small matrix product. Two departures from the published programs' transforms follow: values are cut to 0 … 1 once, after
all of them, and the hue turns in the YIQ plane.

Source of the two families and their strengths: arXiv 2002.05709 (SimCLR), 2006.07733 (BYOL), as ProPos uses them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Self

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from rayclust.errors import ConfigError
from rayclust.methods.base import Batch

GREY = (0.299, 0.587, 0.114)
"""Weights of red, green and blue in an image's grey."""
YIQ = ((0.299, 0.587, 0.114), (0.5959, -0.2746, -0.3213), (0.2115, -0.5227, 0.3112))
"""From red, green and blue to luma and the two axes of the colour plane."""


@dataclass(frozen=True)
class Augmentation:
    """Strengths and probabilities of one view."""

    scale: tuple[float, float] = (0.08, 1.0)
    """Least and largest share of the image's area that a crop keeps."""
    shift: float = 0.0
    """Largest shift, as a share of the side, of an image that is moved in place of being cropped; what it leaves is
    filled by mirroring."""
    flip: float = 0.5
    """Probability of mirroring left and right."""
    jitter: float = 0.8
    """Probability that colours change at all."""
    brightness: float = 0.4
    contrast: float = 0.4
    saturation: float = 0.4
    hue: float = 0.1
    """Of a full turn of the colour plane."""
    grey: float = 0.2
    """Probability of losing all colour."""
    blur: float = 0.0
    """Probability of a Gaussian blur of 0.1 to 2 pixels at a side of 224, in proportion at other sides."""
    solarize: float = 0.0
    """Probability that values above one half are inverted."""


SIMCLR = (Augmentation(), Augmentation())
"""Both views alike, without blur, as for small images."""
SIMCLR_BLUR = (Augmentation(blur=0.5), Augmentation(blur=0.5))
SIMCLR_SMALL = (Augmentation(scale=(0.2, 1.0)), Augmentation(scale=(0.2, 1.0)))
"""MoCo v2's crops (arXiv 2003.04297) without blur: a twelfth of 32 × 32 pixels shows little of anything."""
BYOL = (
    Augmentation(saturation=0.2, blur=1.0),
    Augmentation(saturation=0.2, blur=0.1, solarize=0.2),
)
WEAK = (Augmentation(scale=(0.5, 1.0), jitter=0.0, grey=0.0),) * 2
"""Crops and mirrors alone, which leave an image what it is to a network that knows images."""
CROPPED, SHIFTED = Augmentation(jitter=0.0, grey=0.0), Augmentation(shift=0.125, jitter=0.0, grey=0.0)
"""Views of the published linear evaluation; small images are shifted."""
FAMILIES = {
    "simclr": SIMCLR, "simclr_blur": SIMCLR_BLUR, "simclr_small": SIMCLR_SMALL, "byol": BYOL, "weak": WEAK,
}  # fmt: skip
"""Two views by name."""
RATIO = (3 / 4, 4 / 3)
"""Bounds of a crop's width relative to its height."""
BLUR = (0.1, 2.0)
BLUR_SIDE = 224


@dataclass(frozen=True)
class SquareImages:
    """Rows of pixels as images, whose side and channels follow from the rows' width."""

    side: int
    channels: int

    @classmethod
    def of(cls, dimension: int, method: str) -> Self:
        """Return the shape of rows of D values.

        Args:
            dimension: D.
            method: name of the method that reads them, for the message.

        Raises:
            ConfigError: D is not that of square images with 1 or 3 channels.
        """
        channels = 3 if dimension % 3 == 0 and math.isqrt(dimension // 3) ** 2 == dimension // 3 else 1
        side = math.isqrt(dimension // channels)
        if side**2 * channels != dimension:
            raise ConfigError(f"method = {method}: learns from square images; rows of {dimension} values are none")
        return cls(side, channels)

    def images(self, x: Tensor) -> Tensor:
        """Return rows Float[B D] as images Float[B C H W]."""
        return x.view(len(x), self.side, self.side, self.channels).permute(0, 3, 1, 2)

    def rows(self, images: Tensor) -> Tensor:
        """Return images Float[B C H W] as rows Float[B D]."""
        return images.permute(0, 2, 3, 1).flatten(1)


def keyed_seed(*numbers: int) -> int:
    """Return a seed that depends on every number."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> 1)


def batch_view(images: Tensor, options: Augmentation, batch: Batch, size: int, seed: int) -> Tensor:
    """Return one view of each image of a batch, the same however the batch is spread over workers.

    Args:
        images: Float[B C H W], from 0 to 1, of the batch's rows.
        options: strengths.
        batch: what they are of.
        size: rows of the batch of all workers.
        seed: of the view.
    """
    return random_view(images, options, batch.own(draw(size, seed)))


def random_view(images: Tensor, options: Augmentation, numbers: Tensor) -> Tensor:
    """Return one view of each image.

    Args:
        images: Float[B C H W], from 0 to 1; C is 1 or 3.
        options: strengths.
        numbers: Float[B 16], uniform in [0, 1), the chance of each image; see `draw`.

    Returns:
        A tensor like `images`.
    """
    u = numbers.to(images)
    if images.shape[1] == 1:  # no colour to turn or to lose
        options = replace(options, saturation=0.0, hue=0.0, grey=0.0)
    x = _crop(images, options, u[:, :5])
    x = _recolor(x, options, u[:, 5:11])
    if options.blur > 0:
        x = _blur(x, options.blur, u[:, 11:13])
    if options.solarize > 0:
        inverted = torch.where(x >= 128 / 255, 1 - x, x)
        x = torch.where((u[:, 13] < options.solarize)[:, None, None, None], inverted, x)
    return x


def draw(count: int, seed: int) -> Tensor:
    """Return the chance of one view of `count` images: Float32[count 16], uniform in [0, 1)."""
    return torch.rand((count, 16), generator=torch.Generator().manual_seed(seed))


def _between(u: Tensor, low: float, high: float) -> Tensor:
    return low + (high - low) * u


def _crop(x: Tensor, options: Augmentation, u: Tensor) -> Tensor:
    """Cut a rectangle of random area, shape and place, stretch it to the whole image, and perhaps mirror it."""
    height, width = x.shape[2:]
    area = _between(u[:, 0], *options.scale)
    ratio = _between(u[:, 1], math.log(RATIO[0]), math.log(RATIO[1])).exp()
    # Sides relative to the image's; a rectangle that would leave the image is cut to it.
    w = (area * ratio * height / width).sqrt().clamp(max=1)
    h = (area / ratio * width / height).sqrt().clamp(max=1)
    left, top = (1 - w) * (2 * u[:, 2] - 1), (1 - h) * (2 * u[:, 3] - 1)
    if options.shift > 0:
        w, h, left, top = (torch.ones_like(w), torch.ones_like(h), *(2 * options.shift * (2 * u[:, 2:4] - 1)).unbind(1))
    mirror = torch.where(u[:, 4] < options.flip, -1.0, 1.0).to(x)
    theta = x.new_zeros((len(x), 2, 3))
    theta[:, 0, 0], theta[:, 0, 2] = w * mirror, left
    theta[:, 1, 1], theta[:, 1, 2] = h, top
    grid = functional.affine_grid(theta, list(x.shape), align_corners=False)
    beyond = "reflection" if options.shift > 0 else "border"
    return functional.grid_sample(x, grid, padding_mode=beyond, align_corners=False)


def _recolor(x: Tensor, options: Augmentation, u: Tensor) -> Tensor:
    """Change brightness, contrast, saturation and hue, and perhaps drop all colour, by one affine map per image."""
    B, C = x.shape[:2]
    factors = [
        torch.where(u[:, 4] < options.jitter, _between(u[:, place], max(0.0, 1 - strength), 1 + strength), 1.0)
        for place, strength in enumerate((options.brightness, options.contrast, options.saturation))
    ]
    brightness, contrast, saturation = factors
    if C == 1:
        mean = x.mean((1, 2, 3)) * brightness
        gain, offset = brightness * contrast, mean * (1 - contrast)
        return (x * gain[:, None, None, None] + offset[:, None, None, None]).clamp(0, 1)
    weights = x.new_tensor(GREY)
    mean = torch.einsum("c,bchw->b", weights, x) / x[0, 0].numel() * brightness
    # In the YIQ plane a saturation is a length and a hue an angle; grey is the saturation 0.
    angle = torch.where(u[:, 4] < options.jitter, _between(u[:, 3], -options.hue, options.hue), 0.0) * 2 * math.pi
    length = torch.where(u[:, 5] < options.grey, 0.0, saturation)
    turn = x.new_zeros((B, 3, 3))
    turn[:, 0, 0] = 1
    turn[:, 1, 1] = turn[:, 2, 2] = length * angle.cos()
    turn[:, 1, 2], turn[:, 2, 1] = -length * angle.sin(), length * angle.sin()
    to_yiq = x.new_tensor(YIQ)
    matrix = torch.linalg.inv(to_yiq) @ turn @ to_yiq * (brightness * contrast)[:, None, None]
    offset = mean * (1 - contrast)
    return torch.baddbmm(offset[:, None, None], matrix, x.flatten(2)).view_as(x).clamp(0, 1)


def _blur(x: Tensor, probability: float, u: Tensor) -> Tensor:
    """Blur some of the images, each by its own width, along rows and then along columns."""
    chosen = (u[:, 0] < probability).nonzero()[:, 0]
    if not len(chosen):
        return x
    side = max(x.shape[2:])
    sigma = _between(u[chosen, 1], *BLUR) * side / BLUR_SIDE
    radius = max(1, round(23 / 2 * side / BLUR_SIDE))
    places = torch.arange(-radius, radius + 1, device=x.device, dtype=x.dtype)
    kernel = (-places.square() / (2 * sigma[:, None].square())).exp()
    kernel = kernel / kernel.sum(1, keepdim=True)
    planes = x[chosen].transpose(0, 1).flatten(0, 1)[None]  # all images and channels as channels of one
    each = kernel.repeat(x.shape[1], 1)[:, None]
    padded = functional.pad(planes, (radius, radius, radius, radius), mode="replicate")
    rows = functional.conv2d(padded, each[:, :, None, :], groups=len(each))
    both = functional.conv2d(rows, each[:, :, :, None], groups=len(each))
    blurred = both[0].view(x.shape[1], len(chosen), *x.shape[2:]).transpose(0, 1)
    return x.index_copy(0, chosen, blurred)
