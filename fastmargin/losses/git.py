"""The Git loss: rows are pushed away from the centres of other classes, the nearer the harder (GIT eq. 1 to 3).

    phi(i, k) = 1 / (1 + ||x_i - c_k||^2)             dphi/dx_i = -2 phi^2 (x_i - c_k)             (GIT eq. 3)

    classes    L_i = sum_{k != y_i} n_k phi(i, k)                      as the text means it: other classes
    samples    L_i = sum_{j != i} phi(i, y_j)                          as eq. 1 prints it: pairs of samples
                   = classes + (n_{y_i} - 1) phi(i, y_i)
    original   L_i = mean over rows j and features of 1 / (1 + (x_i - c_{y_j})^2), and 1/B where j = i: the public code

k runs over the K classes of the batch, n_k rows each: B x K distances, not B x B. In "samples" and "original" the other
samples of its class push a row from its own centre. The push is largest at a distance of 0.58 and falls as 2 / r^3: it
does nothing at r = 14. A lambda_G of the public code, all of whose losses are means, is B d times that of eq. 1.
Letters: B rows, C classes, K of them in the batch, d features.
"""

from typing import Literal, TypeAlias, get_args

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from fastmargin.losses.rows import Reduction, centers_of, check_rows, reduced
from fastmargin.ops.pairwise_potential import pairwise_potential
from fastmargin.require import require

Pairs: TypeAlias = Literal["classes", "samples", "original"]

CHUNK = 2**20  # numbers in the differences of rows and centres held at once


def git_loss(
    x: Tensor,  # [B, d]
    labels: Tensor,  # [B] int64 in [0, C)
    centers: Tensor,  # [C, d]
    *,
    pairs: Pairs = "classes",
    reduction: Reduction = "mean",
) -> Tensor:
    """The Git term of a batch, to be minimised: GIT eq. 1 with "sum", the same over B with "mean".

    Differentiable in x, and in centers if they need a gradient: of a leaf it is sparse, as `center_loss` has it.

    Args:
        x: rows of any floating dtype, computed in that of the centres; of the backbone, not normalised.
        centers: float32 or float64, of all classes; only those of the batch's classes are read.
        pairs: "classes", "samples" or "original"; see the module.
        reduction: "mean" or "sum" (a scalar; of no rows 0) or "none" ([B]).

    A batch of one class is 0 by "classes". A row on a centre has the largest term there and no gradient from it;
    NaN features give a NaN loss. Raises ValueError as `center_loss`, and for unknown pairs.
    """
    require(pairs in get_args(Pairs), "pairs", pairs, f"one of {get_args(Pairs)}")
    check_rows(x, labels, centers)
    x = x.to(centers.dtype)
    classes, place, counts = labels.unique(return_inverse=True, return_counts=True)
    held, n = centers_of(centers, classes), counts.to(x.dtype)  # [K, d], [K]
    if pairs == "original":
        return reduced(by_coordinate(x, place, held, n), reduction)
    rows = pairwise_potential(x, held, labels, classes, b_weight=n, kind="inverse")
    if pairs == "samples":
        rows = rows + (n[place] - 1) / (1 + (x - held[place]).square().sum(1))
    return reduced(rows, reduction)


def by_coordinate(
    x: Tensor,  # [B, d]
    place: Tensor,  # [B] of each row's class in held
    held: Tensor,  # [K, d]
    n: Tensor,  # [K]
) -> Tensor:  # [B]
    """The rows of "original", computed anew in the backward pass, block by block: no B x K x d array is kept."""

    def potential(x: Tensor, held: Tensor, n: Tensor) -> Tensor:  # [m, d], [K, d], [K] -> [m]
        return ((1 / (1 + (x[:, None] - held).square())).sum(2) * n).sum(1)

    step = max(1, CHUNK // max(1, held.numel()))
    blocks = [
        checkpoint(potential, block, held, n, use_reentrant=False, preserve_rng_state=False) for block in x.split(step)
    ]
    own = (1 / (1 + (x - held[place]).square())).sum(1)
    return (torch.cat(blocks) - own + x.shape[1]) / max(1, x.numel())
