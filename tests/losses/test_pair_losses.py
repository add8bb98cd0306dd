"""Marginal, range and margin-based loss against loops over pairs; how the pairs of the last are drawn."""

import itertools
import math

import pytest
import torch
from check import assert_as_good
from dense import F32, F64
from scipy.stats import chi2

from fastmargin.losses.pairs import draw, margin_based_loss, marginal_loss, range_loss, violating_pairs

B, D = 21, 5
MARGINAL = {"threshold": 1.2, "error_margin": 0.3}


def batch(dtype=F64, classes=6):
    return torch.randn(B, D, dtype=dtype), torch.randint(0, classes, (B,))


def unit(x):
    return x / x.norm(dim=1, keepdim=True)


# ---------------------------------------------------------------------------------------------- marginal


def marginal_by_hand(x, labels, threshold, error_margin):
    f, total = unit(x), 0
    for i, j in itertools.permutations(range(len(x)), 2):  # ordered, as printed
        y = 1 if labels[i] == labels[j] else -1
        total = total + (error_margin - y * (threshold - (f[i] - f[j]).norm())).clamp(min=0)
    return total / (len(x) ** 2 - len(x))


def test_marginal_equals_a_loop_over_ordered_pairs():
    x, labels = batch()
    ours, theirs = (x.clone().requires_grad_() for _ in range(2))
    loss, truth = marginal_loss(ours, labels, **MARGINAL), marginal_by_hand(theirs, labels, **MARGINAL)
    loss.backward()
    truth.backward()
    torch.testing.assert_close(loss, truth)
    torch.testing.assert_close(ours.grad, theirs.grad)
    assert torch.autograd.gradcheck(lambda x: marginal_loss(x, labels, **MARGINAL), (x.requires_grad_(),))


def test_marginal_in_float32():
    x, labels = batch(F32)
    got = marginal_loss(x, labels, **MARGINAL)
    assert_as_good(got, marginal_by_hand(x, labels, **MARGINAL), marginal_by_hand(x.double(), labels, **MARGINAL))
    assert marginal_loss(x.half(), labels, **MARGINAL).dtype == F32


def test_marginal_edges():
    x, labels = batch(F32)
    for rows in (0, 1):
        few = x[:rows].clone().requires_grad_()
        loss = marginal_loss(few, labels[:rows], **MARGINAL)
        loss.backward()
        assert loss == 0 and (few.grad == 0).all()
    same = torch.ones(3, D, requires_grad=True)  # at the largest loss of negatives
    loss = marginal_loss(same, torch.arange(3), **MARGINAL)
    loss.backward()
    torch.testing.assert_close(loss, torch.tensor(1.5))
    assert (same.grad == 0).all()
    zero = torch.cat([torch.zeros(1, D), x]).requires_grad_()
    marginal_loss(zero, torch.cat([torch.tensor([0]), labels]), **MARGINAL).backward()
    assert zero.grad.isfinite().all() and (zero.grad[0] == 0).all() and (zero.grad[1:] != 0).any()
    x[3, 1] = math.nan
    assert marginal_loss(x, labels, **MARGINAL).isnan()


# ---------------------------------------------------------------------------------------------- range


def range_by_hand(x, labels, margin, n=2, intra_weight=1.0, inter_weight=1.0):
    intra, means = 0, []
    for k in sorted(set(labels.tolist())):
        rows = x[labels == k]
        means.append(rows.mean(0))
        distances = sorted(((a - b).norm() for a, b in itertools.combinations(rows, 2)), reverse=True)[:n]
        if distances:
            intra = intra + len(distances) / sum(1 / d for d in distances)
    gaps = [(a - b).square().sum() for a, b in itertools.combinations(means, 2)]
    return intra_weight * intra + inter_weight * (margin - min(gaps)).clamp(min=0)


@pytest.mark.parametrize("options", [{}, {"n": 1}, {"n": 5}, {"intra_weight": 0.3, "inter_weight": 0.7}])
@pytest.mark.parametrize("classes", [3, 12])  # 12: some of one row or two
def test_range_equals_loops_over_classes_and_means(options, classes):
    x, labels = batch(classes=classes)
    ours, theirs = (x.clone().requires_grad_() for _ in range(2))
    loss, truth = range_loss(ours, labels, margin=9.0, **options), range_by_hand(theirs, labels, 9.0, **options)
    loss.backward()
    truth.backward()
    torch.testing.assert_close(loss, truth)
    torch.testing.assert_close(ours.grad, theirs.grad)
    assert torch.autograd.gradcheck(lambda x: range_loss(x, labels, margin=9.0, **options), (x.requires_grad_(),))


