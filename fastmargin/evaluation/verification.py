"""Verification: are two images of one identity? Scores of pairs, and the rates at thresholds on them.

TAR at FAR (also called VR at FAR). n = floor(far I) impostors may be accepted. The threshold is the
(n + 1)-th largest impostor score, and scores strictly above it are accepted: ties count against the
embeddings. TAR is the accepted share of the genuine pairs. Where far < 1/I no count stands behind a
threshold: NaN, "not resolvable".
"""

from collections.abc import Sequence

import numpy as np

from fastmargin.evaluation.arrays import Array, blocks, identities, scores, unit


def cosine_scores(
    embeddings: Array,  # [N, d]
    labels: Array,  # [N]
) -> tuple[np.ndarray, np.ndarray]:  # [G], [I] float32
    """Cosines of all pairs of images, genuine and impostor, computed block by block.

    Args:
        embeddings: [N, d].
        labels: [N] of any kind.

    Returns:
        Genuine [G] and impostor [I], float32.

    Raises:
        ValueError: wrong shapes, rows that are zero or not finite, fewer than 2 identities, no genuine pair.
    """
    rows = unit(embeddings).astype(np.float32)
    identity = identities(labels, len(rows))
    sizes = np.bincount(identity)
    if len(sizes) < 2 or sizes.max(initial=0) < 2:
        raise ValueError(
            f"{len(rows)} images of {len(sizes)} identities, {sizes.max(initial=0)} or fewer of each; "
            "want at least 2 identities, one of them with 2 images"
        )
    genuine, impostor = [], []
    for block in blocks(len(rows), len(rows)):
        cosines = rows[block] @ rows[block.start :].T
        same = identity[block, None] == identity[block.start :]
        later = np.arange(cosines.shape[1]) > np.arange(cosines.shape[0])[:, None]
        genuine.append(cosines[later & same])
        impostor.append(cosines[later & ~same])
    return np.concatenate(genuine), np.concatenate(impostor)


def tar_at_far(
    genuine: Array,  # [G]
    impostor: Array,  # [I]
    far: float,
) -> float:
    """True accept rate where the false accept rate is at most `far`. See the module.

    Args:
        genuine: [G] scores of pairs of one identity.
        impostor: [I] of two identities.
        far: in (0, 1].

    Returns:
        A share; NaN where far < 1/I.

    Raises:
        ValueError: far outside (0, 1], scores that are empty or not finite.
    """
    return tars_at_fars(genuine, impostor, [far])[0]


def tars_at_fars(
    genuine: Array,  # [G]
    impostor: Array,  # [I]
    fars: Sequence[float],
) -> list[float]:
    """The `tar_at_far` of each, but scores are sorted once."""
    impostor = scores("impostor", impostor)
    allowed = np.array([accepted_impostors(far, impostor.size) for far in fars])
    return np.where(allowed > 0, accept_rates(genuine, impostor, allowed), np.nan).tolist()


def best_accuracy(
    genuine: Array,  # [G]
    impostor: Array,  # [I]
) -> float:
    """The share of scores on the right side of the threshold that is best for these very scores: an optimistic number.

    Genuine scores lie above it, impostors do not.

    Args:
        genuine: [G] scores of pairs of one identity.
        impostor: [I] of two identities.

    Returns:
        A share.

    Raises:
        ValueError: scores that are empty or not finite.
    """
    mates, others = (np.sort(scores(name, x)) for name, x in (("genuine", genuine), ("impostor", impostor)))
    tried = np.concatenate([[-np.inf], mates, others])
    accepted = len(mates) - np.searchsorted(mates, tried, "right")
    return float((accepted + np.searchsorted(others, tried, "right")).max() / (len(mates) + len(others)))


def roc(
    genuine: Array,  # [G]
    impostor: Array,  # [I]
    points: int = 200,
) -> tuple[np.ndarray, np.ndarray]:  # far [p], tar [p], p <= points
    """The ROC for a plot: FARs evenly spaced in their logarithm, 1/I to 1, and the `tar_at_far` of each.

    Args:
        genuine: [G] scores of pairs of one identity.
        impostor: [I] of two identities.
        points: at most so many, 2 or more.

    Returns:
        FAR [p] and TAR [p], p <= points.

    Raises:
        ValueError: points < 2, scores that are empty or not finite.
    """
    if points < 2:
        raise ValueError(f"points is {points}; want at least 2")
    impostor = scores("impostor", impostor)
    allowed = np.unique(np.geomspace(1, impostor.size, points).round().astype(np.int64))
    return allowed / impostor.size, accept_rates(genuine, impostor, allowed)


def accepted_impostors(far: float, impostors: int) -> int:
    """How many of them a false accept rate admits. ValueError for far outside (0, 1]."""
    if not 0 < far <= 1:
        raise ValueError(f"far is {far}; want a rate in (0, 1]")
    return int(far * impostors * (1 + 1e-12))  # 0.29 of 100 is 29, but 28.999... in floating point


def accept_rates(
    genuine: Array,  # [G]
    impostor: np.ndarray,  # [I]
    allowed: np.ndarray,  # [t] impostors that may be accepted, 0 to I
) -> np.ndarray:  # [t] share of genuine scores accepted
    """TAR at each number of accepted impostors."""
    genuine = np.sort(scores("genuine", genuine))
    return (len(genuine) - np.searchsorted(genuine, thresholds(impostor, allowed), "right")) / len(genuine)


def thresholds(
    impostor: np.ndarray,  # [I]
    allowed: np.ndarray,  # [t] 0 to I
) -> np.ndarray:  # [t]
    """What a score must exceed so that no more than `allowed` impostors are accepted."""
    refused = len(impostor) - allowed
    return np.where(refused > 0, np.sort(impostor)[refused - 1], -np.inf)
