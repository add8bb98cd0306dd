"""The Git loss against B x B brute force in each variant, and every way of its gradient."""

import math

import pytest
import torch
from check import assert_as_good
from dense import F32, F64, leaves

from fastmargin.losses import git
from fastmargin.losses.center import CenterBank, batch_means
from fastmargin.losses.git import git_loss
from fastmargin.ops.pairwise_potential import IMPLS

B, C, D = 23, 11, 7
PAIRS = ("classes", "samples", "original")


def batch(dtype=F64):
    """Rows near enough to the centers for the push to matter."""
    x, centers = 0.4 * torch.randn(B, D, dtype=dtype), 0.4 * torch.randn(C, D, dtype=dtype)
    return x, torch.randint(0, C - 3, (B,)), centers


def brute_force(x, labels, centers, pairs):
    """Rows of the loss, from all B x B pairs of samples (GIT eq. 1; the public code's means)."""
    apart = x[:, None] - centers[labels]
    if pairs == "original":
        off_diagonal = 1 - torch.eye(len(x), dtype=x.dtype)
        return (1 / (1 + (apart * off_diagonal[:, :, None]).square())).mean((1, 2))
    counted = ~torch.eye(len(x), dtype=torch.bool) if pairs == "samples" else labels[:, None] != labels
    return (counted / (1 + apart.square().sum(2))).sum(1)


@pytest.fixture(params=[name for name in ("native", "stream", "reference") if name in IMPLS])
def potential(request, monkeypatch):
    monkeypatch.setenv("FASTMARGIN_BACKEND", request.param)


@pytest.mark.usefixtures("potential")
@pytest.mark.parametrize("pairs", PAIRS)
def test_rows_and_gradients_equal_all_pairs_of_samples(pairs):
    x, labels, centers = batch()
    upstream = torch.randn(B, dtype=F64)
    (x1, c1), (x2, c2) = leaves(x, centers), leaves(x, centers)
    truth, got = brute_force(x1, labels, c1, pairs), git_loss(x2, labels, c2, pairs=pairs, reduction="none")
    torch.autograd.backward([truth, got], [upstream, upstream])
    assert c2.grad.is_sparse
    for ours, theirs in ((got, truth), (x2.grad, x1.grad), (c2.grad.to_dense(), c1.grad)):
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("pairs", PAIRS)
def test_reductions(pairs):
    x, labels, centers = batch()
    rows = brute_force(x, labels, centers, pairs)
    torch.testing.assert_close(git_loss(x, labels, centers, pairs=pairs, reduction="sum"), rows.sum())
    torch.testing.assert_close(git_loss(x, labels, centers, pairs=pairs), rows.mean())


def test_the_readings_differ_by_the_samples_of_the_same_class():
    x, labels, centers = batch()
    own_center = 1 / (1 + (x - centers[labels]).square().sum(1))
    others = (labels[:, None] == labels).sum(1) - 1
    classes, samples = (git_loss(x, labels, centers, pairs=p, reduction="none") for p in ("classes", "samples"))
    torch.testing.assert_close(samples - classes, others * own_center)
    assert (others > 0).any()
    torch.testing.assert_close(git_loss(x, labels, centers), classes.mean(), msg="classes is the default")


def test_the_public_code_in_one_feature_is_the_samples_reading():
    """With d = 1 a coordinate is the norm: means instead of sums, and the constant 1/B of the diagonal."""
    x, labels, centers = batch()
    x, centers = x[:, :1], centers[:, :1]
    expected = git_loss(x, labels, centers, pairs="samples", reduction="sum") / B**2 + 1 / B
    torch.testing.assert_close(git_loss(x, labels, centers, pairs="original"), expected)


def test_gradient_is_equation_3():
    x, labels, centers = batch()
    x.requires_grad_()
    git_loss(x, labels, centers, pairs="samples", reduction="sum").backward()
    apart = x.detach()[:, None] - centers[labels]
    slope = -2 * apart / (1 + apart.square().sum(2, keepdim=True)).square()
    slope[range(B), range(B)] = 0
    torch.testing.assert_close(x.grad, slope.sum(1))


