"""Ten-fold accuracy, the protocol of LFW (Huang et al. 2007), in the variants that papers report.

Folds are contiguous, in the order of the pairs; each is judged by the threshold that is best for the other
nine. The variants' numbers must not be compared with each other:
- "insightface" (facenet, InsightFace): squared distance of the unit vectors, thresholds 0, .01, .., 3.99,
  same if distance < threshold, the first of the best thresholds.
- "sphereface" (SphereFace, AM-Softmax): the mean of the nine folds' embeddings, not normalised before, is
  taken off, then cosine; thresholds -1, -.9999, .., 1, same if above, different if below, wrong if equal;
  the mean of the best thresholds.
- "euclidean" (Git loss, Minimum Margin Loss: the distance is printed, the rest is not): distance of the
  embeddings as they are; thresholds 0, halfway between each two neighbouring distances of the nine folds, and
  above them all; same if distance < threshold, the first of the best thresholds.

VAL, which facenet and InsightFace print beside it: squared distances as "insightface", thresholds 0, .001, ..,
3.999; the threshold at which the nine folds reach a false accept rate, interpolated linearly between the last
that does not exceed it and the next; on the fold left out, the share of genuine and of impostor pairs below it.
"""

from collections.abc import Callable, Iterator
from typing import Literal, TypeAlias

import numpy as np

from fastmargin.evaluation.arrays import Array, array, unit, vectors
from fastmargin.evaluation.verification import accepted_impostors

Variant: TypeAlias = Literal["insightface", "sphereface", "euclidean"]

FOLDS = 10


def verification_accuracy(
    a: Array,  # [P, d]
    b: Array,  # [P, d]
    same: Array,  # [P] bool, or 0 and 1
    folds: int = FOLDS,
    variant: Variant = "insightface",
) -> tuple[float, float]:
    """Mean and standard deviation (of the population, as numpy's) of the accuracy over the folds.

    ValueError for an unknown variant, wrong shapes, folds below 2 or more than the pairs, and rows that are
    not finite or, but for "euclidean", zero (for "sphereface" once the mean is off).
    """
    if variant not in VARIANTS:
        raise ValueError(f"variant is {variant!r}; want one of {', '.join(VARIANTS)}")
    a, b, same, tests = _pairs(a, b, same, folds)
    accuracies = list(VARIANTS[variant](a, b, same, tests))
    return float(np.mean(accuracies)), float(np.std(accuracies))


def validation_rate(
    a: Array,  # [P, d]
    b: Array,  # [P, d]
    same: Array,  # [P] bool, or 0 and 1
    far: float = 1e-3,
    folds: int = FOLDS,
) -> tuple[float, float, float]:
    """VAL: mean and standard deviation over the folds, and the false accept rate they came to, which is not `far`.

    A fold counts where it has a pair of the kind. NaN, "not resolvable", where `far` is less than one impostor
    of some nine folds, or no fold has genuine pairs. ValueError as `verification_accuracy`; far outside (0, 1].
    """
    a, b, same, tests = _pairs(a, b, same, folds)
    distance, grid = ((unit(a) - unit(b)) ** 2).sum(1), np.arange(0, 4, 0.001)
    accepted: dict[bool, list[float]] = {True: [], False: []}
    for test in tests:
        impostor = np.sort(np.delete(distance, test)[~np.delete(same, test)])
        if not accepted_impostors(far, len(impostor)):
            return (float("nan"),) * 3
        rates = np.searchsorted(impostor, grid, "left") / len(impostor)
        threshold = np.interp(far, rates, grid) if rates[-1] >= far else 0.0
        for kind, shares in accepted.items():
            if (chosen := test[same[test] == kind]).size:
                shares.append(float((distance[chosen] < threshold).mean()))
    genuine, impostors = (np.array(accepted[kind] or [np.nan]) for kind in (True, False))
    return float(genuine.mean()), float(genuine.std()), float(impostors.mean())


def _pairs(
    a: Array,  # [P, d]
    b: Array,  # [P, d]
    same: Array,  # [P] bool, or 0 and 1
    folds: int,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, list[np.ndarray]]:  # [P, d], [P, d], [P] bool, folds of [n] indices
    a, b, same = vectors(a), vectors(b), array(same)
    if a.shape != b.shape or same.shape != a.shape[:1] or not np.isin(same, (0, 1)).all():
        given = f"a {a.shape}, b {b.shape}, same {same.shape} {same.dtype}"
        raise ValueError(f"{given}; want [P, d], [P, d] and [P] of 0 and 1")
    if not 2 <= folds <= len(same):
        raise ValueError(f"folds is {folds} for {len(same)} pairs; want 2 folds or more, a pair in each")
    return a, b, same.astype(bool), np.array_split(np.arange(len(same)), folds)


def _insightface(
    a: np.ndarray,  # [P, d]
    b: np.ndarray,  # [P, d]
    same: np.ndarray,  # [P] bool
    tests: list[np.ndarray],  # folds of [n] indices
) -> Iterator[float]:
    scores, thresholds = -((unit(a) - unit(b)) ** 2).sum(1), -np.arange(0, 4, 0.01)
    for test in tests:
        correct = _correct(np.delete(scores, test), np.delete(same, test), thresholds, "right")
        best = thresholds[correct.argmax()]
        yield float(_correct(scores[test], same[test], best, "right")) / len(test)


def _sphereface(
    a: np.ndarray,  # [P, d]
    b: np.ndarray,  # [P, d]
    same: np.ndarray,  # [P] bool
    tests: list[np.ndarray],  # folds of [n] indices
) -> Iterator[float]:
    thresholds = np.arange(-10_000, 10_001) / 10_000
    for test in tests:
        mean = (np.delete(a, test, 0).mean(0) + np.delete(b, test, 0).mean(0)) / 2
        scores = (unit(a - mean) * unit(b - mean)).sum(1)
        correct = _correct(np.delete(scores, test), np.delete(same, test), thresholds, "left")
        best = thresholds[correct == correct.max()].mean()
        yield float(_correct(scores[test], same[test], best, "left")) / len(test)


def _euclidean(
    a: np.ndarray,  # [P, d]
    b: np.ndarray,  # [P, d]
    same: np.ndarray,  # [P] bool
    tests: list[np.ndarray],  # folds of [n] indices
) -> Iterator[float]:
    scores = -np.linalg.norm(a - b, axis=1)
    for test in tests:
        known = np.unique(np.delete(scores, test))[::-1]  # the nearest pair first
        thresholds = np.concatenate([[0.0], (known[1:] + known[:-1]) / 2, [-np.inf]])
        correct = _correct(np.delete(scores, test), np.delete(same, test), thresholds, "right")
        best = thresholds[correct.argmax()]
        yield float(_correct(scores[test], same[test], best, "right")) / len(test)


VARIANTS: dict[Variant, Callable[..., Iterator[float]]] = {
    "insightface": _insightface,
    "sphereface": _sphereface,
    "euclidean": _euclidean,
}


def _correct(
    scores: np.ndarray,  # [n]
    same: np.ndarray,  # [n] bool
    thresholds: np.ndarray,  # [t]
    equal: Literal["left", "right"],  # an impostor at the threshold is wrong (left) or refused (right)
) -> np.ndarray:  # [t] pairs judged rightly: genuine above the threshold, impostors below
    genuine, impostor = np.sort(scores[same]), np.sort(scores[~same])
    accepted = len(genuine) - np.searchsorted(genuine, thresholds, "right")
    return accepted + np.searchsorted(impostor, thresholds, equal)
