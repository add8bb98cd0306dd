"""Center loss, and the centers that it, the Git loss and the minimum margin share.

    L_C = 1/2 sum_i ||x_i - c_{y_i}||^2                              (GIT section 3, MML eq. 2; Wen et al. 2016)
    c_j <- c_j + rate_j sum_{i: y_i = j} (x_i - c_j)                 for the classes of the batch alone

    paper   rate_j = alpha / (1 + n_j)     the rule of the paper: an average of c_j and the batch mean, n_j rows
    sgd     rate_j = alpha                 a gradient step of L_C; steps beyond the mean where alpha n_j > 1
    ema     rate_j = alpha / n_j           the share alpha of the batch mean

A training step computes its losses with the old centers, then calls `update`. Loss weights do not scale the update.

Losses take any centers, and the choice decides how their gradient reaches the features (MML section II.C leaves it
open). `bank.centers` have no gradient; `bank.updated` gives dL/dx_i = rate_{y_i} dL/dc_{y_i}; `batch_means` gives
dL/dx_i = dL/dc_{y_i} / n_{y_i}; a Parameter [C, d] of your own is trained itself.

A batch is that of this process, except for a bank with a group. GIT: Calefati et al. 2018, Git Loss for Deep Face
Recognition; MML: Wei et al. 2018, Minimum Margin Loss for Deep Face Recognition.
Letters: B rows, C classes, K of them in the batch, d features, n_j rows of class j.
"""

from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor, nn

from fastmargin.distributed.agreement import check_equal
from fastmargin.distributed.functions import sum_by_class
from fastmargin.losses.rows import Reduction, centers_of, check_batch, check_rows, reduced, wide
from fastmargin.require import require

Rule: TypeAlias = Literal["paper", "sgd", "ema"]


class CenterBank(nn.Module):
    """The centers of all classes, `centers` [C, d] float32, a buffer that starts at 0.

    Args:
        in_features, num_classes: d and C.
        update: the rule: "paper", "sgd" or "ema"; see the module.
        alpha: its rate, from 0 (centers stay) to 1.
        group: a torch.distributed group: the rule then uses the batch of all ranks, and all ranks have equal centers.
            None: this process alone.

    Raises:
        ValueError: a size below 1, an unknown rule, alpha outside [0, 1], or options that differ between ranks.
    """

    centers: Tensor

    def __init__(
        self, in_features: int, num_classes: int, update: Rule = "paper", alpha: float = 0.5, group: Any = None
    ) -> None:
        super().__init__()
        for name, size in (("in_features", in_features), ("num_classes", num_classes)):
            require(isinstance(size, int) and size >= 1, name, size, "an int of 1 or more")
        require(update in get_args(Rule), "update", update, f"one of {get_args(Rule)}")
        require(isinstance(alpha, (int, float)) and 0 <= alpha <= 1, "alpha", alpha, "a rate from 0 to 1")
        check_equal(dict(in_features=in_features, num_classes=num_classes, update=update, alpha=alpha), group)
        self.rule, self.alpha, self.group = update, alpha, group
        self.register_buffer("centers", torch.zeros(num_classes, in_features, dtype=torch.float32))

    def updated(
        self,
        x: Tensor,  # [B, d]
        labels: Tensor,  # [B] int64 in [0, C)
    ) -> tuple[Tensor, Tensor]:  # [K, d], [K] sorted classes
        """The centers of the batch's classes after an update, differentiable in x, and these classes.

        The bank itself does not change. In a group the classes are those of all ranks, and the gradients of this rank's
        rows are times N, because the objective is the average of the losses that N ranks back-propagate.

        Args:
            x: [B, d] of any floating dtype, cast to that of the centers.
            labels: [B] int64 in [0, C).

        Returns:
            Centers [K, d], and the classes [K] int64 that they are of, sorted.

        Raises:
            ValueError: as `center_loss`.
        """
        check_rows(x, labels, self.centers)
        classes, inverse, counts = labels.unique(return_inverse=True, return_counts=True)
        difference = x.to(self.centers.dtype) - self.centers[labels]
        total = difference.new_zeros(len(classes), difference.shape[1]).index_add(0, inverse, difference)  # [K, d]
        if self.group is not None:
            classes, counts, total = sum_by_class(classes, counts, total, self.group)
        divisor = {"paper": 1 + counts, "sgd": torch.ones_like(counts), "ema": counts}[self.rule]
        return self.centers[classes] + (self.alpha / divisor.to(total.dtype))[:, None] * total, classes

    @torch.no_grad()
    def update(
        self,
        x: Tensor,  # [B, d]
        labels: Tensor,  # [B] int64 in [0, C)
    ) -> None:
        """Updates the centers of the batch's classes; rows that are not finite stay out.

        In a group all ranks call it together.

        Args:
            x: [B, d] of any floating dtype, cast to that of the centers.
            labels: [B] int64 in [0, C).

        Raises:
            ValueError: as `center_loss`.
        """
        check_rows(x, labels, self.centers)
        kept = x.to(self.centers.dtype).isfinite().all(1)
        fresh, classes = self.updated(x[kept], labels[kept])
        finite = fresh.isfinite().all(1, keepdim=True)
        self.centers[classes] = torch.where(finite, fresh, self.centers[classes])

    def extra_repr(self) -> str:
        num_classes, in_features = self.centers.shape
        return f"in_features={in_features}, num_classes={num_classes}, update={self.rule}, alpha={self.alpha}"


def batch_means(
    x: Tensor,  # [B, d]
    labels: Tensor,  # [B] int64
) -> tuple[Tensor, Tensor]:  # [K, d], [K] sorted classes
    """The mean of the rows of each class of the batch, differentiable in x, and these classes.

    Args:
        x: [B, d] of any floating dtype; half precisions are computed in float32.
        labels: [B] int64.

    Returns:
        Means [K, d], and the classes [K] int64 that they are of, sorted.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit.
    """
    check_batch(x, labels)
    x = wide(x)
    classes, inverse, counts = labels.unique(return_inverse=True, return_counts=True)
    total = x.new_zeros(len(classes), x.shape[1]).index_add(0, inverse, x)
    return total / counts[:, None], classes


def center_loss(
    x: Tensor,  # [B, d]
    labels: Tensor,  # [B] int64 in [0, C)
    centers: Tensor,  # [C, d]
    *,
    reduction: Reduction = "mean",
) -> Tensor:
    """Half the squared distance of each row to the center of its class: MML eq. 2 with "sum", over B with "mean".

    Only the centers of the rows are read. Differentiable in x, and in centers if they require it: a leaf's gradient is
    sparse, for SGD without weight decay or SparseAdam. Distances are in the units of the features. A row on its center
    has no loss and no gradient; NaN features give a NaN loss.

    Args:
        x: [B, d] of any floating dtype, cast to that of the centers.
        labels: [B] int64 in [0, C).
        centers: [C, d] float32 or float64.
        reduction: "mean", "sum" or "none".

    Returns:
        A scalar (0 of no rows), or [B] with "none"; in the dtype of the centers.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, an unknown reduction, and labels outside [0, C); these
            are not validated on CUDA, where it would synchronize.
    """
    check_rows(x, labels, centers)
    difference = x.to(centers.dtype) - centers_of(centers, labels)
    return reduced(difference.square().sum(1) / 2, reduction)