@pytest.mark.usefixtures("potential")
@pytest.mark.parametrize("pairs", PAIRS)
def test_gradcheck_of_rows_and_trained_centres(pairs):
    x, labels, centers = (t[:9] for t in batch())
    labels = labels % len(centers)
    assert torch.autograd.gradcheck(
        lambda x, c: git_loss(x, labels, c * 1.0, pairs=pairs, reduction="none"),
        (x.requires_grad_(), centers.requires_grad_()),
    )


@pytest.mark.parametrize("pairs", PAIRS)
@pytest.mark.parametrize("route", ["through_update", "batch_means"])
def test_gradcheck_of_centres_made_from_the_batch(pairs, route):
    x, labels, centers = batch()
    bank = CenterBank(D, C).double()
    bank.centers.copy_(centers)
    index = labels.unique(return_inverse=True)[1]
    made = {"through_update": bank.updated, "batch_means": batch_means}[route]

    def loss(x):
        return git_loss(x, index, made(x, labels)[0], pairs=pairs)

    assert torch.autograd.gradcheck(loss, (x.requires_grad_(),))


def test_original_keeps_no_array_of_rows_and_centres_and_features(monkeypatch):
    x, labels, centers = batch()
    whole = git_loss(x.clone().requires_grad_(), labels, centers, pairs="original", reduction="none")
    monkeypatch.setattr(git, "CHUNK", 3 * C * D)  # blocks of a few rows
    kept = []

    def note(t):
        kept.append(t.numel())
        return t

    leaf = x.clone().requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        blocked = git_loss(leaf, labels, centers, pairs="original", reduction="none")
    assert max(kept) <= B * D < B * len(labels.unique()) * D
    torch.testing.assert_close(blocked, whole, rtol=1e-13, atol=0)
    reference = x.clone().requires_grad_()
    brute_force(reference, labels, centers, "original").sum().backward()
    blocked.sum().backward()
    torch.testing.assert_close(leaf.grad, reference.grad)


@pytest.mark.usefixtures("potential")
@pytest.mark.parametrize("pairs", PAIRS)
def test_float32_errs_no_more_than_the_brute_force(pairs):
    x, labels, centers = batch(F32)
    got = git_loss(x, labels, centers, pairs=pairs, reduction="none")
    truth = brute_force(x.double(), labels, centers.double(), pairs)
    assert_as_good(got, brute_force(x, labels, centers, pairs), truth)
    with torch.autocast("cpu", torch.bfloat16):
        half = git_loss(x.bfloat16(), labels, centers, pairs=pairs)
    assert half.dtype == F32
    torch.testing.assert_close(half, git_loss(x.bfloat16().float(), labels, centers, pairs=pairs))


@pytest.mark.usefixtures("potential")
def test_descent_moves_a_row_away_from_the_other_centre():
    x, centers = torch.tensor([[0.3, 0.0]]), torch.tensor([[0.0, 0.0], [9.0, 9.0]])
    row, labels = x.clone().requires_grad_(), torch.tensor([1, 0])
    both = torch.cat([row, torch.zeros(1, 2)])
    git_loss(both, labels, centers, reduction="sum").backward()
    assert row.grad[0, 0] < -0.3, "descent is away from the origin, class 0's center"


@pytest.mark.usefixtures("potential")
@pytest.mark.parametrize("pairs", PAIRS)
def test_edges(pairs):
    x, labels, centers = batch(F32)
    empty = x[:0].clone().requires_grad_()
    loss = git_loss(empty, labels[:0], centers, pairs=pairs)
    loss.backward()
    assert loss == 0 and empty.grad.shape == (0, D)
    one = torch.full((B,), 4)
    alone = git_loss(rows := x.clone().requires_grad_(), one, centers, pairs=pairs)
    alone.backward()
    torch.testing.assert_close(alone, brute_force(x, one, centers, pairs).mean())
    assert (alone == 0) == (pairs == "classes") and rows.grad.isfinite().all()
    on_centres = centers[labels].clone().requires_grad_()
    git_loss(on_centres, (labels + 1) % C, centers, pairs=pairs).backward()
    assert on_centres.grad.isfinite().all()
    x[4, 2] = math.nan
    assert git_loss(x, labels, centers, pairs=pairs).isnan()


def test_unknown_pairs():
    with pytest.raises(ValueError, match=r"pairs is 'triples'; want one of .*'classes', 'samples', 'original'"):
        git_loss(*batch(), pairs="triples")
