"""Distractors, MegaFace's curve, open-set DIR and coverage at precision, against brute force and by hand."""

import math

import numpy as np
import pytest
import torch
from embeddings import blobs, unit

from fastmargin.evaluation import (
    arrays,
    classify,
    cmc,
    coverage_at_precision,
    dir_at_far,
    megaface_cmc,
    prototypes,
    rank_k,
)


def cosines(a, b):
    """[len(a), len(b)] float32, as the metrics compute them."""
    return unit(np.asarray(a, float)).astype(np.float32) @ unit(np.asarray(b, float)).astype(np.float32).T


def tied(rng, rows):
    """Axes and diagonals of four dimensions: many cosines are equal, and all are exact: 0, .5, -.5, 1, -1."""
    axes, diagonals = np.eye(4)[rng.integers(4, size=rows)], rng.choice([-1, 1], size=(rows, 4))
    return np.where(rng.random((rows, 1)) < 0.5, axes, diagonals) * rng.choice([-4, 1, 2], size=(rows, 1))


# ---- distractors ----


@pytest.mark.parametrize("block", [1, 70, 2**22])
@pytest.mark.parametrize("ties", [False, True])
def test_cmc_with_distractors_equals_brute_force(block, ties, monkeypatch):
    monkeypatch.setattr(arrays, "BLOCK", block)
    rng = np.random.default_rng(0)
    x, y = blobs(60, 9, noise=2.0)
    x = tied(rng, 60) if ties else x
    distractors = tied(rng, 31) if ties else rng.normal(size=(31, 16))
    probes, labels, gallery, gallery_labels = x[:30], y[:30], x[30:], y[30:]
    has_mate = np.isin(labels, gallery_labels)
    probes, labels = probes[has_mate], labels[has_mate]
    ranks = []
    for to_gallery, to_others, label in zip(
        cosines(probes, gallery), cosines(probes, distractors), labels, strict=True
    ):
        best = to_gallery[gallery_labels == label].max()
        ranks.append(1 + (to_gallery[gallery_labels != label] >= best).sum() + (to_others >= best).sum())
    expected = [np.mean(np.array(ranks) <= r) for r in range(1, 62)]
    got = cmc(probes, labels, gallery, gallery_labels, 61, torch.from_numpy(distractors))
    np.testing.assert_allclose(got, expected, atol=1e-12)
    without = cmc(probes, labels, gallery, gallery_labels, 61)
    assert got[-1] == 1 and (got <= without).all() and got[9] < without[9]
    assert rank_k(probes, labels, gallery, gallery_labels, 3, distractors) == got[2]
    assert rank_k(probes, labels, gallery, gallery_labels, 3, distractors[:0]) == without[2]


@pytest.mark.parametrize("block", [1, 70, 2**22])
@pytest.mark.parametrize("ties", [False, True])
def test_megaface_cmc_equals_brute_force(block, ties, monkeypatch):
    monkeypatch.setattr(arrays, "BLOCK", block)
    rng = np.random.default_rng(1)
    x, y = blobs(40, 9, noise=1.5)
    x = tied(rng, 40) if ties else x
    distractors = tied(rng, 50) if ties else rng.normal(size=(50, 16))
    among, beside = cosines(x, x), cosines(x, distractors)
    ranks = [
        1 + (beside[i] >= among[i, j]).sum() for i in range(40) for j in range(40) if i != j and y[i] == y[j]
    ]  # each pair of mates, in either order
    expected = [np.mean(np.array(ranks) <= r) for r in range(1, 52)]
    got = megaface_cmc(x, y, distractors, 51)
    np.testing.assert_allclose(got, expected, atol=1e-12)
    assert got[-1] == 1 and 0 < got[9] < 1


def test_megaface_by_hand():
    """Mates at 60 degrees; of three distractors one ties with that, one is nearer to the first image only."""
    angles = np.radians([0, 60, -60, -30, 180])
    x = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    assert megaface_cmc(x[:2], [7, 7], x[2:], 3).tolist() == [0.5, 0.5, 1]
    assert megaface_cmc(x[:2], [7, 7], x[:0], 1).tolist() == [1]
    with pytest.raises(ValueError, match="1 of 3 probes have no mate among the probes"):
        megaface_cmc(x[:3], [7, 7, 8], x[3:], 1)
    with pytest.raises(ValueError, match="0 of 0 probes"):
        megaface_cmc(x[:0], [], x, 1)
    with pytest.raises(ValueError, match="k is 0"):
        megaface_cmc(x[:2], [7, 7], x[2:], 0)


# ---- open set ----


def brute_force_dir(probes, labels, gallery, gallery_labels, far, k):
    """The best DIR over every threshold, accepting what is above it, that keeps the FAR."""
    scores = cosines(probes, gallery)
    known = np.isin(labels, gallery_labels)
    impostor = scores[~known].max(1)
    allowed = far * len(impostor) + 1e-9
    if allowed < 1:
        return math.nan
    mates, ranks = [], []
    for row, label in zip(scores[known], np.asarray(labels)[known], strict=True):
        mates.append(row[gallery_labels == label].max())
        ranks.append(1 + (row[gallery_labels != label] >= mates[-1]).sum())
    mates, ranks = np.array(mates), np.array(ranks)
    thresholds = [-math.inf, *impostor, *mates]
    return max(np.mean((mates > t) & (ranks <= k)) for t in thresholds if (impostor > t).sum() <= allowed)


