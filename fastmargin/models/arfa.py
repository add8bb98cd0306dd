"""Adaptive Rational Fraction Activation (Doppelganger Mining, equation 1; its Table 1 network uses it throughout).

    F(x) = k x             x > 0
         = k x / (a - x)   x <= 0        F -> -k as x -> -inf; slope at 0 from the left k / a, from the right k

a, per channel, is learned and must stay positive: a = softplus(raw). The paper gives no initial value; here it is 1,
where the slope is continuous. k, per layer, is not learned: `fastmargin.models.lsuv` sets it once.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import relu, softplus


def arfa(
    x: Tensor,  # [B, C, ...]
    a: Tensor,  # [C], above 0
    k: Tensor | float,
) -> Tensor:  # [B, C, ...]
    """F(x), elementwise. Differentiable in x and a; the slope at 0 is k / a."""
    below = x.clamp(max=0)
    return k * (relu(x) + below / (a.view(-1, *[1] * (x.ndim - 2)) - below))


class ARFA(nn.Module):
    """`arfa` with learned a [channels] and fixed k, both initially 1."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.raw = nn.Parameter(torch.full((channels,), math.log(math.e - 1)))  # softplus of it is 1
        self.k: Tensor
        self.register_buffer("k", torch.ones(()))

    def forward(
        self,
        x: Tensor,  # [B, channels, ...]
    ) -> Tensor:  # the same
        return arfa(x, softplus(self.raw), self.k)
