"""The metrics against brute force, scikit-learn and cases that can be worked out by hand."""

import itertools
import math
import tracemalloc

import numpy as np
import pytest
import torch
from embeddings import blobs, unit

from fastmargin.evaluation import (
    arrays,
    best_accuracy,
    class_distances,
    cmc,
    cosine_scores,
    dir_at_far,
    evaluate_embeddings,
    evaluate_pairs,
    rank_k,
    roc,
    sample_pairs,
    tar_at_far,
    verification_accuracy,
)

# ---- scores of pairs ----


@pytest.mark.parametrize("block", [1, 100, 2**22])
def test_cosine_scores_are_all_pairs(block, monkeypatch):
    monkeypatch.setattr(arrays, "BLOCK", block)
    x, y = blobs(53, 9)
    pairs = list(itertools.combinations(range(53), 2))
    for got, kind in zip(cosine_scores(x, y), (True, False), strict=True):
        expected = sorted(unit(x)[i] @ unit(x)[j] for i, j in pairs if (y[i] == y[j]) == kind)
        assert got.dtype == np.float32
        np.testing.assert_allclose(np.sort(got), expected, atol=3e-7)


def test_cosine_scores_take_tensors_any_dtype_and_any_norm():
    x, y = blobs(20, 4)
    expected = cosine_scores(x, y)
    scale = np.logspace(-200, 200, 20)[:, None]
    for other in (torch.from_numpy(x).requires_grad_(), x * scale):
        for got, wanted in zip(cosine_scores(other, torch.from_numpy(y)), expected, strict=True):
            np.testing.assert_allclose(got, wanted, atol=3e-7)
    names = np.array(["alpha", "beta", "gamma", "delta"])[y]
    assert all(map(np.array_equal, cosine_scores(x, names), expected))
    pixels = (np.abs(x) * 50).astype(np.uint8)
    tensor = torch.from_numpy(pixels)
    for kind in (pixels, tensor, tensor.bfloat16(), pixels.astype(np.float16)):
        assert all(map(np.array_equal, cosine_scores(kind, y), cosine_scores(pixels.astype(float), y)))


@pytest.mark.parametrize(
    ("x", "y", "message"),
    [
        ([[1.0, 0], [0, 0], [1, 1]], [0, 0, 1], "embedding 1 of 3 is zero"),
        ([[1.0, 0], [1, 1], [1, math.nan]], [0, 0, 1], "embedding 2 of 3 is not finite"),
        ([[math.inf, 0], [1, 1], [1, 2]], [0, 0, 1], "embedding 0 of 3 is not finite"),
        ([[1.0, 0], [1, 1], [1, 2]], [0, 0, 0], "want at least 2 identities"),
        ([[1.0, 0], [1, 1], [1, 2]], [0, 1, 2], "one of them with 2 images"),
        ([[1.0, 0], [1, 1], [1, 2]], [0, 1], "want one for each of 3 images"),
        ([1.0, 2.0], [0, 1], r"want real numbers \[n, d\]"),
        ([[True], [True]], [0, 1], r"want real numbers \[n, d\]"),
        (np.zeros((0, 3)), [], "want at least 2 identities"),
        (np.zeros((2, 0)), [0, 0], "is zero"),
    ],
)
@pytest.mark.parametrize("function", [cosine_scores, evaluate_embeddings])
def test_bad_embeddings_are_refused(function, x, y, message):
    with pytest.raises(ValueError, match=message):
        function(np.array(x), np.array(y))


# ---- TAR at FAR ----


def brute_force_tar(genuine, impostor, far):
    """The best TAR over every threshold, accepting what is above it, that keeps the FAR."""
    allowed = far * len(impostor) + 1e-9
    if allowed < 1:
        return math.nan
    thresholds = [-math.inf, *genuine, *impostor]
    return max(np.mean(genuine > t) for t in thresholds if np.sum(impostor > t) <= allowed)


@pytest.mark.parametrize("values", [3, 10, 10**6])
def test_tar_at_far_equals_brute_force(values):
    rng = np.random.default_rng(values)
    for _ in range(60):
        genuine = rng.integers(values, size=rng.integers(1, 30)) / values + 0.2
        impostor = rng.integers(values, size=rng.integers(1, 40)) / values
        for far in (0.001, 0.024, 0.1, 0.25, 1 / len(impostor), 0.7, 1.0):
            got, expected = tar_at_far(genuine, impostor, far), brute_force_tar(genuine, impostor, far)
            assert got == pytest.approx(expected, abs=1e-12, nan_ok=True)


