"""MobileFaceNet (Chen et al., arXiv 1804.07573, table 1): inverted residuals, then a global depthwise convolution.

    conv3x3 64, stride 2;  depthwise 3x3;  the bottlenecks of SETTINGS;  conv1x1 512
    global depthwise convolution: one weight per channel and pixel of the last map, 7 x 7 of 112 x 112;  FC

Each is followed by BN and, except the last convolution of a bottleneck and the last two layers, by PReLU.
"""

from torch import nn

from fastmargin.models.layers import Residual, conv, conv_norm_prelu, halved, last_norm, linear

STEM, LAST = 64, 512
SETTINGS = (  # expansion, channels, units, stride of the first unit
    (2, 64, 5, 2),
    (4, 128, 1, 2),
    (2, 128, 6, 1),
    (4, 128, 1, 2),
    (2, 128, 2, 1),
)


def mobilefacenet(dim: int, size: tuple[int, int], channels: int) -> nn.Sequential:
    body: list[nn.Module] = [conv_norm_prelu(channels, STEM, 3, stride=2), conv_norm_prelu(STEM, STEM, 3, groups=STEM)]
    inputs = STEM
    for expansion, outputs, units, stride in SETTINGS:
        for number in range(units):
            body.append(bottleneck(inputs, outputs, expansion * inputs, 1 if number else stride))
            inputs = outputs
    whole = nn.Conv2d(LAST, LAST, halved(size, 4), groups=LAST, bias=False)
    return nn.Sequential(
        *body,
        conv_norm_prelu(inputs, LAST, 1),
        nn.Sequential(whole, nn.BatchNorm2d(LAST), nn.Flatten()),
        nn.Sequential(linear(LAST, dim, bias=False), last_norm(dim)),
    )


def bottleneck(inputs: int, outputs: int, inner: int, stride: int) -> nn.Module:
    layers = nn.Sequential(
        conv_norm_prelu(inputs, inner, 1),
        conv_norm_prelu(inner, inner, 3, stride, groups=inner),
        conv(inner, outputs, 1),
        nn.BatchNorm2d(outputs),
    )
    return Residual(layers) if stride == 1 and inputs == outputs else layers
