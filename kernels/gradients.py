"""Gradients of rows and weights from exponentials; the targets and the top-k are added in float32.

    E_ij = exp(z_ij - o_i) factor_j         o_i = ln(n) / 2 where kept, rest_i + t_i where made again
    c_i  = d_rest_i exp(o_i - rest_i) lift  0 where there is no other class, rest_i = -inf
    dx_i = c_i / lift sum_j E_ij o_j + sum of e w^_c over the row's entries (c, e)
    dw_j = power_j (I - w^_j w^_j^T) (sum_i E_ij c_i x_i / lift + factor_j * sum of e x_i over j's entries (i, e))
    db_j = sum_i E_ij c_i / lift + sum of e over the class's entries

c_i x_i is rounded once, from x in float32. lift, a power of two, brings the largest d_rest into [1/2, 1), so that no
c_i x_i over- or underflows. t_i in [0, ln 2) is spread evenly over the rows: where a class has all of each row's
probability, as the other one of two, its E would be the same rounded number in all rows, whose error would not average
out. Entries are d_target at the row's own class and d_topk at its top-k classes. They are sorted by class, so that no
sum depends on timing. Letters: B rows, C classes, n classes of a chunk, d features, k, m entries in all.
"""

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastmargin.ops.problem import Problem

from .operands import TYPES, whole_rows
from .tile import inverse_norms, split_scale, weight_rows
from .tile_table import H100

MOST_SPLITS = 8
TILE_ROWS, TILE_FEATURES = 128, 256  # of a product's tile, about


@triton.jit(do_not_specialize=["first", "n"])
def weight_gradient_kernel(
    dw,  # [n, d] sum_i E_ij c_i x_i, changed, or None
    db,  # [n] sum_i E_ij c_i, changed, or None
    x,  # [B, d] float32
    w,  # [C, d]
    class_ids,  # [all] or None
    bounds,  # [blocks + 1] int32: where the entries of each block of all classes begin
    entry_class,  # [m] int32
    entry_row,  # [m] int64
    entry_value,  # [m] float32
    lift,  # []
    first,
    n,
    w_row,
    w_feature,
    d: tl.constexpr,
    COMPUTE: tl.constexpr,
    NORMALIZE: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    j, f = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C), tl.arange(0, BLOCK_D)
    inside, in_d = j < n, f < d
    block = first // BLOCK_C + tl.program_id(0)
    at, last = tl.load(bounds + block), tl.load(bounds + block + 1)
    entries = tl.zeros((BLOCK_C, BLOCK_D), dtype=tl.float32)
    count = tl.zeros((BLOCK_C,), dtype=tl.float32)
    while at < last:
        own, value = first + j == tl.load(entry_class + at), tl.load(entry_value + at)
        xt = tl.load(x + tl.load(entry_row + at) * d + f, mask=in_d, other=0.0)
        entries += tl.where(own[:, None], value * xt[None, :], 0.0)
        count += tl.where(own, value, 0.0)
        at += 1
    inverse = 1 / tl.load(lift)
    if db is not None:
        tl.store(db + j, tl.load(db + j, mask=inside, other=0.0) * inverse + count, mask=inside)
    if dw is not None:
        out, mask = dw + j.to(tl.int64)[:, None] * d + f[None, :], inside[:, None] & in_d[None, :]
        products = tl.load(out, mask=mask, other=0.0) * inverse
        if NORMALIZE:
            wt = weight_rows(w, class_ids, first + j.to(tl.int64), inside, w_row, w_feature, d, BLOCK_D)
            exponent, residual = split_scale(inverse_norms(wt), COMPUTE)
            unit = wt * (exponent * residual)[:, None]
            products += residual[:, None] * entries
            products = exponent[:, None] * (products - tl.sum(products * unit, 1)[:, None] * unit)
        else:
            products += entries
        if class_ids is not None:  # 0 where there is no class, whatever x is
            ids = tl.load(class_ids + first + j, mask=inside, other=-1)
            products = tl.where((ids >= 0)[:, None], products, 0.0)
        tl.store(out, products, mask=mask)


