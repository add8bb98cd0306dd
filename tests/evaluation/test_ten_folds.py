"""Ten-fold accuracy in every variant, VAL, and the pairs they are measured on, against brute force and by hand."""

import itertools
import math

import numpy as np
import pytest
import torch
from embeddings import unit

from fastmargin.evaluation import sample_pairs, validation_rate, verification_accuracy

# ---- ten folds ----


def judge(variant, score, same, t):
    """Share of pairs that the threshold t gets right, written as in the two public codes."""
    if variant != "sphereface":
        return np.mean((score < t) == same)
    return (np.sum(score[same] > t) + np.sum(score[~same] < t)) / len(score)


def brute_force_accuracy(a, b, same, folds, variant):
    """Every variant, threshold by threshold."""
    fold = np.concatenate([np.full(len(part), f) for f, part in enumerate(np.array_split(same, folds))])
    rates = []
    for f in range(folds):
        train, test = fold != f, fold == f
        if variant == "insightface":
            score, thresholds = ((unit(a) - unit(b)) ** 2).sum(1), np.arange(0, 4, 0.01)
        elif variant == "euclidean":
            score = np.sqrt(((a - b) ** 2).sum(1))
            known = sorted(set(score[train]))
            thresholds = np.array([0, *(sum(two) / 2 for two in itertools.pairwise(known)), math.inf])
        else:
            mean = np.concatenate([a[train], b[train]]).mean(0)
            score, thresholds = (unit(a - mean) * unit(b - mean)).sum(1), np.arange(-10000, 10001) / 10000
        rate = np.array([judge(variant, score[train], same[train], t) for t in thresholds])
        best = thresholds[rate == rate.max()]
        best = best.mean() if variant == "sphereface" else best[0]
        rates.append(judge(variant, score[test], same[test], best))
    return np.mean(rates), np.std(rates)


@pytest.mark.parametrize(("pairs", "folds"), [(47, 10), (31, 2), (5, 5)])
@pytest.mark.parametrize("variant", ["insightface", "sphereface", "euclidean"])
def test_verification_accuracy_equals_brute_force(pairs, folds, variant):
    rng = np.random.default_rng(pairs)
    same = rng.random(pairs) < 0.5
    a = (rng.normal(size=(pairs, 4)) + 0.5) * rng.uniform(0.1, 10, (pairs, 1))
    b = np.where(same[:, None], a, 0) + rng.normal(size=(pairs, 4))
    expected = brute_force_accuracy(a, b, same, folds, variant)
    assert verification_accuracy(a, b, same, folds, variant) == pytest.approx(expected, abs=1e-12)
    tensors = (torch.from_numpy(x) for x in (a, b, same.astype(int)))
    assert verification_accuracy(*tensors, folds=folds, variant=variant) == pytest.approx(expected, abs=1e-12)


def pair_at(cosine):
    return [1.0, 0.0], [cosine, math.sqrt(1 - cosine**2)]


def test_insightface_takes_the_first_of_the_best_thresholds():
    """Genuine pairs at squared distance 2, impostors at 4: 2.01 to 3.99 are equally good, 2.01 is taken."""
    pairs = [pair_at(0), pair_at(-1)] * 10
    same = np.array([1, 0] * 10)
    for distance, expected in (
        (2.005, (1, 0)),
        (2.5, (0.95, 0.15)),
    ):  # fold 0 fails, its pair moves the others
        pairs[0] = pair_at(1 - distance / 2)
        a, b = map(np.array, zip(*pairs, strict=True))
        assert verification_accuracy(a, b, same) == pytest.approx(expected)


def test_insightface_refuses_a_distance_at_the_threshold():
    """Genuine at 1.995, impostors at 2: the threshold 2.00 alone is perfect."""
    a, b = map(np.array, zip(*[pair_at(0.0025), ([1.0, 0.0], [0.0, 1.0])] * 10, strict=True))
    assert verification_accuracy(a, b, np.array([1, 0] * 10)) == (1, 0)


