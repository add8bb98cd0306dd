"""Angles whose derivatives stay finite: theta from its cosine, its sine, and the branch that m1 theta + m2 lies in.

The slope of theta has no bound near |cos theta| = 1. Its divisor sin(theta) is floored, at 1e-3 in float32 and 1e-7 in
float64. Values are exact. B rows, C classes.
"""

import math
from typing import Any, TypeAlias

import torch
from torch import Tensor

Value: TypeAlias = float | Tensor  # a configured margin: a number or [C]; of the rows: a number or [B]


def is_number(value: Value, number: float) -> bool:
    return not isinstance(value, Tensor) and value == number


def cos_sin(angle: Value) -> tuple[Value, Value]:
    space = torch if isinstance(angle, Tensor) else math
    return space.cos(angle), space.sin(angle)


def add_slope(value: Tensor, x: Tensor) -> Tensor:  # [B], [B] -> [B]
    """Exactly `value`, as x - x is 0, with the gradient of x added to its own."""
    return value + (x - x.detach())


class SafeAcos(torch.autograd.Function):
    """theta of c in [-1, 1]: the value of acos, the slope -1 / max(sin(theta), floor)."""

    @staticmethod
    def forward(c: Tensor) -> Tensor:  # [B] -> [B]
        return torch.acos(c)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # [B] -> [B]
        (c,) = ctx.saved_tensors
        floor = 1e-7 if c.dtype == torch.float64 else 1e-3
        return -grad / ((1 - c) * (1 + c)).clamp(min=floor * floor).sqrt()


def sine(c: Tensor, theta: Tensor) -> Tensor:  # [B], [B] -> [B]
    """sin(theta) computed from c, accurate near 0 and pi, with slope -c / max(sin(theta), floor)."""
    return add_slope(((1 - c) * (1 + c)).detach().sqrt(), torch.sin(theta))


def branch(theta: Tensor, m1: Value, m2: Value) -> Tensor:  # [B], number or [B] -> [B]
    """k = floor(phi / pi). Neighboring branches agree in value and slope at phi = k pi, so rounding is harmless there,
    but not at theta = 0 and pi: k must be that of angles just inside."""
    end = 8 * torch.finfo(theta.dtype).eps
    phi = m1 * theta.clamp(end, math.pi - end) + m2
    return (phi.detach() / math.pi).floor()
