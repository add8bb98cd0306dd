"""The minimum margin: pushes centers apart that are nearer than M (MML eq. 13, as its text means it; see center.py).

    L_M = sum_{i < j} max(M - ||c_i - c_j||^2, 0)           dL_M/dc_i = -2 sum_{j: ||c_i - c_j||^2 < M} (c_i - c_j)

Eq. 13 prints ||c_i - c_j||^2 - M, which would pull far centers together; the text penalizes pairs nearer than M. And it
sums over i, j = 1..K: every pair twice, which `ordered=True` keeps, and i = j, a constant K M that is left out.
M is of the squared distance: the paper's 200 is a distance of 14.1 between features of its scale.

The gradient reaches the features by the centers that are passed in (see center.py):

    minimum_margin_loss(bank.updated(x, labels)[0], margin=200.0)         through the update of the centers
    minimum_margin_loss(batch_means(x, labels)[0], margin=200.0)          through the batch means
    minimum_margin_loss(parameter, labels, margin=200.0)                  trains the centers, a Parameter [C, d]

Letters: B rows, C classes, K of them in the batch, d features.
"""

from typing import Literal

import torch
from torch import Tensor

from fastmargin.losses.rows import Reduction, centers_of, check_centers, reduced
from fastmargin.ops.pairwise_potential import pairwise_potential
from fastmargin.require import require


def minimum_margin_loss(
    centers: Tensor,  # [C, d]
    labels: Tensor | None = None,  # [B] int64 in [0, C)
    *,
    margin: float,
    scope: Literal["batch", "all"] = "batch",
    ordered: bool = False,
    reduction: Reduction = "sum",
) -> Tensor:
    """The hinge of MML eq. 13 over pairs of centers, no matrix of distances stored. Differentiable in centers.

    Fewer than two classes have no pair: 0. Coincident centers have the loss M and no gradient; NaN centers give a NaN
    loss. With labels, the gradient of a leaf tensor is sparse, as in `center_loss`.

    Args:
        centers: [C, d] float32 or float64.
        labels: [B] int64 in [0, C), those of the batch. None: `centers` are those of the batch's classes, a row each.
        margin: M, on the squared distance, above 0.
        scope: "batch": pairs of classes of the batch; "all": pairs of all rows, whatever the labels, O(C^2 d).
        ordered: counts each pair twice, as printed.
        reduction: "sum" as printed, "mean" over the pairs, or "none".

    Returns:
        A scalar; with "none" [K] or [C], each center's share of the sum, in the order of the classes.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, margin <= 0, an unknown scope or reduction, and labels
            outside [0, C); these are not validated on CUDA, where it would synchronize.
    """
    require(scope in ("batch", "all"), "scope", scope, "'batch' or 'all'")
    check_centers(centers, labels)
    if scope == "batch" and labels is not None:
        centers = centers_of(centers, labels.unique())
    n = len(centers)
    ids = torch.arange(n, device=centers.device)
    rows = pairwise_potential(centers, centers, ids, ids, kind="hinge", margin=margin)  # [n], each pair twice
    share = 1.0 if ordered else 0.5
    if reduction == "mean":
        return rows.sum() / max(1, n * (n - 1))
    return reduced(rows, reduction) * share
