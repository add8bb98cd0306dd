"""Everything that speaks to other ranks: N ranks hold the classes, and the rows of a batch, between them.

The objective is the average over ranks of what each back-propagates, L = 1/N sum_r L_r, as DDP and FSDP2 have it. The
owner of row i merges what every rank r makes of its classes and the row (merging.py), and

    d x_i = N sum_r d x_ir

dw then is the objective's gradient as it is. d x_i is that of the owner's L_r: the backbone's own averaging divides it
by N. What every rank holds in whole (a learnt scale, margins, a bias) has its gradient averaged.

Bytes that a rank sends or receives in a step, for B rows of d float32 features in all and k mined classes:

    labels 8 B, x 4 d B (2 d B in bfloat16), parts 8 B, top-k 12 k B; back 12 B, dx 4 d B
    8 B more where a margin looks at the whole batch, 8 k B where mined classes are sampled

All calls are torch.distributed's public ones, made in the same order on every rank, and bound by the group's timeout.
"""

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from fastmargin.distributed.layout import Group, Layout, all_gather, all_to_all_by_owner, batch_layout, reduce_scatter
from fastmargin.distributed.merge import merge_lists, merge_parts, pack_lists, shard_gradients


class GatherRows(torch.autograd.Function):
    """All ranks' rows. Forward: all-gather, in `dtype` if there is one. Backward: the sum over ranks times `factor`,
    reduce-scattered in the rows' own dtype."""

    @staticmethod
    def forward(
        ctx: Any,
        own: Tensor,  # [count, ...]
        layout: Layout,
        factor: float,
        dtype: torch.dtype | None,
    ) -> Tensor:  # [total, ...]
        ctx.layout, ctx.factor = layout, factor
        return all_gather(own if dtype is None else own.to(dtype), layout).to(own.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:  # [total, ...]
        return reduce_scatter(gradient, ctx.layout) * ctx.factor, None, None, None


def gather_rows(own: Tensor, batch: Layout, dtype: torch.dtype | None) -> Tensor:  # [b, d] -> [B, d]
    """The rows of a batch, whose gradient arises in parts of 1/N: `MergeShards`."""
    return own if batch.group is None else GatherRows.apply(own, batch, len(batch.sizes), dtype)


def gather_classes(own: Tensor, classes: Layout) -> Tensor:  # [C_local, d] -> [C, d]
    """The weights of all classes; the gradient of each is the objective's."""
    return own if classes.group is None else GatherRows.apply(own, classes, 1 / len(classes.sizes), None)


class MergeShards(torch.autograd.Function):
    """(rest, target) of own rows, from the parts that every rank made of all rows with its own classes.

    Forward: one all-to-all, 8 bytes a row in float32. Backward: one all-gather of (d_rest, d_target, rest), 12 bytes.
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


def merge_shards(
    rest: Tensor,  # [B]
    target: Tensor,  # [B]
    values: Tensor,  # [B, k]
    classes: Tensor,  # [B, k] int64 class ids
    batch: Layout,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # [b], [b], [b, k], [b, k]
    """Own rows over all classes, from all rows over own classes. The k best have no gradient."""
    if batch.group is None:
        return rest, target, values, classes
    return *MergeShards.apply(rest, target, batch), *merge_topk(values.detach(), classes, batch)


def merge_topk(
    values: Tensor,  # [B, k]
    classes: Tensor,  # [B, k] int64 class ids
    layout: Layout,
) -> tuple[Tensor, Tensor]:  # [b, k], [b, k]
    """The k best of all ranks for own rows, ties by the smaller id. One all-to-all, 12 k bytes a row in float32."""
    k = values.shape[1]
    if k == 0:
        return layout.local_slice(values), layout.local_slice(classes)
    return merge_lists(all_to_all_by_owner(pack_lists(values, classes), layout), k, values.dtype)


class OwnClasses(torch.autograd.Function):
    """A whole [C] parameter's entries of the classes held here. Its gradient is dense, and N times the objective's, of
    which the other ranks have the rest: their average is the objective's. Nothing travels but for that."""

    @staticmethod
    def forward(ctx: Any, whole: Tensor, layout: Layout) -> Tensor:  # [C] -> [C_local]
        ctx.layout = layout
        return layout.local_slice(whole).clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # [C_local], perhaps sparse
        layout = ctx.layout
        own = gradient.to_dense() * len(layout.sizes)
        return F.pad(own, (layout.start, layout.total - layout.stop)), None


def average_gradients(parameters: Iterable[nn.Parameter], group: Group | None) -> None:
    """From now on their gradients are averaged over the group as they arise: 4 bytes a number. Twice is as once."""
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


def reshard(own: Tensor, old: Layout, new: Layout) -> Tensor:  # [old.count, d] -> [at most new.count, d]
    """What of `old` belongs here by `new`. One all-to-all: a row travels if it changes its rank."""
    if old.group is None:
        return own

    def ends(layout: Layout) -> list[tuple[int, int]]:
        stops = torch.tensor(layout.sizes).cumsum(0).tolist()
        return [(stop - size, stop) for stop, size in zip(stops, layout.sizes, strict=True)]

    def common(one: tuple[int, int], others: list[tuple[int, int]]) -> list[int]:
        return [max(0, min(one[1], stop) - max(one[0], start)) for start, stop in others]

    sent, received = common(ends(old)[old.rank], ends(new)), common(ends(new)[new.rank], ends(old))
    out = own.new_empty(sum(received), *own.shape[1:])
    dist.all_to_all_single(out, own.contiguous(), received, sent, group=old.group)
    return out


def sum_by_class(
    classes: Tensor,  # [K] without repeats
    counts: Tensor,  # [K]
    sums: Tensor,  # [K, d]
    group: Group,
) -> tuple[Tensor, Tensor, Tensor]:  # [K'] sorted classes of all ranks, [K'] counts, [K', d] sums
    """Counts and sums by class over all ranks, added in the order of the ranks: equal on all of them, bit for bit.

    16 bytes and the sums a class. The objective is the average of what the ranks back-propagate: the gradient of this
    rank's sums is N times theirs.
    """
    layout, _ = batch_layout(classes, group)
    merged, place = layout.gather(classes).unique(return_inverse=True)
    many, total = counts.new_zeros(len(merged)), sums.new_zeros(len(merged), sums.shape[1])
    parts = (layout.gather(t).split(layout.sizes) for t in (counts, sums))
    for at, count, part in zip(place.split(layout.sizes), *parts, strict=True):
        many.index_add_(0, at, count)
        total.index_add_(0, at, part)
    return merged, many, total.index_add(0, layout.local_slice(place), sums - sums.detach(), alpha=len(layout.sizes))


@torch.no_grad()
def global_grad_norm(
    sharded: nn.Parameter,  # another part of it on each rank
    others: Iterable[nn.Parameter],  # the same on every rank, or DTensors
    group: Group | None,
) -> Tensor:  # []
    """The 2-norm of all gradients together. One all-reduce of a number, and what DTensors do for theirs."""
    own = sharded.new_zeros(0) if sharded.grad is None else sharded.grad
    own = own.coalesce().values() if own.is_sparse else own
    square = own.norm().square()
    if group is not None:
        dist.all_reduce(square, group=group)
    gradients = [p.grad for p in others if p.grad is not None]
    for here in (True, False):  # DTensors do not mix with others
        norm: Any = nn.utils.get_total_norm([g for g in gradients if hasattr(g, "full_tensor") == here])
        square = square + (norm.full_tensor() if hasattr(norm, "full_tensor") else norm).to(square).square()
    return square.sqrt()
