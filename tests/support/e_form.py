"""The GPU kernels' arithmetic modeled in plain torch: bfloat16 storage, float32 sums (fastmargin/ops/exponentials.py).

    o_j = bf16(power_j w_j)          factor_j power_j = 1 / ||w_j||, power_j a power of two, factor_j in [1, 2)
    z_ij = <bf16(x_i), o_j> factor_j
    E_ij = bf16(exp(z_ij - o_i) factor_j), 0 at j = y_i     o_i = ln(C) / 2 where kept, rest_i + t_i where made again
    c_i = lift d_rest_i exp(o_i - rest_i), 0 where rest_i = -inf; lift a power of two: max |lift d_rest| in [1/2, 1)
    dx_i = (c_i / lift) sum_j E_ij o_j + d_target_i w^_y
    dw_j = power_j (I - w^_j w^_j^T) (sum_i E_ij bf16(c_i x_i) / lift + factor_j sum over j's rows of d_target_i x_i)

t_i in [0, ln 2), spread evenly over the rows: where a class has all of each row's probability, as the other one of two,
its E would be the same rounded number in all rows, whose error would not average out.

Beside it plain PyTorch: the same operands, float32 logits, all B x C of them, their gradients rounded for the products.
dw is made for a few classes at a time. Letters: B rows, C classes, d features.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch

BF16, F32, F64 = torch.bfloat16, torch.float32, torch.float64


def rounded(t):
    return t.to(BF16).float()


class Weights(NamedTuple):
    """What depends on the class weights alone, so that many problems can share it."""

    w: torch.Tensor  # [C, d] float32
    unit: torch.Tensor  # [C, d] float64
    inverse: torch.Tensor  # [C] float64, 1 / ||w_j||
    power: torch.Tensor  # [C] float32
    factor: torch.Tensor  # [C] float32
    o: torch.Tensor  # [C, d] float32, the operand


class Results(NamedTuple):
    rest: torch.Tensor  # [B]
    dx: torch.Tensor  # [B, d]
    dw: Callable[[slice], torch.Tensor]  # of some classes, [n, d]


def weights_of(w):
    inverse, scale = 1 / w.double().norm(dim=1), 1 / w.norm(dim=1)
    mantissa, exponent = scale.frexp()
    power = torch.ldexp(torch.ones_like(scale), exponent - 1)
    return Weights(w, w.double() * inverse[:, None], inverse, power, 2 * mantissa, rounded(power[:, None] * w))


def truth(p, x, y, d_rest, d_target):
    rows, x = torch.arange(len(x)), x.double()
    z = x @ p.unit.T
    z[rows, y] = -torch.inf
    rest = z.logsumexp(1)
    g = (z - rest[:, None]).exp() * d_rest.double()[:, None]
    g[rows, y] = d_target.double()
    return Results(rest, g @ p.unit, lambda at: projected(g[:, at].T @ x, p.unit[at], p.inverse[at]))


def plain(p, x, y, d_rest, d_target):
    rows, xr = torch.arange(len(x)), rounded(x)
    z = xr @ p.o.T * p.factor
    z[rows, y] = -torch.inf
    rest = z.logsumexp(1)
    g = (z - rest[:, None]).exp() * d_rest[:, None]
    g[rows, y] = d_target
    unit, scale, g = p.power * p.factor, p.power * p.factor, rounded(g)
    dx = rounded(g * p.factor) @ p.o
    return Results(rest, dx, lambda at: projected(g[:, at].T @ xr, p.w[at] * unit[at, None], scale[at]))


def modeled(p, x, y, d_rest, d_target, *, kept):
    rows = torch.arange(len(x))
    z = rounded(x) @ p.o.T * p.factor
    z[rows, y] = -torch.inf
    o = math.log(len(p.w)) / 2
    rest = o + (z - o).exp().sum(1).log()
    offset = torch.full_like(rest, o) if kept else rest.masked_fill(rest == -torch.inf, torch.inf) + spread(len(x))
    e = rounded((z - offset[:, None]).exp() * p.factor)
    lift = torch.ldexp(d_rest.new_ones(()), -d_rest.abs().amax().frexp().exponent)
    c = torch.where(rest == -torch.inf, 0.0, lift * d_rest * (offset - rest).exp())
    cx, scale = rounded(c[:, None] * x), p.power * p.factor
    dx = (c / lift)[:, None] * (e @ p.o) + d_target[:, None] * (p.w * scale[:, None])[y]

    def dw(at):
        entries = torch.zeros_like(p.w[at])
        here = (y >= at.start) & (y < at.stop)
        entries.index_add_(0, y[here] - at.start, (d_target[:, None] * x)[here])
        products = e[:, at].T @ cx / lift + p.factor[at, None] * entries
        return projected(products, p.w[at] * scale[at, None], p.power[at])

    return Results(rest, dx, dw)


def spread(B):
    """t_i: multiples of the golden ratio, whose fractions are spread evenly."""
    return math.log(2) * (torch.arange(B) * ((math.sqrt(5) - 1) / 2)).frac()


def projected(dw, unit, scale):  # [n, d], [n, d], [n]
    return scale[:, None] * (dw - (dw * unit).sum(1, keepdim=True) * unit)
