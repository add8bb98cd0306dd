"""pairwise_potential in Triton, in chunks of rows and columns whose 2 phi' fits a workspace.

    u_ij        = |a'_i|^2 + |b'_j|^2 - 2 <a'_i, b'_j>       the mean of b subtracted from both
    potential_i = sum_j v_j phi(u_ij)                        partial sums per tile, added in float64
    slope_i     = sum_j q_ij a'_i - sum_j q_ij b'_j          q_ij = v_j 2 phi'(u_ij), 0 for pairs that do not count

A tile with a near pair, u < 1e-2 (|a'|^2 + |b'|^2), is computed a second time, as a whole, from the differences of the
points as given: u, and its part of the slope as sum_j q_ij (a_i - b_j). Products are float32 whatever torch is set to:
they are all tl.dot with input_precision="ieee". Where b is a, every pair is computed from both its ends.

Loops have constant bounds or are `while`: with numpy 2.4 Triton's interpreter supports no others. Hence a compilation
per d. A program owns the rows that it sums for: no atomics and no locks, and runs repeat bit for bit.
Letters: N and M points, n and m those of a chunk, d features.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor


class Tile(NamedTuple):
    """Sizes of a program's tile of pairs, or of slopes."""

    rows: int
    columns: int
    features: int
    warps: int

    def options(self) -> dict[str, int]:
        blocks = dict(BLOCK_N=self.rows, BLOCK_M=self.columns, BLOCK_D=self.features)
        return blocks | dict(num_warps=self.warps, num_stages=1)


# Of the tiles tried, the largest that spill no register and leave an H100's multiprocessor room for two programs.
PAIRS = Tile(64, 64, 32, 8)
SLOPES = Tile(PAIRS.rows, PAIRS.columns, 64, 8)  # sums over one tile of pairs at a time
WORKSPACE = 2**23  # pairs of a chunk, at most: 32 MiB
ROWS, COLUMNS = 2**13, 2**14  # of a chunk, at most
NEAR = tl.constexpr(1e-2)  # share of |a|^2 + |b|^2 below which a squared distance is computed from the difference


@triton.jit
def points(
    x,  # [n, d]
    mean,  # [d], or None: as given
    at,  # [BLOCK] int64
    f,  # [BLOCK_D] int64
    n,
    d,
    row,
    feature,
):
    """A block of points, the mean subtracted [BLOCK, BLOCK_D]; 0 outside."""
    inside = (at < n)[:, None] & (f < d)[None, :]
    block = tl.load(x + at[:, None] * row + f[None, :] * feature, mask=inside, other=0.0)
    if mean is not None:
        block = tl.where(inside, block - tl.load(mean + f, mask=f < d, other=0.0)[None, :], 0.0)
    return block


