"""Exponentials kept from the forward pass: the backward pass then makes no logits, so three products and not four.

    E_ij = exp(z_ij - o) factor_j            0 at j = y_i and where there is no class; o = ln(n) / 2 for all rows
    factor_j power_j = 1 / ||w_j||           power_j a power of two, factor_j in [1, 2); both 0 for ||w_j|| < 1e-12
    rest_i = o + log sum_j exp(z_ij - o)
    expected_weight_i = exp(o - rest_i) sum_j E_ij power_j w_j
    dw_j = power_j (I - w^_j w^_j^T) (sum_i E_ij c_i x_i + factor_j * the entries)      c_i = d_rest_i exp(o - rest_i)

Entries are d_target at the row's own class and d_topk at its top-k, in float32. E does not depend on rest, so it can be
stored before rest is known: in the type of the products' operands, [B, pitch], of which the first n columns count. The
whole of 1/||w_j|| as a factor would let E over- or underflow. E, and c_i, are normal numbers of a float32's range for
||x_i|| <= 80 - o: hence only for rows whose norm the head knows to be within that. Letters: B rows, n classes, d
features.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from fastmargin.ops.problem import Problem

LARGEST_NORM = 80.0  # of x_i, plus o
MULTIPLE = 64  # of a row of E, so that each begins on 128 bytes


def offset_of(n: int) -> float:
    """o for n classes."""
    return math.log(n) / 2 if n else 0.0


def pitch_of(n: int) -> int:
    """The number of columns of E for n classes."""
    return -(-n // MULTIPLE) * MULTIPLE


def check_kept(p: Problem, keep: bool) -> None:
    """Raises ValueError where exponentials would leave the range of their type."""
    if keep and (not p.normalize_weight or p.compute_dtype == torch.float16):
        given = f"normalize_weight = {p.normalize_weight}, compute_dtype = {p.compute_dtype}"
        raise ValueError(f"keep_exponentials with {given}: want normalized weights, and bfloat16 or float32 operands")


class KeptBytes:
    """Counts the exponentials that graphs hold which are not yet backpropagated, all together at most `limit` bytes.

    In compiled code only one graph's are compared with the limit.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.held: list[tuple[StorageWeakRef, int]] = []

    def admit(self, size: int) -> bool:
        """Whether `size` bytes more are within the limit."""
        if torch.compiler.is_compiling():
            return size <= self.limit
        self.held = [(ref, bytes_held) for ref, bytes_held in self.held if not ref.expired()]
        return size + sum(bytes_held for _, bytes_held in self.held) <= self.limit

    def add(self, exponentials: Tensor) -> None:  # [B, pitch]
        """Counts them until the last graph that saved them is freed."""
        if not torch.compiler.is_compiling():
            self.held.append((StorageWeakRef(exponentials.untyped_storage()), exponentials.nbytes))

    def __getstate__(self) -> dict[str, object]:
        """Copies and pickles hold no graphs."""
        return {"limit": self.limit, "held": []}


class Keep(NamedTuple):
    """A head's wish to keep exponentials."""

    kept: KeptBytes
    max_norm: float  # of all rows of x, before they are rounded; inf where it is not known

    def admits(self, p: Problem) -> bool:
        dtype, n = p.compute_dtype or p.x.dtype, p.num_classes
        if not p.normalize_weight or dtype == torch.float16 or min(len(p.x), n) == 0:
            return False
        in_range = self.max_norm + offset_of(n) <= LARGEST_NORM
        return in_range and self.kept.admit(len(p.x) * pitch_of(n) * dtype.itemsize)
