"""How good embeddings are on identities never trained on: verification, identification, ten-fold accuracy.

Letters: N images, d features, P pairs, G genuine scores (pairs of one identity), I impostor scores.

TAR at FAR. n = floor(far I) impostors may be accepted. The threshold is the (n + 1)-th largest impostor
score, and what lies strictly above it is accepted: ties count against the embeddings. TAR is the accepted
share of the genuine pairs. Where far < 1/I no count stands behind a threshold: NaN, "not resolvable".

CMC. The rank of a probe is 1 + the gallery images of others that score at least its best mate (again ties
count against it), and cmc[r - 1] is the share of probes of rank r or better.

Ten-fold accuracy. Folds are contiguous, in the order of the pairs; each is judged by the threshold that is
best for the other nine. Two public variants, whose numbers must not be compared with each other:
- "insightface" (facenet, InsightFace): squared distance of the unit vectors, thresholds 0, .01, .., 3.99,
  same if distance < threshold, the first of the best thresholds.
- "sphereface" (SphereFace, AM-Softmax): the mean of the nine folds' embeddings, not normalised before, is
  taken off, then cosine; thresholds -1, -.9999, .., 1, same if above, different if below, wrong if equal;
  the mean of the best thresholds.
"""

from collections.abc import Iterator
from typing import Literal, NamedTuple, TypeAlias

import numpy as np
from torch import Tensor

Array: TypeAlias = np.ndarray | Tensor
Variant: TypeAlias = Literal["insightface", "sphereface"]

BLOCK = 2**22  # scores held at once, 16 MB of float32
ENROLMENTS = 5  # random galleries behind the mean rank-1
PAIRS = 6000  # pairs behind the accuracy, as many as LFW has
FOLDS = 10


class Pairs(NamedTuple):
    """Pairs of images; fold f is the f-th of equal, contiguous parts, half of it genuine."""

    first: np.ndarray  # [P] int64
    second: np.ndarray  # [P] int64
    same: np.ndarray  # [P] bool


def evaluate_embeddings(
    embeddings: Array,  # [N, d]
    labels: Array,  # [N]
    seed: int = 0,
) -> dict[str, float]:
    """The numbers of a report.

    "tar@1e-2", "tar@1e-3" over all pairs of images (NaN: not resolvable). "rank1": one random image of each
    identity enrolled, all others probes, mean of 5 draws. "accuracy": ten folds, "insightface", on up to
    6,000 pairs of `sample_pairs`; NaN where there are too few identities for it. "inter_distance",
    "intra_distance": `class_distances`. Counts: "genuine_pairs", "impostor_pairs", "identities", "images".
    Work grows with N^2; 5,000 images take seconds. ValueError: as `cosine_scores`.
    """
    genuine, impostor = cosine_scores(embeddings, labels)
    unit = _unit(embeddings)
    identity = _identities(labels, len(unit))
    inter, intra = class_distances(embeddings, labels)
    return {
        "tar@1e-2": tar_at_far(genuine, impostor, 1e-2),
        "tar@1e-3": tar_at_far(genuine, impostor, 1e-3),
        "rank1": _mean_rank1(unit, identity, seed),
        "accuracy": _sampled_accuracy(unit, identity, seed),
        "inter_distance": inter,
        "intra_distance": intra,
        "genuine_pairs": genuine.size,
        "impostor_pairs": impostor.size,
        "identities": int(identity.max()) + 1,
        "images": identity.size,
    }


def class_distances(
    embeddings: Array,  # [N, d]
    labels: Array,  # [N]
) -> tuple[float, float]:
    """(inter, intra), Euclidean and of embeddings as they are (Git Loss, Table 1): the mean distance of two class
    means, NaN for one class; the mean over classes of the mean distance to the own class mean.
    ValueError for wrong shapes, no rows, rows that are not finite.
    """
    rows = _array(embeddings).astype(np.float64)
    if rows.ndim != 2 or not rows.size or not np.isfinite(rows).all():
        raise ValueError(f"embeddings are {rows.shape}; wanted [N, d], at least one row, all finite")
    identity = _identities(labels, len(rows))
    sizes = np.bincount(identity)
    means = np.stack([np.bincount(identity, column) for column in rows.T], axis=1) / sizes[:, None]
    own = np.bincount(identity, np.linalg.norm(rows - means[identity], axis=1)) / sizes
    apart = np.concatenate([np.linalg.norm(means[k + 1 :] - mean, axis=1) for k, mean in enumerate(means)])
    return float(apart.mean() if apart.size else np.nan), float(own.mean())


