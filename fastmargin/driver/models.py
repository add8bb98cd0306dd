"""The backbone of the default run: a small convolutional network with output option E.

Four convolutions of stride 2, each followed by batch normalisation and PReLU; then option E of ArcFace
(Deng et al., arXiv 1801.07698v1, section 3.2.2), BN - FC - BN, without its dropout. The last gamma stays 1:
over a batch, every feature of an embedding has variance 1.
"""

import torch
from torch import nn
from torch.nn.utils import convert_conv2d_weight_memory_format

WIDTHS = (32, 64, 128, 128)  # channels
KERNELS = (5, 3, 3, 3)


def build_model(dim: int, size: int, channels: int = 1) -> nn.Module:
    """Network from images [B, channels, size, size] to embeddings [B, dim]; 0.31 M parameters at dim 128, size 32.

    The layout is channels_last, the faster one on a CPU. Weights are drawn from torch's global generator.
    ValueError unless dim and size are at least 1.
    """
    if dim < 1 or size < 1:
        raise ValueError(f"dim and size are at least 1, got dim = {dim}, size = {size}")
    blocks = [block(*shape) for shape in zip((channels, *WIDTHS[:-1]), WIDTHS, KERNELS, strict=True)]
    side = -(-size // 2 ** len(blocks))  # each block halves the side and rounds up
    model = nn.Sequential(*blocks, output(WIDTHS[-1], side, dim))
    return convert_conv2d_weight_memory_format(model, torch.channels_last)


def block(inputs: int, outputs: int, kernel: int) -> nn.Sequential:
    """Convolution of stride 2 (He's normal initial weights), batch normalisation, PReLU."""
    conv = nn.Conv2d(inputs, outputs, kernel, stride=2, padding=kernel // 2, bias=False)
    activation = nn.PReLU(outputs)
    nn.init.kaiming_normal_(conv.weight, a=0.25, mode="fan_out")  # 0.25: the slope PReLU starts with
    return nn.Sequential(conv, nn.BatchNorm2d(outputs), activation)


def output(channels: int, side: int, dim: int) -> nn.Sequential:
    """Option E: BN - FC - BN with gamma 1; no bias, the last BN has one."""
    linear = nn.Linear(channels * side * side, dim, bias=False)
    nn.init.xavier_normal_(linear.weight)
    last = nn.BatchNorm1d(dim)
    last.weight.requires_grad_(False)
    return nn.Sequential(nn.BatchNorm2d(channels), nn.Flatten(), linear, last)
