"""nontarget_lse in plain PyTorch (formulas: nontarget_lse.py).

`stream` walks over blocks of classes and runs on any device. Letters: B rows, C classes, n classes of a block,
d features, k nearest classes.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from fastmargin.ops.checks import check_ids
from fastmargin.ops.class_update import Step, stream_update
from fastmargin.ops.common import padded, stable_topk, without_autocast
from fastmargin.ops.problem import BackwardInput, ForwardOutput, Gradients, Problem
from fastmargin.ops.target_logit import inverse_norms

INF = math.inf
LOW = -1e30  # initial running maximum; finite, so that LOW - LOW is 0


def rounded(t: Tensor, dtype: torch.dtype | None) -> Tensor:
    """t rounded to `dtype`, in its own dtype: the operand of a product that accumulates in t's dtype."""
    if dtype is None:
        return t
    bits = t.to(dtype).view(torch.int16)
    return (bits & -1).view(dtype).to(t.dtype)  # & -1 keeps torch.compile from canceling the two casts


def operand(
    w: Tensor,  # [n, d]
    scale: Tensor | None,  # [n] 1/||w_j||
    compute_dtype: torch.dtype | None,
) -> Tensor:  # [n, d] unit rows where there is a scale
    """A power of two brings each row near unit norm before rounding, so that none over- or underflows in float16."""
    if scale is None:
        return rounded(w, compute_dtype)
    if compute_dtype is None:
        return w * scale[:, None]
    mantissa, exponent = scale.frexp()
    return rounded(torch.ldexp(w, exponent[:, None]), compute_dtype) * mantissa[:, None]


class Block(NamedTuple):
    first: int
    w: Tensor  # [n, d] operand of the products; unit rows where weights are normalized
    unit: Tensor  # [n, d] the same before rounding
    scale: Tensor | None  # [n] 1/||w_j||
    z: Tensor  # [B, n]


def block_of(p: Problem, x: Tensor, first: int, last: int) -> Block:  # x [B, d] rounded
    pick = slice(first, last) if p.class_ids is None else p.class_ids[first:last]
    w = p.w[pick]
    scale = inverse_norms(w) if p.normalize_weight else None
    unit = operand(w, scale, None)
    w = unit if p.compute_dtype is None else operand(w, scale, p.compute_dtype)
    z = x @ w.T
    if p.bias is not None:
        z += p.bias[pick]
    return Block(first, w, unit, scale, z)