def test_sphereface_takes_the_mean_of_the_best_thresholds():
    """Genuine cosines 1, impostors -1: every threshold between is equally good, their mean is 0."""
    e = np.array([1.0, 0])
    fold = [(e, e), (-e, -e), (e, -e), (-e, e)]  # sums to zero: no mean to subtract
    same = np.array([1, 1, 0, 0] * 10)
    for cosine, expected in ((0.1, (1, 0)), (-0.1, (0.95, 0.15))):
        u, v = map(np.array, pair_at(cosine))
        pairs = [(u, v), (-u, -v), *fold[2:], *fold * 9]
        a, b = (np.array(side) for side in zip(*pairs, strict=True))
        assert verification_accuracy(a, b, same, variant="sphereface") == pytest.approx(expected)


def test_sphereface_counts_a_score_at_the_threshold_as_wrong():
    """Cosines of .00005 and -.00005 leave the threshold 0 alone as the best; fold 0 has impostors at 0."""

    def fold(genuine, impostor):
        sides = [tuple(map(np.array, pair_at(cosine))) for cosine in (genuine, impostor)]
        return [(sign * u, sign * v) for u, v in sides for sign in (1, -1)]

    a, b = map(np.array, zip(*fold(5e-5, 0.0), *fold(5e-5, -5e-5) * 9, strict=True))
    same = np.array([1, 1, 0, 0] * 10)
    assert verification_accuracy(a, b, same, variant="sphereface") == pytest.approx((0.95, 0.15))


def test_euclidean_takes_embeddings_as_they_are():
    """Genuine pairs one apart, impostors three, of any length; fold 0 has one at 2, halfway, which is refused."""
    a = np.array([[0.0, 0], [5, 5], [0, 100], [0, 0]] * 10)
    b = a + [[1, 0], [0, 1], [3, 0], [0, 3]] * 10
    same = np.array([1, 1, 0, 0] * 10)
    assert verification_accuracy(a, b, same, variant="euclidean") == (1, 0)
    for distance, expected in ((1.999, (1, 0)), (2.0, (0.975, 0.075))):
        b[0] = distance, 0
        assert verification_accuracy(a, b, same, variant="euclidean") == pytest.approx(expected)


def test_euclidean_breaks_ties_toward_the_nearer_threshold():
    """All distances are equal: refusing all is as good as accepting all, and is tried first."""
    a, b = np.zeros((8, 2)), np.ones((8, 2))
    assert verification_accuracy(a, b, [1, 0] * 4, folds=2, variant="euclidean") == (0.5, 0)
    assert verification_accuracy(a, b, [1, 1, 1, 0] * 2, folds=2, variant="euclidean") == (0.75, 0)
    assert verification_accuracy(a, a, [1, 0, 0, 0] * 2, folds=2, variant="euclidean") == (0.75, 0)


# ---- VAL ----


def brute_force_val(a, b, same, far, folds):
    """facenet's calculate_val; where its interpolation meets equal rates, the last of them counts."""
    distance = ((unit(a) - unit(b)) ** 2).sum(1)
    fold = np.concatenate([np.full(len(part), f) for f, part in enumerate(np.array_split(same, folds))])
    vals, fars = [], []
    for f in range(folds):
        train, test = fold != f, fold == f
        grid = np.arange(0, 4, 0.001)
        rates = [np.mean(distance[train & ~same] < t) for t in grid]
        threshold = 0.0
        if max(rates) >= far:
            i = max(i for i, rate in enumerate(rates) if rate <= far)
            step = 0 if rates[i] == far else (far - rates[i]) / (rates[i + 1] - rates[i])
            threshold = grid[i] + step * 0.001
        for kind, into in ((same, vals), (~same, fars)):
            if (test & kind).any():
                into.append(np.mean(distance[test & kind] < threshold))
    return np.mean(vals), np.std(vals), np.mean(fars)