def test_range_has_both_of_its_terms():
    x, labels = batch()
    intra, inter = (range_loss(x, labels, margin=9.0, **{f"{off}_weight": 0}) for off in ("inter", "intra"))
    assert intra > 0 and inter > 0
    assert range_loss(x, labels, margin=1e-6, intra_weight=0) == 0, "means farther apart than the margin"


def test_range_in_float32_far_from_the_origin():
    x, labels = batch(F32)
    x = x * 0.01 + 30
    got = range_loss(x, labels, margin=9.0, inter_weight=0)
    truth = range_by_hand(x.double(), labels, 9.0, inter_weight=0)
    assert_as_good(got, range_by_hand(x, labels, 9.0, inter_weight=0), truth)


def test_range_edges():
    one_class, no_pair, no_row = torch.zeros(4).long(), torch.arange(4), torch.arange(0)
    for labels, term in ((one_class, "inter"), (no_pair, "intra"), (no_row, "inter"), (no_row, "intra")):
        x = torch.randn(len(labels), D, requires_grad=True)
        loss = range_loss(x, labels, margin=9.0)
        loss.backward()
        assert loss.isfinite() and x.grad.isfinite().all()
        other = {"inter": "intra", "intra": "inter"}[term]
        assert range_loss(x, labels, margin=9.0, **{f"{other}_weight": 0}) == 0
    same = torch.ones(4, D, requires_grad=True)
    loss = range_loss(same, torch.tensor([0, 0, 1, 1]), margin=9.0)
    loss.backward()
    torch.testing.assert_close(loss, torch.tensor(9.0))
    assert (same.grad == 0).all()
    x, labels = batch(F32)
    x[3, 1] = math.nan
    assert range_loss(x, labels, margin=9.0).isnan()


# ---------------------------------------------------------------------------------------------- margin-based


def seeded():
    return torch.Generator().manual_seed(5)


def pairs_of(x, labels, beta=0.5, margin=0.1):
    f = unit(x)
    positives, negatives = violating_pairs(f @ f.T, labels, torch.tensor(beta, dtype=x.dtype), margin, seeded())
    drawn = [(i, j, 1) for i, j in enumerate(positives.tolist()) if j >= 0]
    return drawn + [(i, j, -1) for i, j in enumerate(negatives.tolist()) if j >= 0]


def test_margin_based_is_the_mean_over_its_active_pairs():
    x, labels = batch()
    f, drawn = unit(x), pairs_of(x, labels)
    losses = torch.stack([0.1 - y * (f[i] @ f[j] - 0.5) for i, j, y in drawn])
    assert {y for _, _, y in drawn} == {1, -1} and (losses > 0).all(), "what is drawn violates the margin"
    torch.testing.assert_close(margin_based_loss(x, labels, generator=seeded()), losses.mean())


def test_margin_based_gradients():
    x, labels = batch()
    beta = torch.tensor(0.5, dtype=F64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda x, beta: margin_based_loss(x, labels, beta, generator=seeded()), (x.requires_grad_(), beta)
    )
    margin_based_loss(x, labels, beta, generator=seeded()).backward()
    signs = [y for _, _, y in pairs_of(x.detach(), labels)]
    assert beta.grad == pytest.approx(sum(signs) / len(signs)), "positives push beta down, negatives up"


def test_margin_based_is_told_by_its_generator():
    x, labels = batch()
    losses = [margin_based_loss(x, labels, generator=torch.Generator().manual_seed(s)).item() for s in (1, 1, 2)]
    assert losses[0] == losses[1] != losses[2]
    torch.manual_seed(1)
    before = margin_based_loss(x, labels).item()
    torch.manual_seed(1)
    assert margin_based_loss(x, labels).item() == before != margin_based_loss(x, labels).item()


def test_pairs_are_of_their_kind_and_never_the_row_itself():
    _, labels = batch(classes=3)
    seen = 0
    for seed in range(200):
        torch.manual_seed(seed)
        f = unit(torch.randn(B, D))
        positives, negatives = violating_pairs(f @ f.T, labels, torch.tensor(0.5), 0.1)
        for i, (p, q) in enumerate(zip(positives.tolist(), negatives.tolist(), strict=True)):
            assert p != i and (p < 0 or (labels[p] == labels[i] and f[p] @ f[i] < 0.6))
            assert q < 0 or (labels[q] != labels[i] and f[q] @ f[i] > 0.4)
            seen += (p >= 0) + (q >= 0)
    assert seen > 200 * B


