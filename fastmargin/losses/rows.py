"""Helpers of the losses: the checks of a batch, the centers of its classes, unit rows, the reduction.

Letters: B rows, C classes, K of them in the batch, d features.
"""

from typing import Literal, TypeAlias

import torch.nn.functional as F
from torch import Tensor

from fastmargin.ops.checks import DTYPES, check_int64, check_label_range, check_one_device
from fastmargin.require import require

Reduction: TypeAlias = Literal["mean", "sum", "none"]


def check_batch(
    x: Tensor,  # [B, d]
    labels: Tensor,  # [B]
) -> None:
    """ValueError unless x is floating [B, d] and labels int64 [B], on one device. Values are not read."""
    for name, given in (("x", x), ("labels", labels)):
        require(isinstance(given, Tensor), name, type(given).__name__, "a tensor")
    if x.ndim != 2 or x.shape[1] == 0 or not x.is_floating_point():
        raise ValueError(f"want floating x [B, d], d above 0; got {x.dtype} {[*x.shape]}")
    check_int64("labels", labels, len(x))
    check_one_device({"x": x, "labels": labels})


def check_centers(
    centers: Tensor,  # [C, d]
    labels: Tensor | None,  # [B]
) -> None:
    """ValueError unless centers are float32 or float64 [C, d] and labels int64 [B], on the CPU in [0, C)."""
    require(isinstance(centers, Tensor), "centers", type(centers).__name__, "a tensor")
    if centers.ndim != 2 or centers.shape[1] == 0 or centers.dtype not in DTYPES:
        raise ValueError(f"want float32 or float64 centers [C, d], d above 0; got {centers.dtype} {[*centers.shape]}")
    if labels is None:
        return
    require(isinstance(labels, Tensor), "labels", type(labels).__name__, "a tensor")
    check_int64("labels", labels, None)
    check_one_device({"centers": centers, "labels": labels})
    check_label_range(labels, 0, len(centers))


def check_rows(
    x: Tensor,  # [B, d]
    labels: Tensor,  # [B]
    centers: Tensor,  # [C, d]
) -> None:
    check_batch(x, labels)
    check_centers(centers, labels)
    if x.shape[1] != centers.shape[1]:
        raise ValueError(f"x {[*x.shape]} and centers {[*centers.shape]} differ in their features")


def centers_of(
    centers: Tensor,  # [C, d]
    classes: Tensor,  # [n]
) -> Tensor:  # [n, d]
    """Rows of the centers. The gradient of a leaf tensor is sparse COO, of these rows: never C x d numbers."""
    return F.embedding(classes, centers, sparse=centers.is_leaf)


def wide(x: Tensor) -> Tensor:  # [B, d]
    """Half precisions cast to float32; float32 and float64 as they are."""
    return x if x.dtype in DTYPES else x.float()


def reduced(rows: Tensor, reduction: Reduction) -> Tensor:  # [n] -> [] or [n]; the mean of no rows is 0
    require(reduction in ("mean", "sum", "none"), "reduction", reduction, "'mean', 'sum' or 'none'")
    if reduction == "none":
        return rows
    return rows.sum() / (max(1, len(rows)) if reduction == "mean" else 1)
