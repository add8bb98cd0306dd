"""SphereFace-20 (Liu et al., arXiv 1704.08063, table 2; initial weights and biases of its public prototxt).

Four stages of a 3x3 convolution of stride 2 and PReLU, then 1, 2, 4, 1 residual units; a fully connected
layer on the whole map. There are no norm layers. AM-Softmax (arXiv 1801.05599) trains this network, too.
"""

from torch import nn

from fastmargin.models.layers import Residual, halved, linear

WIDTHS = (64, 128, 256, 512)
UNITS = (1, 2, 4, 1)


def sphereface20(dim: int, size: tuple[int, int], channels: int) -> nn.Sequential:
    body: list[nn.Module] = []
    inputs = channels
    for width, units in zip(WIDTHS, UNITS, strict=True):
        body += [smaller(inputs, width), *(unit(width) for _ in range(units))]
        inputs = width
    height, width = halved(size, len(WIDTHS))
    return nn.Sequential(*body, nn.Flatten(), linear(inputs * height * width, dim, bias=True))


def smaller(inputs: int, outputs: int) -> nn.Sequential:
    layer = nn.Conv2d(inputs, outputs, 3, stride=2, padding=1)
    nn.init.xavier_uniform_(layer.weight)
    assert layer.bias is not None
    nn.init.zeros_(layer.bias)
    return nn.Sequential(layer, nn.PReLU(outputs))


def unit(channels: int) -> Residual:
    """x + (conv - PReLU - conv - PReLU)(x). Its initial weights are so small that the unit is almost the identity."""
    layers: list[nn.Module] = []
    for _ in range(2):
        layer = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        nn.init.normal_(layer.weight, std=0.01)
        layers += [layer, nn.PReLU(channels)]
    return Residual(nn.Sequential(*layers))
