"""Center loss and the bank of centers against loops over rows and classes; ranks against one process."""

import math

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from check import assert_as_good
from dense import F32, F64

import fastmargin as fm
from fastmargin.losses.center import CenterBank, batch_means, center_loss

B, C, D = 23, 11, 7
RULES = {"paper": lambda n: 1 / (1 + n), "sgd": lambda n: 1.0, "ema": lambda n: 1 / n}  # of alpha


def batch(dtype=F64):
    """Rows, labels of some classes only, centers of all."""
    return torch.randn(B, D, dtype=dtype), torch.randint(0, C - 3, (B,)), torch.randn(C, D, dtype=dtype)


def filled_bank(centers, **options):
    bank = CenterBank(*centers.shape[::-1], **options).to(centers.dtype)
    bank.centers.copy_(centers)
    return bank


def moved_by_hand(x, labels, centers, rule, alpha):
    """The counts rule as a loop over classes."""
    centers = centers.clone()
    for j in range(len(centers)):
        rows = x[labels == j]
        if len(rows):
            centers[j] -= alpha * RULES[rule](len(rows)) * (centers[j] - rows).sum(0)
    return centers


# ---------------------------------------------------------------------------------------------- the loss


def test_loss_equals_the_formula():
    x, labels, centers = batch()
    rows = torch.stack([(x[i] - centers[labels[i]]).norm() ** 2 / 2 for i in range(B)])
    torch.testing.assert_close(center_loss(x, labels, centers, reduction="none"), rows)
    torch.testing.assert_close(center_loss(x, labels, centers, reduction="sum"), rows.sum())
    torch.testing.assert_close(center_loss(x, labels, centers), rows.mean())


def test_gradient_is_the_difference():
    x, labels, centers = batch()
    x.requires_grad_()
    center_loss(x, labels, centers, reduction="sum").backward()
    torch.testing.assert_close(x.grad, x.detach() - centers[labels])
    trained = centers.clone().requires_grad_()
    assert torch.autograd.gradcheck(
        lambda x, c: center_loss(x, labels, c * 1.0, reduction="none"), (x, trained), check_batched_grad=False
    )


def test_a_leaf_has_a_sparse_gradient_over_its_rows():
    x, labels, centers = batch()
    dense = centers.clone().requires_grad_()
    ((x - dense[labels]).square().sum() / 2).backward()
    leaf = centers.clone().requires_grad_()
    center_loss(x, labels, leaf, reduction="sum").backward()
    assert leaf.grad.is_sparse and leaf.grad._nnz() <= B
    torch.testing.assert_close(leaf.grad.to_dense(), dense.grad)
    torch.optim.SGD([leaf], lr=0.1).step()
    torch.testing.assert_close(leaf.detach(), centers - 0.1 * dense.grad)


def test_float32_and_half_rows():
    x, labels, centers = batch(F32)
    centers += 100  # far from the origin
    x += 100
    truth = center_loss(x.double(), labels, centers.double(), reduction="none")
    plain = (x - centers[labels]).norm(dim=1) ** 2 / 2
    assert_as_good(center_loss(x, labels, centers, reduction="none"), plain, truth)
    half = x.bfloat16().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        loss = center_loss(half, labels, centers)
    loss.backward()
    assert loss.dtype == F32 and half.grad.dtype == torch.bfloat16
    torch.testing.assert_close(loss, center_loss(half.detach().float(), labels, centers))


def test_no_rows_and_rows_that_are_not_finite():
    x, labels, centers = batch(F32)
    empty = x[:0].requires_grad_()
    loss = center_loss(empty, labels[:0], centers)
    loss.backward()
    assert loss == 0 and empty.grad.shape == (0, D)
    (bank := filled_bank(centers)).update(empty, labels[:0])
    assert torch.equal(bank.centers, centers) and bank.updated(empty, labels[:0])[0].shape == (0, D)
    assert center_loss(centers[labels], labels, centers) == 0
    x[4, 2] = math.nan
    losses = center_loss(x, labels, centers, reduction="none")
    assert losses.isnan().nonzero().tolist() == [[4]]


