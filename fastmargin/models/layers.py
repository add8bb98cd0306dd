"""The parts that several backbones share."""

from torch import Tensor, nn


class Residual(nn.Module):
    """shortcut(x) + body(x)."""

    def __init__(self, body: nn.Module, shortcut: nn.Module | None = None) -> None:
        super().__init__()
        self.body = body
        self.shortcut = shortcut or nn.Identity()

    def forward(
        self,
        x: Tensor,  # [B, channels, H, W]
    ) -> Tensor:  # [B, channels, H, W], of the body
        return self.shortcut(x) + self.body(x)


def conv(inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    """Convolution, padded so that only the stride reduces the size; no bias, as a norm follows; He normal weights."""
    layer = nn.Conv2d(inputs, outputs, kernel, stride=stride, padding=kernel // 2, groups=groups, bias=False)
    nn.init.kaiming_normal_(layer.weight, a=0.25, mode="fan_out")  # 0.25: the initial slope of PReLU
    return layer


def conv_norm_prelu(inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Sequential:
    layer = conv(inputs, outputs, kernel, stride, groups)
    return nn.Sequential(layer, nn.BatchNorm2d(outputs), nn.PReLU(outputs))


def linear(inputs: int, outputs: int, bias: bool) -> nn.Linear:
    """Fully connected layer, Glorot normal weights."""
    layer = nn.Linear(inputs, outputs, bias=bias)
    nn.init.xavier_normal_(layer.weight)
    if bias:
        nn.init.zeros_(layer.bias)
    return layer


def last_norm(dim: int) -> nn.BatchNorm1d:
    """BN whose gamma is fixed at 1, as in ArcFace's public code: over a batch every feature has variance 1."""
    norm = nn.BatchNorm1d(dim)
    norm.weight.requires_grad_(False)
    return norm


def halved(size: tuple[int, int], times: int) -> tuple[int, int]:
    """Height and width after `times` layers of stride 2, each of which rounds up."""
    height, width = (-(-side // 2**times) for side in size)
    return height, width
