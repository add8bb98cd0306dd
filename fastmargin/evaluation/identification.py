"""Identification: whose image is it? A probe is compared by cosine with a gallery of enrolled images.

Rank. A mate is a gallery image of the probe's identity. The rank is 1 + the number of gallery images of others that
score at least the probe's best mate: ties count against the probe.

CMC. cmc[r - 1] is the share of probes of rank r or better. Distractors are gallery images of other identities.
MegaFace's (Kemelmacher-Shlizerman et al. 2016): every image is a probe once for each other image of its
identity, which alone is enrolled beside the distractors.

Open set. A probe whose identity is not enrolled is an impostor; its score is its best one. DIR at FAR and rank k is
the share of the other probes of rank k or better whose mate scores strictly above the threshold, the
(n + 1)-th largest impostor score, n = floor(far impostors). BLUFR (Liao et al. 2014) reports at k = 1 the mean
less the standard deviation over 10 trials.

Coverage at precision (Guo and Zhang 2017; Doppelganger Mining, section 4.1). A probe is given the identity of
its best prototype, the mean embedding of a class, with that cosine as confidence. The most confident probes
are accepted, equal confidences together: as many as can be while the precision among them, the share that is
right, holds. Coverage is the accepted share of all probes.
"""

from typing import NamedTuple

import numpy as np

from fastmargin.evaluation.arrays import Array, array, blocks, identities, labels, unit, vectors
from fastmargin.evaluation.verification import accepted_impostors, thresholds


class Search(NamedTuple):
    """The result of a search of the gallery, for each probe."""

    mate: np.ndarray  # [P] the best score of an image of its own identity, -inf if there is none
    rivals: np.ndarray  # [P] images of others that score at least that
    best: np.ndarray  # [P] the best score of any image


def cmc(
    probes: Array,  # [P, d]
    probe_labels: Array,  # [P]
    gallery: Array,  # [Q, d]
    gallery_labels: Array,  # [Q]
    k: int,
    distractors: Array | None = None,  # [D, d]
) -> np.ndarray:  # [k]
    """Cumulative match curve by cosine, ranks 1 to k. An identity may have several gallery images. See the module.

    Args:
        probes: [P, d].
        probe_labels: [P] of any kind.
        gallery: [Q, d].
        gallery_labels: [Q] of the same kind.
        k: the last rank.
        distractors: [D, d], gallery images of nobody among the probes.

    Returns:
        [k], the share of probes of each rank or better.

    Raises:
        ValueError: k < 1, no probes, a probe without a mate in the gallery, rows zero or not finite.
    """
    _check_rank(k)
    probed, enrolled = labels(probe_labels, len(array(probes))), labels(gallery_labels, len(array(gallery)))
    stray = int((~np.isin(probed, enrolled)).sum())
    if stray or not len(probed):
        raise ValueError(f"{stray} of {len(probed)} probes have no mate in the gallery; want one for each")
    return _curve(search(probes, probed, gallery, enrolled, distractors).rivals, k)


def rank_k(
    probes: Array,  # [P, d]
    probe_labels: Array,  # [P]
    gallery: Array,  # [Q, d]
    gallery_labels: Array,  # [Q]
    k: int = 1,
    distractors: Array | None = None,  # [D, d]
) -> float:
    """Share of probes of rank k or better: the last value of `cmc`.

    Args:
        probes: [P, d].
        probe_labels: [P] of any kind.
        gallery: [Q, d].
        gallery_labels: [Q] of the same kind.
        k: the rank.
        distractors: [D, d], gallery images of nobody among the probes.

    Returns:
        A share.

    Raises:
        ValueError: as `cmc`.
    """
    return float(cmc(probes, probe_labels, gallery, gallery_labels, k, distractors)[-1])


def megaface_cmc(
    probes: Array,  # [P, d]
    probe_labels: Array,  # [P]
    distractors: Array,  # [D, d]
    k: int,
) -> np.ndarray:  # [k]
    """MegaFace's curve: one enrolled mate at a time among the distractors (Kemelmacher-Shlizerman et al. 2016).

    Args:
        probes: [P, d].
        probe_labels: [P] of any kind.
        distractors: [D, d].
        k: the last rank.

    Returns:
        [k], the share of probes of each rank or better.

    Raises:
        ValueError: k < 1, a probe without a mate among the probes, rows zero or not finite.
    """
    _check_rank(k)
    probe = unit(probes).astype(np.float32)
    identity = identities(probe_labels, len(probe))
    alone = int((np.bincount(identity)[identity] == 1).sum())
    if alone or not len(probe):
        raise ValueError(f"{alone} of {len(probe)} probes have no mate among the probes; want one for each")
    enrolled = np.concatenate([probe, unit(distractors).astype(np.float32)])
    before = []
    for rows in blocks(len(probe), len(enrolled)):
        scores = probe[rows] @ enrolled.T
        others = np.sort(scores[:, len(probe) :], axis=1)
        for row, mates in enumerate(identity[rows, None] == identity):
            mates[rows.start + row] = False
            before.append(others.shape[1] - np.searchsorted(others[row], scores[row, : len(probe)][mates], "left"))
    return _curve(np.concatenate(before), k)