def blocks(p: Problem, x: Tensor) -> Iterator[Block]:  # x [B, d] rounded
    """All classes, in blocks whose logits and weights each stay within 4 MiB of float32."""
    C, n = p.num_classes, max(256, 2**20 // max(len(x), x.shape[1]))
    for first in range(0, C, n):
        yield block_of(p, x, first, min(first + n, C))


def scatter_local_(
    z: Tensor,  # [B, n], changed in place
    ids: Tensor,  # [B, k] class indices: in class_ids where there are some, else in w
    first: int,  # class index of column 0
    value: Tensor | float,  # [B, k]
    add: bool = False,
) -> Tensor:
    """Sets z to `value` at the given classes, or adds it. "Local": those outside this block change nothing."""
    column = ids - first
    inside = (column >= 0) & (column < z.shape[1]) & (ids >= 0)
    column = column.clamp(0, z.shape[1] - 1)
    if add:
        return z.scatter_add_(1, column, torch.where(inside, value, 0.0))
    return z.scatter_(1, column, torch.where(inside, value, z.gather(1, column)))


@without_autocast
def stream_fwd(p: Problem, topk: int, need_expected_weight: bool) -> ForwardOutput:
    p.check_reserved()
    check_ids(p.y, p.class_ids, len(p.w))
    x = rounded(p.x, p.compute_dtype)
    shift, total = x.new_full((len(x), 1), LOW), x.new_zeros(len(x), 1)
    expected_weight = torch.zeros_like(x) if need_expected_weight else x.new_empty(0)
    values, classes = x.new_empty(len(x), 0), p.y.new_empty(len(x), 0)
    for first, operands, _, _, z in blocks(p, x):
        scatter_local_(z, p.y[:, None], first, -INF)
        if topk:
            ids = torch.arange(first, first + z.shape[1], device=z.device).expand_as(z)
            new_values, new_classes = stable_topk(z, ids, topk)
            values, classes = stable_topk(
                torch.cat((values, new_values), 1), torch.cat((classes, new_classes), 1), topk
            )
        higher = torch.maximum(shift, z.amax(1, keepdim=True))
        factor, shift = (shift - higher).exp(), higher
        e = z.sub_(shift).exp_()
        total = total * factor + e.sum(1, keepdim=True)
        if need_expected_weight:
            expected_weight = torch.addmm(expected_weight * factor, e, operands)
    rest = (total.log() + shift)[:, 0]  # log 0 = -inf where there is no other class
    if need_expected_weight:
        expected_weight = expected_weight / torch.where(total == 0, 1.0, total)
    return ForwardOutput(rest, *padded(values, classes, topk), expected_weight, x.new_empty(0))


@without_autocast
def stream_bwd(p: Problem, given: BackwardInput, need_dx: bool, need_dw: bool, need_db: bool) -> Gradients:
    p.check_reserved()
    out = empty_gradients(p, False, need_dw, need_db)
    for block, g, x in logit_gradients(p, given) if need_dw or need_db else ():
        classes = slice(block.first, block.first + g.shape[1])
        if need_dw:
            out.dw[classes] = weight_gradient(block, g, x)
        if need_db:
            out.db[classes] = g.sum(0)
    return out._replace(dx=row_gradient(p, given)) if need_dx else out


@without_autocast
def stream_bwd_update(
    p: Problem,  # w is changed
    given: BackwardInput,
    need_dx: bool,
    need_db: bool,
    step: Step,
) -> tuple[Tensor, Tensor]:  # dx [B, d], db [n]; each [0] where not needed
    """Makes the optimizer step of each block as soon as its gradient is complete; dx is of the weights before."""
    p.check_reserved()
    dx, _, db = empty_gradients(p, False, False, need_db)
    if need_dx:
        dx = row_gradient(p, given)
    for block, g, x in logit_gradients(p, given):
        classes = slice(block.first, block.first + g.shape[1])
        dw = weight_gradient(block, g, x)
        if need_db:
            db[classes] = g.sum(0)
        if p.class_ids is None:
            stream_update(p.w[classes], dw, None, step._replace(state=[t[classes] for t in step.state]))
        else:
            stream_update(p.w, dw, p.class_ids[classes], step)
    return dx, db


def row_gradient(p: Problem, given: BackwardInput) -> Tensor:  # [B, d]
    dx = given.d_rest[:, None] * given.expected_weight
    dx = dx + weighted_class_sum(p, p.y[:, None], given.d_target[:, None])
    return dx if given.d_topk is None else dx + weighted_class_sum(p, given.topk_classes, given.d_topk)


def logit_gradients(p: Problem, given: BackwardInput) -> Iterator[tuple[Block, Tensor, Tensor]]:
    """For each block: the block, g [B, n], and x [B, d] as the operand of the products."""
    offset = given.rest.masked_fill(given.rest == -INF, INF)[:, None]  # no other class: exp(z - inf) is 0
    x = rounded(p.x, p.compute_dtype)
    for block in blocks(p, x):
        g = block.z.sub_(offset).exp_().mul_(given.d_rest[:, None])
        scatter_local_(g, p.y[:, None], block.first, given.d_target[:, None])
        if given.d_topk is not None:
            scatter_local_(g, given.topk_classes, block.first, given.d_topk, add=True)
        yield block, g, x


def empty_gradients(p: Problem, *need: bool) -> Gradients:
    shapes = (p.x.shape, (p.num_classes, p.x.shape[1]), (p.num_classes,))
    return Gradients(*(p.x.new_empty(shape if needed else (0,)) for shape, needed in zip(shapes, need, strict=True)))


def weighted_class_sum(
    p: Problem,
    classes: Tensor,  # [B, k], -1: none
    g: Tensor,  # [B, k]
) -> Tensor:  # [B, d] sum over k of g times the class's weight
    if p.num_classes == 0 or classes.shape[1] == 0:
        return torch.zeros_like(p.x)
    safe = classes.clamp(min=0)
    chosen = p.w[safe if p.class_ids is None else p.class_ids[safe]]
    factor = g.masked_fill(classes < 0, 0.0)
    if p.normalize_weight:
        factor = factor * inverse_norms(chosen.flatten(0, 1)).view_as(factor)
    return (factor[:, :, None] * chosen).sum(1)


def weight_gradient(block: Block, g: Tensor, x: Tensor) -> Tensor:  # [B, n], [B, d] -> [n, d]
    dw = g.T @ x
    if block.scale is None:
        return dw
    radial = (dw * block.unit).sum(1, keepdim=True)
    return block.scale[:, None] * (dw - radial * block.unit)
