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

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Self, TypeAlias, TypeVar

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from fastmargin.merging import merge_lists, merge_parts, pack_lists, shard_gradients

Group: TypeAlias = dist.ProcessGroup
T = TypeVar("T")


@dataclass(frozen=True)
class Layout:
    """How classes, or the rows of a batch, lie over the ranks of a group: in one order, sizes[r] of them on rank r.

    Without a group there is one rank, which has them all.
    """

    group: Group | None
    sizes: tuple[int, ...]

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self  # a group cannot be copied

    @property
    def rank(self) -> int:
        return 0 if self.group is None else self.group.rank()

    @property
    def total(self) -> int:
        return sum(self.sizes)

    @property
    def count(self) -> int:
        return self.sizes[self.rank]

    @property
    def start(self) -> int:
        return sum(self.sizes[: self.rank])

    @property
    def stop(self) -> int:
        return self.start + self.count

    def own(self, everyones: Tensor) -> Tensor:  # [total, ...] -> [count, ...]
        return everyones if self.group is None else everyones[self.start : self.stop]

    def gather(self, own: Tensor) -> Tensor:  # [count, ...] -> [total, ...], without a gradient
        return own if self.group is None else all_gather(own.detach(), self)

    def place(self, ids: Tensor) -> Tensor:  # [n] -> [n]
        """Where each is among those of this rank; -1 where it is another's, or no one's."""
        return torch.where((ids >= self.start) & (ids < self.stop), ids - self.start, -1)

    def put(self, everyones: Tensor, own: Tensor) -> Tensor:  # [total, ...], [count, ...] -> [total, ...]
        """Everyone's, but for the own ones: so that these may have a gradient."""
        return torch.cat((everyones[: self.start], own, everyones[self.stop :]))

    def place_and_rank(self, index: Tensor) -> tuple[Tensor, Tensor]:  # [n] -> [n], [n]
        if len(set(self.sizes)) == 1:
            return index % self.sizes[0], index // self.sizes[0]
        stops = torch.tensor(self.sizes, device=index.device).cumsum(0)
        ranks = torch.bucketize(index, stops, right=True)
        return index - F.pad(stops, (1, 0))[ranks], ranks


