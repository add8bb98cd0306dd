"""Merging the results of N ranks, each of all rows over its own classes. Pure functions; no communication.

    rest_i    = log sum_r exp(rest_ir)                  target_i    = sum_r target_ir
    d rest_ir = 1/N exp(rest_ir - rest_i) d rest_i      d target_ir = 1/N d target_i      0 where rest_ir = -inf

for the objective L = 1/N sum_r L_r; d v stands for dL/dv. Letters: N ranks, B rows of all ranks, b of this one, k
nearest classes.
"""

import torch
from torch import Tensor

from fastmargin.ops.common import stable_topk


def merge_parts(parts: Tensor) -> tuple[Tensor, Tensor]:  # [N, b, 2] -> [b], [b]
    """rest and target over all classes, from those of each rank."""
    rests, targets = parts.unbind(2)
    return rests.logsumexp(0), targets.sum(0)


def shard_gradients(
    rest: Tensor,  # [B] over this rank's classes
    merged: Tensor,  # [B] over all classes
    d_rest: Tensor,  # [B] of the merged rest
    d_target: Tensor,  # [B]
    ranks: int,
) -> tuple[Tensor, Tensor]:  # [B], [B]
    """The gradients of this rank's rest and target."""
    share = torch.where(rest == -torch.inf, 0.0, (rest - merged).exp())
    return d_rest * share / ranks, d_target / ranks


def pack_lists(values: Tensor, classes: Tensor) -> Tensor:  # [B, k], [B, k] int64 -> [B, 3 k] int32 (4 k of float64)
    return torch.cat([t.contiguous().view(torch.int32) for t in (values, classes)], 1)


def merge_lists(
    lists: Tensor,  # [N, b, 3 k] int32, ranks in the order of their classes: `stable_topk` needs ascending ids
    k: int,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:  # [b, k], [b, k]
    parts = lists.transpose(0, 1).split((lists.shape[2] - 2 * k, 2 * k), 2)
    values, classes = (part.clone(memory_format=torch.contiguous_format) for part in parts)
    return stable_topk(values.view(dtype).flatten(1), classes.view(torch.int64).flatten(1), k)