def test_tar_at_far_by_hand():
    impostor = np.arange(100) / 100  # 0 .. .99
    assert tar_at_far(impostor, impostor, 0.29) == 0.29  # though 0.29 * 100 < 29 in floating point
    assert tar_at_far(impostor, impostor, 0.299) == 0.29
    assert math.isnan(tar_at_far(impostor, impostor, 0.0099)), "fewer than one impostor: not resolvable"
    assert tar_at_far([0.985, 0.98, 0.5], impostor, 0.01) == pytest.approx(1 / 3), "a tie is not accepted"
    assert tar_at_far(torch.tensor([0.5]), torch.tensor([0.4, 0.3]).half(), 0.5) == 1
    assert tar_at_far([0.5, 0.5], [0.5] * 1000, 0.999) == 0, "all tied: nothing can be told apart"
    assert tar_at_far([0.1], [0.5], 1.0) == 1


def test_tar_and_roc_equal_scikit_learn():
    metrics = pytest.importorskip("sklearn.metrics")
    rng = np.random.default_rng(0)
    for digits in (1, 2, 9):
        genuine, impostor = rng.normal(1, 1, 300).round(digits), rng.normal(0, 1, 2000).round(digits)
        same, scores = np.repeat([1, 0], [300, 2000]), np.concatenate([genuine, impostor])
        fpr, tpr, _ = metrics.roc_curve(same, scores, drop_intermediate=False)
        far, tar = roc(genuine, impostor, points=50)
        for f, t in zip(far, tar, strict=True):
            assert t == pytest.approx(tpr[fpr <= f + 1e-12].max(), abs=1e-12)
            assert t == tar_at_far(genuine, impostor, f)
        for f in (5e-4, 1e-3, 1e-2, 0.1, 1.0):
            assert tar_at_far(genuine, impostor, f) == pytest.approx(tpr[fpr <= f].max(), abs=1e-12)


def test_roc_spans_every_rate_that_can_be_resolved():
    far, tar = roc(np.arange(50), np.arange(1000) / 10, points=40)
    assert far[0] == 1e-3 and far[-1] == 1 and tar[-1] == 1
    assert 30 < len(far) <= 40 and (np.diff(far) > 0).all() and (np.diff(tar) >= 0).all()
    far, tar = roc([0.5], [0.1])
    assert far.tolist() == [1.0] and tar.tolist() == [1.0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([0.5], [0.5], 0.0), r"far is 0\.0"),
        (([0.5], [0.5], 1.1), r"far is 1\.1"),
        (([0.5], [0.5], math.nan), "far is nan"),
        (([], [0.5], 1.0), "genuine scores"),
        (([0.5], [], 1.0), "impostor scores"),
        (([0.5], [0.5, math.nan], 1.0), "impostor scores"),
        (([[0.5]], [0.5], 1.0), "genuine scores"),
    ],
)
def test_tar_at_far_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        tar_at_far(*arguments)


def test_roc_refuses():
    with pytest.raises(ValueError, match="points is 1"):
        roc([0.5], [0.5], points=1)


# ---- rank-k ----


def brute_force_cmc(probes, probe_labels, gallery, gallery_labels, k):
    hits = np.zeros(k)
    for x, label in zip(unit(probes), probe_labels, strict=True):
        scores = (unit(gallery) @ x).astype(np.float32)
        best = max(s for s, g in zip(scores, gallery_labels, strict=True) if g == label)
        rank = 1 + sum(s >= best and g != label for s, g in zip(scores, gallery_labels, strict=True))
        hits[rank - 1 :] += 1
    return hits / len(probes)


@pytest.mark.parametrize("block", [1, 70, 2**22])
def test_cmc_equals_brute_force(block, monkeypatch):
    monkeypatch.setattr(arrays, "BLOCK", block)
    x, y = blobs(90, 12, noise=2.0)
    gallery, gallery_labels = x[:40], y[:40]
    probed = (np.arange(90) >= 40) & np.isin(y, gallery_labels)
    probes, probe_labels = x[probed], y[probed]
    expected = brute_force_cmc(probes, probe_labels, gallery, gallery_labels, 40)
    got = cmc(torch.from_numpy(probes), probe_labels, gallery, torch.from_numpy(gallery_labels), 40)
    np.testing.assert_allclose(got, expected, atol=1e-12)
    assert 0.1 < got[0] < 0.9 and got[-1] == 1
    assert rank_k(probes, probe_labels, gallery, gallery_labels, 5) == got[4]
    assert cmc(probes, probe_labels, gallery, gallery_labels, 60)[40:].tolist() == [1] * 20


def test_rank_ties_count_against_the_probe():
    gallery, labels = np.array([[1.0, 0], [2, 0], [0, 1], [1, 0]]), np.array([0, 1, 2, 3])
    curve = cmc([[3.0, 0], [0, 1]], [1, 2], gallery, labels, 4)
    assert curve.tolist() == [0.5, 0.5, 1, 1], "three identities look the same: rank 3"
    twice = cmc([[3.0, 0]], [1], [[1.0, 0], [1, 0], [0, 1]], [1, 1, 2], 2)
    assert twice.tolist() == [1, 1], "a second mate is no rival"


