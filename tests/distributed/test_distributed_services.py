"""Services of a head in a group other than its loss, and its communication. Each task below runs on every rank."""

import copy
import functools
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from check import error
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

import fastmargin as fm
from fastmargin.distributed import layout
from fastmargin.head.margin_head import MarginHead

D = 16


def problem(C=50, margin=None, B=12, dtype=torch.float64, **options):
    """A head of one process and one in the group, with equal weights; embeddings and labels of all ranks."""
    torch.manual_seed(0)
    heads = []
    for group in (None, dist.group.WORLD):
        make = copy.deepcopy(margin) if margin is not None else fm.ArcFace()
        heads.append(MarginHead(D, C, make, bias=make.plain, group=group, **options).to(dtype))
    w, bias = torch.randn(C, D, dtype=dtype), torch.randn(C, dtype=dtype)
    for head in heads:
        head.load_full_weight(w)
        if head.bias is not None:
            head.bias.data.copy_(bias)
    return *heads, 9 * torch.randn(B, D, dtype=dtype), torch.randint(0, C, (B,))


def local(t, uneven=False):
    """This rank's part of t: equal parts, or 0, 1, 2, ... rows and the remaining ones on the last rank."""
    rank, N = dist.get_rank(), dist.get_world_size()
    if not uneven:
        return t.chunk(N)[rank]
    return t.split([*range(N - 1), len(t) - sum(range(N - 1))])[rank]


def whole(part, layout):
    return layout.gather(part)


# ---------------------------------------------------------------------------------------------- where the classes lie


def lie(counts):
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for C in counts:
        head = MarginHead(D, C, fm.ArcFace(), group=dist.group.WORLD, seed=3)
        lo, hi = head.class_range
        assert torch.arange(lo, hi).tolist() == distribute_tensor(torch.arange(C), mesh, [Shard(0)]).to_local().tolist()
        assert len(head.weight) == hi - lo and head.num_classes == C
        one = MarginHead(D, C, fm.ArcFace(), seed=3)
        assert torch.equal(head.weight, one.weight[lo:hi]) and torch.equal(whole(head.weight, head.classes), one.weight)


@pytest.mark.parametrize("N", [1, 3, 4])
def test_classes_lie_as_a_dtensors_rows_and_start_as_in_one_process(ranks, N):
    ranks(N, lie, (1, 2, 3, 5, 10, 11, 1023, 1025, 3000))


def grow():
    for margin in (fm.ArcFace(), fm.L2Softmax()):
        for C, n in ((1, 1), (3, 0), (10, 1), (10, 30), (7, 2000)):
            one, head, f, y = problem(C, margin, dtype=torch.float32, uneven=True)
            one.extend(n)
            head.extend(n)
            assert head.num_classes == C + n and head.class_range == distributed_range(C + n)
            assert torch.equal(whole(head.weight, head.classes), one.weight)
            assert head.bias is None or torch.equal(head.bias, one.bias)
            want, got = one(f, y).loss, head(local(f), local(y)).loss
            dist.all_reduce(got)
            assert error(got / dist.get_world_size(), want) < 1e-6
    with pytest.raises(ValueError, match="class_weight"):
        problem(class_weight=torch.ones(50))[1].extend(1)


def distributed_range(C):
    held = layout.chunks(C, dist.group.WORLD)
    return held.start, held.stop


@pytest.mark.parametrize("N", [2, 3])
def test_extend_moves_rows_to_the_ranks_that_hold_them_now(ranks, N):
    ranks(N, grow)


# ---------------------------------------------------------------------------------------------- neighbors, ties


def neighbors():
    for margin in (fm.ArcFace(), fm.L2Softmax()):
        for C in (1, 2, 700):
            one, head, f, _ = problem(C, margin)
            for k in (0, 1, 5):
                (scores, classes), (want_scores, want) = head.nearest(local(f, uneven=True), k), one.nearest(f, k)
                assert torch.equal(classes, local(want, uneven=True))
                torch.testing.assert_close(scores, local(want_scores, uneven=True), rtol=1e-12, atol=0)


def ties():
    one, head, f, y = problem(20, topk=6)
    w = torch.eye(4, D, dtype=torch.float64).repeat(5, 1)  # each row five times, on different ranks; products are exact
    for h in (one, head):
        h.load_full_weight(w)
    got, want = head(local(f), local(y)), one(f, y)
    assert torch.equal(got.hard_classes, local(want.hard_classes))
    assert torch.equal(head.nearest(local(f), 20)[1], local(one.nearest(f, 20)[1]))
    scores, classes = want.hard_scores, want.hard_classes
    tied = scores[:, 1:] == scores[:, :-1]
    assert tied.sum() > len(f) and (classes[:, 1:] > classes[:, :-1])[tied].all()


