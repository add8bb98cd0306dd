"""The order in which images are visited, and the hash behind all random numbers of the data.

The order is counter-based, a pure function of (seed, step): its state is two integers, and a run resumes
exactly, with any number of workers.

- Hash: the splitmix64 generator (Steele, Lea and Flood 2014, "Fast splittable pseudorandom number
  generators"), applied to one word of a key after another. The first word names the use, so that no two uses
  share a stream.
- Permutation of 0..n-1: four Feistel rounds (Luby and Rackoff 1988) on the smallest even number of bits
  that holds n - 1, with cycle walking (Black and Rogaway 2002): a value outside 0..n-1 goes through again.
- Batches: sample p = step * batch + i of the run is image permutation(p mod n) of epoch p div n.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fastmargin.splitmix64 import INCREMENT, finalize_

ORDER, AUGMENT, SYNTHETIC = 1, 2, 3  # first words of a key

ROUNDS = 4


def mix64(
    x: NDArray[np.uint64],  # any shape
) -> NDArray[np.uint64]:  # the same
    """One splitmix64 output for the state x: a bijection of the 64-bit words."""
    return finalize_(x.view(np.int64) + INCREMENT).view(np.uint64)


def hash64(*words: ArrayLike) -> NDArray[np.uint64]:
    """Hash of a key whose words are integers, or integer arrays that broadcast; [1] if all are integers."""
    state = np.zeros(1, np.uint64)  # no scalar: only arrays overflow without a warning
    for word in words:
        state = mix64(state ^ np.asarray(word).astype(np.uint64))
    return state


class Permutation:
    """The order of n items in one epoch: a bijection of 0..n-1, without a table. ValueError unless n >= 1."""

    def __init__(self, n: int, seed: int, epoch: int) -> None:
        if n < 1:
            raise ValueError(f"a permutation needs at least one item, got n = {n}")
        self.n = n
        self.bits = np.uint64(max(1, ((n - 1).bit_length() + 1) // 2))  # of each half of a Feistel block
        self.keys = hash64(ORDER, seed, epoch, np.arange(ROUNDS))  # [ROUNDS]

    def __call__(
        self,
        index: ArrayLike,  # [m] int64 in 0..n-1
    ) -> NDArray[np.int64]:  # [m]
        value = self._feistel(np.atleast_1d(index).astype(np.uint64))
        while (outside := value >= self.n).any():
            value[outside] = self._feistel(value[outside])
        return value.astype(np.int64)

    def _feistel(
        self,
        value: NDArray[np.uint64],  # [m] below 4 ** bits
    ) -> NDArray[np.uint64]:  # [m] below 4 ** bits
        mask = (np.uint64(1) << self.bits) - np.uint64(1)
        left, right = value >> self.bits, value & mask
        for key in self.keys:
            left, right = right, left ^ (mix64(right ^ key) & mask)
        return (left << self.bits) | right


@dataclass(frozen=True)
class UniformBatches:
    """Every image once per epoch, in batches of one size: a batch may end one epoch and begin the next."""

    n: int
    batch_size: int
    seed: int

    def __post_init__(self) -> None:
        if self.n < 1 or self.batch_size < 1:
            raise ValueError(f"n and batch_size are at least 1, got {self.n} and {self.batch_size}")

    def _samples(self, step: int) -> NDArray[np.int64]:  # [batch] numbers of samples, counted from the start of the run
        return step * self.batch_size + np.arange(self.batch_size, dtype=np.int64)

    def epochs(self, step: int) -> NDArray[np.int64]:  # [batch]
        """The epoch of each image of the batch."""
        return self._samples(step) // self.n

    def indices(self, step: int) -> NDArray[np.int64]:  # [batch]
        """The images of the batch, each in 0..n-1."""
        index, epochs = self._samples(step) % self.n, self.epochs(step)
        for epoch in np.unique(epochs):
            same = epochs == epoch
            index[same] = Permutation(self.n, self.seed, int(epoch))(index[same])
        return index
