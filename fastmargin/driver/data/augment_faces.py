"""Augmentation of photographs, counter-based: a pure function of (seed, epoch, index) of each image.

On uint8, in this order. The random numbers are those of `driver.data.augment_glyphs`; DRAWS names them:

    mirror    half of the images
    window    the image becomes its window of 1 - CROP to 1 of the side, off the center by up to SHIFT of the side each
              way; pixels are the nearest ones, and outside of the image those of its edge
    color     each channel brighter or darker by up to CHANNEL levels
    gray      GRAY of the images lose their color, 0.299 R + 0.587 G + 0.114 B in every channel
    erase     ERASED of the images have a rectangle of ERASE of the side each way filled with one random level

Mirror, color and gray are those of Doppelganger Mining (Smirnov et al. 2017, 4.2.3); erasing is that of Zhong et al.
(arXiv 1708.04896) with height and width drawn independently.
"""

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from fastmargin.driver.data.augment_glyphs import stream, to_float, uniform
from fastmargin.driver.data.order import AUGMENT, hash64

MIRROR = 0.5  # share of images
CROP = 0.1
SHIFT = 0.05
CHANNEL = 10  # levels of 255
GRAY = 0.1  # share of images
ERASED = 0.25  # share of images
ERASE = (0.1, 0.4)
LUMA = (19595, 38470, 7471)  # of R, G, B, in units of 2^-16: Pillow's
DRAWS = (
    "mirror", "scale", "right", "down", "red", "green", "blue", "gray",
    "erase", "width", "height", "left", "top", "level",
)  # fmt: skip


def augment_faces(
    images: Tensor,  # [B, H, W] or [B, H, W, 3] uint8
    index: ArrayLike,  # [B] int64
    epoch: ArrayLike,  # [B] int64
    seed: int,
) -> Tensor:  # [B, 1, H, W] or [B, 3, H, W] float32
    """Mirrored, shifted, cropped, colored and erased images; the same (seed, epoch, index) always gives the same."""
    start = hash64(AUGMENT, seed, epoch, index)  # [B]
    draws = torch.from_numpy(uniform(stream(start, 0, len(DRAWS)) >> np.uint64(32)))  # [B, DRAWS]
    draw = dict(zip(DRAWS, draws.T, strict=True))  # [B] each, in (0, 1)
    result = window(images, draw)
    result = shift_channels(result, draws[:, 4:7])
    lose_color(result, draw["gray"] < GRAY)
    erase(result, draw)
    return to_float(result)


def window(
    images: Tensor,  # [B, H, W] or [B, H, W, 3] uint8
    draw: dict[str, Tensor],  # [B] each
) -> Tensor:  # the same
    """Mirror, crop and shift: one gather of pixels."""
    batch, height, width = images.shape[:3]
    scale = 1 - CROP * draw["scale"]
    rows = lines(height, scale, SHIFT * (2 * draw["down"] - 1))
    columns = lines(width, scale, SHIFT * (2 * draw["right"] - 1))
    columns = torch.where(draw["mirror"][:, None] < MIRROR, columns.flip(1), columns)
    image = torch.arange(batch)[:, None, None]
    pixel = (image * height + rows[:, :, None]) * width + columns[:, None, :]  # [B, H, W]
    return images.flatten(0, 2).index_select(0, pixel.flatten()).view(images.shape)


def lines(
    side: int,
    scale: Tensor,  # [B] side of the window, as a share of the image's
    shift: Tensor,  # [B] of its center, in the same unit
) -> Tensor:  # [B, side] int64
    """The row (or column) of the image that each row of the window takes."""
    center = (torch.arange(side) + 0.5) / side - 0.5
    source = center * scale[:, None] + shift[:, None] + 0.5
    return (source * side).floor().long().clamp_(0, side - 1)


def shift_channels(
    images: Tensor,  # [B, H, W] or [B, H, W, 3] uint8
    draws: Tensor,  # [B, 3]; gray images take the first
) -> Tensor:  # the same
    levels = (draws * (2 * CHANNEL + 1)).floor().short() - CHANNEL
    levels = levels[:, None, None, :] if images.ndim == 4 else levels[:, :1, None]
    return (images.short() + levels).clamp_(0, 255).byte()


def lose_color(
    images: Tensor,  # [B, H, W] or [B, H, W, 3] uint8, changed in place
    chosen: Tensor,  # [B] bool
) -> None:
    if images.ndim == 4:
        luma = (images[chosen].int() * torch.tensor(LUMA, dtype=torch.int32)).sum(-1, keepdim=True)
        images[chosen] = ((luma + 2**15) >> 16).byte().expand(-1, -1, -1, 3)


def erase(
    images: Tensor,  # [B, H, W] or [B, H, W, 3] uint8, changed in place
    draw: dict[str, Tensor],  # [B] each
) -> None:
    rows = span(images.shape[1], draw["height"], draw["top"])
    columns = span(images.shape[2], draw["width"], draw["left"])
    levels = (256 * draw["level"]).floor().byte()
    for number in (draw["erase"] < ERASED).nonzero()[:, 0].tolist():
        images[number, slice(*rows[number]), slice(*columns[number])] = levels[number]


def span(
    side: int,
    length: Tensor,  # [B] in (0, 1)
    start: Tensor,  # [B] in (0, 1)
) -> list[list[int]]:  # B pairs
    """First and end row (or column) of the erased part."""
    low, high = ERASE
    pixels = ((low + (high - low) * length) * side).round()
    first = (start * (side - pixels + 1)).floor()
    return torch.stack([first, first + pixels], dim=1).long().tolist()
