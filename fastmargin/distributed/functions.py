"""The autograd Functions and reductions that communicate. Classes and batch rows are sharded over N ranks.

The objective is the average over ranks of the losses that they back-propagate, L = 1/N sum_r L_r, as in DDP and FSDP2.
Where the factors N and 1/N are:

    L_r       N times this rank's share of the mean (MarginHead._reduce)
    d rest    divided by N: MergeShards.backward, by merge.shard_gradients
    dw        then is the gradient of the objective, on the rank that holds the class
    dx        times N: GatherRows.backward. It is the gradient of L_r, which the backbone's DDP divides by N
    others    parameters that every rank holds in full (learned scale, margins, bias): averaged over the ranks

Bytes that a rank sends or receives in a step for each row of all ranks' batches (d float32 features, k of top-k):

    forward   labels 8, x 4 d (2 d in bfloat16), rest and target 8, top-k 12 k;  8 more where a margin needs the whole
              batch, 8 k where hard classes are passed to a head that samples
    backward  d_rest, d_target and rest 12, dx 4 d

and 16 a rank where batch sizes are exchanged, 4 for each number of `others`.

All calls are public ones of torch.distributed, made in the same order on every rank, and end by the group's timeout.
"""

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from fastmargin.distributed.layout import Group, Layout, all_gather, all_to_all_by_owner, batch_layout, reduce_scatter
from fastmargin.distributed.merge import merge_lists, merge_parts, pack_lists, shard_gradients
from fastmargin.ops.common import once_differentiable, rows_of
from fastmargin.ops.problem import LSEOutput


class GatherRows(torch.autograd.Function):
    """The rows of all ranks. Forward: all-gather, cast to `dtype` if it is given. Backward: reduce-scatter of the sum
    over ranks, in the dtype of the rows, times `factor`."""

    @staticmethod
    def forward(
        ctx: Any,
        local: Tensor,  # [count, ...]
        layout: Layout,
        factor: float,
        dtype: torch.dtype | None,
    ) -> Tensor:  # [total, ...]
        ctx.layout, ctx.factor = layout, factor
        return all_gather(local if dtype is None else local.to(dtype), layout).to(local.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:  # [total, ...]
        return reduce_scatter(gradient, ctx.layout) * ctx.factor, None, None, None


def gather_rows(local: Tensor, batch: Layout, dtype: torch.dtype | None) -> Tensor:  # [b, d] -> [B, d]
    """The rows of a batch. Times N in backward: the gradient is pre-divided by N, see MergeShards."""
    return local if batch.group is None else GatherRows.apply(local, batch, len(batch.sizes), dtype)


def gather_classes(local: Tensor, classes: Layout) -> Tensor:  # [C_local, d] -> [C, d]
    """The weights of all classes. Averaged over ranks in backward, which makes it the gradient of the objective."""
    return local if classes.group is None else GatherRows.apply(local, classes, 1 / len(classes.sizes), None)


class MergeShards(torch.autograd.Function):
    """(rest, target) of this rank's rows over all classes, from those of all rows over each rank's classes.

    Forward: one all-to-all, 8 bytes a row in float32. Backward: one all-gather of (d_rest, d_target, rest), 12 bytes;
    its gradients are divided by N, as the objective is the average over ranks.
    """

    @staticmethod
    def forward(
        ctx: Any,
        rest: Tensor,  # [B]
        target: Tensor,  # [B]
        layout: Layout,
    ) -> tuple[Tensor, Tensor]:  # [b], [b]
        merged, total = merge_parts(all_to_all_by_owner(torch.stack((rest, target), 1), layout))
        ctx.save_for_backward(rest, merged)
        ctx.layout = layout
        return merged, total

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any,
        d_rest: Tensor,  # [b]
        d_target: Tensor,  # [b]
    ) -> tuple[Tensor, Tensor, None]:  # [B], [B]
        rest, merged = ctx.saved_tensors
        d_rest, d_target, merged = all_gather(torch.stack((d_rest, d_target, merged), 1), ctx.layout).unbind(1)
        return *shard_gradients(rest, merged, d_rest, d_target, len(ctx.layout.sizes)), None


def merge_shards(shard: LSEOutput, batch: Layout) -> LSEOutput:  # of B rows -> of b rows
    """This rank's rows over all classes, from all rows over this rank's classes. The k best have no gradient."""
    rest, target = MergeShards.apply(shard.rest, shard.target, batch)
    values, classes = merge_topk(shard.topk_values.detach(), shard.topk_classes, batch)
    return LSEOutput(rest, target, values, classes)


def merge_topk(
    values: Tensor,  # [B, k]
    classes: Tensor,  # [B, k] int64 class ids
    layout: Layout,
) -> tuple[Tensor, Tensor]:  # [b, k], [b, k]
    """The k best of all ranks for this rank's rows; of equal values the smaller id. One all-to-all, 12 k bytes a row in
    float32."""
    k = values.shape[1]
    if k == 0:
        return layout.local_slice(values), layout.local_slice(classes)
    return merge_lists(all_to_all_by_owner(pack_lists(values, classes), layout), k, values.dtype)