def cosine_scores(
    embeddings: Array,  # [N, d]
    labels: Array,  # [N]
) -> tuple[np.ndarray, np.ndarray]:  # [G], [I] float32
    """Cosines of all pairs of images, genuine and impostor, computed block by block.

    ValueError for wrong shapes, rows that are zero or not finite, fewer than 2 identities, no genuine pair.
    """
    unit = _unit(embeddings).astype(np.float32)
    identity = _identities(labels, len(unit))
    sizes = np.bincount(identity)
    if len(sizes) < 2 or sizes.max(initial=0) < 2:
        raise ValueError(
            f"{len(unit)} images of {len(sizes)} identities, {sizes.max(initial=0)} or fewer of each; "
            "wanted at least 2 identities, one of them with 2 images"
        )
    genuine, impostor = [], []
    for rows in _blocks(len(unit), len(unit)):
        scores = unit[rows] @ unit[rows.start :].T
        same = identity[rows, None] == identity[rows.start :]
        later = np.arange(scores.shape[1]) > np.arange(scores.shape[0])[:, None]
        genuine.append(scores[later & same])
        impostor.append(scores[later & ~same])
    return np.concatenate(genuine), np.concatenate(impostor)


def tar_at_far(
    genuine: Array,  # [G]
    impostor: Array,  # [I]
    far: float,
) -> float:
    """True accept rate where the false accept rate is at most `far`; NaN where far < 1/I.

    ValueError for far outside (0, 1] and for scores that are empty or not finite.
    """
    if not 0 < far <= 1:
        raise ValueError(f"far is {far}; wanted a rate in (0, 1]")
    impostor = _scores("impostor", impostor)
    allowed = int(far * impostor.size * (1 + 1e-12))  # 0.29 of 100 is 29, which floating point falls short of
    return float(_accept_rates(genuine, impostor, np.array([allowed]))[0]) if allowed else float("nan")


def roc(
    genuine: Array,  # [G]
    impostor: Array,  # [I]
    points: int = 200,
) -> tuple[np.ndarray, np.ndarray]:  # far [p], tar [p], p <= points
    """The ROC for a plot: FARs evenly spaced in their logarithm, 1/I to 1, and the `tar_at_far` of each."""
    if points < 2:
        raise ValueError(f"points is {points}; wanted at least 2")
    impostor = _scores("impostor", impostor)
    allowed = np.unique(np.geomspace(1, impostor.size, points).round().astype(np.int64))
    return allowed / impostor.size, _accept_rates(genuine, impostor, allowed)


def cmc(
    probes: Array,  # [P, d]
    probe_labels: Array,  # [P]
    gallery: Array,  # [Q, d]
    gallery_labels: Array,  # [Q]
    k: int,
) -> np.ndarray:  # [k]
    """Cumulative match curve by cosine, ranks 1 to k. An identity may have several gallery images.

    ValueError for k < 1, no probes, a probe without a mate in the gallery, rows zero or not finite.
    """
    if k < 1:
        raise ValueError(f"k is {k}; wanted at least 1")
    probe, enrolled = _unit(probes).astype(np.float32), _unit(gallery).astype(np.float32)
    wanted, present = _labels(probe_labels, len(probe)), _labels(gallery_labels, len(enrolled))
    stray = int((~np.isin(wanted, present)).sum())
    if stray or not len(probe):
        raise ValueError(f"{stray} of {len(probe)} probes have no mate in the gallery; wanted one for each")
    before = []
    for rows in _blocks(len(probe), len(enrolled)):
        scores, mate = probe[rows] @ enrolled.T, wanted[rows, None] == present
        best = np.where(mate, scores, -np.inf).max(1, keepdims=True)
        before.append(((scores >= best) & ~mate).sum(1))
    return np.bincount(np.concatenate(before).clip(max=k), minlength=k + 1)[:k].cumsum() / len(probe)


def rank_k(
    probes: Array,  # [P, d]
    probe_labels: Array,  # [P]
    gallery: Array,  # [Q, d]
    gallery_labels: Array,  # [Q]
    k: int = 1,
) -> float:
    """Share of probes of rank k or better: the last value of `cmc`."""
    return float(cmc(probes, probe_labels, gallery, gallery_labels, k)[-1])


