"""What the products read: weights of one wave of classes, rounded once, in a workspace that stays in the L2 cache.

    o_j = w_j power_j, rounded;  power_j factor_j = 1 / ||w_j||, := 0 for ||w_j|| < 1e-12

The weights stay as they are. Rounding them tile by tile inside the product would need no workspace, but then registers
and shared memory stand between a copy and the matrix units, which wait for every step (Triton compiles a wait for all
products in flight), and every block of rows reads four bytes a weight instead of two. Letters: B rows, C classes, n
classes of a wave, d features.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .tile import inverse_norms, split_scale, weight_rows

WORKSPACE = 2**25  # bytes of the operands of a wave, and of what a kernel writes for it: about an L2 cache each
GROUP = 64  # neighbouring classes; every wave but the last has a multiple of it
ELEMENTS = 4096  # of a program that works on whole rows of weights
TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


class Wave(NamedTuple):
    first: int
    o: Tensor  # [n, d]
    power: Tensor | None  # [n]; None where weights are not normalised
    factor: Tensor | None  # [n]

    @property
    def at(self) -> slice:
        return slice(self.first, self.first + len(self.o))


@triton.jit(do_not_specialize=["first", "n"])
def operands_kernel(
    o,  # [n, d] COMPUTE, out, or None
    power,  # [n] float32, out, or None
    factor,  # [n] float32, out, or None
    w,  # [C, d]
    class_ids,  # [all] or None
    first,
    n,
    w_row,
    w_feature,
    d: tl.constexpr,
    COMPUTE: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    j = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = j < n
    wt = weight_rows(w, class_ids, first + j.to(tl.int64), inside, w_row, w_feature, d, BLOCK_D)
    if factor is not None:
        p, q = split_scale(inverse_norms(wt), COMPUTE)
        tl.store(power + j, p, mask=inside)
        tl.store(factor + j, q, mask=inside)
        wt = wt * p[:, None]
    if o is not None:
        f = tl.arange(0, BLOCK_D)
        tl.store(o + j.to(tl.int64)[:, None] * d + f[None, :], wt.to(COMPUTE), mask=inside[:, None] & (f < d)[None, :])


def whole_rows(d: int) -> dict[str, int]:
    """Block sizes of a kernel that works on whole rows of weights, at most a group of them."""
    features = triton.next_power_of_2(d)
    return dict(BLOCK_C=min(max(ELEMENTS // features, 1), GROUP), BLOCK_D=features)


def wave_size(
    n: int,
    bytes_of_a_class: int,
    multiple: int,  # of classes
) -> int:
    """Waves of about the same size, so that none is left with a few classes."""
    count = triton.cdiv(max(n, 1), max(WORKSPACE // bytes_of_a_class, 1))
    return triton.cdiv(triton.cdiv(max(n, 1), count), multiple) * multiple


def waves(
    w: Tensor,  # [C, d]
    class_ids: Tensor | None,  # [n]
    normalize_weight: bool,
    compute_dtype: torch.dtype | None,
    step: int,
) -> Iterator[Wave]:
    """All classes, `step` at a time; a wave is valid until the next one is asked for."""
    n, d = len(w) if class_ids is None else len(class_ids), w.shape[1]
    dtype, copy = compute_dtype or w.dtype, compute_dtype is not None or class_ids is not None or not w.is_contiguous()
    room = w.new_empty(min(step, n), d, dtype=dtype) if copy else None
    scales = w.new_empty(2, min(step, n)) if normalize_weight else None
    blocks = whole_rows(d)
    for first in range(0, n, step):
        size = min(step, n - first)
        o = w[first : first + size] if room is None else room[:size]
        power, factor = (None, None) if scales is None else scales[:, :size]
        if copy or normalize_weight:
            operands_kernel[(triton.cdiv(size, blocks["BLOCK_C"]),)](
                o if copy else None, power, factor, w, class_ids, first, size, *w.stride(),
                d=d, COMPUTE=TYPES[dtype], **blocks,
            )  # fmt: skip
        yield Wave(first, o, power, factor)
