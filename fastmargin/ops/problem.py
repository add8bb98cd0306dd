"""What an implementation of nontarget_lse is given, and what it returns, in the forward and in the backward pass.

Letters: B rows, C classes, n of them selected, d features, k nearest classes.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Problem(NamedTuple):
    """The logits z [B, n] that are never stored. Fields: as the arguments of `nontarget_lse`."""

    x: Tensor  # [B, d]
    w: Tensor  # [C, d]
    y: Tensor  # [B] int64, class indices: in class_ids where there are some, else in w; -1: none of these classes
    bias: Tensor | None = None  # [C]
    class_ids: Tensor | None = None  # [n] int64, sorted
    normalize_weight: bool = True
    compute_dtype: torch.dtype | None = None
    bend: Tensor | None = None  # [B, 4] of rules that bend negatives; reserved
    pool: int = 1  # sub-centers of a class; reserved

    @property
    def device(self) -> torch.device:
        return self.x.device

    @property
    def num_classes(self) -> int:
        """n"""
        return len(self.w if self.class_ids is None else self.class_ids)

    def check_reserved(self) -> None:
        """Raises ValueError for what no portable backend computes."""
        if self.bend is not None:
            raise ValueError("bend (rules that bend negatives) is not supported by this backend")
        if self.pool != 1:
            raise ValueError(f"pool = {self.pool} (sub-centers) is not supported by this backend; want 1")


class BackwardInput(NamedTuple):
    """What the forward pass saved, and the gradients of its results."""

    rest: Tensor  # [B]
    topk_classes: Tensor  # [B, k]
    expected_weight: Tensor  # [B, d]; [0] without dx, and where the backward pass sums it
    exponentials: Tensor  # [B, pitch], see exponentials.py; [0] where none are kept
    d_rest: Tensor  # [B]
    d_target: Tensor  # [B]
    d_topk: Tensor | None  # [B, k]


class ForwardOutput(NamedTuple):
    rest: Tensor  # [B]
    topk_values: Tensor  # [B, k]
    topk_classes: Tensor  # [B, k] class indices
    expected_weight: Tensor  # [B, d]; [0] where it is not needed, or summed in the backward pass
    exponentials: Tensor  # [B, pitch], see exponentials.py; [0] where none are kept


class Gradients(NamedTuple):
    """Each [0] where it is not needed."""

    dx: Tensor  # [B, d]
    dw: Tensor  # [n, d]
    db: Tensor  # [n]


class LSEOutput(NamedTuple):
    """What `nontarget_lse` returns."""

    rest: Tensor  # [B]
    target: Tensor  # [B]
    topk_values: Tensor  # [B, k]
    topk_classes: Tensor  # [B, k] int64
