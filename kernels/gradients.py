"""Gradients of rows and weights from the products of a backward pass; the targets and the top-k are added in float32.

    dx_i = sum_j g_ij o_j / d_rest_scale + sum of e w^_c over the row's entries (c, e)
    dw_j = exponent_scale_j (I - w^_j w^_j^T)
           (sum_i g_ij x_i / d_rest_scale + residual_scale_j * sum of e x_i over the class's entries (i, e))
    db_j = sum_i g_ij / d_rest_scale + sum of e over the class's entries

Entries are d_target at the row's own class and d_topk at its top-k classes. They are sorted by class, so that no sum
depends on timing. g includes residual_scale_j. Letters: B rows, C classes, n classes of a chunk, d features, k, m
entries in all.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .operands import ClassChunk, whole_rows
from .tile import inverse_norms, weight_rows
from .tile_table import H100

MOST_SPLITS = 8
TILE_ROWS, TILE_FEATURES = 128, 256  # of a product's tile, about


@triton.jit(do_not_specialize=["first", "n"])
def weight_gradient_kernel(
    dw,  # [n, d] sum_i g_ij x_i, changed, or None
    db,  # [n] sum_i g_ij, changed, or None
    x,  # [B, d] float32
    w,  # [C, d]
    class_ids,  # [all] or None
    exponent_scale,  # [n] or None
    residual_scale,  # [n] or None
    bounds,  # [blocks + 1] int32: where the entries of each block of all classes begin
    entry_class,  # [m] int32
    entry_row,  # [m] int64
    entry_value,  # [m] float32
    d_rest_scale,  # []
    first,
    n,
    w_row,
    w_feature,
    d: tl.constexpr,
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
    inverse = 1 / tl.load(d_rest_scale)
    if db is not None:
        tl.store(db + j, tl.load(db + j, mask=inside, other=0.0) * inverse + count, mask=inside)
    if dw is not None:
        out, mask = dw + j.to(tl.int64)[:, None] * d + f[None, :], inside[:, None] & in_d[None, :]
        products = tl.load(out, mask=mask, other=0.0) * inverse
        if residual_scale is None:
            products += entries
        else:
            exponent = tl.load(exponent_scale + j, mask=inside, other=0.0)
            residual = tl.load(residual_scale + j, mask=inside, other=0.0)
            unit = (
                weight_rows(w, class_ids, first + j.to(tl.int64), inside, w_row, w_feature, d, BLOCK_D)
                * (exponent * residual)[:, None]
            )
            products += residual[:, None] * entries
            products = exponent[:, None] * (products - tl.sum(products * unit, 1)[:, None] * unit)
        if class_ids is not None:  # 0 where there is no class, whatever x is
            ids = tl.load(class_ids + first + j, mask=inside, other=-1)
            products = tl.where((ids >= 0)[:, None], products, 0.0)
        tl.store(out, products, mask=mask)


@triton.jit(do_not_specialize=["B", "n", "splits"])
def row_gradient_kernel(
    dx,  # [B, d] float32, out
    sums,  # [splits, B, d]
    w,  # [C, d]
    class_ids,  # [n] or None
    classes,  # [B, entries] int64 class indices
    values,  # [B, entries]
    d_rest_scale,  # []
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
    total = total / tl.load(d_rest_scale)
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
    chunk: ClassChunk,
    dw: Tensor | None,  # [n, d] sum_i g_ij x_i, changed
    db: Tensor | None,  # [n] sum_i g_ij, changed
    x: Tensor,  # [B, d] float32
    w: Tensor,  # [C, d]
    class_ids: Tensor | None,  # [all]
    entries: Entries,
    d_rest_scale: Tensor,  # []
) -> None:
    n, blocks = len(chunk.o), whole_rows(w.shape[1])
    weight_gradient_kernel[(triton.cdiv(n, blocks["BLOCK_C"]),)](
        dw,
        db,
        x,
        w,
        class_ids,
        chunk.exponent_scale,
        chunk.residual_scale,
        entries.bounds,
        entries.sorted_class,
        entries.sorted_row,
        entries.sorted_value,
        d_rest_scale,
        chunk.first,
        n,
        *w.stride(),
        d=w.shape[1],
        **blocks,
    )


def finish_rows(
    dx: Tensor,  # [B, d], out
    sums: Tensor,  # [splits, B, d]
    w: Tensor,  # [C, d]
    class_ids: Tensor | None,  # [n]
    entries: Entries,
    d_rest_scale: Tensor,  # []
    n: int,
    normalize_weight: bool,
) -> None:
    splits, B, d = sums.shape
    blocks = whole_rows(d)
    row_gradient_kernel[(triton.cdiv(B, blocks["BLOCK_C"]),)](
        dx,
        sums,
        w,
        class_ids,
        entries.classes,
        entries.values,
        d_rest_scale,
        B,
        n,
        splits,
        *w.stride(),
        d=d,
        ENTRIES=entries.classes.shape[1],
        NORMALIZE=normalize_weight,
        BLOCK_B=blocks["BLOCK_C"],
        BLOCK_D=blocks["BLOCK_D"],
    )


def d_rest_scale_of(
    d_rest: Tensor,  # [B]
    compute_dtype: torch.dtype | None,
) -> Tensor:  # []
    """A power of two that scales d_rest so that the largest g is near 2^14: float16 has a small exponent range.

    1 for other types.
    """
    one = d_rest.new_ones(())
    if compute_dtype != torch.float16 or d_rest.numel() == 0:
        return one
    return torch.ldexp(one, (14 - d_rest.abs().amax().frexp().exponent).clamp(max=100))


def splits_of(B: int, d: int) -> int:
    """Into how many products dx = g o is split along the classes (split-K): its few tiles would not keep a GPU busy.

    A power of two, since chunks are multiples of 64 classes.
    """
    tiles = triton.cdiv(B, TILE_ROWS) * triton.cdiv(d, TILE_FEATURES)
    return 1 << min(max(H100 // tiles, 1).bit_length() - 1, MOST_SPLITS.bit_length() - 1)


def add_row_products(
    sums: Tensor,  # [splits, B, d], changed
    g: Tensor,  # [B, n]
    o: Tensor,  # [n, d]
) -> None:
    """sums += g o in parts; a chunk that is not divisible by their number is added to the first."""
    n = g.shape[1]
    s = 1 if n % len(sums) else len(sums)
    parts = g.unflatten(1, (s, n // s)).transpose(0, 1), o.unflatten(0, (s, n // s))
    if g.dtype == torch.float32:
        sums[:s].baddbmm_(*parts)
    elif torch.compiler.is_compiling():  # baddbmm(out_dtype=) cannot be traced in torch 2.11 to 2.13
        sums[:s] += torch.bmm(*parts, out_dtype=torch.float32)
    elif g.is_cuda:
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
