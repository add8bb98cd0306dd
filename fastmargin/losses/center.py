"""Center loss, and the centres that it, the Git loss and the minimum margin share.

    L_C = 1/2 sum_i ||x_i - c_{y_i}||^2                              (GIT section 3, MML eq. 2; Wen et al. 2016)
    c_j <- c_j + rate_j sum_{i: y_i = j} (x_i - c_j)                 for the classes of the batch alone

    paper   rate_j = alpha / (1 + n_j)     the rule of the paper: an average of c_j and the batch mean, n_j rows
    sgd     rate_j = alpha                 a gradient step of L_C; steps beyond the mean where alpha n_j > 1
    ema     rate_j = alpha / n_j           the share alpha of the batch mean

A training step takes its losses from the old centres, then calls `update`. No weight of a loss scales that step.

Losses take any centres: which are passed in is the route by which a gradient reaches the features (MML section II.C
leaves it open). `bank.centers` have none; `bank.updated` gives dL/dx_i = rate_{y_i} dL/dc_{y_i}; `batch_means` gives
dL/dx_i = dL/dc_{y_i} / n_{y_i}; a Parameter [C, d] of your own is trained itself.

A batch is that of this process, but for a bank with a group.
Letters: B rows, C classes, K of them in the batch, d features, n_j rows of class j.
"""

from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor, nn

from fastmargin.distributed.functions import sum_by_class
from fastmargin.losses.rows import Reduction, centers_of, check_batch, check_rows, reduced, wide
from fastmargin.require import require

Rule: TypeAlias = Literal["paper", "sgd", "ema"]


class CenterBank(nn.Module):
    """The centres of all classes, `centers` [C, d] float32, a buffer that starts at 0.

    Args:
        num_classes, dim: C and d.
        update: the rule: "paper", "sgd" or "ema"; see the module.
        alpha: its rate, from 0 (centres stay) to 1.
        group: of torch.distributed: the batch of a rule is then that of all its ranks, and all hold equal centres.
            None: this process alone.

    Raises:
        ValueError: a size below 1, an unknown rule, alpha outside [0, 1].
    """

    centers: Tensor

    def __init__(
        self, num_classes: int, dim: int, update: Rule = "paper", alpha: float = 0.5, group: Any = None
    ) -> None:
        super().__init__()
        for name, size in (("num_classes", num_classes), ("dim", dim)):
            require(isinstance(size, int) and size >= 1, name, size, "an int of 1 or more")
        require(update in get_args(Rule), "update", update, f"one of {get_args(Rule)}")
        require(isinstance(alpha, (int, float)) and 0 <= alpha <= 1, "alpha", alpha, "a rate from 0 to 1")
        self.rule, self.alpha, self.group = update, alpha, group
        self.register_buffer("centers", torch.zeros(num_classes, dim, dtype=torch.float32))

    def updated(
        self,
        x: Tensor,  # [B, d]
        labels: Tensor,  # [B] int64 in [0, C)
    ) -> tuple[Tensor, Tensor]:  # [K] sorted classes, [K, d]
        """The batch's classes and what the rule makes of their centres, differentiable in x; the bank keeps its own.

        In a group the classes are those of all ranks, and gradients are N times those of this rank's rows, because
        the objective is the average of what N ranks back-propagate. ValueError as for `center_loss`.
        """
        check_rows(x, labels, self.centers)
        classes, place, counts = labels.unique(return_inverse=True, return_counts=True)
        apart = x.to(self.centers.dtype) - self.centers[labels]
        pull = apart.new_zeros(len(classes), apart.shape[1]).index_add(0, place, apart)  # [K, d]
        if self.group is not None:
            classes, counts, pull = sum_by_class(classes, counts, pull, self.group)
        parts = {"paper": 1 + counts, "sgd": torch.ones_like(counts), "ema": counts}[self.rule]
        return classes, self.centers[classes] + (self.alpha / parts.to(pull.dtype))[:, None] * pull

    @torch.no_grad()
    def update(
        self,
        x: Tensor,  # [B, d]
        labels: Tensor,  # [B] int64 in [0, C)
    ) -> None:
        """Moves the centres of the batch's classes; a class with a row that is not finite keeps its centre.

        In a group every rank calls it at once. ValueError as for `center_loss`.
        """
        classes, fresh = self.updated(x, labels)
        finite = fresh.isfinite().all(1, keepdim=True)
        self.centers[classes] = torch.where(finite, fresh, self.centers[classes])

    def extra_repr(self) -> str:
        num_classes, dim = self.centers.shape
        return f"num_classes={num_classes}, dim={dim}, update={self.rule}, alpha={self.alpha}"


def batch_means(
    x: Tensor,  # [B, d]
    labels: Tensor,  # [B] int64
) -> tuple[Tensor, Tensor]:  # [K] sorted classes, [K, d]
    """The batch's classes and the means of their rows, differentiable in x. ValueError for wrong shapes or dtypes."""
    check_batch(x, labels)
    x = wide(x)
    classes, place, counts = labels.unique(return_inverse=True, return_counts=True)
    total = x.new_zeros(len(classes), x.shape[1]).index_add(0, place, x)
    return classes, total / counts[:, None]


def center_loss(
    x: Tensor,  # [B, d]
    labels: Tensor,  # [B] int64 in [0, C)
    centers: Tensor,  # [C, d]
    *,
    reduction: Reduction = "mean",
) -> Tensor:
    """Half the squared distance of each row to the centre of its class: MML eq. 2 with "sum", over B with "mean".

    Only the rows' centres are read. Differentiable in x, and in centers if they need a gradient: of a leaf it is
    sparse, for plain SGD (no weight decay) or SparseAdam. Distances are in the units of the features.

    Args:
        x: rows of any floating dtype, computed in that of the centres.
        centers: float32 or float64, of all classes.
        reduction: "mean" or "sum" (a scalar; of no rows 0) or "none" ([B]).

    A row on its centre has no loss and no gradient; NaN features give a NaN loss.
    Raises ValueError for shapes, dtypes or devices that do not fit and an unknown reduction; on the CPU, where looking
    does not stall, for labels outside [0, C).
    """
    check_rows(x, labels, centers)
    apart = x.to(centers.dtype) - centers_of(centers, labels)
    return reduced(apart.square().sum(1) / 2, reduction)
