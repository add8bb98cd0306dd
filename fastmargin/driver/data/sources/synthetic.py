"""Synthetic identities, for runs that measure speed: synthetic:CLASSESxIMAGES, with IMAGES images of each class.

Every image is made when it is indexed, a pure function of its number: a GRID x GRID mosaic in which each tile is 0.75
times a level of its identity plus 0.25 times one of the image, both from `driver.data.order.hash64`. A network learns
them at once. Image i is of identity i div IMAGES.
"""

import re

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastmargin.driver.config import DataConfig
from fastmargin.driver.data.identities import Identities
from fastmargin.driver.data.order import SYNTHETIC, hash64
from fastmargin.driver.data.sources.pixels import Color
from fastmargin.driver.log import Log

SIZE = 112  # pixels a side, if data.size is null
GRID = 8  # tiles a side
PREFIX = "synthetic:"


class Synthetic:
    """The images, [N, size, size] or [N, size, size, 3]."""

    def __init__(self, classes: int, images: int, size: int, color: Color) -> None:
        self.images = images
        self.shape = (classes * images, size, size, 3) if color == "rgb" else (classes * images, size, size)
        self.channels = 3 if color == "rgb" else 1
        row = np.arange(size) * GRID // size
        self._tile = (GRID * row[:, None] + row).ravel()  # [size * size] of each pixel

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(
        self,
        index: NDArray[np.int64],  # [m]
    ) -> Tensor:  # [m, size, size] or [m, size, size, 3] uint8
        levels = (3 * self._levels(0, index // self.images) + self._levels(1, index)) // 4
        tiles = levels.astype(np.uint8).reshape(len(index), GRID * GRID, self.channels)
        return torch.from_numpy(tiles.take(self._tile, 1).reshape(len(index), *self.shape[1:]))

    def _levels(
        self,
        use: int,
        number: NDArray[np.int64],  # [m] of identities, or of images
    ) -> NDArray[np.uint16]:  # [m, GRID * GRID * channels] in 0..255
        words = hash64(SYNTHETIC, use, number[:, None], np.arange(GRID * GRID * self.channels // 8))
        return words.view(np.uint8).astype(np.uint16)

    def checksums(self) -> NDArray[np.uint32]:  # [N]
        return hash64(SYNTHETIC, 1, np.arange(len(self))).astype(np.uint32)

    def title(self, number: int) -> str:
        return f"image {number}"


def load_synthetic(config: DataConfig, log: Log) -> Identities:
    """ValueError unless `data.source` is synthetic:CLASSESxIMAGES, both at least 1."""
    match = re.fullmatch(PREFIX + r"([1-9]\d*)x([1-9]\d*)", config.source)
    if match is None:
        raise ValueError(f"data.source is {config.source}; want {PREFIX}CLASSESxIMAGES, such as {PREFIX}1000x20")
    classes, images = map(int, match.groups())
    made = Synthetic(classes, images, config.size or SIZE, config.color or "rgb")
    return Identities(made, torch.arange(classes).repeat_interleave(images), [str(label) for label in range(classes)])
