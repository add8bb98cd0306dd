"""Labelled images by identity, and how whole identities are split."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from fastmargin.driver.data.order import Permutation
from fastmargin.ops.common import rank_in_group

EACH = 10  # images that an identity may always bring to an evaluation


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
        of = labels[rows]
        rank = rank_in_group(self.labels[rows]).numpy()  # of an image in its identity
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
