"""What the kernels compute tiles of: places in the class list, scales of weights, logits.

    z_ij = <x_i, w_j / ||w_j||>     (or <x_i, w_j> + b_j), of operands rounded to COMPUTE, summed in float32

Letters: B rows, n classes, d features.
"""

import triton
import triton.language as tl


@triton.jit
def class_ids(
    rows,  # [n] or None
    cols,  # [BLOCK] int64 places
    in_c,  # [BLOCK]
):
    """The row of w of each place."""
    ids = cols
    if rows is not None:
        ids = tl.load(rows + cols, mask=in_c, other=0)
    return ids


@triton.jit
def split_scale(
    scale,  # [n] 1/||w_j||
    cols,  # [BLOCK] int64 places
    in_c,  # [BLOCK]
    COMPUTE: tl.constexpr,
):
    """A power of two, which brings a weight near to unit norm before it is rounded, and the rest of 1/||w||."""
    power = tl.full(cols.shape, 1.0, tl.float32)
    factor = power
    if scale is not None:
        factor = tl.load(scale + cols, mask=in_c, other=0.0)
        if COMPUTE != tl.float32:
            power = (factor.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
            factor = tl.where(power == 0, 0.0, factor / tl.where(power == 0, 1.0, power))
    return power, factor


@triton.jit
def logits(
    x,  # [B, d]
    w,  # [C, d]
    bias,  # [C] or None
    rows,  # [n] or None
    scale,  # [n] 1/||w_j||, or None
    at,  # [BLOCK_B] int64
    cols,  # [BLOCK_C] int64
    B,
    n,
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
    """A tile of z [BLOCK_B, BLOCK_C], of operands rounded to COMPUTE; -inf at places past the last class."""
    in_b, in_c = at < B, cols < n
    ids = class_ids(rows, cols, in_c)
    z = tl.zeros((BLOCK_B, BLOCK_C), dtype=tl.float32)
    power, _ = split_scale(scale, cols, in_c, COMPUTE)
    for start in range(0, d, BLOCK_D):
        f = (start + tl.arange(0, BLOCK_D)).to(tl.int64)
        in_d = f < d
        xt = tl.load(x + at[:, None] * x_row + f[None, :] * x_feature, mask=in_b[:, None] & in_d[None, :], other=0.0)
        wt = tl.load(w + ids[None, :] * w_row + f[:, None] * w_feature, mask=in_d[:, None] & in_c[None, :], other=0.0)
        z = tl.dot(xt.to(COMPUTE), (wt * power[None, :]).to(COMPUTE), z, input_precision="ieee")
    _, factor = split_scale(scale, cols, in_c, COMPUTE)  # again: held over the loop it would cost registers
    z = z * factor[None, :]
    if bias is not None:
        z = z + tl.load(bias + ids, mask=in_c, other=0.0).to(tl.float32)[None, :]
    return tl.where(in_c[None, :], z, float("-inf"))