@pytest.mark.parametrize(
    ("x", "labels", "centers", "message"),
    [
        (torch.zeros(3, 2), torch.zeros(2, dtype=torch.int64), torch.zeros(4, 2), r"int64 labels \[3\]; got .*\[2\]"),
        (torch.zeros(3, 2), torch.zeros(3), torch.zeros(4, 2), "int64 labels"),
        (torch.zeros(3, 2), torch.zeros(3, dtype=torch.int32), torch.zeros(4, 2), "got torch.int32"),
        (torch.zeros(3), torch.zeros(3, dtype=torch.int64), torch.zeros(4, 2), r"floating x \[B, d\]"),
        (torch.zeros(3, 2).long(), torch.zeros(3, dtype=torch.int64), torch.zeros(4, 2), "floating x"),
        (torch.zeros(3, 2), torch.zeros(3, dtype=torch.int64), torch.zeros(4, 3), "differ in their features"),
        (torch.zeros(3, 2), torch.zeros(3, dtype=torch.int64), torch.zeros(4), r"centers \[C, d\]"),
        (torch.zeros(3, 2), torch.zeros(3, dtype=torch.int64), torch.zeros(4, 2).half(), "float32 or float64 centers"),
        (torch.zeros(3, 2), torch.tensor([0, 4, 1]), torch.zeros(4, 2), r"label 4 of row 1 is outside \[0, 4\)"),
        (torch.zeros(3, 2), torch.tensor([0, 1, -1]), torch.zeros(4, 2), r"label -1 of row 2"),
        (None, torch.zeros(3, dtype=torch.int64), torch.zeros(4, 2), "x is 'NoneType'"),
        (torch.zeros(3, 2), [0, 1, 2], torch.zeros(4, 2), "labels is 'list'"),
    ],
)
def test_refusals(x, labels, centers, message):
    with pytest.raises(ValueError, match=message):
        center_loss(x, labels, centers)
    with pytest.raises(ValueError, match=message):
        fm.git_loss(x, labels, centers)


def test_unknown_reduction():
    x, labels, centers = batch()
    with pytest.raises(ValueError, match="reduction is 'median'; want 'mean', 'sum' or 'none'"):
        center_loss(x, labels, centers, reduction="median")


# ---------------------------------------------------------------------------------------------- the bank


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_update_equals_the_counts_rule(rule, alpha):
    x, labels, centers = batch()
    bank = filled_bank(centers, update=rule, alpha=alpha)
    bank.update(x, labels)
    torch.testing.assert_close(bank.centers, moved_by_hand(x, labels, centers, rule, alpha))
    absent = torch.tensor(sorted(set(range(C)) - set(labels.tolist())))
    assert len(absent) >= 3 and torch.equal(bank.centers[absent], centers[absent])
    assert alpha > 0 or torch.equal(bank.centers, centers)


@pytest.mark.parametrize("rule", RULES)
def test_order_of_the_rows_does_not_matter(rule):
    x, labels, centers = batch()
    one, other = (filled_bank(centers, update=rule) for _ in range(2))
    order = torch.randperm(B)
    one.update(x, labels)
    other.update(x[order], labels[order])
    torch.testing.assert_close(one.centers, other.centers, rtol=1e-12, atol=1e-12)


def test_rates_of_the_paper_rule():
    """An average of the center and the batch mean with rate alpha n / (1 + n): alpha for many rows."""
    for n in (1, 3, 10_000):
        bank = filled_bank(torch.zeros(2, D, dtype=F64), alpha=0.5)
        x = torch.randn(n, D, dtype=F64) + 3
        bank.update(x, torch.ones(n, dtype=torch.int64))
        torch.testing.assert_close(bank.centers[1], 0.5 * n / (1 + n) * x.mean(0))
        assert (bank.centers[0] == 0).all()


def test_the_weight_of_the_loss_is_not_in_the_step():
    x, labels, _ = batch(F32)
    banks = [CenterBank(D, C) for _ in range(2)]
    for weight, bank in zip((1.0, 1e-6), banks, strict=True):
        rows = x.clone().requires_grad_()
        (weight * center_loss(rows, labels, bank.centers)).backward()
        bank.update(rows, labels)
    assert torch.equal(banks[0].centers, banks[1].centers) and banks[0].centers.abs().max() > 0.1


@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_a_row_that_is_not_finite_moves_no_center(bad):
    x, labels, centers = batch()
    x[5, 1] = bad
    bank, kept = filled_bank(centers), torch.arange(len(x)) != 5
    bank.update(x, labels)
    torch.testing.assert_close(bank.centers, moved_by_hand(x[kept], labels[kept], centers, "paper", 0.5))


