"""pairwise_potential in plain PyTorch, with the signature of the registered op (formulas: pairwise_potential.py).

`stream` walks over tiles of pairs and runs on any device. `reference` stores all N x M x d differences; it is the truth
of the tests. Letters: N and M points, d features; m and n those of a tile, p pairs.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from fastmargin.ops.common import without_autocast

KINDS = ("inverse", "hinge")
TILE = 1024  # points on a side of a tile of pairs
NEAR = 1e-2  # a squared distance below this share of |a|^2 + |b|^2 is computed from the difference
CHUNK = 2**20  # numbers of the differences of near pairs that are in memory at one time


def phi(u: Tensor, kind: str, margin: float) -> tuple[Tensor, Tensor]:  # any shape -> the same: phi, 2 phi'
    if kind == "inverse":
        value = 1 / (1 + u)
        return value, -2 * value.square()
    return (margin - u).clamp(min=0), torch.where(u < margin, -2.0, 0.0).to(u.dtype)


class Side(NamedTuple):
    """The points of one side of a tile."""

    points: Tensor  # [n, d] as given
    centered: Tensor  # [n, d] less the mean of all b
    squares: Tensor  # [n] of the centered
    ids: Tensor  # [n]

    @staticmethod
    def from_points(points: Tensor, ids: Tensor, mean: Tensor, tile: slice) -> "Side":  # [N, d], [N], [d]
        centered = points[tile] - mean
        return Side(points[tile], centered, centered.square().sum(1), ids[tile])


class Pairs(NamedTuple):
    """Pairs of a tile by row and column, and their differences."""

    rows: Tensor  # [p]
    cols: Tensor  # [p]
    differences: Tensor  # [p, d]


def near_pairs(
    near: Tensor,  # [m, n] bool
    a: Side,
    b: Side,
) -> Iterator[Pairs]:
    step = max(1, CHUNK // a.points.shape[1])
    for indices in near.nonzero().split(step):
        rows, cols = indices.unbind(1)
        yield Pairs(rows, cols, a.points[rows] - b.points[cols])


def add_slopes(
    slope: Tensor,  # [m, d] of a, changed
    other: Tensor | None,  # [n, d] of b, changed
    q: Tensor,  # [m, n] 2 phi' of the pairs with different ids, changed
    near: Tensor,  # [m, n] bool
    a: Side,
    b: Side,
) -> None:
    """Adds near pairs from their differences (on a GPU in no fixed order), the others by a matrix product."""
    for pairs in near_pairs(near & (q != 0), a, b):
        force = q[pairs.rows, pairs.cols, None] * pairs.differences
        slope.index_add_(0, pairs.rows, force)
        if other is not None:
            other.index_add_(0, pairs.cols, force, alpha=-1)
    q.masked_fill_(near, 0.0)
    if not q.any():
        return
    slope += q.sum(1, keepdim=True) * a.centered - q @ b.centered
    if other is not None:
        other += q.sum(0)[:, None] * b.centered - q.T @ a.centered


@without_autocast
def stream_fwd(
    a: Tensor,  # [N, d]
    b: Tensor | None,  # [M, d]; None: a
    a_ids: Tensor,  # [N]
    b_ids: Tensor | None,  # [M]
    b_weight: Tensor | None,  # [M]
    kind: str,
    margin: float,
    want_slope: bool,
) -> tuple[Tensor, Tensor]:  # potential [N], slope [N, d] or [0]
    one_side = b is None
    b, b_ids = (a, a_ids) if b is None or b_ids is None else (b, b_ids)
    potential = a.new_zeros(len(a), dtype=torch.float64)
    slope = a.new_zeros(a.shape if want_slope else (0,))
    mean = b.mean(0)
    for i in range(0, len(a), TILE):
        for j in range(i if one_side else 0, len(b), TILE):
            rows, cols, mirrored = slice(i, i + TILE), slice(j, j + TILE), one_side and j > i
            one, two = Side.from_points(a, a_ids, mean, rows), Side.from_points(b, b_ids, mean, cols)
            squares = one.squares[:, None] + two.squares
            u = squares - 2 * (one.centered @ two.centered.T)
            different = one.ids[:, None] != two.ids
            near = different & (u < NEAR * squares)
            for pairs in near_pairs(near, one, two):
                u[pairs.rows, pairs.cols] = pairs.differences.square().sum(1)
            value, q = (torch.where(different, t, 0.0) for t in phi(u, kind, margin))
            if b_weight is not None:
                value, q = value * b_weight[cols], q * b_weight[cols]
            potential[rows] += value.sum(1)
            if mirrored:
                potential[cols] += value.sum(0)
            if want_slope:
                add_slopes(slope[rows], slope[cols] if mirrored else None, q, near, one, two)
    return potential.to(a.dtype), slope


@without_autocast
def reference_fwd(
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
    differences = a[:, None] - b
    value, q = phi(differences.square().sum(2), kind, margin)
    weight = (a_ids[:, None] != b_ids) * (1.0 if b_weight is None else b_weight)
    slope = (weight * q)[:, :, None] * differences
    return (weight * value).sum(1), slope.sum(1) if want_slope else a.new_empty(0)
