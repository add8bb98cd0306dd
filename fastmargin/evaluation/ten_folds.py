"""Ten-fold accuracy, the protocol of LFW (Huang et al. 2007), in the variants that papers report.

Folds are contiguous, in the order of the pairs; the threshold for each is the one that is best on the other
nine. The numbers of different variants must not be compared with each other:
- "insightface" (facenet, InsightFace): squared distance of the unit vectors, thresholds 0, .01, .., 3.99,
  same if distance < threshold, the first of the best thresholds.
- "sphereface" (SphereFace, AM-Softmax): the mean of the nine folds' embeddings, which are not normalized before,
  is subtracted, then cosine; thresholds -1, -.9999, .., 1, same if above, different if below, wrong if equal;
  the mean of the best thresholds.
- "euclidean" (Git loss, Minimum Margin Loss: papers state the distance, and nothing else): distance of the
  embeddings as they are; thresholds 0, halfway between each two neighboring distances of the nine folds, and
  above them all; same if distance < threshold, the first of the best thresholds.

VAL, which facenet and InsightFace print beside it: squared distances as "insightface", thresholds 0, .001, ..,
3.999; the threshold at which the nine folds reach a false accept rate, interpolated linearly between the last
that does not exceed it and the next; on the fold left out, the share of genuine and of impostor pairs below it.
"""

from collections.abc import Callable, Iterator
from typing import Literal, NamedTuple, TypeAlias

import numpy as np

from fastmargin.evaluation.arrays import Array, array, unit, vectors
from fastmargin.evaluation.verification import accepted_impostors

Variant: TypeAlias = Literal["insightface", "sphereface", "euclidean"]
Scores: TypeAlias = Callable[[np.ndarray], np.ndarray]  # indices [n] of the fold left out -> scores of all pairs [P]

FOLDS = 10


class Fold(NamedTuple):
    """The pairs, with one fold left out."""

    scores: np.ndarray  # [n] of the fold left out
    same: np.ndarray  # [n] bool
    other_scores: np.ndarray  # [P - n] of all other folds
    other_same: np.ndarray  # [P - n] bool


class Rule(NamedTuple):
    """How a variant scores pairs and takes a threshold. A larger score is a more similar pair."""

    scores: Callable[[np.ndarray, np.ndarray], Scores]  # of pairs of rows [P, d], [P, d]
    thresholds: Callable[[np.ndarray], np.ndarray]  # scores of the other folds [m] -> [t]
    best: Callable[[np.ndarray, np.ndarray], np.ndarray]  # thresholds [t], correct pairs at each [t] -> []
    equal: Literal["left", "right"]  # an impostor at the threshold is wrong ("left") or refused ("right")


def verification_accuracy(
    a: Array,  # [P, d]
    b: Array,  # [P, d]
    same: Array,  # [P] bool, or 0 and 1
    folds: int = FOLDS,
    variant: Variant = "insightface",
) -> tuple[float, float]:
    """Mean and standard deviation (of the population, as numpy's) of the accuracy over the folds.

    Args:
        a: [P, d].
        b: [P, d], the other image of each pair.
        same: [P] bool, or 0 and 1.
        folds: from 2 to P, contiguous.
        variant: "insightface", "sphereface" or "euclidean": see the module.

    Returns:
        (mean, standard deviation), shares.

    Raises:
        ValueError: an unknown variant, wrong shapes, folds below 2 or more than the pairs, and rows that are not finite
            or, except for "euclidean", zero (for "sphereface" after the mean is subtracted).
    """
    if variant not in VARIANTS:
        raise ValueError(f"variant is {variant!r}; want one of {', '.join(VARIANTS)}")
    a, b, same, tests = _pairs(a, b, same, folds)
    rule, accuracies = VARIANTS[variant], []
    for fold in _folds(rule.scores(a, b), same, tests):
        thresholds = rule.thresholds(fold.other_scores)
        best = rule.best(thresholds, _correct(fold.other_scores, fold.other_same, thresholds, rule.equal))
        accuracies.append(float(_correct(fold.scores, fold.same, best, rule.equal)) / len(fold.same))
    return float(np.mean(accuracies)), float(np.std(accuracies))


