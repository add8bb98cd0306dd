"""The numbers of a report: of labeled embeddings, and of a list of pairs."""

import math

import numpy as np

from fastmargin.evaluation.arrays import Array, array, identities, unit
from fastmargin.evaluation.features import class_distances
from fastmargin.evaluation.identification import classify, cmc, coverage_at_precision, dir_at_far
from fastmargin.evaluation.sampling import fills, sample_pairs
from fastmargin.evaluation.ten_folds import FOLDS, VARIANTS, validation_rate, verification_accuracy
from fastmargin.evaluation.verification import best_accuracy, cosine_scores, tar_at_far, tars_at_fars

FARS = {"tar@1e-2": 1e-2, "tar@1e-3": 1e-3, "tar@1e-4": 1e-4}
ENROLLMENTS = 5  # random galleries behind the mean rank-1 and DIR
PAIRS = 6000  # pairs behind the accuracy, as many as LFW has


def evaluate_embeddings(
    embeddings: Array,  # [N, d]
    labels: Array,  # [N]
    seed: int = 0,
) -> dict[str, float]:
    """The numbers of a report on labeled images. Work grows with N^2; 5,000 images take seconds.

    Args:
        embeddings: [N, d].
        labels: [N] of any kind.
        seed: of the draws.

    Returns:
        By name, NaN ("not resolvable") where there are too few pairs, probes or identities. "tar@1e-2" to "tar@1e-4"
        over all pairs of images. "rank1", "rank5": one random image of each identity enrolled, all others probes, mean
        of 5 draws; "coverage@99%" of the same: how many probes, the most confident first, can be given an identity with
        99 % of them right. "dir@1e-2": for a random half of the identities, open set, rank 1. "accuracy": ten folds,
        "insightface", on up to 6,000 pairs of `sample_pairs`. "inter", "intra": `class_distances`; "inter/intra": their
        ratio, which has no unit. Counts: "genuine_pairs", "impostor_pairs", "identities", "images".

    Raises:
        ValueError: as `cosine_scores`.
    """
    genuine, impostor = cosine_scores(embeddings, labels)
    rows = unit(embeddings)
    identity = identities(labels, len(rows))
    inter, intra = class_distances(embeddings, identity)
    return {
        **dict(zip(FARS, tars_at_fars(genuine, impostor, list(FARS.values())), strict=True)),
        **_one_shot(rows, identity, seed),
        "dir@1e-2": _mean_dir(rows, identity, seed),
        "accuracy": _sampled_accuracy(rows, identity, seed),
        "inter": inter,
        "intra": intra,
        "inter/intra": inter / intra if intra else math.nan,
        "genuine_pairs": genuine.size,
        "impostor_pairs": impostor.size,
        "identities": int(identity.max()) + 1,
        "images": identity.size,
    }


def evaluate_pairs(
    a: Array,  # [P, d]
    b: Array,  # [P, d]
    same: Array,  # [P] bool, or 0 and 1
    folds: int = FOLDS,
) -> dict[str, float]:
    """The numbers of a report on a list of pairs, in folds that are contiguous.

    Args:
        a: [P, d].
        b: [P, d], the other image of each pair.
        same: [P] bool, or 0 and 1.
        folds: from 1 to P.

    Returns:
        By name, NaN: not resolvable. "accuracy_X" and "std_X" for each variant X of `verification_accuracy`, "val@1e-3"
        of `validation_rate`: NaN for one fold, as there is no other for the threshold. "accuracy_best", "tar@1e-2",
        "tar@1e-3": of the cosines of all pairs. Counts: "pairs", "genuine_pairs".

    Raises:
        ValueError: as `verification_accuracy`.
    """
    results: dict[str, float] = {}
    for variant in VARIANTS:
        found = verification_accuracy(a, b, same, folds, variant) if folds != 1 else (math.nan, math.nan)
        results[f"accuracy_{variant}"], results[f"std_{variant}"] = found
    results["val@1e-3"] = validation_rate(a, b, same, 1e-3, folds)[0] if folds != 1 else math.nan
    cosines, genuine = (unit(a) * unit(b)).sum(1), array(same).astype(bool)
    sides = cosines[genuine], cosines[~genuine]
    mixed = 0 < genuine.sum() < len(genuine)
    results["accuracy_best"] = best_accuracy(*sides) if mixed else math.nan
    for name in ("tar@1e-2", "tar@1e-3"):
        results[name] = tar_at_far(*sides, FARS[name]) if mixed else math.nan
    return {**results, "pairs": len(genuine), "genuine_pairs": int(genuine.sum())}


def _one_shot(
    rows: np.ndarray,  # [N, d]
    identity: np.ndarray,  # [N] 0 to U-1
    seed: int,
) -> dict[str, float]:
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(ENROLLMENTS):
        enrolled = _enroll(identity, rng)
        rest = np.delete(np.arange(len(identity)), enrolled)
        sides = rows[rest], identity[rest], rows[enrolled], identity[enrolled]
        rates = cmc(*sides, 5)
        found.append([rates[0], rates[-1], coverage_at_precision(*classify(*sides), 0.99)])
    return dict(zip(("rank1", "rank5", "coverage@99%"), np.mean(found, axis=0).tolist(), strict=True))


def _mean_dir(
    rows: np.ndarray,  # [N, d]
    identity: np.ndarray,  # [N] 0 to U-1
    seed: int,
) -> float:
    rng = np.random.default_rng(seed)
    rates = []
    for _ in range(ENROLLMENTS):
        enrolled = _enroll(identity, rng)
        enrolled = rng.permutation(enrolled)[: len(enrolled) // 2]
        rest = np.delete(np.arange(len(identity)), enrolled)
        if not np.isin(identity[rest], identity[enrolled]).any():
            return float("nan")
        rates.append(dir_at_far(rows[rest], identity[rest], rows[enrolled], identity[enrolled], 1e-2))
    return float(np.mean(rates))


def _enroll(
    identity: np.ndarray,  # [N] 0 to U-1
    rng: np.random.Generator,
) -> np.ndarray:  # [U] a random image of each identity
    images, sizes = identity.argsort(kind="stable"), np.bincount(identity)
    return images[sizes.cumsum() - sizes + rng.integers(sizes)]


def _sampled_accuracy(
    rows: np.ndarray,  # [N, d]
    identity: np.ndarray,  # [N] 0 to U-1
    seed: int,
) -> float:
    if not fills(identity, FOLDS):
        return float("nan")
    first, second, same = sample_pairs(identity, PAIRS, seed)
    return verification_accuracy(rows[first], rows[second], same)[0]
