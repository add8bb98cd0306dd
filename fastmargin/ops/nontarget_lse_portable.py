"""nontarget_lse in plain PyTorch, with the signatures of the registered ops (formulas: nontarget_lse.py).

`stream` walks over blocks of classes and runs on any device. Letters: B rows, C classes, n classes of a block,
d features, k nearest classes.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from fastmargin.ops.checks import check_ids
from fastmargin.ops.class_update import stream_update
from fastmargin.ops.common import padded, stable_topk, without_autocast
from fastmargin.ops.target_logit import inverse_norms

INF = math.inf
LOW = -1e30  # initial running maximum; finite, so that LOW - LOW is 0


def check_bend_pool(bend: Tensor | None, pool: int) -> None:
    if bend is not None:
        raise ValueError("bend (rules that bend negatives) is not supported by this backend")
    if pool != 1:
        raise ValueError(f"pool = {pool} (sub-centers) is not supported by this backend; want 1")


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


def block_of(
    x: Tensor,  # [B, d]
    w: Tensor,  # [C, d]
    bias: Tensor | None,  # [C]
    class_ids: Tensor | None,  # [n]
    normalize_weight: bool,
    compute_dtype: torch.dtype | None,
    first: int,
    last: int,
) -> Block:
    pick = slice(first, last) if class_ids is None else class_ids[first:last]
    w = w[pick]
    scale = inverse_norms(w) if normalize_weight else None
    unit = operand(w, scale, None)
    w = unit if compute_dtype is None else operand(w, scale, compute_dtype)
    z = x @ w.T
    if bias is not None:
        z += bias[pick]
    return Block(first, w, unit, scale, z)


def count(w: Tensor, class_ids: Tensor | None) -> int:  # [C, d], [n]
    return len(w) if class_ids is None else len(class_ids)


def blocks(
    x: Tensor,  # [B, d]
    w: Tensor,  # [C, d]
    bias: Tensor | None,  # [C]
    class_ids: Tensor | None,  # [n]
    normalize_weight: bool,
    compute_dtype: torch.dtype | None,
) -> Iterator[Block]:
    """All classes, in blocks whose logits and weights each stay within 4 MiB of float32."""
    C, n = count(w, class_ids), max(256, 2**20 // max(len(x), x.shape[1]))
    for first in range(0, C, n):
        yield block_of(x, w, bias, class_ids, normalize_weight, compute_dtype, first, min(first + n, C))


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
def stream_fwd(
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
    shift, total = x.new_full((len(x), 1), LOW), x.new_zeros(len(x), 1)
    expected_weight = torch.zeros_like(x) if need_expected_weight else x.new_empty(0)
    values, classes = x.new_empty(len(x), 0), y.new_empty(len(x), 0)
    for first, operands, _, _, z in blocks(x, w, bias, class_ids, normalize_weight, compute_dtype):
        scatter_local_(z, y[:, None], first, -INF)
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
    return rest, *padded(values, classes, topk), expected_weight


@without_autocast
def stream_bwd(
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
    _, dw, db = empty_gradients(x, w, class_ids, False, need_dw, need_db)
    dx = row_gradient(
        x, w, y, class_ids, normalize_weight, topk_classes, expected_weight, d_rest, d_target, d_topk, need_dx
    )
    given = x, w, y, bias, class_ids, normalize_weight, compute_dtype, rest, topk_classes, d_rest, d_target, d_topk
    for block, g, operands in gradients(*given) if need_dw or need_db else ():
        block_slice = slice(block.first, block.first + g.shape[1])
        if need_dw:
            dw[block_slice] = weight_gradient(block, g, operands)
        if need_db:
            db[block_slice] = g.sum(0)
    return dx, dw, db


@without_autocast
def stream_bwd_update(
    x: Tensor,  # [B, d]
    w: Tensor,  # [C, d], changed
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
    need_db: bool,
    state: list[Tensor],  # [C, d] each, changed
    rule: str,
    hyper: list[float],
    grad_scale: Tensor | None,  # []
) -> tuple[Tensor, Tensor]:  # dx [B, d], db [n]; each [0] where not needed
    """Makes the optimizer step of each block as soon as its gradient is complete."""
    check_bend_pool(bend, pool)
    dx = row_gradient(
        x, w, y, class_ids, normalize_weight, topk_classes, expected_weight, d_rest, d_target, d_topk, need_dx
    )
    _, _, db = empty_gradients(x, w, class_ids, False, False, need_db)
    given = x, w, y, bias, class_ids, normalize_weight, compute_dtype, rest, topk_classes, d_rest, d_target, d_topk
    for block, g, operands in gradients(*given):
        block_slice = slice(block.first, block.first + g.shape[1])
        dw = weight_gradient(block, g, operands)
        if need_db:
            db[block_slice] = g.sum(0)
        if class_ids is None:
            stream_update(w[block_slice], [t[block_slice] for t in state], dw, None, rule, hyper, grad_scale)
        else:
            stream_update(w, state, dw, class_ids[block_slice], rule, hyper, grad_scale)
    return dx, db


def row_gradient(
    x: Tensor,  # [B, d]
    w: Tensor,  # [C, d]
    y: Tensor,  # [B]
    class_ids: Tensor | None,  # [n]
    normalize_weight: bool,
    topk_classes: Tensor,  # [B, k]
    expected_weight: Tensor,  # [B, d], or [0] without dx
    d_rest: Tensor,  # [B]
    d_target: Tensor,  # [B]
    d_topk: Tensor | None,  # [B, k]
    need_dx: bool,
) -> Tensor:  # [B, d], or [0]
    if not need_dx:
        return x.new_empty(0)
    dx = d_rest[:, None] * expected_weight + weighted_class_sum(
        w, class_ids, normalize_weight, y[:, None], d_target[:, None]
    )
    return dx if d_topk is None else dx + weighted_class_sum(w, class_ids, normalize_weight, topk_classes, d_topk)


def gradients(
    x: Tensor,  # [B, d]
    w: Tensor,  # [C, d]
    y: Tensor,  # [B]
    bias: Tensor | None,  # [C]
    class_ids: Tensor | None,  # [n]
    normalize_weight: bool,
    compute_dtype: torch.dtype | None,
    rest: Tensor,  # [B]
    topk_classes: Tensor,  # [B, k]
    d_rest: Tensor,  # [B]
    d_target: Tensor,  # [B]
    d_topk: Tensor | None,  # [B, k]
) -> Iterator[tuple[Block, Tensor, Tensor]]:
    """For each block: the block, g [B, n], and x [B, d] as the operand of the products."""
    offset = rest.masked_fill(rest == -INF, INF)[:, None]  # no other class: exp(z - inf) is 0
    x = rounded(x, compute_dtype)
    for block in blocks(x, w, bias, class_ids, normalize_weight, compute_dtype):
        g = block.z.sub_(offset).exp_().mul_(d_rest[:, None])
        scatter_local_(g, y[:, None], block.first, d_target[:, None])
        if d_topk is not None:
            scatter_local_(g, topk_classes, block.first, d_topk, add=True)
        yield block, g, x


def empty_gradients(
    x: Tensor,  # [B, d]
    w: Tensor,  # [C, d]
    class_ids: Tensor | None,  # [n]
    *need: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    n = count(w, class_ids)
    shapes = (x.shape, (n, x.shape[1]), (n,))
    dx, dw, db = (x.new_empty(shape if needed else (0,)) for shape, needed in zip(shapes, need, strict=True))
    return dx, dw, db


def weighted_class_sum(
    w: Tensor,  # [C, d]
    class_ids: Tensor | None,  # [n]
    normalize_weight: bool,
    classes: Tensor,  # [B, k], -1: none
    g: Tensor,  # [B, k]
) -> Tensor:  # [B, d] sum over k of g times the class's weight
    if count(w, class_ids) == 0 or classes.shape[1] == 0:
        return w.new_zeros(len(g), w.shape[1])
    safe = classes.clamp(min=0)
    chosen = w[safe if class_ids is None else class_ids[safe]]
    factor = g.masked_fill(classes < 0, 0.0)
    if normalize_weight:
        factor = factor * inverse_norms(chosen.flatten(0, 1)).view_as(factor)
    return (factor[:, :, None] * chosen).sum(1)


def weight_gradient(block: Block, g: Tensor, x: Tensor) -> Tensor:  # [B, n], [B, d] -> [n, d]
    dw = g.T @ x
    if block.scale is None:
        return dw
    radial = (dw * block.unit).sum(1, keepdim=True)
    return block.scale[:, None] * (dw - radial * block.unit)
