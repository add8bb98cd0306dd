"""nontarget_lse as its formulas say it (nontarget_lse.py), with the signatures of the registered ops.

It stores the B x C logits; it is the truth of the tests and is written to be read, not to be fast. Letters: B rows, C
classes, d features, k nearest classes.
"""

import torch
from torch import Tensor

from fastmargin.ops.checks import check_ids
from fastmargin.ops.common import padded, without_autocast
from fastmargin.ops.nontarget_lse_portable import (
    INF,
    block_of,
    check_bend_pool,
    count,
    empty_gradients,
    rounded,
    weight_gradient,
)


@without_autocast
def reference_fwd(
    x: Tensor,  # [B, d]
    w: Tensor,  # [C, d]
    y: Tensor,  # [B]
    bias: Tensor | None,  # [C]
    class_ids: Tensor | None,  # [n]
    bend: Tensor | None,  # [B, 4]
    normalize_weight: bool,
    pool: int,
    topk: int,
    compute_dtype: torch.dtype | None,
    need_expected_weight: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # rest [B], topk values [B, k], topk classes [B, k], expected weight
    check_bend_pool(bend, pool)
    check_ids(y, class_ids, len(w))
    x = rounded(x, compute_dtype)
    _, operands, _, _, z = block_of(x, w, bias, class_ids, normalize_weight, compute_dtype, 0, count(w, class_ids))
    z = z.masked_fill(is_target(y, z), -INF)
    rest = z.logsumexp(1)
    values, classes = padded(*z.sort(dim=1, descending=True, stable=True), topk)
    return rest, values, classes, softmax(z, rest[:, None]) @ operands if need_expected_weight else x.new_empty(0)


@without_autocast
def reference_bwd(
    x: Tensor,  # [B, d]
    w: Tensor,  # [C, d]
    y: Tensor,  # [B]
    bias: Tensor | None,  # [C]
    class_ids: Tensor | None,  # [n]
    bend: Tensor | None,  # [B, 4]
    normalize_weight: bool,
    pool: int,
    compute_dtype: torch.dtype | None,
    rest: Tensor,  # [B]
    topk_classes: Tensor,  # [B, k]
    expected_weight: Tensor,  # [B, d], or [0] without dx
    d_rest: Tensor,  # [B]
    d_target: Tensor,  # [B]
    d_topk: Tensor | None,  # [B, k]
    need_dx: bool,
    need_dw: bool,
    need_db: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # dx [B, d], dw [n, d], db [n]; each [0] where not needed
    check_bend_pool(bend, pool)
    x = rounded(x, compute_dtype)
    block = block_of(x, w, bias, class_ids, normalize_weight, compute_dtype, 0, count(w, class_ids))
    g = d_rest[:, None] * softmax(block.z, rest[:, None])
    g = torch.where(is_target(y, g), d_target[:, None], g)
    if d_topk is not None:
        one_hot = topk_classes[:, :, None] == torch.arange(g.shape[1], device=g.device)  # [B, k, n]
        g = g + (one_hot * d_topk[:, :, None]).sum(1)
    dx, dw, db = empty_gradients(x, w, class_ids, need_dx, need_dw, need_db)
    return (
        g @ block.w if need_dx else dx,
        weight_gradient(block, g, x) if need_dw else dw,
        g.sum(0) if need_db else db,
    )


def is_target(y: Tensor, z: Tensor) -> Tensor:  # [B], [B, n] -> [B, n]
    return y[:, None] == torch.arange(z.shape[1], device=y.device)


def softmax(z: Tensor, rest: Tensor) -> Tensor:  # [B, n], [B, 1] -> [B, n]
    """exp(z - rest); 0 where rest is -inf, as there is no other class."""
    return torch.where(rest == -INF, 0.0, (z - rest).exp())