@pytest.mark.parametrize(("pairs", "folds", "far"), [(200, 10, 0.05), (200, 10, 0.25), (90, 3, 0.1), (60, 5, 1.0)])
def test_validation_rate_equals_brute_force(pairs, folds, far):
    rng = np.random.default_rng(pairs)
    same = rng.random(pairs) < 0.5
    a = rng.normal(size=(pairs, 6))
    b = np.where(same[:, None], a, 0) + rng.normal(size=(pairs, 6))
    expected = brute_force_val(a, b, same, far, folds)
    assert validation_rate(a, b, same, far, folds) == pytest.approx(expected, abs=1e-12)
    assert 0 < expected[0] and expected[2] > 0
    tensors = (torch.from_numpy(x) for x in (a, b, same.astype(int)))
    assert validation_rate(*tensors, far=far, folds=folds) == pytest.approx(expected, abs=1e-12)


def test_validation_rate_of_rates_that_cannot_be_resolved():
    a = np.eye(2)[[0, 0] * 10]
    b = np.eye(2)[[0, 1] * 10]
    same = np.array([1, 0] * 10)
    assert validation_rate(a, b, same, far=1 / 9) == (1, 0, 1), "9 impostors, all at 2: a line cannot part them"
    assert all(map(math.isnan, validation_rate(a, b, same, far=0.11))), "less than one of them"
    assert all(map(math.isnan, validation_rate(a, b, np.ones(20), far=1.0))), "no impostor at all"
    val, deviation, far = validation_rate(a, b, np.zeros(20), far=1.0)
    assert math.isnan(val) and math.isnan(deviation) and far == 1, "no genuine pair"
    halves = np.repeat([1, 0], 10)
    assert all(map(math.isnan, validation_rate(a, b, halves, far=0.5, folds=2))), "one fold has all impostors"
    with pytest.raises(ValueError, match=r"far is 0\.0"):
        validation_rate(a, b, same, far=0.0)


def test_folds_of_one_class():
    """Two folds, one all genuine at distance 0, one all impostors at distance 2."""
    a, b = np.tile([1.0, 0], (20, 1)), np.repeat([[1.0, 0], [0, 1]], 10, axis=0)
    same = np.repeat([True, False], 10)
    # Trained on impostors alone the first threshold, 0, is perfect and refuses all; on genuine alone .01 is.
    assert verification_accuracy(a, b, same, folds=2) == (0.5, 0.5)
    expected = brute_force_accuracy(a, b + 0.1, same, 2, "sphereface")
    assert verification_accuracy(a, b + 0.1, same, 2, "sphereface") == pytest.approx(expected)
    assert verification_accuracy(a[10:], b[10:], same[10:], folds=10) == (1, 0)
    # "euclidean" learns to refuse all from impostors alone, and to accept all from genuine pairs alone.
    assert verification_accuracy(a, b, same, 2, "euclidean") == (0, 0)
    assert verification_accuracy(a[10:], b[10:], same[10:], 10, "euclidean") == (1, 0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"variant": "lfw"}, "variant is 'lfw'; want one of insightface, sphereface, euclidean"),
        ({"a": np.ones((4, 2))}, "want"),
        ({"same": [1, 0, 1]}, "want"),
        ({"same": [1, 0, 1, 0, -1]}, "of 0 and 1"),
        ({"folds": 1}, "folds is 1 for 5 pairs"),
        ({"folds": 6}, "folds is 6 for 5 pairs"),
        ({"b": np.zeros((5, 3))}, "embedding 0 of 5 is zero"),
        ({"b": np.full((5, 3), np.nan), "variant": "euclidean"}, "embedding 0 of 5 is not finite"),
        (
            {"variant": "sphereface"},
            "embedding 0 of 5 is zero",
        ),  # all rows are equal: nothing is left of them
    ],
)
def test_verification_accuracy_refuses(changes, message):
    usual = {"a": np.ones((5, 3)), "b": np.ones((5, 3)), "same": [1, 0, 1, 0, 1], "folds": 5}
    with pytest.raises(ValueError, match=message):
        verification_accuracy(**{**usual, **changes})


