"""Which rank holds which classes or rows, and the collectives on tensors that are sharded so."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Self, TypeAlias

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

Group: TypeAlias = dist.ProcessGroup


@dataclass(frozen=True)
class Layout:
    """How classes, or the rows of a batch, are sharded over ranks: in order, sizes[r] of them on rank r.

    group: of the ranks. Without one there is one rank, which has all of them, and no call communicates.
    rank: this one.
    """

    group: Group | None
    sizes: tuple[int, ...]
    rank: int = 0

    @classmethod
    def of(cls, group: Group | None, sizes: Iterable[int]) -> Self:
        return cls(group, tuple(sizes), 0 if group is None else group.rank())

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self  # a group cannot be copied

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

    def local_slice(self, all_ranks: Tensor) -> Tensor:  # [total, ...] -> [count, ...]
        return all_ranks if len(self.sizes) == 1 else all_ranks[self.start : self.stop]

    def gather(self, local: Tensor) -> Tensor:  # [count, ...] -> [total, ...], without a gradient
        return local if self.group is None else all_gather(local.detach(), self)

    def local_index(self, ids: Tensor) -> Tensor:  # [n] global ids -> [n]
        """The position of each among those of this rank; -1 for those of other ranks, and for -1."""
        return torch.where((ids >= self.start) & (ids < self.stop), ids - self.start, -1)

    def global_id(self, local: Tensor) -> Tensor:  # local indices of any shape, -1: none -> the same
        return torch.where(local < 0, -1, local + self.start)

    def splice_local(self, all_ranks: Tensor, local: Tensor) -> Tensor:  # [total, ...], [count, ...] -> [total, ...]
        """`all_ranks` with this rank's part replaced by `local`, through which gradients then flow."""
        return torch.cat((all_ranks[: self.start], local, all_ranks[self.stop :]))

    def local_index_and_rank(self, index: Tensor) -> tuple[Tensor, Tensor]:  # [n] in [0, total) -> [n], [n]
        """Where each lies: its position on its rank, and that rank."""
        if len(set(self.sizes)) == 1:
            return index % self.sizes[0], index // self.sizes[0]
        stops = torch.tensor(self.sizes, device=index.device).cumsum(0)
        ranks = torch.bucketize(index, stops, right=True)
        return index - F.pad(stops, (1, 0))[ranks], ranks


def chunks(total: int, group: Group | None) -> Layout:
    """DTensor's rule, see `chunk_sizes`."""
    return Layout.of(group, chunk_sizes(total, 1 if group is None else group.size()))


def chunk_sizes(total: int, ranks: int) -> tuple[int, ...]:
    """Rank r has [r n, (r + 1) n) with n = ceil(total / ranks), cut off at `total`."""
    n = -(-total // ranks)
    return tuple(min(total, (r + 1) * n) - min(total, r * n) for r in range(ranks))


def batch_layout(
    rows: Tensor,  # [b, ...]
    group: Group | None,
    *,
    uneven: bool = True,
    may_sync: bool = True,
) -> tuple[Layout, Tensor]:  # and the rows
    """The layout of the batch that the rows of all ranks make.

    If `uneven` or `may_sync`, the ranks exchange their row counts, a host sync on a GPU; if not `uneven`, different
    counts then raise ValueError on every rank. Without the exchange all are taken to be equal: if they are not, the
    collectives fail or time out. With it, rows that require a gradient on any rank are returned so on every rank, since
    all must join the backward collective.
    """
    if group is None:
        return Layout.of(None, [len(rows)]), rows
    if not (uneven or may_sync):
        return Layout.of(group, [len(rows)] * group.size()), rows
    mine = torch.tensor([[len(rows), rows.requires_grad]], device=rows.device)
    sizes, require_grad = zip(*all_gather(mine, chunks(group.size(), group)).tolist(), strict=True)
    if not uneven and len(set(sizes)) > 1:
        raise ValueError(
            f"the ranks' batches have {[*sizes]} rows: want the same number on every rank, or a head with uneven=True"
        )
    if any(require_grad) and not rows.requires_grad:
        rows = rows.detach().requires_grad_()
    return Layout.of(group, sizes), rows


# Collectives along the first dimension. Gloo and NCCL need equal parts: where sizes differ, the smaller are padded.
# The names of newer torch, or of older.
all_gather_single: Any = getattr(dist, "all_gather_single", getattr(dist, "all_gather_into_tensor", None))
reduce_scatter_single: Any = getattr(dist, "reduce_scatter_single", getattr(dist, "reduce_scatter_tensor", None))


@torch.compiler.disable
def all_gather(local: Tensor, layout: Layout) -> Tensor:  # [count, ...] -> [total, ...]
    n = max(layout.sizes)
    parts = local.new_empty(len(layout.sizes), n, *local.shape[1:])
    all_gather_single(parts.flatten(0, 1), padded(local, n), group=layout.group)
    if len(set(layout.sizes)) == 1:
        return parts.flatten(0, 1)
    return torch.cat([part[:size] for part, size in zip(parts, layout.sizes, strict=True)])


@torch.compiler.disable
def reduce_scatter(all_ranks: Tensor, layout: Layout) -> Tensor:  # [total, ...] -> [count, ...], summed over ranks
    n = max(layout.sizes)
    if len(set(layout.sizes)) > 1:
        all_ranks = torch.cat([padded(part, n) for part in all_ranks.split(layout.sizes)])
    local = all_ranks.new_empty(n, *all_ranks.shape[1:])
    reduce_scatter_single(local, all_ranks.contiguous(), group=layout.group)
    return local[: layout.count]


@torch.compiler.disable
def all_to_all_by_owner(all_ranks: Tensor, layout: Layout) -> Tensor:  # [total, m] -> [N, count, m]
    """Sends each row to the rank that owns it: the result has one part from each rank."""
    parts = all_ranks.new_empty(len(layout.sizes), layout.count, all_ranks.shape[1])
    received = [layout.count] * len(layout.sizes)
    dist.all_to_all_single(parts.flatten(0, 1), all_ranks.contiguous(), received, [*layout.sizes], group=layout.group)
    return parts


def padded(rows: Tensor, n: int) -> Tensor:  # [m, ...] -> [n, ...]
    return torch.cat((rows, rows.new_zeros(n - len(rows), *rows.shape[1:]))) if len(rows) < n else rows.contiguous()
