"""Augmentation of characters, counter-based: a pure function of (seed, epoch, index) of each image.

Image i in epoch e has its own splitmix64 stream, which starts at hash(seed, e, i): draw j is mix64(start + j G),
with G = 2^64 / golden ratio. Eight draws choose the warp, the blur and the noise level; the others are the
noise, two pixels each by the rule of Box and Muller (1958). So an image does not depend on the other images
of its batch, on the worker or on the thread.

The pixel of the result at u, in [-1, 1]^2 from the center, is taken from A u + t of the original:

    A = scale [[cos a, -sin a], [sin a, cos a]] [[1, shear], [0, 1]]

No mirror: b and d are two identities. `to_float` and `augment` divide intensities by 255 and subtract no mean:
the background is 0, as the padding of a convolution is. Noise may go beyond [0, 1].
"""

import math

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor
from torch.nn.functional import grid_sample, pad

from fastmargin.driver.data.order import AUGMENT, hash64, mix64
from fastmargin.splitmix64 import INCREMENT

GOLDEN = np.uint64(INCREMENT % 2**64)
ROTATION = math.radians(8)
SCALE = 0.1
SHEAR = 0.12
SHIFT = 0.12  # in units of half the width
BLURRED = 0.5  # share of the images
NOISE = 0.08  # largest standard deviation
PARAMETERS = 8  # draws of an image before those of its noise


def to_float(
    images: Tensor,  # [B, H, W] or [B, H, W, 3] uint8
) -> Tensor:  # [B, 1, H, W] or [B, 3, H, W] float32
    """Intensities in [0, 1]; 0 is background."""
    channels_first = images.unsqueeze(1) if images.ndim == 3 else images.permute(0, 3, 1, 2)
    return channels_first.float().div_(255)


def augment(
    images: Tensor,  # [B, H, W] or [B, H, W, 3] uint8
    index: ArrayLike,  # [B] int64
    epoch: ArrayLike,  # [B] int64
    seed: int,
) -> Tensor:  # [B, 1, H, W] or [B, 3, H, W] float32
    """Warped, perhaps blurred, noisy images; the same (seed, epoch, index) always gives the same image."""
    start = hash64(AUGMENT, seed, epoch, index)  # [B]
    draws = torch.from_numpy(uniform(stream(start, 0, PARAMETERS) >> np.uint64(32)))  # [B, PARAMETERS]
    result = warp(to_float(images), 2 * draws[:, :5] - 1)
    blurred = draws[:, 5] < BLURRED
    result[blurred] = blur(result[blurred])
    pixels = math.prod(images.shape[1:])
    noise = torch.from_numpy(gaussian(stream(start, PARAMETERS, (pixels + 1) // 2)))[:, :pixels]
    return result + (NOISE * draws[:, 6:7] * noise).view_as(result)


def stream(
    start: NDArray[np.uint64],  # [B]
    first: int,
    count: int,
) -> NDArray[np.uint64]:  # [B, count]
    """Draws first, first + 1, ... of each stream."""
    return mix64(start[:, None] + np.arange(first, first + count, dtype=np.uint64) * GOLDEN)


def uniform(
    words: NDArray[np.uint64],  # any shape, 32 random bits each
) -> NDArray[np.float32]:  # the same, in (0, 1)
    """Midpoints of 2^23 equal intervals: each is a float32 number, none is 0 or 1."""
    return ((words >> words.dtype.type(9)).astype(np.float32) + np.float32(0.5)) * np.float32(2**-23)


def gaussian(
    words: NDArray[np.uint64],  # [B, n]
) -> NDArray[np.float32]:  # [B, 2 n]
    """Two standard normal numbers from each word, by Box and Muller's rule."""
    radius = np.sqrt(-2 * np.log(uniform((words >> np.uint64(32)).astype(np.uint32))))
    angle = np.float32(2 * math.pi) * uniform(words.astype(np.uint32))
    return np.concatenate([radius * np.cos(angle), radius * np.sin(angle)], axis=1)


def warp(
    images: Tensor,  # [B, c, H, W] float32
    amounts: Tensor,  # [B, 5] in (-1, 1): rotation, scale, shear, shift right, shift down
) -> Tensor:  # [B, c, H, W]
    """Rotate, scale, shear and shift each image about its center, bilinearly; outside of it is black."""
    limits = torch.tensor([ROTATION, SCALE, SHEAR, SHIFT, SHIFT])
    angle, scale, shear, right, down = (amounts * limits).T[:, :, None, None]  # [B, 1, 1] each
    height, width = images.shape[-2:]
    x = ((2 * torch.arange(width) + 1) / width - 1)[None, None, :]
    y = ((2 * torch.arange(height) + 1) / height - 1)[None, :, None]
    cos, sin = (1 + scale) * angle.cos(), (1 + scale) * angle.sin()
    sheared = x + shear * y  # [B, H, W]
    grid = torch.stack([cos * sheared - sin * y + right, sin * sheared + cos * y + down], dim=-1)
    return grid_sample(images, grid, align_corners=False)


def blur(
    images: Tensor,  # [B, c, H, W]
) -> Tensor:  # [B, c, H, W]
    """The 3 x 3 binomial filter (1 2 1)/4 in both directions; outside of the image is black."""
    padded = pad(images, (1, 1, 1, 1))
    rows = padded[..., :-2, :] + 2 * padded[..., 1:-1, :] + padded[..., 2:, :]
    return (rows[..., :-2] + 2 * rows[..., 1:-1] + rows[..., 2:]) / 16
