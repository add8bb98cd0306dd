"""Losses of pairs of rows of a batch.

Marginal loss (MML eq. 6; Deng et al. 2017), of unit rows f^, y_ij = 1 within a class and -1 across, D the distance:

    L = 1/(B^2 - B) sum_{i != j} max(xi - y_ij (theta - ||f^_i - f^_j||), 0)

Range loss (MML eq. 8 to 11; Zhang et al. 2017), D_kj the j-th largest distance within class k, means m of the batch:

    L = a sum_k [n / sum_{j <= n} 1 / D_kj] + b max(M - ||m_Q - m_R||^2, 0)        Q, R: the two nearest class means

Margin-based loss with cosines S (DOP eq. 2), and its pairs drawn by how much they violate the margin (DOP eq. 3 to 5):

    l(i, j) = max(margin - y_ij (S_ij - beta), 0)         dl/dS = -y, dl/dbeta = y on active pairs
    v_pos   = max(beta + margin - S, 0)                   v_neg = max(S - (beta - margin), 0)
    each row takes at most one positive and one negative, t with probability v_t / sum v, none where the sum is 0

Not here: contrastive, triplet and lifted structure losses, which pytorch-metric-learning has. MML: see center.py; DOP:
Smirnov et al. 2017, Doppelganger Mining for Face Representation Learning.
Letters: B rows, K classes in the batch, d features, P pairs.
"""

import math

import torch
from torch import Tensor

from fastmargin.losses.center import batch_means
from fastmargin.losses.rows import check_batch, wide
from fastmargin.ops.common import rank_in_group, unit_rows
from fastmargin.require import require

EXACT = "donot_use_mm_for_euclid_dist"  # products lose the digits of small distances
LEAST = 1e-12  # lower bound of squared distances under an inverse square root


def marginal_loss(
    x: Tensor,  # [B, d]
    labels: Tensor,  # [B] int64
    *,
    threshold: float,
    error_margin: float,
) -> Tensor:
    """MML eq. 6: all pairs should be on their side of one threshold. Differentiable in x.

    The loss of fewer than two rows is 0; coincident rows have no gradient from their pair, and a zero row has none; NaN
    features give a NaN loss.

    Args:
        x: [B, d] of any floating dtype, normalized here; half precisions are computed in float32.
        labels: [B] int64.
        threshold: theta, a distance of unit rows, from 0 to 2.
        error_margin: xi, the least distance of a pair from the threshold, 0 or more.

    Returns:
        A scalar.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, and options out of range.
    """
    check_batch(x, labels)
    require(0 <= threshold <= 2, "threshold", threshold, "a distance of unit rows, from 0 to 2")
    require(0 <= error_margin < math.inf, "error_margin", error_margin, "a number of 0 or more")
    unit, _ = unit_rows(wide(x))
    distance = torch.cdist(unit, unit, compute_mode=EXACT)
    sign = torch.where(labels[:, None] == labels, 1.0, -1.0).to(distance.dtype)
    hinge = (error_margin - sign * (threshold - distance)).clamp(min=0)
    return hinge.triu(1).sum() / max(1, math.comb(len(x), 2))


def range_loss(
    x: Tensor,  # [B, d]
    labels: Tensor,  # [B] int64
    *,
    margin: float,
    n: int = 2,
    intra_weight: float = 1.0,
    inter_weight: float = 1.0,
) -> Tensor:
    """MML eq. 8: the farthest pairs within classes, and the two nearest class means. Differentiable in x.

    A class of one row has no pair, and a batch of one class no second term: 0. Pairs nearer than 1e-6 count as 1e-6 and
    have no gradient; NaN features give a NaN loss.

    Args:
        x: [B, d] of any floating dtype, not normalized; half precisions are computed in float32.
        labels: [B] int64.
        margin: M, on the squared distance of means, above 0.
        n: farthest pairs of a class whose harmonic mean counts; fewer where it has fewer. 2 is the paper's choice.
        intra_weight, inter_weight: alpha and beta of eq. 8.

    Returns:
        A scalar.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, margin <= 0, n < 1 and negative weights.
    """
    check_batch(x, labels)
    require(0 < margin < math.inf, "margin", margin, "a squared distance above 0")
    require(isinstance(n, int) and n >= 1, "n", n, "an int of 1 or more")
    for name, weight in (("intra_weight", intra_weight), ("inter_weight", inter_weight)):
        require(0 <= weight < math.inf, name, weight, "a number of 0 or more")
    x = wide(x)
    one, other, index = farthest_pairs(x, labels, n)
    inverse = (x[one] - x[other]).square().sum(1).clamp(min=LEAST).rsqrt()  # [P]
    pairs = index.bincount()
    sums = inverse.new_zeros(len(pairs)).index_add(0, index, inverse)
    means, _ = batch_means(x, labels)
    q, r = nearest_means(means.detach())
    gap = (margin - (means[q] - means[r]).square().sum(1)).clamp(min=0)
    return intra_weight * (pairs[pairs > 0] / sums[pairs > 0]).sum() + inter_weight * gap.sum()