# ---- pairs for the folds ----


@pytest.mark.parametrize("folds", [2, 7, 10])
def test_sampled_pairs_are_balanced_distinct_and_disjoint_in_identity(folds):
    labels = np.random.default_rng(0).integers(1000, size=2500) * 3 + 5  # many identities have one image
    first, second, same = sample_pairs(labels, 600, seed=1, folds=folds)
    assert len(first) == len(second) == len(same) == 600 // (2 * folds) * 2 * folds
    assert ((labels[first] == labels[second]) == same).all() and (first != second).all()
    identities = []
    for f, s, kind in zip(*(np.split(x, folds) for x in (first, second, same)), strict=True):
        assert 2 * kind.sum() == len(kind)
        assert len({frozenset(pair) for pair in zip(f, s, strict=True)}) == len(f)
        identities.append({*labels[f], *labels[s]})
    assert len(set.union(*identities)) == sum(map(len, identities))


def test_sampled_pairs_are_uniform_and_repeatable():
    labels = np.array([0, 0, 0, 1, 1, 2, 2, 2, 2, 3, 3, 3])
    count = np.zeros((12, 12))
    for seed in range(3000):
        drawn = sample_pairs(torch.from_numpy(labels), 8, seed, folds=2)
        np.add.at(count, (drawn.first, drawn.second), 1)
    assert all(map(np.array_equal, drawn, sample_pairs(labels, 8, 2999, folds=2)))
    assert not np.array_equal(drawn.first, sample_pairs(labels, 8, 0, folds=2).first)
    # A fold is two of the four identities, each split equally likely; it gives 2 of its genuine, 2 of its
    # impostor pairs, but for the one pair of identity 1, whose partner's pairs make up the rest.
    sizes = np.bincount(labels)
    genuine = sizes * (sizes - 1) // 2
    expected = np.zeros((12, 12))
    for i, j in itertools.permutations(range(12), 2):
        a, b = labels[i], labels[j]
        for fold in itertools.combinations(range(4), 2):
            if i > j and a in fold and b in fold:
                pool = genuine[list(fold)].sum() if a == b else sizes[list(fold)].prod()
                expected[i, j] += 3000 / 3 * 2 / pool
    assert abs(count - expected).max() < 5 * math.sqrt(expected.max())
    assert count.sum() == expected.sum() == 3000 * 8


def test_fewer_pairs_where_a_fold_has_no_more():
    labels = np.repeat(np.arange(8), 2)  # a fold of four pairs of images
    drawn = sample_pairs(labels, 10_000, 0, folds=2)
    assert len(drawn.same) == 16
    assert sorted(drawn.first[drawn.same] // 2) == list(range(8)), "each genuine pair once"
    alone = np.r_[np.arange(20), np.arange(4)]  # four identities have two images, sixteen have one
    for seed in range(10):
        assert len(sample_pairs(alone, 100, seed, folds=4).same) == 8


@pytest.mark.parametrize(
    ("labels", "pairs", "folds", "message"),
    [
        (np.arange(40) % 20, 18, 10, "18 pairs in 10 folds"),
        (np.arange(40) % 20, 100, 1, "100 pairs in 1 folds"),
        (np.arange(38) % 19, 100, 10, "10 folds need 20 identities"),
        (np.r_[np.arange(30), np.arange(9)], 100, 10, "10 of them with 2 images"),
        (np.zeros((4, 2)), 100, 10, "want one for each"),
    ],
)
def test_sample_pairs_refuses(labels, pairs, folds, message):
    with pytest.raises(ValueError, match=message):
        sample_pairs(labels, pairs, 0, folds)
