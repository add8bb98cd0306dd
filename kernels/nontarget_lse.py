"""nontarget_lse in Triton: the GEMM, the masked exp-sum and group maxima in one kernel, no B x C logits.

    z_ij   = <x_i, w_j / ||w_j||>                  (or <x_i, w_j> + b_j); 1/||w|| := 0 for ||w|| < 1e-12
    rest_i = log sum_{j != y_i} exp(z_ij)          partial (max, sum) per strip of classes, merged at the end
    topk_i = the k largest z_ij, j != y_i          ties: the smaller class (topk.py)
    g_ij   = d_rest_i exp(z_ij - rest_i) for j != y_i, d_target_i at y_i; plus d_topk at its classes
    dx_i   = sum_j g_ij w_j/||w_j||     dw_j = (1/||w_j||) (I - w^_j w^_j^T) sum_i g_ij x_i     db_j = sum_i g_ij

Both passes iterate over chunks of classes whose operands fit a workspace (operands.py); tile_table.py chooses the
tiles, and gradients.py has what follows the products. A program keeps its block of rows and iterates over a strip of
class blocks. This loop is flattened with the loop over features, so that the loads of the next block overlap the
exponentials of this one.

Loops have constant bounds or are `while`: with numpy 2.4 the interpreter of Triton 3.6 supports no others. Hence a
compilation per d and per length of a strip. No atomics and no locks: runs repeat bit for bit. All sums are float32.
Compiled ahead of time, not yet run on a GPU. Letters: B rows, C classes, n classes of a chunk, d features, k.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastmargin.ops.problem import BackwardInput, ForwardOutput, Gradients, Problem

from .gradients import add_row_products, d_rest_scale_of, entries_of, finish_chunk, finish_rows, multiply, splits_of
from .operands import GROUP, ClassChunk, class_chunks, count_of, whole_rows
from .tile import classes_in, contains_any, logits, own_columns
from .tile_table import Plan, plan_of
from .topk import Best, classes_of_best

LOW = -1e30  # a running maximum before its first value; finite, so that LOW - LOW is 0


@triton.jit(do_not_specialize=["B", "n", "first", "strips", "groups_row"])
def nontarget_lse_fwd_kernel(
    high,  # [B, strips] float32, changed: running maximum
    total,  # [B, strips] float32, changed: sum of exp(z - high)
    groups,  # [B, ...] float32, out: the largest z of each group of the chunk, or None
    x,  # [B, d] operands, or a descriptor
    o,  # [n, d] operands, or a descriptor
    y,  # [B] int64
    residual_scale,  # [n] or None
    bias,  # [n] or None
    count,  # [] or None: see classes_in
    B,
    n,
    first,  # class index of the chunk
    strips,
    groups_row,
    d: tl.constexpr,
    GROUP: tl.constexpr,
    STRIP: tl.constexpr,
    TMA: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    row = tl.program_id(0) * BLOCK_B
    at = row + tl.arange(0, BLOCK_B)
    in_b = at < B
    own, here = own_columns(y, at, B, first, n), classes_in(n, first, count)
    partial = at.to(tl.int64) * strips + tl.program_id(1)
    m = tl.load(high + partial, mask=in_b, other=0.0)
    s = tl.load(total + partial, mask=in_b, other=0.0)
    for block in tl.range(0, STRIP, flatten=True):
        col = (tl.program_id(1) * STRIP + block) * BLOCK_C
        z = logits(x, o, residual_scale, bias, row, col, B, n, d, BLOCK_B, BLOCK_C, BLOCK_D, TMA)
        if contains_any(own, col, BLOCK_C) | (col + BLOCK_C > here):
            cols = col + tl.arange(0, BLOCK_C)
            z = tl.where((cols[None, :] == own[:, None]) | (cols >= here)[None, :], float("-inf"), z)
        if groups is None:
            top = tl.max(z, 1)
        else:
            tops = tl.max(tl.reshape(z, (BLOCK_B, BLOCK_C // GROUP, GROUP)), 2)
            group = col // GROUP + tl.arange(0, BLOCK_C // GROUP)
            inside = in_b[:, None] & (group * GROUP < n)[None, :]
            tl.store(groups + at.to(tl.int64)[:, None] * groups_row + group[None, :], tops, mask=inside)
            top = tl.max(tops, 1)
        higher = tl.maximum(m, top)
        s = s * tl.exp(m - higher) + tl.sum(tl.exp(z - higher[:, None]), 1)
        m = higher
    tl.store(high + partial, m, mask=in_b)
    tl.store(total + partial, s, mask=in_b)


@triton.jit(do_not_specialize=["B", "n", "first"])
def nontarget_lse_bwd_kernel(
    g,  # [B, n] of the operands' type, out, or a descriptor
    x,  # [B, d] operands, or a descriptor
    o,  # [n, d] operands, or a descriptor
    y,  # [B] int64
    residual_scale,  # [n] or None
    bias,  # [n] or None
    safe_rest,  # [B] float32: rest, but +inf where there is no other class: g is 0 there
    d_rest,  # [B] float32
    count,  # [] or None: see classes_in
    B,
    n,
    first,  # class index of the chunk
    g_row,
    d: tl.constexpr,
    STRIP: tl.constexpr,
    TMA: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """g_ij = d_rest_i exp(z_ij - rest_i) residual_scale_j, 0 at the targets."""
    row = tl.program_id(0) * BLOCK_B
    at = row + tl.arange(0, BLOCK_B)
    in_b = at < B
    own, here = own_columns(y, at, B, first, n), classes_in(n, first, count)
    rest = tl.load(safe_rest + at, mask=in_b, other=0.0)
    upstream = tl.load(d_rest + at, mask=in_b, other=0.0)
    for block in tl.range(0, STRIP, flatten=True):
        col = (tl.program_id(1) * STRIP + block) * BLOCK_C
        cols = col + tl.arange(0, BLOCK_C)
        z = logits(x, o, residual_scale, bias, row, col, B, n, d, BLOCK_B, BLOCK_C, BLOCK_D, TMA)
        value = tl.exp(z - rest[:, None]) * upstream[:, None]
        if residual_scale is not None:
            value = value * tl.load(residual_scale + cols, mask=cols < n, other=0.0)[None, :]
        if contains_any(own, col, BLOCK_C):
            value = tl.where(cols[None, :] == own[:, None], 0.0, value)
        if count is not None:
            value = tl.where((cols < here)[None, :], value, 0.0)
        if TMA:
            g.store([row, col], value.to(x.dtype))
        else:
            inside = in_b[:, None] & (cols < n)[None, :]
            tl.store(g + at.to(tl.int64)[:, None] * g_row + cols[None, :], value, mask=inside)


def forward(p: Problem, topk: int) -> ForwardOutput:  # without expected_weight
    x, y, bias, class_ids = prepared(p)
    w, (B, d), n = p.w, x.shape, p.num_classes
    plan = plan_of(x, n, max(d * x.element_size(), 4 * B // GROUP if topk else 0))
    strips = plan.grid(B, plan.step)[1]
    high, total = w.new_full((B, strips), LOW), w.new_zeros(B, strips)
    best = Best(B, topk, triton.cdiv(n, GROUP), x.device)
    groups, class_count = w.new_empty(B, plan.step // GROUP) if topk else None, count_of(class_ids)
    with torch.cuda.device_of(x):
        for chunk in class_chunks(w, class_ids, p.normalize_weight, p.compute_dtype, plan.step) if B else ():
            size = len(chunk.o)
            nontarget_lse_fwd_kernel[plan.grid(B, size)](
                high,
                total,
                groups,
                *plan.operands(x, chunk.o),
                y,
                chunk.residual_scale,
                None if bias is None else bias[chunk.at],
                class_count,
                B,
                size,
                chunk.first,
                strips,
                plan.step // GROUP,
                d=d,
                GROUP=GROUP,
                **plan.options(),
            )
            if groups is not None:
                best.add(groups[:, : triton.cdiv(size, GROUP)], chunk.first // GROUP)
        values, classes = classes_of_best(best, x, w, y, bias, class_ids, class_count, p.normalize_weight)
    return ForwardOutput(merged(high, total), values, classes, w.new_empty(0), w.new_empty(0))


def prepared(
    p: Problem,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:  # x [B, d] operands, y [B], bias [n], class_ids [n]
    """Contiguous; x is rounded, bias is that of the selected classes."""
    bias = p.bias if p.bias is None or p.class_ids is None else p.bias[p.class_ids]
    bias, class_ids = (None if t is None else t.contiguous() for t in (bias, p.class_ids))
    return p.x.to(p.compute_dtype or p.x.dtype).contiguous(), p.y.contiguous(), bias, class_ids


def merged(
    high: Tensor,  # [B, strips]
    total: Tensor,  # [B, strips]
) -> Tensor:  # [B]; log 0 = -inf where there is no other class
    shift = high.amax(1, keepdim=True)
    return (total * (high - shift).exp()).sum(1).log() + shift[:, 0]


def backward(p: Problem, given: BackwardInput, need_dx: bool, need_dw: bool, need_db: bool) -> Gradients:
    exact = p.x.contiguous()
    x, y, bias, class_ids = prepared(p)
    w, (B, d), n = p.w, x.shape, p.num_classes
    shapes = ((B, d) if need_dx else 0, (n, d) if need_dw else 0, n if need_db else 0)
    dx, dw, db = (w.new_empty(shape) if B else w.new_zeros(shape) for shape in shapes)
    if B == 0:
        return Gradients(dx, dw, db)
    d_rest_scale = d_rest_scale_of(given.d_rest, p.compute_dtype)
    safe_rest = given.rest.masked_fill(given.rest == -math.inf, math.inf)  # no other class: exp(z - inf) is 0
    d_rest, class_count = given.d_rest.contiguous() * d_rest_scale, count_of(class_ids)
    entries = entries_of(y, given.d_target, given.topk_classes, given.d_topk, n, whole_rows(d)["BLOCK_C"])
    plan = plan_of(x, n, max(B, d) * x.element_size())
    workspace, sums = x.new_empty(B, plan.step), w.new_zeros(splits_of(B, d) if need_dx else 0, B, d)
    with torch.cuda.device_of(x):
        for chunk in class_chunks(w, class_ids, p.normalize_weight, p.compute_dtype, plan.step):
            g = gradient_of_logits(plan, workspace, x, chunk, y, bias, safe_rest, d_rest, class_count)
            at = chunk.at
            if need_dx:
                add_row_products(sums, g, chunk.o)
            if need_dw:
                multiply(dw[at], g.T, x)
            if need_db:
                torch.sum(g, 0, dtype=torch.float32, out=db[at])
            if need_dw or need_db:
                parts = dw[at] if need_dw else None, db[at] if need_db else None
                finish_chunk(chunk, *parts, exact, w, class_ids, entries, d_rest_scale)
        if need_dx:
            finish_rows(dx, sums, w, class_ids, entries, d_rest_scale, n, p.normalize_weight)
    return Gradients(dx, dw, db)


def gradient_of_logits(
    plan: Plan,
    workspace: Tensor,  # [B, step]
    x: Tensor,  # [B, d] operands
    chunk: ClassChunk,
    y: Tensor,  # [B]
    bias: Tensor | None,  # [C]
    safe_rest: Tensor,  # [B]
    d_rest: Tensor,  # [B] scaled
    count: Tensor | None,  # []
) -> Tensor:  # g [B, n]
    (B, d), n = x.shape, len(chunk.o)
    g = workspace[:, :n]
    nontarget_lse_bwd_kernel[plan.grid(B, n)](
        plan.blocks(g, plan.tile.rows, plan.tile.classes),
        *plan.operands(x, chunk.o),
        y,
        chunk.residual_scale,
        None if bias is None else bias[chunk.at],
        safe_rest,
        d_rest,
        count,
        B,
        n,
        chunk.first,
        plan.step,
        d=d,
        **plan.options(),
    )
    return g