class LocalEntries(torch.autograd.Function):
    """This rank's classes of a [C] parameter that every rank holds in full. No communication in forward.

    The gradient is dense, 0 at the classes of other ranks, and times N, so that `average_gradients` over the ranks
    makes it the gradient of the objective.
    """

    @staticmethod
    def forward(ctx: Any, whole: Tensor, layout: Layout) -> Tensor:  # [C] -> [C_local]
        ctx.layout = layout
        return layout.local_slice(whole).clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # [C_local], perhaps sparse
        layout = ctx.layout
        local = to_dense(gradient) * len(layout.sizes)
        return F.pad(local, (layout.start, layout.total - layout.stop)), None


def to_dense(gradient: Tensor) -> Tensor:  # [C_local], perhaps sparse
    """As torch's, which torch 2.11 cannot trace; the sum of a class does not depend on an order of atomics."""
    if not gradient.is_sparse:
        return gradient
    ids, rows = rows_of(gradient)
    return rows.new_zeros(gradient.shape).index_add_(0, ids.clamp(min=0), rows)


def average_gradients(parameters: Iterable[nn.Parameter], group: Group | None) -> None:
    """Hooks that average each parameter's gradient over the group: an all-reduce of 4 bytes a number. Idempotent."""
    if group is None:
        return
    for parameter in parameters:
        if parameter.requires_grad and getattr(parameter, "_averaged_over", None) is not group:
            parameter._averaged_over = group  # type: ignore[attr-defined]
            parameter.register_hook(lambda gradient: averaged(gradient, group))


def averaged(gradient: Tensor, group: Group) -> Tensor:
    total = gradient.clone(memory_format=torch.contiguous_format)  # a hook may not change what it is given
    dist.all_reduce(total, group=group)
    return total / group.size()


def reshard(local: Tensor, old: Layout, new: Layout) -> Tensor:  # [old.count, d] -> [at most new.count, d]
    """The rows of `old` that this rank holds in `new`. One all-to-all: only rows that change their rank are sent."""
    if old.group is None:
        return local

    def ranges(layout: Layout) -> list[tuple[int, int]]:  # of each rank, [start, stop)
        stops = torch.tensor(layout.sizes).cumsum(0).tolist()
        return [(stop - size, stop) for stop, size in zip(stops, layout.sizes, strict=True)]

    def overlaps(one: tuple[int, int], others: list[tuple[int, int]]) -> list[int]:  # sizes
        return [max(0, min(one[1], stop) - max(one[0], start)) for start, stop in others]

    sent = overlaps(ranges(old)[old.rank], ranges(new))
    received = overlaps(ranges(new)[new.rank], ranges(old))
    out = local.new_empty(sum(received), *local.shape[1:])
    dist.all_to_all_single(out, local.contiguous(), received, sent, group=old.group)
    return out


def sum_by_class(
    classes: Tensor,  # [K] without repeats
    counts: Tensor,  # [K]
    sums: Tensor,  # [K, d]
    group: Group,
) -> tuple[Tensor, Tensor, Tensor]:  # [K'] sorted classes of all ranks, [K'] counts, [K', d] sums
    """Counts and sums by class over all ranks, added in the order of ranks: equal on all of them, bit for bit.

    Gathers 16 bytes and a sum for each class of each rank. The gradient goes to this rank's sums only, times N:
    the objective is the average of the losses that the ranks back-propagate.
    """
    layout, _ = batch_layout(classes, group)
    merged, inverse = layout.gather(classes).unique(return_inverse=True)
    all_counts, total = counts.new_zeros(len(merged)), sums.new_zeros(len(merged), sums.shape[1])
    parts = (layout.gather(t).split(layout.sizes) for t in (counts, sums))
    for index, count, part in zip(inverse.split(layout.sizes), *parts, strict=True):
        all_counts.index_add_(0, index, count)
        total.index_add_(0, index, part)
    difference = sums - sums.detach()  # 0, with the gradient of sums
    total = total.index_add(0, layout.local_slice(inverse), difference, alpha=len(layout.sizes))
    return merged, all_counts, total


@torch.no_grad()
def global_grad_norm(
    sharded: nn.Parameter,  # each rank holds a part of it
    others: Iterable[nn.Parameter],  # replicated on every rank, or DTensors
    group: Group | None,
) -> Tensor:  # []
    """The 2-norm of all gradients together. One all-reduce of a number, and the communication of DTensors' norms."""
    grad = sharded.new_zeros(0) if sharded.grad is None else sharded.grad
    grad = rows_of(grad)[1] if grad.is_sparse else grad
    square = grad.norm().square()
    if group is not None:
        dist.all_reduce(square, group=group)
    gradients = [p.grad for p in others if p.grad is not None]
    for sharded_ones in (True, False):  # get_total_norm takes DTensors or tensors, not both
        norm: Any = nn.utils.get_total_norm([g for g in gradients if hasattr(g, "full_tensor") == sharded_ones])
        square = square + (norm.full_tensor() if hasattr(norm, "full_tensor") else norm).to(square).square()
    return square.sqrt()
