"""IResNet, called LResNet-IR by ArcFace (arXiv 1801.07698v1, sections 3.2.1 to 3.2.3).

    L     the first convolution is 3x3 of stride 1: the last map of 112 x 112 pixels is 7 x 7
    IR    BN - conv3x3 - BN - PReLU - conv3x3(stride) - BN, plus a shortcut: conv1x1(stride) - BN where the
          stride is 2, at the start of each of the four stages, else the identity
    last  one of the output options of `fastmargin.models.outputs`

Units per stage as in InsightFace's code; the paper does not give them.
"""

from torch import nn

from fastmargin.models.layers import Residual, conv, conv_norm_prelu, halved
from fastmargin.models.outputs import output as output_layers

UNITS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 14, 3), 100: (3, 13, 30, 3)}
WIDTHS = (64, 128, 256, 512)


def iresnet(
    depth: int, dim: int, size: tuple[int, int], channels: int, *, output: str = "E", dropout: float | None = None
) -> nn.Sequential:
    """depth: a key of UNITS. output, dropout: `fastmargin.models.outputs.output`, which raises ValueError."""
    body: list[nn.Module] = [conv_norm_prelu(channels, WIDTHS[0], 3)]
    inputs = WIDTHS[0]
    for width, units in zip(WIDTHS, UNITS[depth], strict=True):
        for number in range(units):
            body.append(unit(inputs, width, stride=1 if number else 2))
            inputs = width
    return nn.Sequential(*body, output_layers(output, inputs, halved(size, len(WIDTHS)), dim, dropout))


def unit(inputs: int, outputs: int, stride: int) -> Residual:
    body = nn.Sequential(
        nn.BatchNorm2d(inputs),
        conv_norm_prelu(inputs, outputs, 3),
        conv(outputs, outputs, 3, stride),
        nn.BatchNorm2d(outputs),
    )
    if stride == 1:
        return Residual(body)
    return Residual(body, nn.Sequential(conv(inputs, outputs, 1, stride), nn.BatchNorm2d(outputs)))