def validation_rate(
    a: Array,  # [P, d]
    b: Array,  # [P, d]
    same: Array,  # [P] bool, or 0 and 1
    far: float = 1e-3,
    folds: int = FOLDS,
) -> tuple[float, float, float]:
    """VAL at a false accept rate over the folds. See the module.

    Args:
        a: [P, d].
        b: [P, d], the other image of each pair.
        same: [P] bool, or 0 and 1.
        far: in (0, 1].
        folds: from 2 to P, contiguous.

    Returns:
        Mean and standard deviation of VAL over the folds, and the false accept rate they came to, which is not `far`.
        Each is over the folds that have such pairs. NaN, "not resolvable", where `far` admits less than one impostor of
        some nine folds, or no fold has genuine pairs.

    Raises:
        ValueError: far outside (0, 1]; as `verification_accuracy`.
    """
    a, b, same, tests = _pairs(a, b, same, folds)
    grid = np.arange(0, 4, 0.001)  # of distances, the negative scores
    accepted: dict[bool, list[float]] = {True: [], False: []}
    for fold in _folds(_squared(a, b), same, tests):
        impostor = np.sort(-fold.other_scores[~fold.other_same])
        if not accepted_impostors(far, len(impostor)):
            return (float("nan"),) * 3
        rates = np.searchsorted(impostor, grid, "left") / len(impostor)
        threshold = np.interp(far, rates, grid) if rates[-1] >= far else 0.0
        for kind, shares in accepted.items():
            if (chosen := fold.same == kind).any():
                shares.append(float((-fold.scores[chosen] < threshold).mean()))
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


def _folds(
    scores: Scores,
    same: np.ndarray,  # [P] bool
    tests: list[np.ndarray],  # folds of [n] indices
) -> Iterator[Fold]:
    for test in tests:
        of_pairs = scores(test)
        yield Fold(of_pairs[test], same[test], np.delete(of_pairs, test), np.delete(same, test))


def _squared(
    a: np.ndarray,  # [P, d]
    b: np.ndarray,  # [P, d]
) -> Scores:
    scores = -((unit(a) - unit(b)) ** 2).sum(1)
    return lambda _: scores


def _centered(
    a: np.ndarray,  # [P, d]
    b: np.ndarray,  # [P, d]
) -> Scores:
    def scores(test: np.ndarray) -> np.ndarray:
        mean = (np.delete(a, test, 0).mean(0) + np.delete(b, test, 0).mean(0)) / 2
        return (unit(a - mean) * unit(b - mean)).sum(1)

    return scores


def _distance(
    a: np.ndarray,  # [P, d]
    b: np.ndarray,  # [P, d]
) -> Scores:
    scores = -np.linalg.norm(a - b, axis=1)
    return lambda _: scores


def _halfway(
    scores: np.ndarray,  # [m]
) -> np.ndarray:  # [t]
    known = np.unique(scores)[::-1]  # the nearest pair first
    return np.concatenate([[0.0], (known[1:] + known[:-1]) / 2, [-np.inf]])


def _first_best(
    thresholds: np.ndarray,  # [t]
    correct: np.ndarray,  # [t]
) -> np.ndarray:  # []
    return thresholds[correct.argmax()]


def _mean_best(
    thresholds: np.ndarray,  # [t]
    correct: np.ndarray,  # [t]
) -> np.ndarray:  # []
    return thresholds[correct == correct.max()].mean()


VARIANTS: dict[Variant, Rule] = {
    "insightface": Rule(_squared, lambda _: -np.arange(0, 4, 0.01), _first_best, "right"),
    "sphereface": Rule(_centered, lambda _: np.arange(-10_000, 10_001) / 10_000, _mean_best, "left"),
    "euclidean": Rule(_distance, _halfway, _first_best, "right"),
}


def _correct(
    scores: np.ndarray,  # [n]
    same: np.ndarray,  # [n] bool
    thresholds: np.ndarray,  # [t]
    equal: Literal["left", "right"],  # as in `Rule`
) -> np.ndarray:  # [t] pairs that each threshold gets right: genuine above it, impostors below
    genuine, impostor = np.sort(scores[same]), np.sort(scores[~same])
    accepted = len(genuine) - np.searchsorted(genuine, thresholds, "right")
    return accepted + np.searchsorted(impostor, thresholds, equal)
