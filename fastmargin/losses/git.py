"""The Git loss: pushes rows away from the centers of other classes, near ones more (GIT eq. 1 to 3; see center.py).

    phi(i, k) = 1 / (1 + ||x_i - c_k||^2)             dphi/dx_i = -2 phi^2 (x_i - c_k)             (GIT eq. 3)

    classes    L_i = sum_{k != y_i} n_k phi(i, k)                      as the text describes it: other classes
    samples    L_i = sum_{j != i} phi(i, y_j)                          as eq. 1 prints it: pairs of samples
                   = classes + (n_{y_i} - 1) phi(i, y_i)
    original   L_i = mean over rows j and features of 1 / (1 + (x_i - c_{y_j})^2), and 1/B where j = i: the public code

k runs over the K classes of the batch, n_k rows each: B x K distances, not B x B. In "samples" and "original" the other
samples of its class push a row from its own center. The push is largest at a distance of 0.58 and falls as 2 / r^3: at
r = 14 there is none. The losses of the public code are means: its lambda_G is B d times that of eq. 1.
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

CHUNK = 2**20  # numbers of the differences of rows and centers that are in memory at one time


def git_loss(
    x: Tensor,  # [B, d]
    labels: Tensor,  # [B] int64 in [0, C)
    centers: Tensor,  # [C, d]
    *,
    pairs: Pairs = "classes",
    reduction: Reduction = "mean",
) -> Tensor:
    """The Git term of a batch, to be minimized: GIT eq. 1 with "sum", the same over B with "mean".

    Differentiable in x, and in centers if they require it: the gradient of a leaf is sparse, as in `center_loss`. The
    loss of a batch of one class is 0 with "classes". A row on a center has the largest term and no gradient there; NaN
    features give a NaN loss.

    Args:
        x: [B, d] outputs of the backbone, not normalized; any floating dtype, cast to that of the centers.
        labels: [B] int64 in [0, C).
        centers: [C, d] float32 or float64; only those of the batch's classes are read.
        pairs: "classes", "samples" or "original"; see the module.
        reduction: "mean", "sum" or "none".

    Returns:
        A scalar (0 of no rows), or [B] with "none"; in the dtype of the centers.

    Raises:
        ValueError: as `center_loss`, and for unknown pairs.
    """
    require(pairs in get_args(Pairs), "pairs", pairs, f"one of {get_args(Pairs)}")
    check_rows(x, labels, centers)
    x = x.to(centers.dtype)
    classes, inverse, counts = labels.unique(return_inverse=True, return_counts=True)
    centers, n = centers_of(centers, classes), counts.to(x.dtype)  # [K, d], [K]
    if pairs == "original":
        return reduced(by_coordinate(x, inverse, centers, n), reduction)
    rows = pairwise_potential(x, centers, labels, classes, b_weight=n, kind="inverse")
    if pairs == "samples":
        rows = rows + (n[inverse] - 1) / (1 + (x - centers[inverse]).square().sum(1))
    return reduced(rows, reduction)


def by_coordinate(
    x: Tensor,  # [B, d]
    inverse: Tensor,  # [B] index of each row's class in centers
    centers: Tensor,  # [K, d]
    n: Tensor,  # [K]
) -> Tensor:  # [B]
    """The rows of "original", recomputed in the backward pass, block by block: no B x K x d array is stored."""

    def potential(x: Tensor, centers: Tensor, n: Tensor) -> Tensor:  # [m, d], [K, d], [K] -> [m]
        return ((1 / (1 + (x[:, None] - centers).square())).sum(2) * n).sum(1)

    step = max(1, CHUNK // max(1, centers.numel()))
    blocks = [
        checkpoint(potential, block, centers, n, use_reentrant=False, preserve_rng_state=False)
        for block in x.split(step)
    ]
    own_sample = (1 / (1 + (x - centers[inverse]).square())).sum(1)
    return (torch.cat(blocks) - own_sample + x.shape[1]) / max(1, x.numel())