@pytest.mark.parametrize("rule", RULES)
def test_updated_is_the_update_and_differentiable(rule):
    x, labels, centers = batch()
    bank = filled_bank(centers, update=rule, alpha=0.4)
    fresh, classes = bank.updated(x, labels)
    assert torch.equal(bank.centers, centers) and classes.tolist() == sorted(set(labels.tolist()))
    torch.testing.assert_close(fresh, moved_by_hand(x, labels, centers, rule, 0.4)[classes])
    x.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: bank.updated(x, labels)[0], (x,))
    upstream = torch.randn(len(classes), D, dtype=F64)
    (grad,) = torch.autograd.grad(bank.updated(x, labels)[0], x, upstream)
    index = torch.searchsorted(classes, labels)
    rate = torch.tensor([0.4 * RULES[rule](int((labels == y).sum())) for y in labels], dtype=F64)
    torch.testing.assert_close(grad, rate[:, None] * upstream[index])


def test_batch_means():
    x, labels, _ = batch()
    means, classes = batch_means(x, labels)
    torch.testing.assert_close(means, torch.stack([x[labels == j].mean(0) for j in classes]))
    assert torch.autograd.gradcheck(lambda x: batch_means(x, labels)[0], (x.requires_grad_(),))
    assert batch_means(x.bfloat16(), labels - 100)[0].dtype == F32, "any integers are classes"
    assert batch_means(x[:0], labels[:0])[0].shape == (0, D)


def test_bank_state_and_description():
    bank, other = CenterBank(D, C, "ema", 0.25), CenterBank(D, C)
    assert bank.centers.dtype == F32 and (bank.centers == 0).all() and list(bank.parameters()) == []
    bank.update(*batch(F32)[:2])
    other.load_state_dict(bank.state_dict())
    assert torch.equal(bank.centers, other.centers)
    assert repr(bank) == "CenterBank(in_features=7, num_classes=11, update=ema, alpha=0.25)"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((4, 0), "num_classes is 0"),
        ((2.5, 4), "in_features is 2.5"),
        ((4, 4, "adam"), "update is 'adam'; want one of .*'paper', 'sgd', 'ema'"),
        ((4, 4, "ema", 1.5), "alpha is 1.5; want a rate from 0 to 1"),
        ((4, 4, "ema", -0.1), "alpha is -0.1"),
        ((4, 4, "ema", math.nan), "alpha is nan"),
    ],
)
def test_bank_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        CenterBank(*arguments)


# ---------------------------------------------------------------------------------------------- ranks

SHARES = (9, 14)  # rows of the two ranks


def rank_main(rank, path, x, labels, centers):
    dist.init_process_group("gloo", init_method=f"file://{path}/store", rank=rank, world_size=len(SHARES))
    bank = filled_bank(centers, group=dist.group.WORLD)
    local, y = x.split(SHARES)[rank].requires_grad_(), labels.split(SHARES)[rank]
    fresh, classes = bank.updated(local, y)
    fm.minimum_margin_loss(fresh, margin=30.0).backward()
    bank.update(local, y)
    torch.save((classes, fresh.detach(), local.grad, bank.centers), f"{path}/{rank}")
    dist.destroy_process_group()


def test_ranks_equal_one_process(tmp_path):
    x, labels, centers = batch()
    assert set(labels[: SHARES[0]].tolist()) & set(labels[SHARES[0] :].tolist()), "a class on both ranks"
    mp.spawn(rank_main, (str(tmp_path), x, labels, centers), nprocs=len(SHARES))
    (classes, fresh, *first), (_, _, *second) = (torch.load(tmp_path / str(rank)) for rank in (0, 1))
    assert torch.equal(first[1], second[1]), "all ranks hold the same bits"
    bank = filled_bank(centers)
    whole = x.clone().requires_grad_()
    one_fresh, one_classes = bank.updated(whole, labels)
    fm.minimum_margin_loss(one_fresh, margin=30.0).backward()
    bank.update(whole, labels)
    assert torch.equal(classes, one_classes) and whole.grad.abs().max() > 0
    torch.testing.assert_close(fresh, one_fresh.detach(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(first[1], bank.centers, rtol=1e-12, atol=1e-12)
    mean_over_ranks = torch.cat([first[0], second[0]]) / len(SHARES)
    torch.testing.assert_close(mean_over_ranks, whole.grad, rtol=1e-12, atol=1e-12)
