"""What stands around the kernels of a backward pass, in PyTorch: products, the top-k's share, the projection.

Weights enter the products as o_j = w_j power_j, rounded, with power_j factor_j = 1 / ||w_j||, and g carries the factor:

    dx_i = sum_j g_ij o_j     dw_j = power_j (I - w^_j w^_j^T) sum_i g_ij x_i

Letters: B rows, n classes of a wave, d features, k.
"""

import torch
from torch import Tensor


def lift_of(
    compute_dtype: torch.dtype | None,
    *gradients: Tensor | None,  # [B, ...]
) -> Tensor:  # []
    """float16 has few exponents: a power of two, 1 for other types, lifts g up to where the largest is near 2^14."""
    given = [t.abs().amax() for t in gradients if t is not None and t.numel()]
    if compute_dtype != torch.float16 or not given:
        return torch.ones((), device=gradients[0].device)
    return torch.ldexp(torch.ones_like(given[0]), (14 - torch.stack(given).amax().frexp().exponent).clamp(max=100))


def split(
    scale: Tensor | None,  # [n]
    compute_dtype: torch.dtype | None,
) -> tuple[Tensor | float, Tensor | float]:  # [n, 1], [n, 1]
    """`split_scale` in PyTorch."""
    if scale is None or compute_dtype is None:
        return 1.0, 1.0 if scale is None else scale[:, None]
    mantissa, exponent = scale.frexp()
    return torch.ldexp(torch.ones_like(scale), exponent - 1)[:, None], 2 * mantissa[:, None]


def product(a: Tensor, b: Tensor) -> Tensor:  # [m, k], [k, n] -> [m, n] float32
    """With float32 sums of operands of any type."""
    if a.is_cuda and a.dtype != torch.float32:
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()


def add_(
    g: Tensor,  # [B, n], changed in place
    place: Tensor,  # [B, k]; outside [0, n): nothing to add
    value: Tensor,  # [B, k]
    factor: Tensor | float,  # [n, 1]
) -> None:
    inside, place = (place >= 0) & (place < g.shape[1]), place.clamp(0, g.shape[1] - 1)
    if isinstance(factor, Tensor):
        value = value * factor[place, 0]
    g.scatter_add_(1, place, torch.where(inside, value, 0.0).to(g.dtype))


def weight_gradient(
    dw: Tensor,  # [n, d] sum_i g_ij x_i, with the factor of the scale in g
    w: Tensor,  # [n, d]
    power: Tensor | float,  # [n, 1]
    factor: Tensor | float,  # [n, 1]
    normalize_weight: bool,
) -> Tensor:  # [n, d]
    if not normalize_weight:
        return dw
    unit = w * (power * factor)
    return power * (dw - (dw * unit).sum(1, keepdim=True) * unit)
