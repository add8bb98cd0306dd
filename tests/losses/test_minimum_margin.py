"""The minimum margin against a loop over pairs, its sign by gradient descent, and every way of its gradient."""

import math

import pytest
import torch
from check import assert_as_good
from dense import F64

from fastmargin.losses.center import CenterBank, batch_means
from fastmargin.losses.minimum_margin import minimum_margin_loss
from fastmargin.ops.pairwise_potential import IMPLS

B, C, D, M = 23, 11, 7, 12.0


@pytest.fixture(autouse=True, params=[name for name in ("native", "stream", "reference") if name in IMPLS])
def potential(request, monkeypatch):
    monkeypatch.setenv("FASTMARGIN_BACKEND", request.param)


def dense(centers, margin=M):
    """Unordered pairs, every distance stored."""
    squared = (centers[:, None] - centers).square().sum(2)
    return (margin - squared).clamp(min=0).triu(1).sum()


def printed(centers, margin=M):
    """MML eq. 13 as it is printed."""
    squared = (centers[:, None] - centers).square().sum(2)
    return (squared - margin).clamp(min=0).sum()


def filled_bank(centers):
    bank = CenterBank(*centers.shape[::-1], alpha=0.4).to(centers.dtype)
    bank.centers.copy_(centers)
    return bank


def test_classes_of_the_batch():
    centers, labels = torch.randn(C, D, dtype=F64), torch.randint(0, C - 3, (B,))
    present = centers[sorted(set(labels.tolist()))]
    expected = dense(present)
    assert 0 < expected < dense(centers)
    torch.testing.assert_close(minimum_margin_loss(centers, labels, margin=M), expected)
    torch.testing.assert_close(minimum_margin_loss(present, margin=M), expected)
    torch.testing.assert_close(minimum_margin_loss(centers, labels, margin=M, scope="all"), dense(centers))
    torch.testing.assert_close(minimum_margin_loss(centers, margin=M, scope="all"), dense(centers))


def test_ordered_is_twice_and_the_other_reductions():
    centers = torch.randn(C, D, dtype=F64)
    unordered = minimum_margin_loss(centers, margin=M)
    torch.testing.assert_close(minimum_margin_loss(centers, margin=M, ordered=True), 2 * unordered)
    for ordered in (False, True):
        shares = minimum_margin_loss(centers, margin=M, ordered=ordered, reduction="none")
        assert shares.shape == (C,)
        torch.testing.assert_close(shares.sum(), (1 + ordered) * unordered)
        mean = minimum_margin_loss(centers, margin=M, ordered=ordered, reduction="mean")
        torch.testing.assert_close(mean, unordered / math.comb(C, 2))


@pytest.mark.parametrize(("classes", "d"), [(300, 16), (1500, 5)])
def test_all_classes_equal_the_dense_matrix(classes, d):
    centers = torch.randn(classes, d, dtype=F64)
    ours, theirs = (centers.clone().requires_grad_() for _ in range(2))
    loss, truth = minimum_margin_loss(ours, margin=d, scope="all"), dense(theirs, margin=d)
    loss.backward()
    truth.backward()
    torch.testing.assert_close(loss, truth, rtol=1e-12, atol=0)
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-10, atol=1e-10)


def test_gradient_of_the_printed_scale():
    """-4 (deg_i c_i - sum of its neighbors) for ordered pairs."""
    centers = torch.randn(C, D, dtype=F64, requires_grad=True)
    minimum_margin_loss(centers, margin=M, ordered=True).backward()
    held = centers.detach()
    near = ((held[:, None] - held).square().sum(2) < M).double().fill_diagonal_(0)
    assert 0 < near.mean() < 1
    torch.testing.assert_close(centers.grad, -4 * (near.sum(1, keepdim=True) * held - near @ held))


def test_float32_errs_no_more_than_the_dense_matrix():
    centers = torch.randn(60, 33) * 0.3 + 20  # far from the origin, where products cancel
    got = minimum_margin_loss(centers, margin=5.0)
    assert_as_good(got, dense(centers, 5.0), dense(centers.double(), 5.0))


# ---------------------------------------------------------------------------------------------- the sign


def descend(centers, loss):
    centers = centers.clone()
    for _ in range(200):
        leaf = centers.requires_grad_()
        (grad,) = torch.autograd.grad(loss(leaf), leaf)
        centers = (leaf - 0.02 * grad).detach()
    return torch.pdist(centers).square()


def test_descent_pushes_near_centres_apart_and_leaves_far_ones():
    centers = torch.cat([torch.randn(8, D, dtype=F64) * 0.3, torch.full((1, D), 50.0, dtype=F64)])
    before = torch.pdist(centers).square()
    after = descend(centers, lambda c: minimum_margin_loss(c, margin=M))
    assert (before < M).sum() == math.comb(8, 2)
    assert (after[before < M] > before[before < M]).all() and (after > 0.999 * M).all(), "no pair is under M any more"
    assert after[before > M].min() > 0.95 * before[before > M].min()


