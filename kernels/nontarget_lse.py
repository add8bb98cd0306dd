"""nontarget_lse in Triton: the GEMM, the masked exp-sum and group maxima in one kernel, no B x C logits.

    z_ij   = <x_i, w_j / ||w_j||>                  (or <x_i, w_j> + b_j); 1/||w|| := 0 for ||w|| < 1e-12
    rest_i = log sum_{j != y_i} exp(z_ij)          partial (max, sum) per strip of classes, merged at the end
    topk_i = the k largest z_ij, j != y_i          ties: the smaller class (topk.py)
    E_ij   = exp(z_ij - o_i) factor_j              0 at j = y_i; 1/||w_j|| = factor_j power_j, power_j a power of two
    dx, dw, db                                     from E, as gradients.py has it: plain products, no g

Both passes iterate over chunks of classes whose operands fit a workspace (operands.py); tile_table.py chooses the
tiles. The backward pass makes E again, with o_i near rest_i, and both products of a chunk read it. Or the forward pass
keeps it (fastmargin/ops/exponentials.py), with one o for all rows: then its product for dx comes at once, and the
backward pass is that for dw. A program keeps its block of rows and iterates over a strip of class blocks. This loop is
flattened with the loop over features, so that the loads of the next block overlap the exponentials of this one.

Loops have constant bounds or are `while`: with numpy 2.4 the interpreter of Triton 3.6 supports no others. Hence a
compilation per d and per length of a strip. No atomics and no locks: runs repeat bit for bit. All sums are float32.
Compiled ahead of time, not yet run on a GPU. Letters: B rows, C classes, n classes of a chunk, d features, k.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastmargin.ops.exponentials import offset_of, pitch_of
from fastmargin.ops.problem import BackwardInput, ForwardOutput, Gradients, Problem

from .gradients import (
    Scales,
    add_row_products,
    entries_of,
    finish_chunk,
    finish_rows,
    multiply,
    scales_of,
    scales_of_kept,
    splits_of,
)
from .operands import GROUP, ClassChunk, chunk_size, class_chunks, count_of, whole_rows
from .tile import classes_in, contains_any, logits, own_columns
from .tile_table import Plan, most_classes, plan_of
from .topk import Best, classes_of_best

LOW = -1e30  # a running maximum before its first value; finite, so that LOW - LOW is 0


@triton.jit(do_not_specialize=["B", "n", "first", "strips", "groups_row"])
def nontarget_lse_fwd_kernel(
    high,  # [B, strips] float32, changed: running maximum; stays where e is kept
    total,  # [B, strips] float32, changed: sum of exp(z - high)
    e,  # [B, n] of the operands' type, out, or a descriptor, or None: not kept
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
    kept_offset,  # of z where e is kept
    strips,
    e_row,
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
    if e is None:
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
            top = tl.full((BLOCK_B,), float("-inf"), tl.float32)
            for g in tl.static_range(BLOCK_C // GROUP):
                in_group = tl.arange(0, BLOCK_C) // GROUP == g
                largest = tl.max(tl.where(in_group[None, :], z, float("-inf")), 1)
                to = groups + at.to(tl.int64) * groups_row + (col // GROUP + g)
                tl.store(to, largest, mask=in_b & (col + g * GROUP < n))
                top = tl.maximum(top, largest)
        if e is None:
            higher = tl.maximum(m, top)
            s = s * tl.exp(m - higher) + tl.sum(tl.exp(z - higher[:, None]), 1)
            m = higher
        else:
            value = tl.exp(z - kept_offset)
            s += tl.sum(value, 1)
            cols = col + tl.arange(0, BLOCK_C)
            value = value * tl.load(residual_scale + cols, mask=cols < n, other=0.0)[None, :]
            if TMA:
                e.store([row, col], value.to(e.dtype))
            else:
                inside = in_b[:, None] & (cols < n)[None, :]
                tl.store(e + at.to(tl.int64)[:, None] * e_row + cols[None, :], value, mask=inside)
    if e is None:
        tl.store(high + partial, m, mask=in_b)
    tl.store(total + partial, s, mask=in_b)


@triton.jit(do_not_specialize=["B", "n", "first"])
def nontarget_lse_bwd_kernel(
    e,  # [B, n] of the operands' type, out, or a descriptor
    x,  # [B, d] operands, or a descriptor
    o,  # [n, d] operands, or a descriptor
    y,  # [B] int64
    residual_scale,  # [n] or None
    bias,  # [n] or None
    offset,  # [B] float32; +inf where there is no other class: E is 0 there
    count,  # [] or None: see classes_in
    B,
    n,
    first,  # class index of the chunk
    e_row,
    d: tl.constexpr,
    STRIP: tl.constexpr,
    TMA: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """E_ij = exp(z_ij - offset_i) residual_scale_j, 0 at the targets and where there is no class."""
    row = tl.program_id(0) * BLOCK_B
    at = row + tl.arange(0, BLOCK_B)
    in_b = at < B
    own, here = own_columns(y, at, B, first, n), classes_in(n, first, count)
    shift = tl.load(offset + at, mask=in_b, other=0.0)
    for block in tl.range(0, STRIP, flatten=True):
        col = (tl.program_id(1) * STRIP + block) * BLOCK_C
        cols = col + tl.arange(0, BLOCK_C)
        z = logits(x, o, residual_scale, bias, row, col, B, n, d, BLOCK_B, BLOCK_C, BLOCK_D, TMA)
        value = tl.exp(z - shift[:, None])
        if residual_scale is not None:
            value = value * tl.load(residual_scale + cols, mask=cols < n, other=0.0)[None, :]
        if contains_any(own, col, BLOCK_C):
            value = tl.where(cols[None, :] == own[:, None], 0.0, value)
        if count is not None:
            value = tl.where((cols < here)[None, :], value, 0.0)
        if TMA:
            e.store([row, col], value.to(e.dtype))
        else:
            inside = in_b[:, None] & (cols < n)[None, :]
            tl.store(e + at.to(tl.int64)[:, None] * e_row + cols[None, :], value, mask=inside)


def forward(
    p: Problem, topk: int, need_expected_weight: bool, keep_exponentials: bool
) -> ForwardOutput:  # expected_weight is that of kept exponentials alone
    x, y, bias, class_ids = prepared(p)
    w, (B, d), n = p.w, x.shape, p.num_classes
    kept = x.new_empty(B, pitch_of(n)) if keep_exponentials else x.new_empty(0)
    sums_dx = keep_exponentials and need_expected_weight
    size = max(max(d, B if keep_exponentials else 0) * x.element_size(), 4 * B // GROUP if topk else 0)
    plan = plan_of(x, n, size, 1 + sums_dx, 2 + sums_dx + (topk > 0), keeps=keep_exponentials)
    strips, start = plan.grid(B, plan.step)[1], offset_of(n) if keep_exponentials else LOW
    high, total = w.new_full((B, strips), start), w.new_zeros(B, strips)
    sums = w.new_zeros(splits_of(B, d) if sums_dx else 0, B, d)
    best = Best(B, topk, triton.cdiv(n, GROUP), x.device)
    groups, class_count = w.new_empty(B, plan.step // GROUP) if topk else None, count_of(class_ids)
    with torch.cuda.device_of(x):
        for chunk in class_chunks(w, class_ids, p.normalize_weight, p.compute_dtype, plan.step) if B else ():
            size = len(chunk.o)
            e = kept[:, chunk.at] if keep_exponentials else None
            nontarget_lse_fwd_kernel[plan.grid(B, size)](
                high,
                total,
                None if e is None else plan.blocks(e, plan.tile.rows, plan.tile.classes),
                groups,
                *plan.operands(x, chunk.o),
                y,
                chunk.residual_scale,
                None if bias is None else bias[chunk.at],
                class_count,
                B,
                size,
                chunk.first,
                start,
                strips,
                pitch_of(n),
                plan.step // GROUP,
                d=d,
                GROUP=GROUP,
                **plan.options(),
            )
            if e is not None and sums_dx:
                add_row_products(sums, e, chunk.o)
            if groups is not None:
                best.add(groups[:, : triton.cdiv(size, GROUP)], chunk.first // GROUP)
        values, classes = classes_of_best(best, x, w, y, bias, class_ids, class_count, p.normalize_weight)
    rest = merged(high, total)
    expected_weight = expected_of(sums, rest, start) if sums_dx else w.new_empty(0)
    return ForwardOutput(rest, values, classes, expected_weight, kept)


def expected_of(
    sums: Tensor,  # [splits, B, d] of E o, over the classes
    rest: Tensor,  # [B]
    offset: float,
) -> Tensor:  # [B, d]
    none = rest == -torch.inf
    return sums.sum(0) * (offset - rest).masked_fill(none, -torch.inf).exp()[:, None]


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
    w, (B, d), n = p.w, p.x.shape, p.num_classes
    shapes = ((B, d) if need_dx else 0, (n, d) if need_dw else 0, n if need_db else 0)
    out = Gradients(*(w.new_empty(shape) if B else w.new_zeros(shape) for shape in shapes))
    if B == 0:
        return out
    p = p._replace(**{name: getattr(p, name).contiguous() for name in ("x", "y")})
    p = p if p.class_ids is None else p._replace(class_ids=p.class_ids.contiguous())
    with torch.cuda.device_of(p.x):
        if given.exponentials.numel():
            backward_of_kept(p, given, out)
        else:
            backward_made_again(p, given, out)
    return out


def backward_of_kept(p: Problem, given: BackwardInput, out: Gradients) -> None:
    """A chunk's dw is finished while it is in the cache."""
    n, d = p.num_classes, p.x.shape[1]
    entries = entries_of(p.y, given.d_target, given.topk_classes, given.d_topk, n, whole_rows(d)["BLOCK_C"])
    if out.dx.numel():
        finish_rows(out.dx, given.expected_weight[None], given.d_rest.contiguous(), p, entries)
    if out.dw.numel():
        scales = scales_of_kept(given.rest, given.d_rest, offset_of(n))
        rows, step = scaled_rows(p, scales), kept_step(len(p.x), d, n)
        for first in range(0, n, step):
            at = slice(first, min(first + step, n))
            multiply(out.dw[at], given.exponentials[:, at].T, rows)
            finish_chunk(out.dw[at], None, first, p, entries, scales.lift)