def logits():
    N = dist.get_world_size()
    for margin in (fm.ArcFace(s=30.0, learn_scale=True), fm.L2Softmax()):
        for C in (1, 11):
            one, head, f, y = problem(C, margin)
            part = local(f).requires_grad_()
            f.requires_grad_()
            want, got = one.get_logits(f), head.get_logits(part)
            torch.testing.assert_close(got, local(want), rtol=1e-12, atol=0)
            F.cross_entropy(want, y).backward()
            F.cross_entropy(got, local(y)).backward()
            assert error(part.grad / N, local(f.grad)) < 1e-12
            assert error(head.weight.grad, head.classes.local_slice(one.weight.grad)) < 1e-12
            for p, q in zip(head.replicated_parameters(), one.replicated_parameters(), strict=True):
                assert error(p.grad, q.grad) < 1e-12


@pytest.mark.parametrize("task", [neighbors, ties, logits], ids=lambda task: task.__name__)
@pytest.mark.parametrize("N", [1, 3])
def test_inference(ranks, N, task):
    ranks(N, task)


def imprinted():
    for margin in (fm.ArcFace(), fm.L2Softmax()):
        one, head, f, _ = problem(10, margin)
        classes = torch.tensor([9, 4, 9, 9, 0, 1, 4, 3, 3, 0, 9, 8])
        before = head.weight.detach().clone()
        one.imprint(f, classes)
        head.imprint(local(f, uneven=True), local(classes, uneven=True))
        torch.testing.assert_close(whole(head.weight, head.classes), one.weight.data, rtol=1e-12, atol=1e-14)
        before.copy_(head.weight.detach())
        bad = torch.full_like(local(classes), 10 if dist.get_rank() == 1 else 2)
        with pytest.raises(ValueError, match=r"classes run from 2 to 10: want \[0, 10\)"):
            head.imprint(local(f), bad)
        with pytest.raises(ValueError, match="class 5 add up to nothing"):
            head.imprint(0 * local(f), torch.full_like(bad, 5))
        assert torch.equal(head.weight, before)


def test_imprint_takes_embeddings_of_a_class_from_any_rank(ranks):
    ranks(3, imprinted)


# ---------------------------------------------------------------------------------------------- training


def accumulation():
    """Gradients of several passes add up; those of replicated parameters are averaged, once."""
    one, head, f, y = problem(11, fm.ArcFace(m=nn.Parameter(torch.full((11,), 0.4)), learn_scale=True))
    for half in (slice(0, 6), slice(6, 12)):
        one(f[half], y[half]).loss.backward()
        head(local(f[half]), local(y[half])).loss.backward()
    assert error(head.weight.grad, head.classes.local_slice(one.weight.grad)) < 1e-12
    for p, q in zip(head.replicated_parameters(), one.replicated_parameters(), strict=True):
        assert error(p.grad, q.grad) < 1e-12
    assert error(head.grad_norm(), one.grad_norm()) < 1e-12
    flat = torch.cat([p.grad.flatten() for p in one.parameters()])
    assert error(one.grad_norm(), flat.norm()) < 1e-6


def copies():
    """A copy of a head, or a margin replaced later, averages its gradients, too."""
    one, head, f, y = problem(11, fm.ArcFace(learn_scale=True))
    head = copy.deepcopy(head)
    one.margin, head.margin = (fm.CosFace(learn_scale=True).double() for _ in range(2))
    one(f, y).loss.backward()
    copy.deepcopy(head)(local(f), local(y)).loss.backward()
    head(local(f), local(y)).loss.backward()
    assert error(head.margin.s.grad, one.margin.s.grad) < 1e-12


def state():
    """The number of passes, on which the random numbers depend, is part of the state."""
    _, head, f, y = problem(11, fm.ElasticFace(sigma=0.2), sample_rate=0.5)
    first = [head(local(f), local(y)).loss.item() for _ in range(3)]
    assert len(set(first)) == 3 and head.counter.step == 3
    _, again, _, _ = problem(11, fm.ElasticFace(sigma=0.2), sample_rate=0.5)
    again.load_state_dict(head.state_dict())
    assert again.counter.step == 3 and torch.equal(again.weight, head.weight)
    before = torch.get_rng_state()
    assert again(local(f), local(y)).loss.item() == head(local(f), local(y)).loss.item()
    assert torch.equal(torch.get_rng_state(), before)
    head.eval()(local(f), local(y))
    assert head.counter.step == 4


