"""Identities, their split, and the order in which images are visited.

The order is counter-based, a pure function of (seed, step): its state is two integers, and a run resumes
exactly, with any number of workers.

- Hash: the splitmix64 generator (Steele, Lea and Flood 2014, "Fast splittable pseudorandom number
  generators"), folded over the words of a key. The first word names the use, so that no two uses share a
  stream.
- Permutation of 0..n-1: four Feistel rounds (Luby and Rackoff 1988) on the smallest even number of bits
  that holds n - 1, with cycle walking (Black and Rogaway 2002): a value outside 0..n-1 goes through again.
- Batches: sample p = step * batch + i of the run is image permutation(p mod n) of epoch p div n.
"""

import hashlib
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

ORDER, AUGMENT = 1, 2  # first words of a key
ROUNDS = 4


def mix64(
    x: NDArray[np.uint64],  # any shape
) -> NDArray[np.uint64]:  # the same
    """One splitmix64 output for the state x: a bijection of the 64-bit words."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x ^= x >> np.uint64(30)
    x *= np.uint64(0xBF58476D1CE4E5B9)
    x ^= x >> np.uint64(27)
    x *= np.uint64(0x94D049BB133111EB)
    x ^= x >> np.uint64(31)
    return x


def hash64(*words: ArrayLike) -> NDArray[np.uint64]:
    """Hash of a key, word by word: integers or integer arrays that broadcast; [1] if all are integers."""
    state = np.zeros(1, np.uint64)  # not a scalar: arrays wrap silently
    for word in words:
        state = mix64(state ^ np.asarray(word).astype(np.uint64))
    return state


@dataclass(frozen=True)
class Identities:
    """Labelled images; identity c has images `labels == c` and is called `names[c]`."""

    images: Tensor  # [N, H, W] uint8, 0 is background
    labels: Tensor  # [N] int64, dense: 0..C-1
    names: list[str]  # [C]

    @property
    def num_classes(self) -> int:
        return len(self.names)

    def select(
        self,
        wanted: Tensor,  # [C] bool
    ) -> "Identities":
        """The wanted identities alone, with dense labels in the same order."""
        dense = wanted.cumsum(0) - 1
        kept = wanted[self.labels]
        names = [name for name, want in zip(self.names, wanted.tolist(), strict=True) if want]
        return Identities(self.images[kept], dense[self.labels[kept]], names)

    def split(self, holdout: float, seed: int) -> tuple["Identities", "Identities"]:
        """(train, test): whole identities, about a share `holdout` of them in test.

        An identity's side depends on the seed and the first character of its name alone: the split survives
        new fonts, rules and identities. ValueError unless 0 <= holdout < 1.
        """
        if not 0 <= holdout < 1:
            raise ValueError(f"holdout is a share of the identities, 0 <= holdout < 1; got {holdout}")
        test = torch.tensor([held_out(name, holdout, seed) for name in self.names], dtype=torch.bool)
        return self.select(~test), self.select(test)


def held_out(name: str, holdout: float, seed: int) -> bool:
    """Whether md5("seed:codepoint") of the name's first character, as a fraction of 1, is below holdout."""
    digest = hashlib.md5(f"{seed}:{ord(name[0])}".encode(), usedforsecurity=False).digest()
    return int.from_bytes(digest[:4], "big") / 2**32 < holdout


class Permutation:
    """The order of n items in one epoch: a bijection of 0..n-1, without a table. ValueError unless n >= 1."""

    def __init__(self, n: int, seed: int, epoch: int) -> None:
        if n < 1:
            raise ValueError(f"a permutation needs at least one item, got n = {n}")
        self.n = n
        self.bits = np.uint64(max(1, ((n - 1).bit_length() + 1) // 2))  # of a half
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
    """Every image once per epoch, in equal batches that run on over the end of an epoch; none is dropped."""

    n: int
    batch_size: int
    seed: int

    def __post_init__(self) -> None:
        if self.n < 1 or self.batch_size < 1:
            raise ValueError(f"n and batch_size are at least 1, got {self.n} and {self.batch_size}")

    def _samples(self, step: int) -> NDArray[np.int64]:  # [batch] samples of the run
        return step * self.batch_size + np.arange(self.batch_size, dtype=np.int64)

    def epochs(self, step: int) -> NDArray[np.int64]:  # [batch]
        """The epoch of each image of the batch."""
        return self._samples(step) // self.n

    def indices(self, step: int) -> NDArray[np.int64]:  # [batch]
        """The images of the batch, each in 0..n-1."""
        index, epochs = self._samples(step) % self.n, self.epochs(step)
        for epoch in np.unique(epochs):
            now = epochs == epoch
            index[now] = Permutation(self.n, self.seed, int(epoch))(index[now])
        return index
