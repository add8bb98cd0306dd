"""What the kernels share: whole rows of weights, their scales as operands, tiles of logits.

    operands  o_j = w_j exponent_scale_j, rounded
              exponent_scale_j residual_scale_j = 1 / ||w_j||, := 0 for ||w_j|| < 1e-12
    logits    z_ij = <x_i, o_j> residual_scale_j     (or <x_i, o_j> + b_j), of rounded operands, summed in float32

A class index counts in class_ids where they are given, else in w. Letters: B rows, C classes, n classes of a chunk, d
features.
"""

import triton
import triton.language as tl


@triton.jit
def weight_rows(
    w,  # [C, d] float32
    class_ids,  # [all] int64 or None
    indices,  # [BLOCK] int64 class indices
    inside,  # [BLOCK]
    w_row,
    w_feature,
    d: tl.constexpr,
    BLOCK_D: tl.constexpr,  # d or more
):
    """[BLOCK, BLOCK_D]; 0 past the last feature, where `inside` is false, and where class_ids has -1, no class."""
    ids = indices
    if class_ids is not None:
        ids = tl.load(class_ids + indices, mask=inside, other=-1)
        inside = inside & (ids >= 0)
    f = tl.arange(0, BLOCK_D).to(tl.int64)
    mask = inside[:, None] & (f < d)[None, :]
    return tl.load(w + ids[:, None] * w_row + f[None, :] * w_feature, mask=mask, other=0.0)


@triton.jit
def inverse_norms(
    wt,  # [BLOCK, BLOCK_D]
):
    norm = tl.sqrt_rn(tl.sum(wt * wt, 1))
    tiny = norm < 1e-12
    return tl.where(tiny, 0.0, 1 / tl.where(tiny, 1.0, norm))


@triton.jit
def split_scale(
    scale,  # [BLOCK] 1/||w||
    COMPUTE: tl.constexpr,
):
    """exponent_scale and residual_scale, whose product is `scale`.

    exponent_scale, a power of two, brings a weight near unit norm before it is rounded: float16 has a small exponent
    range, and a power of two changes nothing but the exponent. residual_scale, in [1, 2), multiplies the products.
    For float32 operands exponent_scale is 1.
    """
    exponent_scale = tl.full(scale.shape, 1.0, tl.float32)
    residual_scale = scale
    if COMPUTE != tl.float32:
        exponent_scale = (scale.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
        zero = exponent_scale == 0
        residual_scale = tl.where(zero, 0.0, scale / tl.where(zero, 1.0, exponent_scale))
    return exponent_scale, residual_scale


@triton.jit
def operand_tile(
    t,  # [count, d], or a descriptor of it
    first,
    start,
    count,
    d: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_D: tl.constexpr,
    TMA: tl.constexpr,
):
    """[BLOCK, BLOCK_D] from row `first` and feature `start` on; 0 outside."""
    if TMA:
        tile = t.load([first, start])
    else:
        at, f = tl.arange(0, BLOCK), start + tl.arange(0, BLOCK_D)
        mask = (first + at < count)[:, None] & (f < d)[None, :]
        tile = tl.load(t + first.to(tl.int64) * d + at[:, None] * d + f[None, :], mask=mask, other=0.0)
    return tile


@triton.jit
def logits(
    x,  # [B, d] operands, or a descriptor of them
    o,  # [n, d] likewise
    residual_scale,  # [n] or None
    bias,  # [n] or None
    row,
    col,
    B,
    n,
    d: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
    TMA: tl.constexpr,
):
    """z [BLOCK_B, BLOCK_C] from `row` and `col` on; the caller masks columns past the last class."""
    z = tl.zeros((BLOCK_B, BLOCK_C), dtype=tl.float32)
    for start in range(0, d, BLOCK_D):
        xt = operand_tile(x, row, start, B, d, BLOCK_B, BLOCK_D, TMA)
        ot = operand_tile(o, col, start, n, d, BLOCK_C, BLOCK_D, TMA)
        z = tl.dot(xt, ot.T, z, input_precision="ieee")
    cols = col + tl.arange(0, BLOCK_C)
    if residual_scale is not None:
        z = z * tl.load(residual_scale + cols, mask=cols < n, other=0.0)[None, :]
    if bias is not None:
        z = z + tl.load(bias + cols, mask=cols < n, other=0.0)[None, :]
    return z


@triton.jit
def classes_in(
    n,
    first,
    count,  # [] int64: how many class_ids are a class, the first ones; or None: all
):
    """Of the chunk of n class indices from `first` on, how many have a class."""
    inside = n
    if count is not None:
        inside = tl.minimum(tl.load(count) - first, n).to(tl.int32)
    return inside


@triton.jit
def own_columns(
    y,  # [B] int64
    at,  # [BLOCK_B]
    B,
    first,
    n,
):
    """Each row's own class as a column of the chunk that begins at class index `first`; -1 where it is not there."""
    own = tl.load(y + at, mask=at < B, other=-1) - first
    return tl.where((own >= 0) & (own < n), own, -1).to(tl.int32)


@triton.jit
def contains_any(
    own,  # [BLOCK_B]
    col,
    BLOCK_C: tl.constexpr,
):
    """Whether some row's own class is in the tile: with many classes that is rare, and other tiles need no mask."""
    return tl.max(((own >= col) & (own < col + BLOCK_C)).to(tl.int32), 0) > 0
