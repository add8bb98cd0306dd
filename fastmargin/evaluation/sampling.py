"""Pairs of images for data without a pair list."""

from typing import NamedTuple

import numpy as np

from fastmargin.evaluation.arrays import Array, array, identities
from fastmargin.evaluation.ten_folds import FOLDS


class Pairs(NamedTuple):
    """Pairs of images, in equal, contiguous folds; of each fold, the first half are genuine.

    Attributes:
        first: [P] int64, indices of images.
        second: [P] int64, likewise.
        same: [P] bool.
    """

    first: np.ndarray  # [P] int64
    second: np.ndarray  # [P] int64
    same: np.ndarray  # [P] bool


def sample_pairs(
    labels: Array,  # [N]
    pairs: int,
    seed: int,
    folds: int = FOLDS,
) -> Pairs:
    """Pairs for data without a pair list: folds share no identity, each is half genuine, half impostor.

    Within a fold the pairs of a kind are sampled uniformly, without repetition. All folds have the same number of
    pairs: pairs // folds, rounded down to an even number, or what the fold with the fewest pairs of a kind allows.

    Args:
        labels: [N] of any kind.
        pairs: at most so many, over all folds.
        seed: of the draws.
        folds: 2 or more.

    Returns:
        Indices first [P] and second [P], and same [P].

    Raises:
        ValueError: fewer than 2 folds, 2 pairs a fold, 2 identities a fold, or one of them with 2 images.
    """
    identity = identities(labels, len(array(labels)))
    if folds < 2 or pairs < 2 * folds:
        raise ValueError(f"{pairs} pairs in {folds} folds; want at least 2 folds of 2 pairs")
    if not fills(identity, folds):
        raise ValueError(f"{folds} folds need {2 * folds} identities, {folds} of them with 2 images or more")
    rng = np.random.default_rng(seed)
    members = _split_identities(identity, folds, rng)
    starts = [np.searchsorted(identity[images], identity[images]) for images in members]
    each = min(pairs // (2 * folds), *(count.sum() for s in starts for count in (s, np.arange(len(s)) - s)))
    drawn = [images[_draw_pairs(s, each, rng)] for images, s in zip(members, starts, strict=True)]
    first, second = np.concatenate(drawn, axis=1)
    return Pairs(first, second, np.tile(np.arange(2 * each) < each, folds))


def fills(
    identity: np.ndarray,  # [N] 0 to U-1
    folds: int,
) -> bool:
    """Whether every fold can have identities of its own: two, one of them with two images."""
    sizes = np.bincount(identity)
    return len(sizes) >= 2 * folds and int((sizes > 1).sum()) >= folds


def _split_identities(
    identity: np.ndarray,  # [N] 0 to U-1
    folds: int,
    rng: np.random.Generator,
) -> list[np.ndarray]:  # folds of [m] images, in order of their identity
    """Deals identities out at random, those with one image last, so that every fold gets one with a genuine pair."""
    order = rng.permutation(identity.max() + 1)
    order = order[(np.bincount(identity)[order] == 1).argsort(kind="stable")]
    fold = np.empty_like(order)
    fold[order] = np.arange(len(order)) % folds
    images = identity.argsort(kind="stable")
    return [images[fold[identity[images]] == f] for f in range(folds)]


def _draw_pairs(
    starts: np.ndarray,  # [m] for images sorted by identity: index of the first image of the same identity
    each: int,
    rng: np.random.Generator,
) -> np.ndarray:  # [2, 2 each] indices of images: `each` different genuine pairs, then as many impostor pairs
    """Image p forms pairs with the images before it: genuine from starts[p] on, else impostor. All pairs of a kind are
    numbered, and numbers are drawn."""
    here = np.arange(len(starts))
    kinds = []
    for lowest, partners in ((starts, here - starts), (np.zeros_like(starts), starts)):
        ends = partners.cumsum()
        number = rng.choice(ends[-1], each, replace=False)
        p = np.searchsorted(ends, number, "right")
        kinds.append([p, lowest[p] + number - (ends - partners)[p]])
    return np.concatenate(kinds, axis=1)
