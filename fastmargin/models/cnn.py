"""The backbone of the default run: a small convolutional network with output option E.

Four convolutions of stride 2, each followed by batch normalization and PReLU; then option E without its
dropout. 0.31 M parameters at dim 128, size 32, one channel.
"""

from itertools import pairwise

from torch import nn

from fastmargin.models.layers import conv_norm_prelu, halved
from fastmargin.models.outputs import whole_map

WIDTHS = (32, 64, 128, 128)
KERNELS = (5, 3, 3, 3)


def cnn(dim: int, size: tuple[int, int], channels: int) -> nn.Sequential:
    steps = zip(pairwise((channels, *WIDTHS)), KERNELS, strict=True)
    blocks = [conv_norm_prelu(inputs, outputs, kernel, stride=2) for (inputs, outputs), kernel in steps]
    return nn.Sequential(*blocks, whole_map(WIDTHS[-1], halved(size, len(blocks)), dim, dropout=0.0))
