"""nontarget_lse in plain PyTorch, with the signatures of the registered ops (formulas: nontarget_lse.py).

`stream` walks over blocks of classes and runs on any device. `reference` stores the B x C logits; it is the truth of
the tests and is written to be read, not to be fast. Letters: B rows, C classes, n classes of a block, d, k.
"""

import functools
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastmargin.ops.checks import check_ids
from fastmargin.ops.target_logit import inverse_norms

INF = math.inf


def portable(op: Callable[..., Any]) -> Callable[..., Any]:
    """Runs the op outside autocast: z and all sums keep the dtype of the operands."""

    @functools.wraps(op)
    def run(x: Tensor, *args: Any) -> Any:
        with torch.autocast(x.device.type, enabled=False):
            return op(x, *args)

    return run


def refuse(bend: Tensor | None, pool: int, compute_dtype: torch.dtype | None) -> None:
    if bend is not None:
        raise ValueError("bend (rules that bend negatives) is not supported by this backend")
    if pool != 1:
        raise ValueError(f"pool = {pool} (sub-centres) is not supported by this backend; want 1")
    if compute_dtype is not None:
        raise ValueError("compute_dtype is not supported by this backend")


class Block(NamedTuple):
    first: int
    w: Tensor  # [n, d] unit rows where weights are normalised
    scale: Tensor | None  # [n] 1/||w_j||
    z: Tensor  # [B, n]
    own: Tensor  # [B, n] true at the row's own class


def block_of(
    x: Tensor,  # [B, d]
    w: Tensor,  # [C, d]
    y: Tensor,  # [B]
    bias: Tensor | None,  # [C]
    rows: Tensor | None,  # [n]
    normalize_weight: bool,
    first: int,
    last: int,
) -> Block:
    pick = slice(first, last) if rows is None else rows[first:last]
    w, scale = w[pick], None
    if normalize_weight:
        scale = inverse_norms(w)
        w = w * scale[:, None]
    z = x @ w.T
    if bias is not None:
        z = z + bias[pick]
    own = y[:, None] == torch.arange(first, last, device=y.device)
    return Block(first, w, scale, z, own)


def count(w: Tensor, rows: Tensor | None) -> int:
    return len(w) if rows is None else len(rows)