def verification_accuracy(
    a: Array,  # [P, d]
    b: Array,  # [P, d]
    same: Array,  # [P] bool, or 0 and 1
    folds: int = FOLDS,
    variant: Variant = "insightface",
) -> tuple[float, float]:
    """Mean and standard deviation (of the population, as numpy's) of the accuracy over the folds.

    ValueError for an unknown variant, wrong shapes, folds below 2 or more than the pairs, and rows that are
    zero (for "sphereface" also once the mean is off) or not finite.
    """
    if variant not in _VARIANTS:
        raise ValueError(f"variant is {variant!r}; wanted one of {', '.join(_VARIANTS)}")
    a, b, same = _rows(a), _rows(b), _array(same)
    if a.shape != b.shape or same.shape != a.shape[:1] or not np.isin(same, (0, 1)).all():
        given = f"a {a.shape}, b {b.shape}, same {same.shape} {same.dtype}"
        raise ValueError(f"{given}; wanted [P, d], [P, d] and [P] of 0 and 1")
    if not 2 <= folds <= len(same):
        raise ValueError(f"folds is {folds} for {len(same)} pairs; wanted 2 folds or more, a pair in each")
    tests = np.array_split(np.arange(len(same)), folds)
    accuracies = list(_VARIANTS[variant](a, b, same.astype(bool), tests))
    return float(np.mean(accuracies)), float(np.std(accuracies))


