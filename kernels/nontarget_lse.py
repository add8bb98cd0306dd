"""nontarget_lse in Triton: masked exp-sum and group maxima beside the GEMM, no B x C logits.

    z_ij   = <x_i, w_j / ||w_j||>                  (or <x_i, w_j> + b_j); 1/||w|| := 0 for ||w|| < 1e-12
    rest_i = log sum_{j != y_i} exp(z_ij)          partial (max, sum) per strip of classes, merged at the end
    topk_i = the k largest z_ij, j != y_i          ties: the smaller class
    g_ij   = d_rest_i exp(z_ij - rest_i) for j != y_i, d_target_i at y_i; plus d_topk at its classes
    dx_i   = sum_j g_ij w_j/||w_j||     dw_j = (1/||w_j||) (I - w^_j w^_j^T) sum_i g_ij x_i     db_j = sum_i g_ij

Exact top-k from maxima: every class block is a group, and its maximum is kept per row. The k largest lie in the k
groups with the largest maxima, equal maxima preferring the smaller group; those k groups are scored once more. That
second score is a dot of its own, not the GEMM's: it may differ from it in the last bits, so classes that are that
close may change places. Equal logits that are exact in both (equal weight rows, small integers) keep their order.

Loops have constant bounds or are `while`: Triton's interpreter takes no others beside numpy 2.4. Hence a compilation
per d.

No atomics and no locks: a run repeats bit for bit. `a` is not summed in the forward pass; the backward pass walks over
waves of classes, whose g fits a workspace. All sums are float32. Letters: B rows, n classes, d features, k.
"""

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .gradients import add_, lift_of, product, split, weight_gradient
from .tile import class_ids, logits, split_scale


class Tile(NamedTuple):
    """Of z, and how a program computes it. Its classes are also a group of the top-k."""

    compute: tl.dtype  # of the operands
    rows: int
    classes: int
    features: int  # of a step of the product
    warps: int
    stages: int

    def options(self) -> dict[str, object]:
        blocks = dict(BLOCK_B=self.rows, BLOCK_C=self.classes, BLOCK_D=self.features)
        return blocks | dict(COMPUTE=self.compute, num_warps=self.warps, num_stages=self.stages)


TILES = {  # by compute_dtype; the largest whose registers spill in no kernel, of those that were tried
    None: Tile(tl.float32, 64, 64, 32, 8, 1),
    torch.bfloat16: Tile(tl.bfloat16, 128, 64, 64, 8, 2),
    torch.float16: Tile(tl.float16, 128, 64, 64, 8, 2),
}
NORM_C, NORM_D = 32, 64  # of a tile of the row norms
RESCORE_D = 32  # features of a step of the second score
PROGRAMS = 1024  # of the forward grid, about: enough for every GPU's multiprocessors
WORKSPACE = 2**23  # elements of g, and of the operands, of one wave of the backward pass: 32 MiB each
LOW = tl.constexpr(-1e30)  # a running maximum that has seen nothing; finite, so that LOW - LOW is 0


