"""Exact top-k from group maxima, in memory that does not grow with the number of classes.

    topk_i = the k largest z_ij, j != y_i          ties: the smaller class

GROUP neighboring classes are a group; for each chunk of classes the product kernel writes the largest logit of each
group, for each row. The k largest logits lie in the k groups with the largest maxima, where of equal maxima the smaller
group is taken. So only the k best groups so far are kept, and at the end the logits of their classes are computed once
more (rescored). The rescore computes dot products of its own, which may differ from the GEMM's in the last bits, so
classes whose logits are that close may change places. Equal logits that are exact in both (equal weight rows, small
integers) keep their order.

Letters: B rows, C classes, n classes in all, d features, k.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import operands
from .operands import GROUP, TYPES, whole_rows
from .tile import classes_in, inverse_norms, split_scale, weight_rows

SEARCHED = 1024  # numbers searched at a time


@triton.jit(do_not_specialize=["fresh_row", "m", "first"])
def keep_best_kernel(
    values,  # [B, k] float32, changed: the best so far, unordered
    indices,  # [B, k] int32, changed
    fresh,  # [B, m] float32, new numbers of indices from `first` on; larger than all indices that are held
    fresh_row,
    m,
    first,
    k: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Replaces the smallest number held by a larger fresh one; of equal smallest ones, that of the largest index."""
    i = tl.program_id(0).to(tl.int64)
    slot, spot = tl.arange(0, BLOCK_K), tl.arange(0, BLOCK)
    held = tl.load(values + i * k + slot, mask=slot < k, other=float("inf"))
    at = tl.load(indices + i * k + slot, mask=slot < k, other=-1)
    worst = tl.min(held, 0)
    start = 0
    while start < m:
        v = tl.load(fresh + i * fresh_row + start + spot, mask=start + spot < m, other=float("-inf"))
        best, found = tl.max(v, 0, return_indices=True)
        while best > worst:
            _, out = tl.max(tl.where(held == worst, at, -1), 0, return_indices=True)
            held = tl.where(slot == out, best, held)
            at = tl.where(slot == out, first + start + found, at)
            v = tl.where(spot == found, float("-inf"), v)
            worst = tl.min(held, 0)
            best, found = tl.max(v, 0, return_indices=True)
        start += BLOCK
    tl.store(values + i * k + slot, held, mask=slot < k)
    tl.store(indices + i * k + slot, at, mask=slot < k)


@triton.jit(do_not_specialize=["n", "groups_row"])
def rescore_kernel(
    scores,  # [B, m, GROUP] float32, out
    groups,  # [B, m] int32
    x,  # [B, d] operands
    w,  # [C, d]
    y,  # [B] int64
    bias,  # [n] or None
    class_ids,  # [n] or None
    count,  # [] or None: see classes_in
    n,
    groups_row,
    w_row,
    w_feature,
    d: tl.constexpr,
    GROUP: tl.constexpr,
    COMPUTE: tl.constexpr,
    NORMALIZE: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """z of one row and the classes of one group, without a GEMM; -inf at the row's own class and past the last."""
    i = tl.program_id(0).to(tl.int64)
    f = tl.arange(0, BLOCK_D)
    xt = tl.load(x + i * d + f, mask=f < d, other=0.0).to(tl.float32)
    here = classes_in(n, 0, count)
    first = tl.load(groups + i * groups_row + tl.program_id(1)).to(tl.int64) * GROUP
    for part in range(0, GROUP, BLOCK_C):
        index = first + part + tl.arange(0, BLOCK_C)
        inside = index < here
        wt = weight_rows(w, class_ids, index, inside, w_row, w_feature, d, BLOCK_D)
        if NORMALIZE:
            exponent_scale, residual_scale = split_scale(inverse_norms(wt), COMPUTE)
            ot = (wt * exponent_scale[:, None]).to(COMPUTE)
            z = tl.sum(ot.to(tl.float32) * xt[None, :], 1) * residual_scale
        else:
            z = tl.sum(wt.to(COMPUTE).to(tl.float32) * xt[None, :], 1)
        if bias is not None:
            z = z + tl.load(bias + index, mask=inside, other=0.0)
        z = tl.where(inside & (index != tl.load(y + i)), z, float("-inf"))
        out = (i * tl.num_programs(1) + tl.program_id(1)) * GROUP + part + tl.arange(0, BLOCK_C)
        tl.store(scores + out, z)


class Best:
    """For each of B rows: the k largest of the numbers added so far, and their indices."""

    def __init__(self, B: int, k: int, missing: int, device: torch.device) -> None:
        self.values = torch.full((B, k), -math.inf, dtype=torch.float32, device=device)
        self.indices = torch.full((B, k), missing, dtype=torch.int32, device=device)

    def add(self, fresh: Tensor, first: int) -> None:  # [B, m] float32, of indices from `first` on
        B, k = self.values.shape
        keep_best_kernel[(B,)](
            self.values,
            self.indices,
            fresh,
            fresh.stride(0),
            fresh.shape[1],
            first,
            k=k,
            BLOCK_K=triton.next_power_of_2(k),
            BLOCK=SEARCHED,
            num_warps=1,
        )


def classes_of_best(
    best: Best,  # groups
    x: Tensor,  # [B, d] operands
    w: Tensor,  # [C, d]
    y: Tensor,  # [B]
    bias: Tensor | None,  # [n]
    class_ids: Tensor | None,  # [n]
    count: Tensor | None,  # []
    normalize_weight: bool,
) -> tuple[Tensor, Tensor]:  # [B, k], [B, k]
    """Values and class indices of the k largest logits in the k best groups; (-inf, -1) where there are fewer."""
    groups = best.indices.sort(dim=1).values  # in order of class
    (B, k), n, d = groups.shape, len(w) if class_ids is None else len(class_ids), w.shape[1]
    found = Best(B, k, 0, x.device)
    at_once = max(operands.WORKSPACE // (4 * GROUP * max(B, 1)), 1)
    for first in range(0, k if B else 0, at_once):
        part = groups[:, first : first + at_once]
        scores = x.new_empty(*part.shape, GROUP, dtype=torch.float32)
        rescore_kernel[tuple(part.shape)](
            scores,
            part,
            x,
            w,
            y,
            bias,
            class_ids,
            count,
            n,
            part.stride(0),
            *w.stride(),
            d=d,
            GROUP=GROUP,
            COMPUTE=TYPES[x.dtype],
            NORMALIZE=normalize_weight,
            **whole_rows(d),
        )
        found.add(scores.flatten(1), first * GROUP)
    indices, order = found.indices.long().sort(dim=1)
    values, by_value = found.values.gather(1, order).sort(dim=1, descending=True, stable=True)
    indices = indices.gather(1, by_value)
    classes = groups.long().gather(1, indices // GROUP) * GROUP + indices % GROUP
    return values, classes.masked_fill(values == -math.inf, -1)