@triton.jit
def expanded(
    a,
    b,
    mean,
    rows,
    cols,
    n,
    m,
    a_row,
    a_feature,
    b_row,
    b_feature,
    d: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Squared distances from products [BLOCK_N, BLOCK_M], and |a'|^2 + |b'|^2, which they are to be compared with."""
    products = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
    a_squares = tl.zeros((BLOCK_N, BLOCK_D), dtype=tl.float32)
    b_squares = tl.zeros((BLOCK_M, BLOCK_D), dtype=tl.float32)
    for start in range(0, d, BLOCK_D):
        f = (start + tl.arange(0, BLOCK_D)).to(tl.int64)
        at = points(a, mean, rows, f, n, d, a_row, a_feature)
        bt = points(b, mean, cols, f, m, d, b_row, b_feature)
        a_squares += at * at
        b_squares += bt * bt
        products = tl.dot(at, tl.trans(bt), products, input_precision="ieee")
    squares = tl.sum(a_squares, 1)[:, None] + tl.sum(b_squares, 1)[None, :]
    return squares - 2 * products, squares


@triton.jit
def differences(
    a,
    b,
    rows,
    cols,
    n,
    m,
    a_row,
    a_feature,
    b_row,
    b_feature,
    d: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """The same distances from differences, feature by feature."""
    u = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
    for f in range(0, d):
        at = tl.load(a + rows * a_row + f * a_feature, mask=rows < n, other=0.0)
        bt = tl.load(b + cols * b_row + f * b_feature, mask=cols < m, other=0.0)
        apart = at[:, None] - bt[None, :]
        u += apart * apart
    return u


@triton.jit
def pairs_kernel(
    partial,  # [n, blocks of columns] float32, out: potentials of the tiles
    q,  # [n, m] out: 2 phi', or None
    near,  # [blocks of rows, blocks of columns] int32, out: 1 where a tile is computed from differences
    a,  # [n, d]
    b,  # [m, d]
    mean,  # [d]
    a_ids,  # [n] int64
    b_ids,  # [m] int64
    weight,  # [m] or None
    margin,  # of the hinge; None: inverse
    n,
    m,
    a_row,
    a_feature,
    b_row,
    b_feature,
    d: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    block, blocks = tl.program_id(1), tl.num_programs(1)
    rows = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    cols = block.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    in_n, in_m = rows < n, cols < m
    u, squares = expanded(
        a, b, mean, rows, cols, n, m, a_row, a_feature, b_row, b_feature, d, BLOCK_N, BLOCK_M, BLOCK_D
    )
    one, other = tl.load(a_ids + rows, mask=in_n, other=0), tl.load(b_ids + cols, mask=in_m, other=0)
    counts = in_n[:, None] & in_m[None, :] & (one[:, None] != other[None, :])
    has_near = tl.max(tl.max((counts & (u < squares * NEAR)).to(tl.int32), 1), 0)
    if has_near != 0:
        u = differences(a, b, rows, cols, n, m, a_row, a_feature, b_row, b_feature, d, BLOCK_N, BLOCK_M)
    tl.store(near + tl.program_id(0) * blocks + block, has_near)
    if margin is None:
        value = 1 / (1 + u)
        slope = -2 * value * value
    else:
        left = margin - u
        value = tl.where(left < 0, 0.0, left)  # NaN stays NaN
        slope = tl.where(left > 0, -2.0, 0.0)
    value, slope = tl.where(counts, value, 0.0), tl.where(counts, slope, 0.0)
    if weight is not None:
        v = tl.load(weight + cols, mask=in_m, other=0.0)[None, :]
        value, slope = value * v, slope * v
    tl.store(partial + rows * blocks + block, tl.sum(value, 1), mask=in_n)
    if q is not None:
        tl.store(q + rows[:, None] * m + cols[None, :], slope, mask=in_n[:, None] & in_m[None, :])


@triton.jit
def slopes_kernel(
    slope,  # [n, d] float32, added to
    q,  # [n, m]
    near,  # [blocks of rows, blocks of columns] int32
    a,  # [n, d]
    b,  # [m, d]
    mean,  # [d]
    n,
    m,
    a_row,
    a_feature,
    b_row,
    b_feature,
    d: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """The chunk's part of a block of slopes."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    f = tl.program_id(1).to(tl.int64) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = (rows < n)[:, None] & (f < d)[None, :]
    blocks = tl.cdiv(m, BLOCK_M)
    q_b = tl.zeros((BLOCK_N, BLOCK_D), dtype=tl.float32)  # sum_j q_ij b'_j; of tiles with near pairs q_ij (b_j - a_i)
    q_sum = tl.zeros((BLOCK_N,), dtype=tl.float32)  # sum_j q_ij of the other tiles
    block = 0
    while block < blocks:
        first = block * BLOCK_M
        if tl.load(near + tl.program_id(0) * blocks + block) != 0:
            given = points(a, None, rows, f, n, d, a_row, a_feature)
            part = tl.zeros((BLOCK_N, BLOCK_D), dtype=tl.float32)
            for j in range(0, BLOCK_M):
                in_m = first + j < m
                q_j = tl.load(q + rows * m + first + j, mask=(rows < n) & in_m, other=0.0)
                b_j = tl.load(b + (first + j).to(tl.int64) * b_row + f * b_feature, mask=(f < d) & in_m, other=0.0)
                part += q_j[:, None] * (b_j[None, :] - given)
            q_b += part
        else:
            cols = first.to(tl.int64) + tl.arange(0, BLOCK_M)
            at = rows[:, None] * m + cols[None, :]
            qt = tl.load(q + at, mask=(rows < n)[:, None] & (cols < m)[None, :], other=0.0)
            bt = points(b, mean, cols, f, m, d, b_row, b_feature)
            q_b = tl.dot(qt, bt, q_b, input_precision="ieee")
            q_sum += tl.sum(qt, 1)
        block += 1
    at = slope + rows[:, None] * d + f[None, :]
    centered = points(a, mean, rows, f, n, d, a_row, a_feature)
    tl.store(at, tl.load(at, mask=inside, other=0.0) + (q_sum[:, None] * centered - q_b), mask=inside)


class Side(NamedTuple):
    """The points of one side of a chunk."""

    points: Tensor  # [n, d]
    ids: Tensor  # [n]
    weight: Tensor | None  # [n]

    def part(self, first: int, step: int) -> "Side":
        at = slice(first, first + step)
        return Side(self.points[at], self.ids[at], None if self.weight is None else self.weight[at])


def add_chunk(
    potential: Tensor,  # [n] float64, added to
    slope: Tensor | None,  # [n, d], added to
    a: Side,
    b: Side,
    mean: Tensor,  # [d]
    margin: float | None,
) -> None:
    (n, d), m = a.points.shape, len(b.points)
    blocks = triton.cdiv(n, PAIRS.rows), triton.cdiv(m, PAIRS.columns)
    partial, near = mean.new_empty(n, blocks[1]), mean.new_empty(blocks, dtype=torch.int32)
    q = None if slope is None else mean.new_empty(n, m)
    sizes = n, m, *a.points.stride(), *b.points.stride()
    pairs_kernel[blocks](
        partial, q, near, a.points, b.points, mean, a.ids, b.ids, b.weight, margin, *sizes, d=d, **PAIRS.options()
    )
    potential += partial.sum(1, dtype=torch.float64)
    if slope is not None:
        grid = triton.cdiv(n, SLOPES.rows), triton.cdiv(d, SLOPES.features)
        slopes_kernel[grid](slope, q, near, a.points, b.points, mean, *sizes, d=d, **SLOPES.options())


def forward(
    a: Tensor,  # [N, d]
    b: Tensor | None,  # [M, d]; None: a
    a_ids: Tensor,  # [N]
    b_ids: Tensor | None,  # [M]
    b_weight: Tensor | None,  # [M]
    kind: str,
    margin: float,
    want_slope: bool,
) -> tuple[Tensor, Tensor]:  # potential [N], slope [N, d] or [0]
    b, b_ids = (a, a_ids) if b is None or b_ids is None else (b, b_ids)
    one = Side(a, a_ids.contiguous(), None)
    two = Side(b, b_ids.contiguous(), None if b_weight is None else b_weight.contiguous())
    potential = a.new_zeros(len(a), dtype=torch.float64)
    slope = a.new_zeros(a.shape if want_slope else (0,))
    mean, of_hinge = b.mean(0), margin if kind == "hinge" else None
    columns = min(COLUMNS, max(WORKSPACE // max(min(len(a), ROWS), 1) // PAIRS.columns, 1) * PAIRS.columns)
    with torch.cuda.device_of(a):
        for i in range(0, len(a), ROWS):
            rows = slice(i, i + ROWS)
            for j in range(0, len(b), columns):
                slopes = slope[rows] if want_slope else None
                add_chunk(potential[rows], slopes, one.part(i, ROWS), two.part(j, columns), mean, of_hinge)
    return potential.to(a.dtype), slope
