"""Rows of a MarginHead that are very short, very long or not finite, and passes that are recomputed."""

import pytest
import torch
import torch.nn.functional as F
from check import error
from torch.utils.checkpoint import checkpoint

import fastmargin as fm
from fastmargin.head.margin_head import MarginHead


def problem(margin=None, C=50, d=16, B=12, **options):
    margin = fm.ArcFace() if margin is None else margin
    return MarginHead(d, C, margin, **options), 9 * torch.randn(B, d), torch.randint(0, C, (B,))


def row_gradient(head, f, y):
    f = f.detach().clone().requires_grad_()
    head(f, y).loss.backward()
    return f.grad


# ---------------------------------------------------------------------------------------------- activation checkpoints


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize(
    ("margin", "sample_rate"), [(fm.ArcFace, 0.3), (fm.ElasticFace, 1.0), (fm.AdaFace, 1.0)], ids=str
)
def test_a_recomputed_pass_that_would_differ_raises(margin, sample_rate, reentrant):
    head, f, y = problem(margin(), sample_rate=sample_rate)
    loss = checkpoint(lambda f: head(f, y).loss, f.requires_grad_(), use_reentrant=reentrant)
    with pytest.raises(ValueError, match="keep the head out of the checkpointed part"):
        loss.backward()


def test_other_heads_can_be_recomputed():
    head, f, y = problem()
    want = row_gradient(head, f, y)
    checkpoint(lambda f: head(f, y).loss, f.requires_grad_(), use_reentrant=False).backward()
    assert torch.equal(f.grad, want)


# ---------------------------------------------------------------------------------------------- lengths of rows


@pytest.mark.parametrize("norm", [1e-30, 1e-10, 1e-7, 1e10, 1e20, 1e30])
def test_rows_of_any_length_have_the_scores_of_their_direction(norm):
    head, f, y = problem(topk=3)
    f = F.normalize(f.double())
    want, got = head.double()(f, y), head.float()((norm * f).float(), y)
    assert error(got.loss, want.loss) < 1e-5 and error(got.hard_scores, want.hard_scores) < 1e-5
    assert torch.equal(got.hard_classes, want.hard_classes)
    scores, classes = head.nearest((norm * f).float(), 3)
    table = f @ F.normalize(head.weight.detach().double()).T
    assert error(scores, table.topk(3).values) < 1e-5 and torch.equal(classes, table.topk(3).indices)
    head.imprint((norm * f).float(), torch.arange(12))
    assert error(F.normalize(head.weight[:12].detach()), f) < 1e-5


def test_the_gradient_of_a_short_row_is_bounded_and_of_a_zero_row_zero():
    head, f, y = problem()
    unit = F.normalize(f)
    gradients = [row_gradient(head, norm * unit, y) for norm in (1.0, 1e-6, 1e-9, 0.0)]
    for got, factor in zip(gradients[1:3], (1e6, 1e6), strict=True):
        assert error(got, factor * gradients[0]) < 1e-4
    assert not gradients[3].any()


def test_a_row_with_nan_has_no_neighbors(backend):
    head, f, y = problem(topk=3, backend=backend)
    f[4, 1] = torch.nan
    for scores, classes in (head.nearest(f, 3), head(f, y)[2:]):
        assert scores[4].isnan().all() and (classes[4] == -1).all()
        assert not scores[:4].isnan().any() and (classes[:4] >= 0).all()