def blocks(
    x: Tensor, w: Tensor, y: Tensor, bias: Tensor | None, rows: Tensor | None, normalize_weight: bool
) -> Iterator[Block]:
    """All classes, so many at a time that a block of logits and one of weights stay within 4 MiB of float32."""
    C, n = count(w, rows), max(256, 2**20 // max(len(x), x.shape[1]))
    for first in range(0, C, n):
        yield block_of(x, w, y, bias, rows, normalize_weight, first, min(first + n, C))


def weight(z: Tensor, rest: Tensor) -> Tensor:
    """exp(z - rest), 0 where rest is -inf: there is nothing to weigh."""
    return torch.where(rest == -INF, 0.0, (z - rest).exp())


def padded(values: Tensor, classes: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The first k columns, with (-inf, -1) where there are fewer or where a value is -inf."""
    missing = max(k - values.shape[1], 0)
    values = torch.nn.functional.pad(values[:, :k], (0, missing), value=-INF)
    classes = torch.nn.functional.pad(classes[:, :k], (0, missing), value=-1)
    return values, classes.masked_fill(values == -INF, -1)


def best(
    values: Tensor,  # [B, n]
    classes: Tensor,  # [B, n] ascending where values are equal
    k: int,
) -> tuple[Tensor, Tensor]:  # [B, k], [B, k]
    """The k largest, equal values by the smaller class.

    torch.topk leaves the order of equal values open: its k-th value is used, and of the entries equal to it the first.
    """
    if 0 < k < values.shape[1]:
        kth = values.topk(k).values[:, -1:]
        above, equal = values > kth, values == kth
        keep = above | (equal & (equal.cumsum(1) <= k - above.sum(1, keepdim=True)))
        places = torch.arange(values.shape[1], 0, -1, device=values.device) * keep
        at = places.topk(k).indices
        values, classes = values.gather(1, at), classes.gather(1, at)
    values, order = values.sort(dim=1, descending=True, stable=True)
    return padded(values, classes.gather(1, order), k)


@portable
def stream_fwd(
    x: Tensor, w: Tensor, y: Tensor, bias: Tensor | None, rows: Tensor | None, bend: Tensor | None,
    normalize_weight: bool, pool: int, topk: int, compute_dtype: torch.dtype | None, want_a: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    refuse(bend, pool, compute_dtype)
    check_ids(y, rows, len(w))
    rest, a = x.new_full((len(x), 1), -INF), torch.zeros_like(x) if want_a else x.new_empty(0)
    values, classes = x.new_empty(len(x), 0), y.new_empty(len(x), 0)
    for block in blocks(x, w, y, bias, rows, normalize_weight):
        z = block.z.masked_fill(block.own, -INF)
        merged = torch.logaddexp(rest, z.logsumexp(1, keepdim=True))
        if want_a:
            a = a * weight(rest, merged) + weight(z, merged) @ block.w
        rest = merged
        if topk:
            ids = torch.arange(block.first, block.first + z.shape[1], device=z.device).expand_as(z)
            new_values, new_classes = best(z, ids, topk)
            values, classes = best(torch.cat((values, new_values), 1), torch.cat((classes, new_classes), 1), topk)
    return rest[:, 0], *padded(values, classes, topk), a


@portable
def stream_bwd(
    x: Tensor, w: Tensor, y: Tensor, bias: Tensor | None, rows: Tensor | None, bend: Tensor | None,
    normalize_weight: bool, pool: int, compute_dtype: torch.dtype | None, rest: Tensor, topk_classes: Tensor, a: Tensor,
    d_rest: Tensor, d_target: Tensor, d_topk: Tensor | None, need_dx: bool, need_dw: bool, need_db: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    refuse(bend, pool, compute_dtype)
    dx, dw, db = empty_gradients(x, w, rows, need_dx, need_dw, need_db)
    if need_dx:
        dx = d_rest[:, None] * a + pulled(w, rows, normalize_weight, y[:, None], d_target[:, None])
        if d_topk is not None:
            dx += pulled(w, rows, normalize_weight, topk_classes, d_topk)
    for block in blocks(x, w, y, bias, rows, normalize_weight) if need_dw or need_db else ():
        g = logit_gradient(block, rest, topk_classes, d_rest, d_target, d_topk)
        at = slice(block.first, block.first + g.shape[1])
        if need_dw:
            dw[at] = weight_gradient(block, g, x)
        if need_db:
            db[at] = g.sum(0)
    return dx, dw, db


def empty_gradients(x: Tensor, w: Tensor, rows: Tensor | None, *need: bool) -> tuple[Tensor, Tensor, Tensor]:
    n = count(w, rows)
    shapes = (x.shape, (n, x.shape[1]), (n,))
    dx, dw, db = (x.new_empty(shape if needed else (0,)) for shape, needed in zip(shapes, need, strict=True))
    return dx, dw, db


def pulled(
    w: Tensor,  # [C, d]
    rows: Tensor | None,  # [n]
    normalize_weight: bool,
    classes: Tensor,  # [B, k], -1: none
    g: Tensor,  # [B, k]
) -> Tensor:  # [B, d] sum over k of g times the class's weight
    if count(w, rows) == 0 or classes.shape[1] == 0:
        return w.new_zeros(len(g), w.shape[1])
    safe = classes.clamp(min=0)
    chosen = w[safe if rows is None else rows[safe]]
    factor = g.masked_fill(classes < 0, 0.0)
    if normalize_weight:
        factor = factor * inverse_norms(chosen.flatten(0, 1)).view_as(factor)
    return (factor[:, :, None] * chosen).sum(1)


def logit_gradient(
    block: Block,
    rest: Tensor,  # [B]
    topk_classes: Tensor,  # [B, k]
    d_rest: Tensor,  # [B]
    d_target: Tensor,  # [B]
    d_topk: Tensor | None,  # [B, k]
) -> Tensor:  # [B, n]
    g = d_rest[:, None] * weight(block.z, rest[:, None])
    g = torch.where(block.own, d_target[:, None], g)
    if d_topk is not None:
        n = g.shape[1]
        place = topk_classes - block.first
        inside = (place >= 0) & (place < n) & (topk_classes >= 0)
        g = g.scatter_add(1, place.clamp(0, max(n - 1, 0)), d_topk.masked_fill(~inside, 0.0))
    return g


def weight_gradient(block: Block, g: Tensor, x: Tensor) -> Tensor:  # [B, n], [B, d] -> [n, d]
    dw = g.T @ x
    if block.scale is None:
        return dw
    return block.scale[:, None] * (dw - (g * block.z).sum(0)[:, None] * block.w)


@portable
def reference_fwd(
    x: Tensor, w: Tensor, y: Tensor, bias: Tensor | None, rows: Tensor | None, bend: Tensor | None,
    normalize_weight: bool, pool: int, topk: int, compute_dtype: torch.dtype | None, want_a: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    refuse(bend, pool, compute_dtype)
    check_ids(y, rows, len(w))
    block = block_of(x, w, y, bias, rows, normalize_weight, 0, count(w, rows))
    z = block.z.masked_fill(block.own, -INF)
    rest = z.logsumexp(1)
    values, classes = padded(*z.sort(dim=1, descending=True, stable=True), topk)
    return rest, values, classes, weight(z, rest[:, None]) @ block.w if want_a else x.new_empty(0)


@portable
def reference_bwd(
    x: Tensor, w: Tensor, y: Tensor, bias: Tensor | None, rows: Tensor | None, bend: Tensor | None,
    normalize_weight: bool, pool: int, compute_dtype: torch.dtype | None, rest: Tensor, topk_classes: Tensor, a: Tensor,
    d_rest: Tensor, d_target: Tensor, d_topk: Tensor | None, need_dx: bool, need_dw: bool, need_db: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    refuse(bend, pool, compute_dtype)
    block = block_of(x, w, y, bias, rows, normalize_weight, 0, count(w, rows))
    g = logit_gradient(block, rest, topk_classes, d_rest, d_target, d_topk)
    dx, dw, db = empty_gradients(x, w, rows, need_dx, need_dw, need_db)
    return (
        g @ block.w if need_dx else dx,
        weight_gradient(block, g, x) if need_dw else dw,
        g.sum(0) if need_db else db,
    )