def frozen():
    """The rows of an empty rank need not require a gradient; with a frozen backbone there is no backward collective."""
    one, head, f, y = problem(11, uneven=True)
    rows = local(f, uneven=True)
    rows = rows.requires_grad_() if len(rows) else rows
    head(rows, local(y, uneven=True)).loss.backward()
    one(f, y).loss.backward()
    assert error(head.weight.grad, head.classes.local_slice(one.weight.grad)) < 1e-12
    head.zero_grad()
    head(local(f), local(y)).loss.backward()
    assert error(head.weight.grad, head.classes.local_slice(one.weight.grad)) < 1e-12
    head.weight.requires_grad_(False)
    rows = local(f).clone().requires_grad_()
    head(rows, local(y)).loss.backward()
    assert rows.grad.any() and head(local(f), local(y)).loss.requires_grad is False


def low_precision():
    """Autocast changes nothing; with gather_dtype=bfloat16 the scores are those of rounded rows."""
    one, head, f, y = problem(40, dtype=torch.float32, topk=2)
    _, coarse, _, _ = problem(40, dtype=torch.float32, gather_dtype=torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = local(f).bfloat16().requires_grad_()
        got = head(half, local(y))
        got.loss.backward()
    want = one(f.bfloat16().float(), y)
    assert error(got.hard_scores, local(want.hard_scores)) < 1e-5 and half.grad.dtype == torch.bfloat16
    rows = local(f).clone().requires_grad_()
    out = coarse(rows, local(y))
    out.loss.backward()
    x = (64 * F.normalize(local(f))).bfloat16().float() / 64
    cos = (x * F.normalize(one.weight)[local(y)]).sum(1)
    assert error(out.target_score, cos) < 1e-6 < error(out.target_score, local(one(f, y).target_score))
    assert rows.grad.dtype == torch.float32 and rows.grad.isfinite().all()


@pytest.mark.parametrize("task", [accumulation, copies, state, frozen, low_precision], ids=lambda task: task.__name__)
@pytest.mark.parametrize("N", [1, 3])
def test_training(ranks, N, task):
    ranks(N, task)


# ---------------------------------------------------------------------------------------------- what travels


def counted(sent, name, call):
    @functools.wraps(call)
    def counting(*tensors, **given):
        sent.append((name, max(t.nbytes for t in tensors if isinstance(t, torch.Tensor))))
        return call(*tensors, **given)

    return counting


def travelling():
    """Bytes of each collective, of the whole batch: as the docstring of distributed/functions.py has them."""
    B, k, sent = 12, 2, []
    _, plain, f, y = problem(50, topk=k, dtype=torch.float32)
    _, coarse, _, _ = problem(50, fm.AdaFace(), topk=k, dtype=torch.float32, gather_dtype=torch.bfloat16)
    names = (layout, "all_gather_single"), (layout, "reduce_scatter_single"), (dist, "all_to_all_single")
    before = [getattr(*where) for where in names]
    for (module, name), call in zip(names, before, strict=True):
        setattr(module, name, counted(sent, name.removesuffix("_single"), call))
    try:
        sizes = ("all_gather", 16 * dist.get_world_size())  # on the CPU alone, where they are compared
        for head, row, statistics in ((plain, 4 * D, []), (coarse, 2 * D, [("all_gather", 8 * B)])):
            sent.clear()
            loss = head(local(f).requires_grad_(), local(y)).loss
            forward = [sizes, ("all_gather", 8 * B), ("all_gather", row * B)]
            assert sent == [*forward, ("all_to_all", 8 * B), ("all_to_all", 12 * k * B), *statistics]
            sent.clear()
            loss.backward()
            assert sent == [("all_gather", 12 * B), ("reduce_scatter", 4 * D * B)]
    finally:
        for where, call in zip(names, before, strict=True):
            setattr(*where, call)


def test_no_more_travels_than_is_said(ranks):
    ranks(3, travelling)


def averaging():
    """However many forward passes were made before: one all-reduce of each replicated parameter in a backward pass."""
    _, head, f, y = problem(11, fm.ArcFace(m=nn.Parameter(torch.full((11,), 0.4)), learn_scale=True))
    sent = []
    with mock.patch.object(dist, "all_reduce", counted(sent, "all_reduce", dist.all_reduce)):
        for _ in range(3):
            loss = head(local(f), local(y)).loss
            sent.clear()
            loss.backward()
            assert sorted(sent) == [("all_reduce", 8), ("all_reduce", 8 * 11)]


def test_a_gradient_is_averaged_once(ranks):
    ranks(3, averaging)