@triton.jit(do_not_specialize=["B", "n", "splits"])
def row_gradient_kernel(
    dx,  # [B, d] float32, out
    sums,  # [splits, B, d]
    scale,  # [B] of the sums
    w,  # [C, d]
    class_ids,  # [n] or None
    classes,  # [B, entries] int64 class indices
    values,  # [B, entries]
    B,
    n,
    splits,
    w_row,
    w_feature,
    d: tl.constexpr,
    ENTRIES: tl.constexpr,
    NORMALIZE: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    i = tl.program_id(0).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
    f = tl.arange(0, BLOCK_D)
    in_b = i < B
    at, mask = i[:, None] * d + f[None, :], in_b[:, None] & (f < d)[None, :]
    total = tl.zeros((BLOCK_B, BLOCK_D), dtype=tl.float32)
    split = 0
    while split < splits:
        total += tl.load(sums + tl.cast(split, tl.int64) * B * d + at, mask=mask, other=0.0)
        split += 1
    total = total * tl.load(scale + i, mask=in_b, other=0.0)[:, None]
    t = 0
    while t < ENTRIES:
        index = tl.load(classes + i * ENTRIES + t, mask=in_b, other=-1)
        inside = (index >= 0) & (index < n)
        value = tl.load(values + i * ENTRIES + t, mask=inside, other=0.0)
        wt = weight_rows(w, class_ids, index, inside, w_row, w_feature, d, BLOCK_D)
        if NORMALIZE:
            value = value * inverse_norms(wt)
        total += value[:, None] * wt
        t += 1
    tl.store(dx + at, total, mask=mask)


class Entries(NamedTuple):
    """d_target and d_topk: first by row, then sorted by class."""

    classes: Tensor  # [B, 1 + k] class indices
    values: Tensor  # [B, 1 + k]
    bounds: Tensor  # [blocks + 1] int32: where each block of classes begins in the sorted entries
    sorted_class: Tensor  # [m] int32
    sorted_row: Tensor  # [m]
    sorted_value: Tensor  # [m]


def entries_of(
    y: Tensor,  # [B]
    d_target: Tensor,  # [B]
    topk_classes: Tensor,  # [B, k]
    d_topk: Tensor | None,  # [B, k]
    n: int,
    block: int,
) -> Entries:
    classes, values = y[:, None], d_target.contiguous()[:, None]
    if d_topk is not None:
        classes, values = torch.cat((classes, topk_classes), 1), torch.cat((values, d_topk), 1)
    sorted_class, order = classes.flatten().clamp(-1, n).int().sort(stable=True)
    edges = torch.arange(0, n + block, block, dtype=torch.int32, device=y.device)
    bounds = torch.searchsorted(sorted_class, edges, out_int32=True)
    return Entries(classes, values, bounds, sorted_class, order // classes.shape[1], values.flatten()[order])


def finish_chunk(
    dw: Tensor | None,  # [n, d] sum_i E_ij c_i x_i, changed
    db: Tensor | None,  # [n] sum_i E_ij c_i, changed
    first: int,  # class index
    p: Problem,
    entries: Entries,
    lift: Tensor,  # []
) -> None:
    w, d = p.w, p.w.shape[1]
    n, blocks = len(db if dw is None else dw), whole_rows(d)  # type: ignore[arg-type]
    weight_gradient_kernel[(triton.cdiv(n, blocks["BLOCK_C"]),)](
        dw,
        db,
        p.x,
        w,
        p.class_ids,
        entries.bounds,
        entries.sorted_class,
        entries.sorted_row,
        entries.sorted_value,
        lift,
        first,
        n,
        *w.stride(),
        d=d,
        COMPUTE=TYPES[p.compute_dtype or w.dtype],
        NORMALIZE=p.normalize_weight,
        **blocks,
    )


def finish_rows(
    dx: Tensor,  # [B, d], out
    sums: Tensor,  # [splits, B, d]
    scale: Tensor,  # [B]
    p: Problem,
    entries: Entries,
) -> None:
    splits, B, d = sums.shape
    blocks = whole_rows(d)
    row_gradient_kernel[(triton.cdiv(B, blocks["BLOCK_C"]),)](
        dx,
        sums,
        scale,
        p.w,
        p.class_ids,
        entries.classes,
        entries.values,
        B,
        p.num_classes,
        splits,
        *p.w.stride(),
        d=d,
        ENTRIES=entries.classes.shape[1],
        NORMALIZE=p.normalize_weight,
        BLOCK_B=blocks["BLOCK_C"],
        BLOCK_D=blocks["BLOCK_D"],
    )


class Scales(NamedTuple):
    """What exponentials made again are multiplied by."""

    offset: Tensor  # [B] of z; +inf where there is no other class, so that E is 0
    c: Tensor  # [B]
    lift: Tensor  # []


def scales_of(
    rest: Tensor,  # [B]
    d_rest: Tensor,  # [B]
    compute_dtype: torch.dtype | None,
) -> Scales:
    """For exponentials that are made again.

    float16 has a small exponent range: there E is up to 2^15, and c as small.
    """
    shift = 14 * math.log(2) if compute_dtype == torch.float16 else 0.0
    t = spread(len(rest), rest.device)
    lift = lift_of(d_rest)
    offset = rest.masked_fill(rest == -math.inf, math.inf) + (t - shift)
    return Scales(offset, lift * d_rest * t.exp(), lift * math.exp(shift))


def scales_of_kept(
    rest: Tensor,  # [B]
    d_rest: Tensor,  # [B]
    offset: float,
) -> Scales:
    lift = lift_of(d_rest)
    none = rest == -math.inf
    c = lift * d_rest * (offset - rest).masked_fill(none, -math.inf).exp()
    return Scales(torch.full_like(rest, offset), c, lift)


def spread(B: int, device: torch.device) -> Tensor:  # [B]
    """t: the fractions of multiples of the golden ratio, which are spread evenly, times ln 2."""
    golden = (math.sqrt(5) - 1) / 2
    return (torch.arange(B, dtype=torch.float64, device=device) * golden).frac().mul(math.log(2)).float()


def lift_of(d_rest: Tensor) -> Tensor:  # [B] -> []
    """The power of two that brings the largest into [1/2, 1); at most 2^100."""
    exponent = d_rest.abs().amax().frexp().exponent
    return torch.ldexp(d_rest.new_ones(()), -exponent.clamp(min=-100))


def splits_of(B: int, d: int) -> int:
    """Into how many products dx = E o is split along the classes (split-K): its few tiles would not keep a GPU busy.

    A power of two, since chunks are multiples of 64 classes.
    """
    tiles = triton.cdiv(B, TILE_ROWS) * triton.cdiv(d, TILE_FEATURES)
    return 1 << min(max(H100 // tiles, 1).bit_length() - 1, MOST_SPLITS.bit_length() - 1)


def add_row_products(
    sums: Tensor,  # [splits, B, d], changed
    e: Tensor,  # [B, n]
    o: Tensor,  # [n, d]
) -> None:
    """sums += E o in parts; a chunk that is not divisible by their number is added to the first."""
    n = e.shape[1]
    s = 1 if n % len(sums) else len(sums)
    parts = e.unflatten(1, (s, n // s)).transpose(0, 1), o.unflatten(0, (s, n // s))
    if e.dtype == torch.float32:
        sums[:s].baddbmm_(*parts)
    elif torch.compiler.is_compiling():  # baddbmm(out_dtype=) cannot be traced in torch 2.11 to 2.13
        sums[:s] += torch.bmm(*parts, out_dtype=torch.float32)
    elif e.is_cuda:
        torch.baddbmm(sums[:s], *parts, out_dtype=torch.float32, out=sums[:s])
    else:
        sums[:s].baddbmm_(*(p.float() for p in parts))


def multiply(
    out: Tensor,  # [m, n] float32
    a: Tensor,  # [m, k]
    b: Tensor,  # [k, n]
) -> None:
    """out = a b, with float32 sums whatever the operands' type."""
    if a.dtype == torch.float32:
        torch.mm(a, b, out=out)
    elif a.is_cuda:
        torch.mm(a, b, out_dtype=torch.float32, out=out)
    else:
        torch.mm(a.float(), b.float(), out=out)