@torch.no_grad()
def farthest_pairs(
    x: Tensor,  # [B, d]
    labels: Tensor,  # [B]
    n: int,
) -> tuple[Tensor, Tensor, Tensor]:  # rows [P], rows [P], index of their class among the sorted ones [P]
    """The n farthest pairs of rows of each class, or all if it has fewer."""
    distance = torch.cdist(x, x, compute_mode=EXACT)
    one, other = (labels[:, None] == labels).triu(1).nonzero(as_tuple=True)
    index = labels.unique(return_inverse=True)[1][one]
    order = distance[one, other].argsort(descending=True, stable=True)
    order = order[index[order].argsort(stable=True)]  # by class, the farthest first
    kept = order[rank_in_group(index[order]) < n]
    return one[kept], other[kept], index[kept]


@torch.no_grad()
def nearest_means(
    means: Tensor,  # [K, d]
) -> tuple[Tensor, Tensor]:  # [1], [1]; empty where K < 2
    K = len(means)
    distance = torch.cdist(means, means, compute_mode=EXACT).fill_diagonal_(math.inf)
    nearest = distance.flatten().argmin()[None] if K > 1 else torch.empty(0, dtype=torch.int64, device=means.device)
    return nearest // max(1, K), nearest % max(1, K)


def margin_based_loss(
    x: Tensor,  # [B, d]
    labels: Tensor,  # [B] int64
    beta: Tensor | float = 0.5,  # []
    *,
    margin: float = 0.1,
    generator: torch.Generator | None = None,
) -> Tensor:
    """DOP eq. 2 on drawn pairs, divided by the number of active ones. Differentiable in x and beta.

    0 if no pair violates the margin. A zero row has cosine 0 with all rows and no gradient; NaN features give a NaN
    loss.

    Args:
        x: [B, d] of any floating dtype, normalized here; half precisions are computed in float32.
        labels: [B] int64.
        beta: a number or a scalar tensor: the boundary between the cosines of positives and negatives; a Parameter is
            trained (from 0.5, as in the paper).
        margin: alpha of eq. 2, 0 or more.
        generator: of the draws; None: torch's default.

    Returns:
        A scalar.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, and margin < 0.
    """
    check_batch(x, labels)
    require(0 <= margin < math.inf, "margin", margin, "a number of 0 or more")
    unit, _ = unit_rows(wide(x))
    beta = torch.as_tensor(beta, dtype=unit.dtype, device=unit.device)
    with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
        positives, negatives = violating_pairs(unit @ unit.T, labels, beta, margin, generator)
    losses = []
    for sign, chosen in ((1, positives), (-1, negatives)):
        row = (chosen >= 0).nonzero()[:, 0]
        cos = (unit[row] * unit[chosen[row]]).sum(1)
        losses.append((margin - sign * (cos - beta)).clamp(min=0))
    loss = torch.cat(losses)
    return loss.sum() / (loss > 0).sum().clamp(min=1)


def violating_pairs(
    cos: Tensor,  # [B, B]
    labels: Tensor,  # [B]
    beta: Tensor,  # []
    margin: float,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:  # [B] positives, [B] negatives: rows, -1 for none
    """One partner of each kind for each row, drawn by violation (DOP eq. 3 to 5); never the row itself."""
    same = labels[:, None] == labels
    other = ~torch.eye(len(labels), dtype=torch.bool, device=labels.device)
    positive = torch.where(same & other, (beta + margin - cos).clamp(min=0), 0.0)
    negative = torch.where(same, 0.0, (cos - (beta - margin)).clamp(min=0))
    return draw(positive, generator), draw(negative, generator)


def draw(
    weights: Tensor,  # [B, n]
    generator: torch.Generator | None,
) -> Tensor:  # [B] a column of each row, -1 where all weights are 0
    """A column with probability weight / sum. A NaN weight counts as 1, so that NaN features reach the loss."""
    weights = weights.nan_to_num(nan=1.0)
    some = weights.sum(1) > 0
    if weights.shape[1] == 0:
        return torch.full_like(some, -1, dtype=torch.int64)
    columns = torch.where(some[:, None], weights, 1.0).multinomial(1, generator=generator)[:, 0]
    return torch.where(some, columns, -1)