def chunks(total: int, group: Group | None) -> Layout:
    """DTensor's rule: rank r has [r n, (r + 1) n) with n = ceil(total / N), as far as there are so many."""
    ranks = 1 if group is None else group.size()
    n = -(-total // ranks)
    return Layout(group, tuple(min(total, (r + 1) * n) - min(total, r * n) for r in range(ranks)))


def spread(
    rows: Tensor,  # [b, ...]
    group: Group | None,
    *,
    uneven: bool = True,
    look: bool = True,
) -> tuple[Layout, Tensor]:  # and the rows
    """The layout of the batch that every rank brings its rows to.

    uneven or look: the ranks tell each other b, 16 bytes each, which on a GPU waits for the device. Unless uneven, a
    difference is a ValueError on every rank; without a look it goes unseen, until the collectives fail or time out.
    Rows that want no gradient while another rank's do are returned as such that do: all take part in its collective.
    """
    if group is None:
        return Layout(None, (len(rows),)), rows
    if not (uneven or look):
        return Layout(group, (len(rows),) * group.size()), rows
    mine = torch.tensor([[len(rows), rows.requires_grad]], device=rows.device)
    sizes, wanted = zip(*all_gather(mine, chunks(group.size(), group)).tolist(), strict=True)
    if not uneven and len(set(sizes)) > 1:
        raise ValueError(f"the ranks' batches have {[*sizes]} rows: want as many on each, or a head with uneven=True")
    if any(wanted) and not rows.requires_grad:
        rows = rows.detach().requires_grad_()
    return Layout(group, sizes), rows


def check_group(group: Group | None, options: Mapping[str, Any]) -> None:
    """Raises ValueError for a group that is not of all processes and, on every rank, for options that differ."""
    if group is None:
        return
    if not isinstance(group, Group):
        raise ValueError(f"group is {group!r}: want a ProcessGroup, such as torch.distributed.group.WORLD, or None")
    if group.size() != dist.get_world_size():
        raise ValueError(
            f"the group has {group.size()} of {dist.get_world_size()} processes: want one of all, as shards have no "
            "replicas"
        )
    everyones = gather_objects(dict(options), group)
    for rank, theirs in enumerate(everyones):
        for name, value in theirs.items():
            if value != everyones[0][name]:
                raise ValueError(
                    f"{name} is {everyones[0][name]!r} on rank 0, {value!r} on rank {rank}: want one value"
                )


def gather_objects(own: Any, group: Group | None) -> list[Any]:
    """What every rank brings, in their order: small, and picklable."""
    if group is None:
        return [own]
    everyones: list[Any] = [None] * group.size()
    dist.all_gather_object(everyones, own, group=group)
    return everyones


def together(action: Callable[[], T], group: Group | None) -> list[T]:
    """What action() returns on every rank. Where it fails on one, all raise, and say which: OSError, ValueError as
    there, RuntimeError for any other."""
    if group is None:
        return [action()]
    result, error = None, None
    try:
        result = action()
    except Exception as caught:
        error = caught
    kind = next((kind for kind in (OSError, ValueError) if isinstance(error, kind)), RuntimeError)
    everyones = gather_objects((result, error and (kind, f"{error}")), group)
    failures = [(rank, *failure) for rank, (_, failure) in enumerate(everyones) if failure]
    if failures:
        raise failures[0][1]("; ".join(f"rank {rank}: {said}" for rank, _, said in failures)) from error
    return [result for result, _ in everyones]


def is_replica(group: Group | None) -> bool:
    """Whether other processes run that may hold the same: there are some, and no group shares its classes with them."""
    return group is None and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


# Collectives by first dimension. Gloo and NCCL know them in equal parts: where sizes differ, the smaller are padded.

all_gather_single: Any = getattr(dist, "all_gather_single", getattr(dist, "all_gather_into_tensor", None))
reduce_scatter_single: Any = getattr(dist, "reduce_scatter_single", getattr(dist, "reduce_scatter_tensor", None))


@torch.compiler.disable
def all_gather(own: Tensor, layout: Layout) -> Tensor:  # [count, ...] -> [total, ...]
    n = max(layout.sizes)
    parts = own.new_empty(len(layout.sizes), n, *own.shape[1:])
    all_gather_single(parts.flatten(0, 1), padded(own, n), group=layout.group)
    if len(set(layout.sizes)) == 1:
        return parts.flatten(0, 1)
    return torch.cat([part[:size] for part, size in zip(parts, layout.sizes, strict=True)])


@torch.compiler.disable
def reduce_scatter(everyones: Tensor, layout: Layout) -> Tensor:  # [total, ...] -> [count, ...], summed over ranks
    n = max(layout.sizes)
    if len(set(layout.sizes)) > 1:
        everyones = torch.cat([padded(part, n) for part in everyones.split(layout.sizes)])
    own = everyones.new_empty(n, *everyones.shape[1:])
    reduce_scatter_single(own, everyones.contiguous(), group=layout.group)
    return own[: layout.count]


@torch.compiler.disable
def to_owners(everyones: Tensor, layout: Layout) -> Tensor:  # [total, m] -> [N, count, m], one part from each rank
    parts = everyones.new_empty(len(layout.sizes), layout.count, everyones.shape[1])
    received = [layout.count] * len(layout.sizes)
    dist.all_to_all_single(parts.flatten(0, 1), everyones.contiguous(), received, [*layout.sizes], group=layout.group)
    return parts


def padded(rows: Tensor, n: int) -> Tensor:  # [m, ...] -> [n, ...]
    return torch.cat((rows, rows.new_zeros(n - len(rows), *rows.shape[1:]))) if len(rows) < n else rows.contiguous()


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
        merged, total = merge_parts(to_owners(torch.stack((rest, target), 1), layout))
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
        return layout.own(values), layout.own(classes)
    return merge_lists(to_owners(pack_lists(values, classes), layout), k, values.dtype)


class OwnClasses(torch.autograd.Function):
    """A whole [C] parameter's entries of the classes held here. Its gradient is dense, and N times the objective's, of
    which the other ranks have the rest: their average is the objective's. Nothing travels but for that."""

    @staticmethod
    def forward(ctx: Any, whole: Tensor, layout: Layout) -> Tensor:  # [C] -> [C_local]
        ctx.layout = layout
        return layout.own(whole).clone()

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
    layout, _ = spread(classes, group)
    merged, place = layout.gather(classes).unique(return_inverse=True)
    many, total = counts.new_zeros(len(merged)), sums.new_zeros(len(merged), sums.shape[1])
    parts = (layout.gather(t).split(layout.sizes) for t in (counts, sums))
    for at, count, part in zip(place.split(layout.sizes), *parts, strict=True):
        many.index_add_(0, at, count)
        total.index_add_(0, at, part)
    return merged, many, total.index_add(0, layout.own(place), sums - sums.detach(), alpha=len(layout.sizes))


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