def test_cmc_refuses():
    x = np.eye(3)
    with pytest.raises(ValueError, match="k is 0"):
        cmc(x, [0, 1, 2], x, [0, 1, 2], 0)
    with pytest.raises(ValueError, match="1 of 3 probes have no mate"):
        cmc(x, [0, 1, 5], x, [0, 1, 2], 1)
    with pytest.raises(ValueError, match="0 of 0 probes"):
        cmc(x[:0], [], x, [0, 1, 2], 1)
    with pytest.raises(ValueError, match="embedding 2 of 3 is zero"):
        cmc(x, [0, 1, 2], x * [[1], [1], [0]], [0, 1, 2], 1)


# ---- the report's numbers ----


def test_evaluate_embeddings_agrees_with_its_parts():
    x, y = blobs(400, 60, noise=0.8)
    numbers = evaluate_embeddings(torch.from_numpy(x).float(), torch.from_numpy(y), seed=3)
    same, scores = np.equal.outer(y, y), unit(x) @ unit(x).T
    upper = np.triu(np.ones((400, 400), bool), 1)
    genuine, impostor = scores[upper & same], scores[upper & ~same]
    for key, far in (("tar@1e-2", 1e-2), ("tar@1e-3", 1e-3), ("tar@1e-4", 1e-4)):
        assert numbers[key] == pytest.approx(tar_at_far(genuine, impostor, far), abs=2 / len(genuine))
    assert (numbers["genuine_pairs"], numbers["impostor_pairs"]) == (len(genuine), len(impostor))
    assert (numbers["identities"], numbers["images"]) == (60, 400)
    drawn = sample_pairs(y, 6000, 3)
    expected = verification_accuracy(x[drawn.first], x[drawn.second], drawn.same)[0]
    assert numbers["accuracy"] == pytest.approx(expected, abs=2 / len(drawn.same))
    assert (numbers["inter"], numbers["intra"]) == pytest.approx(class_distances(x, y), rel=1e-6)
    assert 0.5 < numbers["accuracy"] < 1 and 0.2 < numbers["tar@1e-3"] < 1
    assert numbers == evaluate_embeddings(x.astype(np.float32), y, seed=3)
    assert numbers["rank1"] != evaluate_embeddings(x, y, seed=4)["rank1"]


def test_class_distances_equal_loops_over_classes_and_pairs():
    x, y = blobs(60, 7)
    x, y = x + 50, y - 3  # far from the origin, any labels
    means = {k: x[y == k].mean(0) for k in set(y.tolist())}
    intra = np.mean([np.mean([np.linalg.norm(row - means[k]) for row in x[y == k]]) for k in means])
    inter = np.mean([np.linalg.norm(a - b) for a, b in itertools.combinations(means.values(), 2)])
    np.testing.assert_allclose(class_distances(torch.from_numpy(x), torch.from_numpy(y)), (inter, intra), rtol=1e-12)
    with pytest.raises(ValueError, match="1 classes; want at least 2"):
        class_distances(x, np.zeros(60))
    assert class_distances(np.zeros((2, 3)), [0, 1]) == (0, 0), "a distance needs no direction"
    for bad in (x[:0], x[:, 0], np.where(x > 50, np.nan, x)):
        with pytest.raises(ValueError, match="want"):
            class_distances(bad, y[: len(bad)])


def test_perfect_embeddings():
    y = np.arange(80) % 20
    numbers = evaluate_embeddings(np.eye(20)[y], y)
    assert [numbers[key] for key in ("tar@1e-2", "tar@1e-3", "rank1", "accuracy")] == [1, 1, 1, 1]


def test_rank1_is_the_mean_over_random_enrollment():
    x, y = blobs(11, 4, noise=1.5, seed=2)
    members = [np.flatnonzero(y == c) for c in range(4)]
    rates = []
    for enrolled in itertools.product(*members):
        rest = np.setdiff1d(np.arange(11), enrolled)
        rates.append(brute_force_cmc(x[rest], y[rest], x[list(enrolled)], range(4), 4)[0])
    drawn = [evaluate_embeddings(x, y, seed)["rank1"] for seed in range(200)]
    assert np.std(rates) > 0.05
    assert np.mean(drawn) == pytest.approx(np.mean(rates), abs=4 * np.std(rates) / math.sqrt(5 * 200))


