"""Operands of the products: the weights of one chunk of classes, rounded once, in a workspace that stays in L2 cache.

    o_j = w_j exponent_scale_j, rounded;  exponent_scale_j residual_scale_j = 1 / ||w_j||, := 0 for ||w_j|| < 1e-12

Rounding the weights tile by tile inside the product would need no workspace. But then a tile would pass through
registers between its load and the matrix units, which would wait at every step (Triton compiles a wait for all products
in flight), and every block of rows would read four bytes per weight instead of two. Letters: B rows, C classes, n
classes of a chunk, d features.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .tile import inverse_norms, split_scale, weight_rows

WORKSPACE = 2**25  # bytes of a chunk's operands, and of what a kernel writes for it: both fit an L2 cache
GROUP = 64  # neighboring classes; every chunk but the last has a multiple of it
ELEMENTS = 4096  # of a program that works on whole rows of weights
TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


class ClassChunk(NamedTuple):
    first: int  # class index
    o: Tensor  # [n, d]
    residual_scale: Tensor | None  # [n]; None where weights are not normalized

    @property
    def at(self) -> slice:
        return slice(self.first, self.first + len(self.o))


@triton.jit(do_not_specialize=["first", "n"])
def operands_kernel(
    o,  # [n, d] COMPUTE, out, or None
    residual_scale,  # [n] float32, out, or None
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
    if residual_scale is not None:
        exponent, residual = split_scale(inverse_norms(wt), COMPUTE)
        tl.store(residual_scale + j, residual, mask=inside)
        wt = wt * exponent[:, None]
    if o is not None:
        f = tl.arange(0, BLOCK_D)
        tl.store(o + j.to(tl.int64)[:, None] * d + f[None, :], wt.to(COMPUTE), mask=inside[:, None] & (f < d)[None, :])


def count_of(class_ids: Tensor | None) -> Tensor | None:  # [n] -> []
    """How many of class_ids are a class: they may end in -1. On the device: the host does not wait."""
    return None if class_ids is None else (class_ids >= 0).sum()


def whole_rows(d: int) -> dict[str, int]:
    """Block sizes of a kernel that works on whole rows of weights, at most a group of them."""
    features = triton.next_power_of_2(d)
    return dict(BLOCK_C=min(max(ELEMENTS // features, 1), GROUP), BLOCK_D=features)


def chunk_size(
    n: int,
    most: int,
    multiple: int,  # of classes
) -> int:
    """Classes of a chunk: at most `most`, but for `multiple`. Chunks are of about the same size."""
    count = triton.cdiv(max(n, 1), max(most, 1))
    return triton.cdiv(triton.cdiv(max(n, 1), count), multiple) * multiple


def class_chunks(
    w: Tensor,  # [C, d]
    class_ids: Tensor | None,  # [n]
    normalize_weight: bool,
    compute_dtype: torch.dtype | None,
    step: int,
) -> Iterator[ClassChunk]:
    """All classes, `step` at a time; a chunk is valid until the next one is taken."""
    n, d = len(w) if class_ids is None else len(class_ids), w.shape[1]
    dtype, copy = compute_dtype or w.dtype, compute_dtype is not None or class_ids is not None or not w.is_contiguous()
    workspace = w.new_empty(min(step, n), d, dtype=dtype) if copy else None
    scales = w.new_empty(min(step, n)) if normalize_weight else None
    blocks = whole_rows(d)
    for first in range(0, n, step):
        size = min(step, n - first)
        o = w[first : first + size] if workspace is None else workspace[:size]
        residual_scale = None if scales is None else scales[:size]
        if copy or normalize_weight:
            operands_kernel[(triton.cdiv(size, blocks["BLOCK_C"]),)](
                o if copy else None,
                residual_scale,
                w,
                class_ids,
                first,
                size,
                *w.stride(),
                d=d,
                COMPUTE=TYPES[dtype],
                **blocks,
            )
        yield ClassChunk(first, o, residual_scale)