def test_without_a_violation_no_pair_is_drawn():
    x = torch.eye(4, D)[[0, 0, 1, 1]].requires_grad_()  # cosine 1 within, 0 across
    labels = torch.tensor([0, 0, 1, 1])
    positives, negatives = violating_pairs((x @ x.T).detach(), labels, torch.tensor(0.5), 0.1)
    assert positives.tolist() == negatives.tolist() == [-1] * 4
    loss = margin_based_loss(x, labels)
    loss.backward()
    assert loss == 0 and (x.grad == 0).all()
    positives, negatives = violating_pairs(torch.full((3, 3), 0.5), torch.arange(3), torch.tensor(0.5), 0.1)
    assert positives.tolist() == [-1] * 3 and (negatives >= 0).all(), "no row is its own positive"


def test_pairs_are_drawn_in_proportion_to_their_violation():
    """Chi-square of 100,000 draws for every row and kind, by equations 3 to 5 as they are printed."""
    x, labels = batch(F32, classes=2)
    cos, same = unit(x) @ unit(x).T, labels[:, None] == labels
    v_pos = torch.where(same, (0.5 + 0.1 - cos).clamp(min=0), 0.0).fill_diagonal_(0)
    v_neg = torch.where(same, 0.0, (cos - (0.5 - 0.1)).clamp(min=0))
    generator, tested = seeded(), 0
    drawn = violating_pairs(cos, labels, torch.tensor(0.5), 0.1, seeded())
    assert [t.tolist() for t in drawn] == [draw(v, generator).tolist() for v in (v_pos, v_neg)]
    for v in torch.cat([v_pos, v_neg]):
        chosen = draw(v.expand(100_000, B), generator)
        if not v.any():
            assert (chosen == -1).all()
            continue
        seen, expected = chosen.bincount(minlength=B), 100_000 * v / v.sum()
        assert (seen[v == 0] == 0).all()
        hit = v > 0
        chi_square = ((seen - expected)[hit].square() / expected[hit]).sum()
        assert chi_square <= chi2.isf(1e-5, int(hit.sum()) - 1) if hit.sum() > 1 else chi_square == 0
        tested += int(hit.sum() > 1)
    assert tested > B


def test_margin_based_edges():
    x, labels = batch(F32)
    for rows in (0, 1):
        few = x[:rows].clone().requires_grad_()
        loss = margin_based_loss(few, labels[:rows])
        loss.backward()
        assert loss == 0 and (few.grad == 0).all()
    same = torch.ones(3, D, requires_grad=True)
    loss = margin_based_loss(same, torch.arange(3))
    loss.backward()
    torch.testing.assert_close(loss, torch.tensor(0.6))
    assert same.grad.abs().max() < 1e-6
    zero = torch.cat([torch.zeros(1, D), x]).requires_grad_()
    margin_based_loss(zero, torch.cat([labels[:1], labels])).backward()
    assert zero.grad.isfinite().all() and (zero.grad[0] == 0).all()
    x[3, 1] = math.nan
    assert margin_based_loss(x, labels).isnan()
    with torch.autocast("cpu", torch.bfloat16):
        half = margin_based_loss(same.detach().bfloat16(), torch.arange(3))
    assert half.dtype == F32


@pytest.mark.parametrize(
    ("loss", "options", "message"),
    [
        (marginal_loss, {"threshold": 2.5, "error_margin": 0.1}, "threshold is 2.5"),
        (marginal_loss, {"threshold": 1.0, "error_margin": -0.1}, "error_margin is -0.1"),
        (range_loss, {"margin": 0.0}, "margin is 0.0; want a squared distance above 0"),
        (range_loss, {"margin": math.nan}, "margin is nan"),
        (range_loss, {"margin": 1.0, "n": 0}, "n is 0"),
        (range_loss, {"margin": 1.0, "inter_weight": -1.0}, "inter_weight is -1.0"),
        (margin_based_loss, {"margin": -0.1}, "margin is -0.1"),
    ],
)
def test_options_out_of_range(loss, options, message):
    with pytest.raises(ValueError, match=message):
        loss(*batch(), **options)


@pytest.mark.parametrize(
    ("loss", "options"), [(marginal_loss, MARGINAL), (range_loss, {"margin": 9.0}), (margin_based_loss, {})]
)
def test_wrong_rows_and_labels(loss, options):
    x, labels = batch()
    for bad, message in ((labels[1:], rf"int64 labels \[{B}\]; got .*\[{B - 1}\]"), (labels.int(), "got torch.int32")):
        with pytest.raises(ValueError, match=message):
            loss(x, bad, **options)
    with pytest.raises(ValueError, match="floating x"):
        loss(x.long(), labels, **options)
    loss(x, labels - 50, **options)  # any integers name classes
