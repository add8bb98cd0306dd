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
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

ORDER, AUGMENT, SYNTHETIC = 1, 2, 3  # first words of a key
ROUNDS = 4
EACH = 10  # images that an identity may always bring to an evaluation

Log = Callable[[str], None]


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


class Stored(Protocol):
    """N images that are read or made when they are asked for, from any thread."""

    @property
    def shape(self) -> tuple[int, ...]:
        """(N, H, W), or (N, H, W, 3) in colour."""

    def __len__(self) -> int: ...

    def __getitem__(
        self,
        index: NDArray[np.int64],  # [m]
        /,
    ) -> Tensor:  # [m, H, W] or [m, H, W, 3] uint8
        ...

    def checksums(self) -> NDArray[np.uint32]:  # [N]
        """A number for each image that tells it from another."""

    def title(self, number: int) -> str:
        """What to call an image: the path of its file, where it has one."""


@dataclass(frozen=True)
class Chosen:
    """Some of the stored images."""

    images: Stored
    rows: NDArray[np.int64]  # [n]

    @property
    def shape(self) -> tuple[int, ...]:
        return (len(self.rows), *self.images.shape[1:])

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(
        self,
        index: NDArray[np.int64],  # [m]
    ) -> Tensor:  # [m, H, W] or [m, H, W, 3] uint8
        return self.images[self.rows[index]]

    def checksums(self) -> NDArray[np.uint32]:  # [n]
        return self.images.checksums()[self.rows]

    def title(self, number: int) -> str:
        return self.images.title(int(self.rows[number]))


@dataclass(frozen=True)
class Identities:
    """Labelled images; identity c has images `labels == c` and is called `names[c]`."""

    images: Tensor | Stored  # [N, H, W] or [N, H, W, 3] uint8, 0 is background
    labels: Tensor  # [N] int64, dense: 0..C-1
    names: list[str]  # [C]

    @property
    def num_classes(self) -> int:
        return len(self.names)

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of an image as a network takes it."""
        height, width, *colors = self.images.shape[1:]
        return (3 if colors else 1), height, width

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of names, labels and images (or their checksums): the same data, and in the same order."""
        images = self.images
        digest = hashlib.sha256("\n".join(self.names).encode())
        digest.update(self.labels.numpy().tobytes())
        digest.update((images.numpy() if isinstance(images, Tensor) else images.checksums()).tobytes())
        return digest.hexdigest()

    def title(self, number: int) -> str:
        """What to call an image: the path of its file, or its number where images are no files."""
        return f"image {number}" if isinstance(self.images, Tensor) else self.images.title(number)

    def take(
        self,
        rows: NDArray[np.int64],  # [n] different images, in any order
    ) -> "Identities":
        """These images alone, of the identities that have any of them, with dense labels in the same order."""
        kept, labels = torch.unique(self.labels[rows], return_inverse=True)
        images = self.images[rows] if isinstance(self.images, Tensor) else Chosen(self.images, rows)
        return Identities(images, labels, [self.names[label] for label in kept.tolist()])

    def split(self, holdout: float, seed: int, key: Callable[[str], object] = str) -> tuple["Identities", "Identities"]:
        """(train, test): whole identities, about a share `holdout` of them in test.

        An identity's side depends on the seed and the key of its name alone: the split survives new identities
        and images. Where chance would leave test without a pair to compare, the first two identities that have
        two images go there, unless holdout is 0. ValueError unless 0 <= holdout < 1.
        """
        if not 0 <= holdout < 1:
            raise ValueError(f"holdout is a share of the identities, 0 <= holdout < 1; got {holdout}")
        place = np.array([fraction(key(name), seed) for name in self.names])  # [C]
        test = place < holdout
        if holdout > 0:
            paired = np.flatnonzero(np.bincount(self.labels, minlength=self.num_classes) > 1)
            test[paired[place[paired].argsort()[:2]]] = True
        test = test[self.labels.numpy()]
        return self.take(np.flatnonzero(~test)), self.take(np.flatnonzero(test))

    def comparable(self, limit: int, seed: int) -> "Identities":
        """What an evaluation is made of: identities with two images or more, and at most `limit` images.

        Should they have more, each identity brings max(EACH, limit / identities) of its images, evenly spread
        over them, and identities are taken in an order drawn by the seed as long as they fit.
        """
        if not self.names:
            return self
        labels = self.labels.numpy()
        sizes = np.bincount(labels)
        given = np.where(sizes > 1, sizes, 0)  # [C] images that each one brings
        if given.sum() > limit:
            given = np.minimum(given, max(EACH, limit // (sizes > 1).sum()))
        order = Permutation(len(sizes), seed, 0)(np.arange(len(sizes)))
        given[order[given[order].cumsum() > limit]] = 0
        rows = labels.argsort(kind="stable")
        rank = np.arange(len(rows)) - (sizes.cumsum() - sizes)[labels[rows]]  # of an image in its identity
        of = labels[rows]
        return self.take(np.sort(rows[rank * given[of] % sizes[of] < given[of]]))


def fraction(key: object, seed: int) -> float:
    """md5("seed:key") as a fraction of 1."""
    digest = hashlib.md5(f"{seed}:{key}".encode(), usedforsecurity=False).digest()
    return int.from_bytes(digest[:4], "big") / 2**32


def dense(
    labels: ArrayLike,  # [N] integers of any kind
) -> tuple[Tensor, NDArray[np.int64]]:  # [N] 0..C-1, [C] what each was
    """Labels without gaps, in the same order."""
    values, labels = np.unique(np.asarray(labels).astype(np.int64), return_inverse=True)
    return torch.from_numpy(labels), values


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
