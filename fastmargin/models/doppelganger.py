"""The network of Doppelganger Mining (Smirnov et al. 2017, table 1), adapted to the size of the images.

Table 1 is for 259 x 259 pixels: two 5x5 convolutions, then residual units and valid convolutions, some of
them dilated and parallel, five halvings in all; a fully connected layer, of which maxout keeps the larger of
each two outputs. ARFA follows every convolution. For smaller images (`side` is the smaller side)

    halvings   min(5, round(log2(side / 8))); the first to be left out is the stride of the first convolution,
               then the first pool, and so on: the last map is between 1 x 1 and 9 x 9, in the table 6 x 6
    channels   min(1, side / 256) of the table's, the smallest number rounded to a multiple of 8

Not in the paper, and chosen here: a residual unit is two convolutions, each followed by ARFA; where it changes the
number of channels its shortcut is a 1x1 convolution; parallel convolutions are padded to the size of the
undilated one. The head normalizes the embedding, the last row of the table. There is no norm layer: the paper
trains it with L2Softmax, at a learning rate of 0.01 that decays.
"""

import math
from typing import TypeVar

import torch
from torch import Tensor, nn

from fastmargin.models.arfa import ARFA
from fastmargin.models.layers import Residual

Layer = TypeVar("Layer", nn.Conv2d, nn.Linear)

SMALLEST = 16  # pixels a side: of smaller images nothing is left in the last map


class Parallel(nn.Module):
    """Branches on the same map, their channels concatenated."""

    def __init__(self, *branches: nn.Module) -> None:
        super().__init__()
        self.branches = nn.ModuleList(branches)

    def forward(
        self,
        x: Tensor,  # [B, channels, H, W]
    ) -> Tensor:  # [B, their channels, H', W']
        return torch.cat([branch(x) for branch in self.branches], dim=1)


class Maxout(nn.Module):
    """Maxout of groups of two (Goodfellow et al. 2013): feature i is the larger of inputs i and dim + i."""

    def forward(
        self,
        x: Tensor,  # [B, 2 dim]
    ) -> Tensor:  # [B, dim]
        first, second = x.chunk(2, dim=1)
        return torch.maximum(first, second)


def doppelganger(dim: int, size: tuple[int, int], channels: int) -> nn.Sequential:
    """With orthonormal weights, as `lsuv` expects. ValueError below 16 pixels a side."""
    side = min(size)
    if side < SMALLEST:
        raise ValueError(f"doppelganger takes images of {SMALLEST} pixels a side or more, got {size}")
    halvings = min(5, round(math.log2(side / 8)))
    halves = [halvings >= 5 - i for i in range(5)]  # the stride, then the four pools
    pools = [nn.MaxPool2d(2) if halve else nn.Identity() for halve in halves[1:]]
    c = 8 * max(1, round(8 * min(1, side / 256)))  # 64 in the table
    features = nn.Sequential(
        activated(conv(channels, c, 5, stride=1 + halves[0]), c),
        activated(conv(c, c, 5), c),
        pools[0],
        residual(c, 2 * c),
        activated(Parallel(conv(2 * c, 2 * c), conv(2 * c, c, dilation=2), conv(2 * c, c, dilation=3)), 4 * c),
        pools[1],
        *(residual(4 * c, 4 * c) for _ in range(2)),
        activated(Parallel(conv(4 * c, 4 * c), conv(4 * c, 4 * c, dilation=2)), 8 * c),
        pools[2],
        *(residual(8 * c, 8 * c) for _ in range(5)),
        activated(conv(8 * c, 16 * c), 16 * c),
        pools[3],
        *(residual(16 * c, 16 * c) for _ in range(3)),
    )
    height, width = (last_side(side, halves) for side in size)
    full = orthonormal(nn.Linear(16 * c * height * width, 2 * dim))
    return nn.Sequential(features, nn.Flatten(), full, Maxout())


def last_side(side: int, halves: list[bool]) -> int:
    """Side of the last map, from the side of an image: 259 -> 128 -> 124, 62 -> 60, 30 -> 28, 14 -> 12, 6."""
    side = (side - 5) // (1 + halves[0]) + 1 - 4
    for halve, lost in zip(halves[1:], (2, 2, 2, 0), strict=True):
        side = side // (1 + halve) - lost
    return side


def conv(inputs: int, outputs: int, kernel: int = 3, stride: int = 1, dilation: int = 1, padding: int = 0) -> nn.Conv2d:
    """Orthonormal convolution; with stride 1 a side shrinks by kernel - 1 - 2 padding, whatever the dilation."""
    inner = (dilation - 1) * (kernel - 1) // 2
    layer = nn.Conv2d(inputs, outputs, kernel, stride=stride, dilation=dilation, padding=inner + padding)
    return orthonormal(layer)


def residual(inputs: int, outputs: int) -> Residual:
    first, second = (activated(conv(width, outputs, padding=1), outputs) for width in (inputs, outputs))
    return Residual(nn.Sequential(first, second), None if inputs == outputs else conv(inputs, outputs, kernel=1))


def activated(layer: nn.Module, channels: int) -> nn.Sequential:
    return nn.Sequential(layer, ARFA(channels))


def orthonormal(layer: Layer) -> Layer:
    """Orthonormal weights and zero bias, from which LSUV starts."""
    nn.init.orthogonal_(layer.weight)
    assert layer.bias is not None
    nn.init.zeros_(layer.bias)
    return layer