def kept_step(B: int, d: int, n: int) -> int:
    """Classes of a chunk of the backward pass of kept exponentials: one product and one kernel."""
    return chunk_size(n, most_classes(B, d, 4 * d, products=1, launches=2), GROUP)


def backward_made_again(p: Problem, given: BackwardInput, out: Gradients) -> None:
    x, y, bias, class_ids = prepared(p)
    w, (B, d), n = p.w, x.shape, p.num_classes
    need_dx, need_dw, need_db = (t.numel() > 0 for t in out)
    scales, class_count = scales_of(given.rest, given.d_rest, p.compute_dtype), count_of(class_ids)
    entries = entries_of(y, given.d_target, given.topk_classes, given.d_topk, n, whole_rows(d)["BLOCK_C"])
    plan = plan_of(x, n, max(B, d) * x.element_size(), 1 + need_dx + need_dw, 3 + need_dx + need_dw)
    workspace, sums = x.new_empty(B, plan.step), w.new_zeros(splits_of(B, d) if need_dx else 0, B, d)
    cx = scaled_rows(p, scales) if need_dw else None
    for chunk in class_chunks(w, class_ids, p.normalize_weight, p.compute_dtype, plan.step):
        e = exponentials(plan, workspace, x, chunk, y, bias, scales.offset, class_count)
        dw, db = out.dw[chunk.at] if need_dw else None, out.db[chunk.at] if need_db else None
        if need_dx:
            add_row_products(sums, e, chunk.o)
        if dw is not None and cx is not None:
            multiply(dw, e.T, cx)
        if db is not None:
            multiply(db[None], scales.c[None].to(e.dtype), e)
        if dw is not None or db is not None:
            finish_chunk(dw, db, chunk.first, p, entries, scales.lift)
    if need_dx:
        finish_rows(out.dx, sums, scales.c / scales.lift, p, entries)


def scaled_rows(p: Problem, scales: Scales) -> Tensor:  # [B, d] operands
    """c_i x_i from x as it was given, rounded once."""
    return (scales.c[:, None] * p.x).to(p.compute_dtype or p.x.dtype)


def exponentials(
    plan: Plan,
    workspace: Tensor,  # [B, step]
    x: Tensor,  # [B, d] operands
    chunk: ClassChunk,
    y: Tensor,  # [B]
    bias: Tensor | None,  # [C]
    offset: Tensor,  # [B]
    count: Tensor | None,  # []
) -> Tensor:  # E [B, n]
    (B, d), n = x.shape, len(chunk.o)
    e = workspace[:, :n]
    nontarget_lse_bwd_kernel[plan.grid(B, n)](
        plan.blocks(e, plan.tile.rows, plan.tile.classes),
        *plan.operands(x, chunk.o),
        y,
        chunk.residual_scale,
        None if bias is None else bias[chunk.at],
        offset,
        count,
        B,
        n,
        chunk.first,
        plan.step,
        d=d,
        **plan.options(),
    )
    return e