@pytest.mark.parametrize("ties", [False, True])
def test_dir_at_far_equals_brute_force(ties):
    rng = np.random.default_rng(2)
    for seed in range(12):
        x, y = blobs(70, 12, noise=1.0, seed=seed)
        x = tied(rng, 70) if ties else x
        gallery = (y < 6) & (np.arange(70) % 2 == 0)
        given = x[~gallery], y[~gallery], x[gallery], y[gallery]
        for far in (0.001, 0.05, 0.2, 1.0):
            for k in (1, 3):
                got, expected = dir_at_far(*given, far, k), brute_force_dir(*given, far, k)
                assert got == pytest.approx(expected, abs=1e-12, nan_ok=True)


def test_dir_at_far_by_hand():
    """Ten impostors score 0.0 to 0.9 against the one enrolled; a mate scores 0.85."""
    angles = np.arccos(np.append(np.arange(10) / 10, 0.85))
    probes = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    given = probes, [9] * 10 + [1], [[1.0, 0]], [1]
    assert [dir_at_far(*given, far) for far in (0.1, 0.2, 1.0)] == [1, 1, 1]
    assert math.isnan(dir_at_far(*given, 0.09)), "less than one impostor: not resolvable"
    angles[10] = angles[8]  # ties with the second-best impostor
    given = np.stack([np.cos(angles), np.sin(angles)], axis=1), *given[1:]
    assert [dir_at_far(*given, far) for far in (0.1, 0.19, 0.2)] == [0, 0, 1]
    for labels, said in (([1] * 11, "11 of 11 probes are enrolled"), ([9] * 11, "0 of 11 probes are enrolled")):
        with pytest.raises(ValueError, match=said):
            dir_at_far(probes, labels, [[1.0, 0]], [1], 0.1)
    with pytest.raises(ValueError, match=r"far is 2\.0"):
        dir_at_far(*given, 2.0)
    with pytest.raises(ValueError, match="k is 0"):
        dir_at_far(*given, 0.1, k=0)


# ---- coverage at precision ----


def brute_force_coverage(confidence, correct, precision):
    best = 0.0
    for threshold in confidence:
        accepted = confidence >= threshold
        if correct[accepted].mean() >= precision - 1e-12:
            best = max(best, accepted.mean())
    return best


@pytest.mark.parametrize("values", [2, 5, 10**6])
def test_coverage_equals_brute_force(values):
    rng = np.random.default_rng(values)
    for _ in range(80):
        n = rng.integers(1, 40)
        confidence = rng.integers(values, size=n) / values
        correct = rng.random(n) < 0.3 + 0.7 * confidence
        for precision in (0.3, 2 / 3, 0.9, 0.99, 1.0):
            got = coverage_at_precision(confidence, correct, precision)
            assert got == pytest.approx(brute_force_coverage(confidence, correct, precision), abs=1e-12)


def test_coverage_equals_scikit_learn():
    metrics = pytest.importorskip("sklearn.metrics")
    rng = np.random.default_rng(0)
    confidence = rng.random(500).round(2)
    correct = rng.random(500) < confidence
    precisions, _, thresholds = metrics.precision_recall_curve(correct, confidence)
    for wanted in (0.6, 0.8, 0.9):
        lowest = thresholds[precisions[:-1] >= wanted].min()
        assert coverage_at_precision(confidence, correct, wanted) == pytest.approx((confidence >= lowest).mean())


def test_coverage_by_hand():
    correct = torch.tensor([1, 1, 0, 1, 1, 1, 1, 1, 1, 1])
    confidence = torch.arange(10, 0, -1) / 10
    assert coverage_at_precision(confidence, correct, 0.9) == 1.0, "the one error is diluted again"
    assert coverage_at_precision(confidence, correct, 0.99) == 0.2
    assert coverage_at_precision(confidence, correct.flip(0), 0.99) == 0.7
    assert coverage_at_precision(torch.ones(10), correct, 0.95) == 0, "equal confidences stand or fall together"


def test_coverage_refuses():
    for precision in (0.0, 1.1, math.nan):
        with pytest.raises(ValueError, match=f"precision is {precision}"):
            coverage_at_precision([0.5], [1], precision)
    for confidence, correct in (([], []), ([0.5], [1, 0]), ([[0.5]], [[1]])):
        with pytest.raises(ValueError, match=r"want \[P\] of each"):
            coverage_at_precision(confidence, correct, 0.9)
    for confidence, correct in (([math.nan], [1]), ([0.5], [2])):
        with pytest.raises(ValueError, match="finite, and correct of 0 and 1"):
            coverage_at_precision(confidence, correct, 0.9)


def test_prototypes_are_true_means():
    x, y = blobs(50, 7)
    means, names = prototypes(torch.from_numpy(x), np.array(list("abcdefg"))[y])
    assert names.tolist() == list("abcdefg")
    np.testing.assert_allclose(means, [x[y == c].mean(0) for c in range(7)], atol=1e-12)


@pytest.mark.parametrize("ties", [False, True])
def test_classify_equals_brute_force(ties):
    rng = np.random.default_rng(4)
    x, y = blobs(80, 10, noise=1.5)
    x = tied(rng, 80) if ties else x
    among, names = tied(rng, 12) if ties else rng.normal(size=(12, 16)), np.arange(12) % 9  # label 9 has none
    confidence, correct = classify(x, y, among, names)
    for row, label, sure, right in zip(cosines(x, among), y, confidence, correct, strict=True):
        assert sure == pytest.approx(row.max(), abs=1e-6)
        assert right == (set(names[row == row.max()]) == {label}), "a tie with another's prototype is wrong"
    assert 0 < correct.mean() < 1
    with pytest.raises(ValueError, match="the gallery is empty"):
        classify(x, y, among[:0], names[:0])
