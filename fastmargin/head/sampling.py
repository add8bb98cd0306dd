"""What is drawn for each class, by its id alone, so that it is the same however many ranks hold the classes.

    initial rows      normal(0, .01), one generator for each block of 1,024 classes, seeded by (seed, block)
    sampled classes   of each block, of n classes, the ceil(rate n) with the smallest hash(seed, step, class), and all
                      that have to be there (PartialFC, An et al. 2021: those of the batch)

hash is splitmix64 of class and derive_seed(seed, step): a bijection of 64 bits, so that no two classes are equal in it.
"""

import contextlib
import math
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor, nn

from fastmargin.distributed.layout import Layout

BLOCK = 1024  # classes that are drawn together
AT_ONCE = 1024 * BLOCK  # classes whose hashes are in memory together


def initial_rows(first: int, last: int, d: int, seed: int) -> Tensor:  # [last - first, d]
    """Rows first..last of the endless normal(0, .01) matrix that belongs to a seed."""
    out = torch.empty(last - first, d, dtype=torch.float32)
    for block in range(first // BLOCK, -(-last // BLOCK)):
        words = np.random.SeedSequence((seed, block)).generate_state(2)
        generator = torch.Generator().manual_seed(int(words[0]) << 31 | int(words[1]) >> 1)
        rows = torch.empty(BLOCK, d, dtype=torch.float32).normal_(0, 0.01, generator=generator)
        lo, hi = max(first, block * BLOCK), min(last, (block + 1) * BLOCK)
        out[lo - first : hi - first] = rows[lo - block * BLOCK : hi - block * BLOCK]
    return out


class StepCounter(nn.Module):
    """How many training passes were made: a number on the host, and an int64 tensor [] in a state_dict."""

    def __init__(self) -> None:
        super().__init__()
        self.step = 0

    def get_extra_state(self) -> Tensor:
        return torch.tensor(self.step)

    def set_extra_state(self, state: Tensor) -> None:
        self.step = int(state)


def derive_seed(*numbers: int) -> int:
    """63 bits that depend on all of them."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> np.uint64(1))


@contextlib.contextmanager
def seeded_rng(number: int, device: torch.device) -> Iterator[None]:
    """Within it torch's generators of the CPU and the device are seeded with a number; then they are as before."""
    cuda = [device.index] if device.type == "cuda" else []
    with torch.random.fork_rng(cuda):
        for generator in (torch.default_generator, *(torch.cuda.default_generators[i] for i in cuda)):
            generator.manual_seed(number)
        yield


def sampled_classes(
    classes: Layout,
    needed: Tensor,  # [n] class ids; outside [0, C): none
    rate: float,
    number: int,
) -> Tensor:  # [m] places among the classes of this rank, sorted
    """The classes of a step: those needed, and a share of each block that depends on `number` alone."""
    kept = torch.zeros(classes.count + 1, dtype=torch.bool, device=needed.device)
    kept[classes.local_index(needed)] = True  # the last entry, at -1, is for what is not here
    for ids in drawn(classes, rate, number, needed.device):
        kept[classes.local_index(ids)] = True
    return kept[:-1].nonzero()[:, 0]


def drawn(classes: Layout, rate: float, number: int, device: torch.device) -> Iterator[Tensor]:  # [m] each
    """The drawn ids of all blocks that reach into the classes of this rank."""
    whole = classes.total // BLOCK * BLOCK
    last = min(-(-classes.stop // BLOCK) * BLOCK, whole)
    for first in range(classes.start // BLOCK * BLOCK, last, AT_ONCE):
        yield smallest(torch.arange(first, min(first + AT_ONCE, last), device=device).view(-1, BLOCK), rate, number)
    if classes.stop > whole:
        yield smallest(torch.arange(whole, classes.total, device=device)[None], rate, number)


def smallest(ids: Tensor, rate: float, number: int) -> Tensor:  # [blocks, n] -> [blocks * ceil(rate n)]
    places = hashed(ids, number).topk(math.ceil(rate * ids.shape[1]), dim=1, largest=False, sorted=False).indices
    return ids.gather(1, places).flatten()


def hashed(ids: Tensor, number: int) -> Tensor:  # of the shape of ids
    """splitmix64: the id-th number of the stream that starts at `number`. int64 arithmetic, modulo 2^64."""
    h = ids * signed(0x9E3779B97F4A7C15) + number
    h ^= (h >> 30).bitwise_and_(2**34 - 1)  # the mask makes a shift of signed numbers one of bits
    h *= signed(0xBF58476D1CE4E5B9)
    h ^= (h >> 27).bitwise_and_(2**37 - 1)
    h *= signed(0x94D049BB133111EB)
    h ^= (h >> 31).bitwise_and_(2**33 - 1)
    return h


def signed(bits: int) -> int:
    return bits - 2**64 if bits >= 2**63 else bits
