"""Labeled images by identity, and their split into whole identities to train on and to hold out."""

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

EACH = 10  # images of an identity that an evaluation takes at least, if it has so many


class Stored(Protocol):
    """N images that are read or made when they are indexed, by any thread."""

    @property
    def shape(self) -> tuple[int, ...]:
        """(N, H, W), or (N, H, W, 3) in color."""

    def __len__(self) -> int: ...

    def __getitem__(
        self,
        index: NDArray[np.int64],  # [m]
        /,
    ) -> Tensor:  # [m, H, W] or [m, H, W, 3] uint8
        ...

    def checksums(self) -> NDArray[np.uint32]:  # [N]
        """A number for each image that differs where the images do."""

    def title(self, number: int) -> str:
        """A name of an image for messages: the path of its file, where it has one."""


@dataclass(frozen=True)
class Chosen:
    """A selection of the stored images."""

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
    """Labeled images; identity c has images `labels == c` and is called `names[c]`."""

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
        """SHA-256 of names, labels and images (or their checksums): equal for the same data in the same order."""
        images = self.images
        digest = hashlib.sha256("\n".join(self.names).encode())
        digest.update(self.labels.numpy().tobytes())
        digest.update((images.numpy() if isinstance(images, Tensor) else images.checksums()).tobytes())
        return digest.hexdigest()

    def title(self, number: int) -> str:
        """A name of an image for messages: the path of its file, or its number where images are no files."""
        return f"image {number}" if isinstance(self.images, Tensor) else self.images.title(number)

    def take(
        self,
        rows: NDArray[np.int64],  # [n] different images, in any order
    ) -> "Identities":
        """Only these images and their identities; labels are numbered anew from 0, in the same order."""
        kept, labels = torch.unique(self.labels[rows], return_inverse=True)
        images = self.images[rows] if isinstance(self.images, Tensor) else Chosen(self.images, rows)
        return Identities(images, labels, [self.names[label] for label in kept.tolist()])

    def split(self, holdout: float, seed: int, key: Callable[[str], object] = str) -> tuple["Identities", "Identities"]:
        """(train, test): whole identities, about a share `holdout` of them in test.

        On which side an identity is depends only on the seed and the key of its name: it stays there when identities
        and images are added. The first two identities with two images or more, in the order of the hash, are always
        in test, which so has a pair to compare, unless holdout is 0. ValueError unless 0 <= holdout < 1.
        """
        test = self.held_out(holdout, seed, key)
        return self.take(np.flatnonzero(~test)), self.take(np.flatnonzero(test))

    def held_out(self, holdout: float, seed: int, key: Callable[[str], object] = str) -> NDArray[np.bool_]:  # [N]
        """Which images `split` puts into test."""
        if not 0 <= holdout < 1:
            raise ValueError(f"holdout is a share of the identities, 0 <= holdout < 1; got {holdout}")
        hashes = np.array([fraction(key(name), seed) for name in self.names])  # [C]
        test = hashes < holdout
        if holdout > 0:
            paired = np.flatnonzero(np.bincount(self.labels, minlength=self.num_classes) > 1)
            test[paired[hashes[paired].argsort()[:2]]] = True
        return test[self.labels.numpy()]

    def comparable(self, limit: int, seed: int) -> "Identities":
        """The images of an evaluation: those of identities with two images or more, `limit` images at most.

        If there are more, an identity has at most max(EACH, limit / identities) images, spread evenly over its own, and
        identities are taken in an order drawn from the seed until the limit is reached.
        """
        if not self.names:
            return self
        labels = self.labels.numpy()
        sizes = np.bincount(labels)
        taken = np.where(sizes > 1, sizes, 0)  # [C] number of images of each
        if taken.sum() > limit:
            taken = np.minimum(taken, max(EACH, limit // (sizes > 1).sum()))
        order = Permutation(len(sizes), seed, 0)(np.arange(len(sizes)))
        taken[order[taken[order].cumsum() > limit]] = 0
        rows = labels.argsort(kind="stable")
        identity = labels[rows]
        rank = rank_in_group(self.labels[rows]).numpy()  # of an image in its identity
        return self.take(np.sort(rows[rank * taken[identity] % sizes[identity] < taken[identity]]))


def fraction(key: object, seed: int) -> float:
    """md5("seed:key") as a number in [0, 1)."""
    digest = hashlib.md5(f"{seed}:{key}".encode(), usedforsecurity=False).digest()
    return int.from_bytes(digest[:4], "big") / 2**32


def dense(
    labels: ArrayLike,  # [N] integers of any kind
) -> tuple[Tensor, NDArray[np.int64]]:  # [N] 0..C-1, [C] the old label of each
    """Labels numbered anew without gaps, in the same order."""
    values, labels = np.unique(np.asarray(labels).astype(np.int64), return_inverse=True)
    return torch.from_numpy(labels), values