@triton.jit
def inverse_norms_kernel(
    scale,  # [n] float32, out
    w,  # [C, d]
    rows,  # [n] or None
    n,
    w_row,
    w_feature,
    d: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    cols = tl.program_id(0).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
    in_c = cols < n
    ids = class_ids(rows, cols, in_c)
    squares = tl.zeros((BLOCK_C, BLOCK_D), dtype=tl.float32)
    for start in range(0, d, BLOCK_D):
        f = (start + tl.arange(0, BLOCK_D)).to(tl.int64)
        mask = in_c[:, None] & (f < d)[None, :]
        wt = tl.load(w + ids[:, None] * w_row + f[None, :] * w_feature, mask=mask, other=0.0).to(tl.float32)
        squares += wt * wt
    norm = tl.sqrt_rn(tl.sum(squares, 1))
    tiny = norm < 1e-12
    tl.store(scale + cols, tl.where(tiny, 0.0, 1 / tl.where(tiny, 1.0, norm)), mask=in_c)


@triton.jit
def nontarget_lse_fwd_kernel(
    high,  # [B, strips] float32, out
    total,  # [B, strips] float32, out
    groups,  # [B, blocks] float32, out: the largest z of each class block, or None
    x,  # [B, d]
    w,  # [C, d]
    y,  # [B] int64
    bias,  # [C] or None
    rows,  # [n] or None
    scale,  # [n] or None
    B,
    n,
    x_row,
    x_feature,
    w_row,
    w_feature,
    blocks,  # of classes
    blocks_per_strip,
    d: tl.constexpr,
    COMPUTE: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    strip = tl.program_id(1)
    at = tl.program_id(0).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
    in_b = at < B
    own = tl.load(y + at, mask=in_b, other=-1)
    m = tl.zeros((BLOCK_B,), dtype=tl.float32) + LOW
    s = tl.zeros((BLOCK_B,), dtype=tl.float32)
    block = strip * blocks_per_strip
    last = min(block + blocks_per_strip, blocks)
    while block < last:
        cols = block.to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
        z = logits(
            x, w, bias, rows, scale, at, cols, B, n, x_row, x_feature, w_row, w_feature,
            d, COMPUTE, BLOCK_B, BLOCK_C, BLOCK_D,
        )  # fmt: skip
        z = tl.where(cols[None, :] == own[:, None], float("-inf"), z)
        top = tl.max(z, 1)
        if groups is not None:
            tl.store(groups + at * blocks + block, top, mask=in_b)
        higher = tl.maximum(m, top)
        s = s * tl.exp(m - higher) + tl.sum(tl.exp(z - higher[:, None]), 1)
        m = higher
        block += 1
    place = at * tl.num_programs(1) + strip
    tl.store(high + place, m, mask=in_b)
    tl.store(total + place, s, mask=in_b)


@triton.jit
def rescore_kernel(
    values,  # [B, chosen, BLOCK_C] float32, out
    chosen,  # [B, chosen] int64 class blocks
    x,  # [B, d]
    w,  # [C, d]
    y,  # [B] int64
    bias,  # [C] or None
    rows,  # [n] or None
    scale,  # [n] or None
    n,
    x_row,
    x_feature,
    w_row,
    w_feature,
    d: tl.constexpr,
    COMPUTE: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """z of one row and one class block, by a dot of their own; -inf at the row's own class."""
    i = tl.program_id(0).to(tl.int64)
    place = i * tl.num_programs(1) + tl.program_id(1)
    cols = tl.load(chosen + place) * BLOCK_C + tl.arange(0, BLOCK_C)
    in_c = cols < n
    ids = class_ids(rows, cols, in_c)
    products = tl.zeros((BLOCK_C, BLOCK_D), dtype=tl.float32)
    power, factor = split_scale(scale, cols, in_c, COMPUTE)
    for start in range(0, d, BLOCK_D):
        f = (start + tl.arange(0, BLOCK_D)).to(tl.int64)
        in_d = f < d
        xt = tl.load(x + i * x_row + f * x_feature, mask=in_d, other=0.0)
        mask = in_c[:, None] & in_d[None, :]
        wt = tl.load(w + ids[:, None] * w_row + f[None, :] * w_feature, mask=mask, other=0.0)
        products += (wt * power[:, None]).to(COMPUTE).to(tl.float32) * xt.to(COMPUTE).to(tl.float32)[None, :]
    z = tl.sum(products, 1) * factor
    if bias is not None:
        z = z + tl.load(bias + ids, mask=in_c, other=0.0).to(tl.float32)
    z = tl.where(in_c & (cols != tl.load(y + i)), z, float("-inf"))
    tl.store(values + place * BLOCK_C + tl.arange(0, BLOCK_C), z)


@triton.jit
def nontarget_lse_bwd_kernel(
    g,  # [B, last - first] of the operands' type, out
    x,  # [B, d]
    w,  # [C, d]
    y,  # [B] int64
    bias,  # [C] or None
    rows,  # [n] or None
    scale,  # [n] or None
    above,  # [B] float32: rest, +inf where there is no other class
    d_rest,  # [B] float32
    d_target,  # [B] float32
    B,
    first,
    last,
    x_row,
    x_feature,
    w_row,
    w_feature,
    d: tl.constexpr,
    COMPUTE: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """g of the classes first..last times the factor of their scale, without the top-k entries."""
    at = tl.program_id(0).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
    place = tl.program_id(1).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
    cols = first + place
    in_b = at < B
    z = logits(
        x, w, bias, rows, scale, at, cols, B, last, x_row, x_feature, w_row, w_feature,
        d, COMPUTE, BLOCK_B, BLOCK_C, BLOCK_D,
    )  # fmt: skip
    p = tl.exp(z - tl.load(above + at, mask=in_b, other=0.0)[:, None])
    value = p * tl.load(d_rest + at, mask=in_b, other=0.0)[:, None]
    own = cols[None, :] == tl.load(y + at, mask=in_b, other=-1)[:, None]
    value = tl.where(own, tl.load(d_target + at, mask=in_b, other=0.0)[:, None], value)
    _, factor = split_scale(scale, cols, cols < last, COMPUTE)
    value = value * factor[None, :]
    inside = in_b[:, None] & (cols < last)[None, :]
    tl.store(g + at[:, None] * (last - first) + place[None, :], value, mask=inside)


def inverse_norms(
    w: Tensor,  # [C, d]
    rows: Tensor | None,  # [n]
) -> Tensor:  # [n] float32
    n = len(w) if rows is None else len(rows)
    scale = w.new_empty(n, dtype=torch.float32)
    grid = (triton.cdiv(n, NORM_C),)
    inverse_norms_kernel[grid](scale, w, rows, n, *w.stride(), d=w.shape[1], BLOCK_C=NORM_C, BLOCK_D=NORM_D)
    return scale


def forward(
    x: Tensor,  # [B, d]
    w: Tensor,  # [C, d]
    y: Tensor,  # [B]
    bias: Tensor | None,  # [C]
    rows: Tensor | None,  # [n]
    bend: Tensor | None,
    normalize_weight: bool,
    pool: int,
    topk: int,
    compute_dtype: torch.dtype | None,
    want_a: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # rest [B], topk_values [B, k], topk_classes [B, k], a [0]
    """`want_a` changes nothing: dx is summed in the backward pass."""
    assert bend is None and pool == 1
    y, bias, rows = (None if t is None else t.contiguous() for t in (y, bias, rows))
    x = x.to(compute_dtype or x.dtype)  # w is rounded tile by tile, x once
    B, n, tile = len(x), len(w) if rows is None else len(rows), TILES[compute_dtype]
    row_blocks, blocks = triton.cdiv(B, tile.rows), max(triton.cdiv(n, tile.classes), 1)
    per_strip = triton.cdiv(blocks, triton.cdiv(PROGRAMS, max(row_blocks, 1)))
    strips = triton.cdiv(blocks, per_strip)
    high, total = x.new_empty(2, B, strips, dtype=torch.float32)
    groups = x.new_empty(B, blocks, dtype=torch.float32) if topk else None
    with torch.cuda.device_of(x):
        scale = inverse_norms(w, rows) if normalize_weight else None
        if B:
            nontarget_lse_fwd_kernel[(row_blocks, strips)](
                high, total, groups, x, w, y, bias, rows, scale, B, n, *x.stride(), *w.stride(),
                blocks, per_strip, d=x.shape[1], **tile.options(),
            )  # fmt: skip
        values, classes = nearest(x, w, y, bias, rows, scale, groups, topk, tile)
    return merged(high, total), values, classes, total.new_empty(0)


def merged(
    high: Tensor,  # [B, strips]
    total: Tensor,  # [B, strips]
) -> Tensor:  # [B]; log 0 = -inf where there is no other class
    shift = high.amax(1, keepdim=True)
    return (total * (high - shift).exp()).sum(1).log() + shift[:, 0]


def nearest(
    x: Tensor,  # [B, d]
    w: Tensor,  # [C, d]
    y: Tensor,  # [B]
    bias: Tensor | None,  # [C]
    rows: Tensor | None,  # [n]
    scale: Tensor | None,  # [n]
    groups: Tensor | None,  # [B, blocks]
    k: int,
    tile: Tile,
) -> tuple[Tensor, Tensor]:  # [B, k], [B, k]
    """The k largest of the k best groups; (-inf, -1) where there are fewer."""
    B, n = len(x), len(w) if rows is None else len(rows)
    if groups is None or B == 0:
        return x.new_empty(B, k, dtype=torch.float32), y.new_empty(B, k)
    chosen = groups.sort(dim=1, descending=True, stable=True).indices[:, :k].sort(dim=1).values  # in order of class
    values = x.new_empty(*chosen.shape, tile.classes, dtype=torch.float32)
    rescore_kernel[tuple(chosen.shape)](
        values, chosen, x, w, y, bias, rows, scale, n, *x.stride(), *w.stride(),
        d=x.shape[1], COMPUTE=tile.compute, BLOCK_C=tile.classes, BLOCK_D=RESCORE_D,
    )  # fmt: skip
    classes = (chosen[:, :, None] * tile.classes + torch.arange(tile.classes, device=x.device)).flatten(1)
    values, order = values.flatten(1).sort(dim=1, descending=True, stable=True)
    missing = max(k - values.shape[1], 0)
    values = torch.nn.functional.pad(values[:, :k], (0, missing), value=-math.inf)
    classes = torch.nn.functional.pad(classes.gather(1, order)[:, :k], (0, missing), value=-1)
    return values, classes.masked_fill(values == -math.inf, -1)


def backward(
    x: Tensor,  # [B, d]
    w: Tensor,  # [C, d]
    y: Tensor,  # [B]
    bias: Tensor | None,  # [C]
    rows: Tensor | None,  # [n]
    bend: Tensor | None,
    normalize_weight: bool,
    pool: int,
    compute_dtype: torch.dtype | None,
    rest: Tensor,  # [B]
    topk_classes: Tensor,  # [B, k]
    a: Tensor,  # [0]
    d_rest: Tensor,  # [B]
    d_target: Tensor,  # [B]
    d_topk: Tensor | None,  # [B, k]
    need_dx: bool,
    need_dw: bool,
    need_db: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # dx [B, d], dw [n, d], db [n]; each [0] where not needed
    assert bend is None and pool == 1
    y, bias, rows = (None if t is None else t.contiguous() for t in (y, bias, rows))
    d_rest, d_target = d_rest.contiguous(), d_target.contiguous()
    (B, d), n, tile = x.shape, len(w) if rows is None else len(rows), TILES[compute_dtype]
    above = rest.masked_fill(rest == -math.inf, math.inf)  # no other class: exp(z - inf) is 0
    lift = lift_of(compute_dtype, d_rest, d_target, d_topk)
    d_rest, d_target, d_topk = (None if t is None else t * lift for t in (d_rest, d_target, d_topk))
    dx = torch.zeros_like(x, dtype=torch.float32) if need_dx else x.new_empty(0)
    dw, db = x.new_empty((n, d) if need_dw else (0,)), x.new_empty(n if need_db else 0)
    wave = max(WORKSPACE // max(B, d, 256) // tile.classes, 1) * tile.classes
    operand = compute_dtype or torch.float32
    xo = x.to(operand)
    with torch.cuda.device_of(x):
        scale = inverse_norms(w, rows) if normalize_weight else None
        for first in range(0, n, wave):
            at = slice(first, min(first + wave, n))
            g = x.new_empty(B, at.stop - first, dtype=operand)
            nontarget_lse_bwd_kernel[(triton.cdiv(B, tile.rows), triton.cdiv(g.shape[1], tile.classes))](
                g, xo, w, y, bias, rows, scale, above, d_rest, d_target, B, first, at.stop,
                *xo.stride(), *w.stride(), d=d, **tile.options(),
            )  # fmt: skip
            part = w[at] if rows is None else w[rows[at]]
            power, factor = split(None if scale is None else scale[at], compute_dtype)
            if d_topk is not None:
                add_(g, topk_classes - first, d_topk, factor)
            if need_dx:
                dx += product(g, (part * power).to(operand))
            if need_dw:
                dw[at] = weight_gradient(product(g.T, xo), part, power, factor, normalize_weight) / lift
            if need_db:
                db[at] = g.sum(0, dtype=torch.float32) / lift
    return (dx / lift).to(x.dtype) if need_dx else dx, dw, db
