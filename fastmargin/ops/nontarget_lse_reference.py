"""nontarget_lse as its formulas say it (nontarget_lse.py).

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
    empty_gradients,
    rounded,
    weight_gradient,
)
from fastmargin.ops.problem import BackwardInput, ForwardOutput, Gradients, Problem


@without_autocast
def reference_fwd(p: Problem, topk: int, need_expected_weight: bool) -> ForwardOutput:
    p.check_reserved()
    check_ids(p.y, p.class_ids, len(p.w))
    _, operands, _, _, z = block_of(p, rounded(p.x, p.compute_dtype), 0, p.num_classes)
    z = z.masked_fill(is_target(p.y, z), -INF)
    rest = z.logsumexp(1)
    values, classes = padded(*z.sort(dim=1, descending=True, stable=True), topk)
    expected_weight = softmax(z, rest[:, None]) @ operands if need_expected_weight else z.new_empty(0)
    return ForwardOutput(rest, values, classes, expected_weight, z.new_empty(0))


@without_autocast
def reference_bwd(p: Problem, given: BackwardInput, need_dx: bool, need_dw: bool, need_db: bool) -> Gradients:
    p.check_reserved()
    x = rounded(p.x, p.compute_dtype)
    block = block_of(p, x, 0, p.num_classes)
    g = given.d_rest[:, None] * softmax(block.z, given.rest[:, None])
    g = torch.where(is_target(p.y, g), given.d_target[:, None], g)
    if given.d_topk is not None:
        one_hot = given.topk_classes[:, :, None] == torch.arange(g.shape[1], device=g.device)  # [B, k, n]
        g = g + (one_hot * given.d_topk[:, :, None]).sum(1)
    dx, dw, db = empty_gradients(p, need_dx, need_dw, need_db)
    return Gradients(
        g @ block.w if need_dx else dx,
        weight_gradient(block, g, x) if need_dw else dw,
        g.sum(0) if need_db else db,
    )


def is_target(y: Tensor, z: Tensor) -> Tensor:  # [B], [B, n] -> [B, n]
    return y[:, None] == torch.arange(z.shape[1], device=y.device)


def softmax(z: Tensor, rest: Tensor) -> Tensor:  # [B, n], [B, 1] -> [B, n]
    """exp(z - rest); 0 where rest is -inf, as there is no other class."""
    return torch.where(rest == -INF, 0.0, (z - rest).exp())
