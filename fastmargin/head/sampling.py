"""Random numbers of each class, from seed, step and its global id alone: the same for any number of ranks.

    initial rows      normal(0, .01), one generator for each block of 1,024 classes, seeded by (seed, block)
    sampled classes   in each block of n classes the ceil(rate n) with the smallest hash(seed, step, class), and all
                      that are required (PartialFC, An et al. 2021: those of the batch)

hash is splitmix64 of the class id and derive_seed(seed, step): a bijection of the 64-bit words, so no two classes have
the same hash.
"""

import contextlib
import math
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor, nn

from fastmargin.distributed.layout import Layout
from fastmargin.splitmix64 import INCREMENT, finalize_

BLOCK = 1024  # classes that share a generator, and a quota of sampled classes
AT_ONCE = 1024 * BLOCK  # classes whose hashes are in memory at one time


def initial_rows(first: int, last: int, d: int, seed: int) -> Tensor:  # [last - first, d]
    """Rows [first, last) of the seed's normal(0, .01) matrix: row j does not depend on how many rows there are."""
    out = torch.empty(last - first, d, dtype=torch.float32)
    for block in range(first // BLOCK, -(-last // BLOCK)):
        words = np.random.SeedSequence((seed, block)).generate_state(2)
        generator = torch.Generator().manual_seed(int(words[0]) << 31 | int(words[1]) >> 1)
        rows = torch.empty(BLOCK, d, dtype=torch.float32).normal_(0, 0.01, generator=generator)
        lo, hi = max(first, block * BLOCK), min(last, (block + 1) * BLOCK)
        out[lo - first : hi - first] = rows[lo - block * BLOCK : hi - block * BLOCK]
    return out


class StepCounter(nn.Module):
    """The number of training passes: an int on the host, so reading it never synchronizes; int64 [] in a state_dict."""

    def __init__(self) -> None:
        super().__init__()
        self.step = 0

    def get_extra_state(self) -> Tensor:
        return torch.tensor(self.step)

    def set_extra_state(self, state: Tensor) -> None:
        self.step = int(state)


def derive_seed(*numbers: int) -> int:
    """A seed of 63 bits, from all of the numbers."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> np.uint64(1))


@contextlib.contextmanager
def seeded_rng(seed: int, device: torch.device) -> Iterator[None]:
    """torch's default generators of the CPU and the device, seeded with `seed`; restored on exit."""
    cuda = [device.index] if device.type == "cuda" else []
    with torch.random.fork_rng(cuda):
        for generator in (torch.default_generator, *(torch.cuda.default_generators[i] for i in cuda)):
            generator.manual_seed(seed)
        yield


def sampled_classes(
    classes: Layout,
    required: Tensor,  # [n] global class ids; those outside [0, C) are ignored
    rate: float,
    step_seed: int,
) -> Tensor:  # [m] local indices, sorted; on CUDA then -1: no class
    """The classes of a step that this rank holds: those required, and a share of each block, drawn by `step_seed`.

    On CUDA the host does not wait for their number: m is an upper bound that it knows.
    """
    kept = torch.zeros(classes.count + 1, dtype=torch.bool, device=required.device)
    kept[classes.local_index(required)] = True  # local_index is -1, the extra last entry, for classes of other ranks
    for ids in drawn(classes, rate, step_seed, required.device):
        kept[classes.local_index(ids)] = True
    if not kept.is_cuda:
        return kept[:-1].nonzero()[:, 0]
    most = most_drawn(classes, rate)
    most += min(len(required), classes.count - most)
    return torch.nonzero_static(kept[:-1], size=most, fill_value=-1)[:, 0]


def most_drawn(classes: Layout, rate: float) -> int:
    """So many of this rank's classes are drawn; where ranks share a block, an upper bound."""
    start, stop = classes.start, classes.stop
    whole = range(-(-start // BLOCK), stop // BLOCK)
    most = len(whole) * math.ceil(rate * BLOCK)
    for block in {start // BLOCK, stop // BLOCK} - {*whole[:1]}:
        first, last = block * BLOCK, min((block + 1) * BLOCK, classes.total)
        most += max(0, min(math.ceil(rate * (last - first)), min(stop, last) - max(start, first)))
    return most


def drawn(classes: Layout, rate: float, step_seed: int, device: torch.device) -> Iterator[Tensor]:  # [m] each
    """Global ids of the classes drawn, from every block with classes of this rank."""
    whole = classes.total // BLOCK * BLOCK
    last = min(-(-classes.stop // BLOCK) * BLOCK, whole)
    for first in range(classes.start // BLOCK * BLOCK, last, AT_ONCE):
        yield smallest(torch.arange(first, min(first + AT_ONCE, last), device=device).view(-1, BLOCK), rate, step_seed)
    if classes.stop > whole:
        yield smallest(torch.arange(whole, classes.total, device=device)[None], rate, step_seed)


def smallest(ids: Tensor, rate: float, step_seed: int) -> Tensor:  # [blocks, n] -> [blocks * ceil(rate n)]
    columns = hashed(ids, step_seed).topk(math.ceil(rate * ids.shape[1]), dim=1, largest=False, sorted=False).indices
    return ids.gather(1, columns).flatten()


def hashed(ids: Tensor, step_seed: int) -> Tensor:  # any shape -> the same
    """The id-th output of the splitmix64 stream that starts at `step_seed`."""
    return finalize_(ids * INCREMENT + step_seed)
