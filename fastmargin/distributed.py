"""The collectives. The only home of torch.distributed beside the driver.

Letters: N ranks, K classes of one rank's batch, d features.
"""

import torch
import torch.distributed as dist
from torch import Tensor


def gather_ragged(rows: Tensor, group: "dist.ProcessGroup") -> list[Tensor]:  # [n, ...] -> N of [n_r, ...]
    """Every rank's rows, in the order of the ranks; n may differ between them. No gradient.

    Two all-gathers: the numbers of rows (a host sync), and the rows, padded to the longest.
    """
    rows = rows.detach()
    n = torch.tensor([len(rows)], device=rows.device)
    counts = [torch.empty_like(n) for _ in range(dist.get_world_size(group))]
    dist.all_gather(counts, n, group=group)
    sizes = [int(count) for count in counts]
    padded = torch.cat([rows, rows.new_zeros(max(sizes) - len(rows), *rows.shape[1:])])
    gathered = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(gathered, padded, group=group)
    return [part[:size] for part, size in zip(gathered, sizes, strict=True)]


def sum_by_class(
    classes: Tensor,  # [K] without repeats
    counts: Tensor,  # [K]
    sums: Tensor,  # [K, d]
    group: "dist.ProcessGroup",
) -> tuple[Tensor, Tensor, Tensor]:  # [K'] sorted classes of all ranks, [K'] counts, [K', d] sums
    """Counts and sums by class over all ranks, added in the order of the ranks: equal on all of them, bit for bit.

    The objective is the average of what the ranks back-propagate: the gradient of this rank's sums is N times theirs.
    """
    parts = [gather_ragged(t, group) for t in (classes, counts, sums)]
    merged, place = torch.cat(parts[0]).unique(return_inverse=True)
    places = place.split([len(part) for part in parts[0]])
    total, many = sums.new_zeros(len(merged), sums.shape[1]), counts.new_zeros(len(merged))
    for at, count, part in zip(places, parts[1], parts[2], strict=True):
        many.index_add_(0, at, count)
        total.index_add_(0, at, part)
    own = places[dist.get_rank(group)]
    return merged, many, total.index_add(0, own, sums - sums.detach(), alpha=len(parts[0]))