def sample_pairs(
    labels: Array,  # [N]
    pairs: int,
    seed: int,
    folds: int = FOLDS,
) -> Pairs:
    """Pairs for data without a pair list: folds share no identity, each is half genuine, half impostor.

    Within a fold pairs are different and uniform over all there are of their kind. Every fold has the same
    number, pairs // folds made even, or as many as the fold with the fewest pairs of a kind allows.
    ValueError for fewer than 2 folds, 2 pairs a fold, 2 identities a fold, or one of them with 2 images.
    """
    identity = _identities(labels, len(_array(labels)))
    if folds < 2 or pairs < 2 * folds:
        raise ValueError(f"{pairs} pairs in {folds} folds; wanted at least 2 folds of 2 pairs")
    if not _fills(identity, folds):
        raise ValueError(f"{folds} folds need {2 * folds} identities, {folds} of them with 2 images or more")
    rng = np.random.default_rng(seed)
    members = _split_identities(identity, folds, rng)
    starts = [np.searchsorted(identity[images], identity[images]) for images in members]
    each = min(pairs // (2 * folds), *(count.sum() for s in starts for count in (s, np.arange(len(s)) - s)))
    drawn = [images[_draw_pairs(s, each, rng)] for images, s in zip(members, starts, strict=True)]
    first, second = np.concatenate(drawn, axis=1)
    return Pairs(first, second, np.tile(np.arange(2 * each) < each, folds))


def _insightface(
    a: np.ndarray,  # [P, d]
    b: np.ndarray,  # [P, d]
    same: np.ndarray,  # [P] bool
    tests: list[np.ndarray],  # folds of [n] indices
) -> Iterator[float]:
    scores, thresholds = -((_unit(a) - _unit(b)) ** 2).sum(1), -np.arange(0, 4, 0.01)
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
        scores = (_unit(a - mean) * _unit(b - mean)).sum(1)
        correct = _correct(np.delete(scores, test), np.delete(same, test), thresholds, "left")
        best = thresholds[correct == correct.max()].mean()
        yield float(_correct(scores[test], same[test], best, "left")) / len(test)


_VARIANTS = {"insightface": _insightface, "sphereface": _sphereface}


def _correct(
    scores: np.ndarray,  # [n]
    same: np.ndarray,  # [n] bool
    thresholds: np.ndarray,  # [t]
    equal: Literal["left", "right"],  # an impostor at the threshold is wrong (left) or refused (right)
) -> np.ndarray:  # [t] pairs judged rightly: genuine above the threshold, impostors below
    genuine, impostor = np.sort(scores[same]), np.sort(scores[~same])
    accepted = len(genuine) - np.searchsorted(genuine, thresholds, "right")
    return accepted + np.searchsorted(impostor, thresholds, equal)


def _accept_rates(
    genuine: Array,  # [G]
    impostor: np.ndarray,  # [I]
    allowed: np.ndarray,  # [t] impostors that may be accepted, 0 to I
) -> np.ndarray:  # [t] share of genuine scores accepted
    genuine = np.sort(_scores("genuine", genuine))
    refused = len(impostor) - allowed
    thresholds = np.where(refused > 0, np.sort(impostor)[refused - 1], -np.inf)
    return (len(genuine) - np.searchsorted(genuine, thresholds, "right")) / len(genuine)


def _mean_rank1(
    unit: np.ndarray,  # [N, d]
    identity: np.ndarray,  # [N] 0 to U-1
    seed: int,
) -> float:
    rng = np.random.default_rng(seed)
    images, sizes = identity.argsort(kind="stable"), np.bincount(identity)
    rates = []
    for _ in range(ENROLMENTS):
        enrolled = images[sizes.cumsum() - sizes + rng.integers(sizes)]
        rest = np.delete(np.arange(len(identity)), enrolled)
        rates.append(rank_k(unit[rest], identity[rest], unit[enrolled], identity[enrolled]))
    return float(np.mean(rates))


def _sampled_accuracy(
    unit: np.ndarray,  # [N, d]
    identity: np.ndarray,  # [N] 0 to U-1
    seed: int,
) -> float:
    if not _fills(identity, FOLDS):
        return float("nan")
    first, second, same = sample_pairs(identity, PAIRS, seed)
    return verification_accuracy(unit[first], unit[second], same)[0]


def _fills(
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
    """Deals identities out at random, those of one image last: every fold gets one with a genuine pair."""
    order = rng.permutation(identity.max() + 1)
    order = order[(np.bincount(identity)[order] == 1).argsort(kind="stable")]
    fold = np.empty_like(order)
    fold[order] = np.arange(len(order)) % folds
    images = identity.argsort(kind="stable")
    return [images[fold[identity[images]] == f] for f in range(folds)]


def _draw_pairs(
    starts: np.ndarray,  # [m] for images in order of identity: where the identity of each one starts
    each: int,
    rng: np.random.Generator,
) -> np.ndarray:  # [2, 2 each] places: `each` different genuine pairs, then as many impostor pairs
    """Image p pairs with those before it: from starts[p] on genuine, else impostor. Draws pair numbers."""
    here = np.arange(len(starts))
    kinds = []
    for lowest, partners in ((starts, here - starts), (np.zeros_like(starts), starts)):
        ends = partners.cumsum()
        number = rng.choice(ends[-1], each, replace=False)
        p = np.searchsorted(ends, number, "right")
        kinds.append([p, lowest[p] + number - (ends - partners)[p]])
    return np.concatenate(kinds, axis=1)


def _blocks(rows: int, columns: int) -> Iterator[slice]:
    """Slices over the rows of a rows x columns array of scores, BLOCK scores each or one row."""
    step = max(1, BLOCK // max(1, columns))
    return (slice(start, min(start + step, rows)) for start in range(0, rows, step))


def _unit(x: Array) -> np.ndarray:  # [n, d] -> float64 rows of length 1
    rows = _rows(x)
    rows = rows / np.abs(rows).max(1, keepdims=True)  # so that no square overflows or vanishes
    return rows / np.sqrt((rows**2).sum(1, keepdims=True))


def _rows(x: Array) -> np.ndarray:  # [n, d] -> float64, checked
    rows = _array(x)
    if rows.ndim != 2 or rows.dtype.kind not in "fiu":
        raise ValueError(f"embeddings are {rows.dtype} {rows.shape}; wanted real numbers [n, d]")
    rows = rows.astype(np.float64)
    bad = ~np.isfinite(rows).all(1) | ~rows.any(1)
    if bad.any():
        raise ValueError(f"embedding {bad.argmax()} of {len(rows)} is zero or not finite; wanted a direction")
    return rows


def _scores(name: str, x: Array) -> np.ndarray:  # [n]
    scores = _array(x)
    if scores.ndim != 1 or not scores.size or not np.isfinite(scores).all():
        raise ValueError(f"{name} scores have shape {scores.shape}; wanted [n], at least one, all finite")
    return scores


def _identities(labels: Array, images: int) -> np.ndarray:  # [N] of any kind -> [N] 0 to U-1
    return np.unique(_labels(labels, images), return_inverse=True)[1]


def _labels(x: Array, images: int) -> np.ndarray:  # [n]
    labels = _array(x)
    if labels.shape != (images,):
        raise ValueError(f"labels have shape {labels.shape}; wanted one for each of {images} images")
    return labels


def _array(x: Array) -> np.ndarray:
    if isinstance(x, Tensor):
        x = x.detach().cpu()
        return (x.double() if x.is_floating_point() else x).numpy()  # numpy has no bfloat16
    return np.asarray(x)