def dir_at_far(
    probes: Array,  # [P, d]
    probe_labels: Array,  # [P]
    gallery: Array,  # [Q, d]
    gallery_labels: Array,  # [Q]
    far: float,
    k: int = 1,
) -> float:
    """Detection and identification rate at rank k, open set. See the module.

    Args:
        probes: [P, d].
        probe_labels: [P] of any kind. Those whose label is not in the gallery are the impostors.
        gallery: [Q, d].
        gallery_labels: [Q] of the same kind.
        far: the false accept rate, in (0, 1].
        k: the rank.

    Returns:
        A share; NaN where far < 1/impostors.

    Raises:
        ValueError: far outside (0, 1], k < 1, no impostor or no other probe, rows zero or not finite.
    """
    _check_rank(k)
    probed, enrolled = labels(probe_labels, len(array(probes))), labels(gallery_labels, len(array(gallery)))
    known = np.isin(probed, enrolled)
    if known.all() or not known.any():
        raise ValueError(f"{known.sum()} of {len(known)} probes are enrolled; want some, and some that are not")
    allowed = accepted_impostors(far, int((~known).sum()))
    found = search(probes, probed, gallery, enrolled)
    if not allowed:
        return float("nan")
    threshold = thresholds(found.best[~known], np.array(allowed))
    return float(((found.rivals < k) & (found.mate > threshold))[known].mean())


def prototypes(
    embeddings: Array,  # [N, d]
    labels: Array,  # [N]
) -> tuple[np.ndarray, np.ndarray]:  # [U, d] float64, [U]
    """The mean embedding of each identity, and its label.

    Args:
        embeddings: [N, d], not normalized here.
        labels: [N] of any kind.

    Returns:
        Means [U, d] float64, and labels [U], sorted.

    Raises:
        ValueError: wrong shapes, rows that are not finite.
    """
    rows = vectors(embeddings)
    identity = identities(labels, len(rows))
    names = np.unique(array(labels))
    sums = np.zeros((len(names), rows.shape[1]))
    np.add.at(sums, identity, rows)
    return sums / np.bincount(identity, minlength=len(names))[:, None], names


def classify(
    probes: Array,  # [P, d]
    probe_labels: Array,  # [P]
    prototypes: Array,  # [Q, d]
    prototype_labels: Array,  # [Q]
) -> tuple[np.ndarray, np.ndarray]:  # confidence [P] float32, correct [P] bool
    """The cosine of each probe's best prototype, and whether it is its own. A tie with another's is wrong.

    Args:
        probes: [P, d].
        probe_labels: [P] of any kind.
        prototypes: [Q, d].
        prototype_labels: [Q] of the same kind.

    Returns:
        Confidence [P] float32, and correct [P] bool.

    Raises:
        ValueError: no prototypes, rows zero or not finite.
    """
    probed, present = labels(probe_labels, len(array(probes))), labels(prototype_labels, len(array(prototypes)))
    found = search(probes, probed, prototypes, present)
    return found.best, np.isfinite(found.mate) & (found.rivals == 0)


def coverage_at_precision(
    confidence: Array,  # [P]
    correct: Array,  # [P] bool
    precision: float,
) -> float:
    """The largest accepted share whose precision is at least `precision` (Guo and Zhang 2017). See the module.

    Args:
        confidence: [P].
        correct: [P] bool, or 0 and 1.
        precision: a share in (0, 1].

    Returns:
        A share of all probes; 0 if there is none.

    Raises:
        ValueError: precision outside (0, 1], shapes that differ, no probe, confidences not finite.
    """
    if not 0 < precision <= 1:
        raise ValueError(f"precision is {precision}; want a share in (0, 1]")
    confidence, correct = array(confidence), array(correct)
    if confidence.ndim != 1 or correct.shape != confidence.shape or not confidence.size:
        raise ValueError(f"confidence {confidence.shape}, correct {correct.shape}; want [P] of each, P at least 1")
    if not np.isfinite(confidence).all() or not np.isin(correct, (0, 1)).all():
        raise ValueError("want confidences that are finite, and correct of 0 and 1")
    order = confidence.argsort()[::-1]
    right, accepted = correct[order].cumsum(), np.arange(1, len(order) + 1)
    last = np.append(np.diff(confidence[order]) != 0, True)  # of those equally confident
    holds = last & (right >= precision * accepted * (1 - 1e-12))
    return float(accepted[holds].max(initial=0) / len(order))


def search(
    probes: Array,  # [P, d]
    probed: np.ndarray,  # [P] labels
    gallery: Array,  # [Q, d]
    enrolled: np.ndarray,  # [Q] labels
    distractors: Array | None = None,  # [D, d]
) -> Search:
    """Compares every probe with the whole gallery by cosine, block by block. ValueError for an empty gallery."""
    probe, images = unit(probes).astype(np.float32), unit(gallery).astype(np.float32)
    if not len(images):
        raise ValueError("the gallery is empty; want at least one image")
    if distractors is not None:
        images = np.concatenate([images, unit(distractors).astype(np.float32)])
    found = []
    for rows in blocks(len(probe), len(images)):
        scores, own = probe[rows] @ images.T, np.zeros((rows.stop - rows.start, len(images)), bool)
        own[:, : len(enrolled)] = probed[rows, None] == enrolled
        mate = np.where(own, scores, -np.inf).max(1)
        found.append(Search(mate, ((scores >= mate[:, None]) & ~own).sum(1), scores.max(1)))
    return Search(*map(np.concatenate, zip(*found, strict=True))) if found else Search(*np.zeros((3, 0)))


def _curve(
    before: np.ndarray,  # [n] rivals that score at least the mate
    k: int,
) -> np.ndarray:  # [k]
    return np.bincount(before.clip(max=k), minlength=k + 1)[:k].cumsum() / len(before)


def _check_rank(k: int) -> None:
    if k < 1:
        raise ValueError(f"k is {k}; want at least 1")