def test_descent_of_the_printed_sign_does_not():
    """The tests above detect the hinge as printed: it ignores near pairs and pulls far ones together."""
    centers = torch.cat([torch.randn(8, D, dtype=F64) * 0.3, torch.full((1, D), 5.0, dtype=F64)])
    before = torch.pdist(centers).square()
    after = descend(centers, printed)
    assert (before < M).sum() == math.comb(8, 2) and (after < 1.001 * M).all()
    assert (after[before > M] < before[before > M]).all()


# ---------------------------------------------------------------------------------------------- routes


def problem():
    torch.manual_seed(3)
    return torch.randn(B, D, dtype=F64), torch.randint(0, C - 3, (B,)), 0.5 * torch.randn(C, D, dtype=F64)


def test_route_of_trained_centres():
    _, labels, centers = problem()
    assert torch.autograd.gradcheck(
        lambda c: minimum_margin_loss(c * 1.0, labels, margin=M, reduction="none"), (centers.requires_grad_(),)
    )
    leaf = centers.detach().requires_grad_()
    minimum_margin_loss(leaf, labels, margin=M).backward()
    assert leaf.grad.is_sparse and leaf.grad._indices()[0].tolist() == sorted(set(labels.tolist()))


def test_route_through_the_update():
    x, labels, centers = problem()
    bank = filled_bank(centers)
    x.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: minimum_margin_loss(bank.updated(x, labels)[0], margin=M), (x,))
    fresh, classes = bank.updated(x, labels)
    fresh.retain_grad()
    minimum_margin_loss(fresh, margin=M).backward()
    index, n = torch.searchsorted(classes, labels), labels.bincount()[labels]
    torch.testing.assert_close(x.grad, (0.4 / (1 + n))[:, None] * fresh.grad[index])
    assert x.grad.abs().max() > 0


def test_route_of_batch_means():
    x, labels, _ = problem()
    x.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: minimum_margin_loss(batch_means(x, labels)[0], margin=M), (x,))
    means, _ = batch_means(x, labels)
    means.retain_grad()
    minimum_margin_loss(means, margin=M).backward()
    index, n = labels.unique(return_inverse=True)[1], labels.bincount()[labels]
    torch.testing.assert_close(x.grad, means.grad[index] / n[:, None])


def test_routes_gradcheck_in_every_reduction_over_all_classes():
    """The batch's centers at their indices among all others."""
    x, labels, centers = problem()
    for reduction in ("sum", "mean", "none"):

        def loss(x, reduction=reduction):
            fresh, classes = filled_bank(centers).updated(x, labels)
            table = centers.index_copy(0, classes, fresh)
            return minimum_margin_loss(table, margin=M, scope="all", ordered=True, reduction=reduction)

        assert torch.autograd.gradcheck(loss, (x.requires_grad_(),))


# ---------------------------------------------------------------------------------------------- edges


def test_edges():
    for rows in (0, 1):
        few = torch.ones(rows, D, requires_grad=True)
        loss = minimum_margin_loss(few, margin=M)
        loss.backward()
        assert loss == 0 and (few.grad == 0).all() and minimum_margin_loss(few, margin=M, reduction="mean") == 0
    one_class = torch.randn(C, D, requires_grad=True)
    loss = minimum_margin_loss(one_class, torch.full((B,), 3), margin=M)
    loss.backward()
    assert loss == 0 and (one_class.grad.to_dense() == 0).all()
    same = torch.full((4, D), 30.0, requires_grad=True)
    loss = minimum_margin_loss(same, margin=M)
    loss.backward()
    assert loss == 6 * M and (same.grad == 0).all()
    assert minimum_margin_loss(torch.tensor([[1.0], [math.nan]]), margin=M).isnan()


@pytest.mark.parametrize(
    ("centers", "labels", "options", "message"),
    [
        (torch.zeros(3, 2), None, {"margin": 0.0}, "margin = 0.0: want a squared distance above 0"),
        (torch.zeros(3, 2), None, {"margin": -1.0}, "margin = -1.0"),
        (torch.zeros(3, 2), None, {"margin": math.nan}, "margin = nan"),
        (torch.zeros(3, 2), None, {"margin": M, "scope": "world"}, "scope is 'world'; want 'batch' or 'all'"),
        (torch.zeros(3, 2), None, {"margin": M, "reduction": "max"}, "reduction is 'max'"),
        (torch.zeros(3), None, {"margin": M}, r"centers \[C, d\]"),
        (torch.zeros(3, 2).long(), None, {"margin": M}, "float32 or float64 centers"),
        (None, None, {"margin": M}, "centers is 'NoneType'"),
        (torch.zeros(3, 2), [0, 1], {"margin": M}, "labels is 'list'"),
        (torch.zeros(3, 2), torch.tensor([0, 3]), {"margin": M}, r"label 3 of row 1 is outside \[0, 3\)"),
        (torch.zeros(3, 2), torch.tensor([0.0]), {"margin": M}, "int64 labels"),
        (torch.zeros(3, 2), torch.zeros(2, 2, dtype=torch.int64), {"margin": M}, r"int64 labels \[B\]"),
    ],
)
def test_refusals(centers, labels, options, message):
    with pytest.raises(ValueError, match=message):
        minimum_margin_loss(centers, labels, **options)