def test_dir_is_the_mean_over_random_halves():
    x, y = blobs(600, 6, noise=1.0, seed=1)
    drawn = [evaluate_embeddings(x, y, seed)["dir@1e-2"] for seed in range(12)]
    rng, rates = np.random.default_rng(0), []
    for _ in range(60):
        enrolled = [rng.choice(np.flatnonzero(y == c)) for c in rng.permutation(6)[:3]]
        rest = np.setdiff1d(np.arange(600), enrolled)
        rates.append(dir_at_far(x[rest], y[rest], x[enrolled], y[enrolled], 1e-2))
    assert 0.05 < np.std(rates) and np.std(drawn) > 0
    assert np.mean(drawn) == pytest.approx(np.mean(rates), abs=4 * np.std(rates) / math.sqrt(60))


def test_evaluate_pairs_agrees_with_its_parts():
    rng = np.random.default_rng(0)
    same = rng.random(400) < 0.5
    a = rng.normal(size=(400, 8)) + 0.3
    b = np.where(same[:, None], a, 0.3) + rng.normal(size=(400, 8))
    numbers = evaluate_pairs(torch.from_numpy(a), b, torch.from_numpy(same), folds=5)
    for variant in ("insightface", "sphereface", "euclidean"):
        expected = verification_accuracy(a, b, same, 5, variant)
        assert (numbers[f"accuracy_{variant}"], numbers[f"std_{variant}"]) == pytest.approx(expected)
    cosines = (unit(a) * unit(b)).sum(1)
    assert numbers["tar@1e-2"] == tar_at_far(cosines[same], cosines[~same], 1e-2)
    assert math.isnan(numbers["val@1e-3"]) and math.isnan(numbers["tar@1e-3"]), "some 200 impostors"
    assert (numbers["pairs"], numbers["genuine_pairs"]) == (400, same.sum())
    assert numbers["accuracy_best"] == best_accuracy(cosines[same], cosines[~same]) > 0.5
    alone = evaluate_pairs(a, b, np.ones(400))
    assert math.isnan(alone["tar@1e-2"]) and math.isnan(alone["accuracy_best"]) and alone["accuracy_insightface"] > 0.99


def test_one_fold_has_no_other_to_take_a_threshold_from():
    a, b, same = np.eye(4), np.eye(4)[[0, 1, 3, 2]], np.array([1, 1, 0, 0])
    numbers, two = (evaluate_pairs(a, b, same, folds) for folds in (1, 2))
    unresolved = {key for key, value in numbers.items() if math.isnan(value)}
    folded = {
        f"{kind}_{variant}" for kind in ("accuracy", "std") for variant in ("insightface", "sphereface", "euclidean")
    }
    assert unresolved == {*folded, "val@1e-3", "tar@1e-2", "tar@1e-3"} and numbers["accuracy_best"] == 1
    assert not math.isnan(two["accuracy_insightface"])


@pytest.mark.parametrize("ties", [False, True])
def test_best_accuracy_equals_brute_force(ties):
    rng = np.random.default_rng(0)
    for size in (1, 2, 7, 40):
        genuine, impostor = rng.normal(0.5, size=size), rng.normal(size=size + 3)
        if ties:
            genuine, impostor = genuine.round(), impostor.round()
        tried = [-np.inf, *genuine, *impostor]
        expected = max(((genuine > t).sum() + (impostor <= t).sum()) / (2 * size + 3) for t in tried)
        assert best_accuracy(torch.from_numpy(genuine), impostor) == pytest.approx(expected, abs=1e-15)
    with pytest.raises(ValueError, match="genuine scores"):
        best_accuracy([], [1.0])


def test_the_ratio_of_distances_has_no_unit():
    x, y = blobs(300, 20)
    numbers, longer = evaluate_embeddings(x, y), evaluate_embeddings(7 * x, y)
    assert numbers["inter/intra"] == pytest.approx(numbers["inter"] / numbers["intra"])
    assert longer["inter/intra"] == pytest.approx(numbers["inter/intra"]) and longer["inter"] > 6 * numbers["inter"]
    assert math.isnan(evaluate_embeddings(np.eye(3)[[0, 0, 1]], [0, 0, 1])["inter/intra"]), "all at their means"


def test_tiny_sets_say_what_cannot_be_told():
    numbers = evaluate_embeddings(np.array([[1.0, 0], [1, 0.1], [0, 1]]), np.array([4, 4, 9]))
    assert math.isnan(numbers["tar@1e-2"]) and math.isnan(numbers["tar@1e-3"]), "2 impostor pairs"
    assert math.isnan(numbers["accuracy"]), "2 identities are too few for ten folds"
    assert math.isnan(numbers["dir@1e-2"]), "1 or 2 impostors"
    assert numbers["rank1"] == 1
    assert (numbers["genuine_pairs"], numbers["impostor_pairs"]) == (1, 2)


def test_five_thousand_images_in_bounded_memory():
    x, y = blobs(5000, 400, d=32)
    tracemalloc.start()
    numbers = evaluate_embeddings(x.astype(np.float32), y)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert numbers["genuine_pairs"] + numbers["impostor_pairs"] == 5000 * 4999 // 2
    assert peak < 300e6
