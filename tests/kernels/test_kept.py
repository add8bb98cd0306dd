"""Exponentials kept from the forward pass, wherever the GPU kernels run: the same values and gradients."""

import math
import re

import pytest
import torch
from check import assert_as_good, error
from dense import F32, F64, cast, dense, problem, run, seen, without_topk
from places import INTERPRETED, check, kept, moved, run_on

import fastmargin as fm
from fastmargin.ops import class_update
from fastmargin.ops.class_update import Step
from fastmargin.ops.exponentials import LARGEST_NORM, KeptBytes, pitch_of
from fastmargin.ops.nontarget_lse import IMPLS
from fastmargin.ops.problem import BackwardInput, Problem

BF16, F16 = torch.bfloat16, torch.float16
SHAPES = [(1, 2, 2, 1), (3, 96, 1009, 5), (65, 33, 300, 1), (20, 24, 256, 0), (8, 8, 1500, 3), (130, 16, 129, 2)]


@pytest.fixture(params=[None, BF16], ids=str)
def stored(request):
    if INTERPRETED and request.param == BF16:
        pytest.skip("Triton's interpreter multiplies bfloat16 wrongly")
    return request.param


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_and_gradients(place, shape):
    B, d, C, k = shape
    *given, upstream = problem(B, d, C, k)
    check(place, given, upstream, op=kept, topk=k)


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("cosine", [0.5, 0.9, 1.0])
def test_confident_rows(place, cosine):
    *given, upstream = problem(8, 24, 600, 1, s=64.0, cosine=cosine)
    check(place, given, upstream, op=kept, topk=1)


@pytest.mark.usefixtures("poison")
def test_selected_classes(place):
    x, w, _, _, upstream = problem(7, 12, 900, 3)
    class_ids = torch.randperm(900)[:603].sort().values
    check(place, (x, w, torch.randint(-1, 603, (7,)), None), upstream, op=kept, class_ids=class_ids, topk=3)


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("C", [1, 2, 300])
def test_rows_of_the_largest_norm_and_classes_of_any(place, stored, C):
    """At the bound; class weights of norms from 1e-3 to 1e3; C = 1: no other class."""
    x, w, y, _, upstream = problem(40, 24, C, s=LARGEST_NORM - math.log(C) / 2 - 1e-4)
    w *= torch.logspace(-3, 3, C, dtype=F64)[torch.randperm(C), None]
    y[::7] = -1
    given = *cast(F32, x, w), y, None
    got, _ = run_on(place, *given, upstream, op=kept, compute_dtype=stored)
    truth, _ = run(dense, *cast(F64, *given), upstream)
    peer = truth if stored is None else run_on(place, *given, upstream, compute_dtype=stored)[0]
    for a, p, t in zip(got, peer, truth, strict=True):
        assert error(a, t) <= 2 * error(p, t) + 1e-5


@pytest.mark.usefixtures("poison")
def test_bfloat16_exponentials_have_float32_sums(place, stored):
    x, w, y, _, upstream = problem(130, 40, 600, 2, s=30.0)
    given, upstream = (*cast(F32, x, w), y, None), without_topk(upstream)
    got, classes = run_on(place, *given, upstream, op=kept, compute_dtype=stored, topk=2)
    rest, _, values, order = dense(*seen(stored or F32, *given[:2]), y, normalize_weight=False, topk=2)
    assert torch.equal(classes, order) and error(got[0], rest) < 1e-6 and error(got[2], values) < 1e-6
    truth, _ = run(dense, *cast(F64, *given), upstream, topk=2)
    again, _ = run_on(place, *given, upstream, compute_dtype=stored, topk=2)
    for a, p, t in zip(got, again, truth, strict=True):
        assert_as_good(a, p, t)


@pytest.mark.usefixtures("poison")
def test_one_class_has_all_of_the_probability(place, stored):
    """Its rounding errors average over the rows, kept or made again."""
    x, w, y, _, (d_rest, _, d_topk) = problem(256, 24, 2, s=60.0, cosine=0.5)
    given, upstream = (*cast(F32, x, w), y, None), (d_rest, -d_rest, d_topk)
    truth, _ = run(dense, *cast(F64, *given), upstream)
    for op in (dict(op=kept), {}):
        got, _ = run_on(place, *given, upstream, compute_dtype=stored, **op)
        assert error(got[4], truth[3 + 1]) < (1e-3 if stored else 1e-5)


@pytest.mark.skipif(INTERPRETED, reason="one thread cannot disagree with itself")
def test_two_runs_agree_to_the_bit(place, stored):
    *given, upstream = problem(5, 16, 600, 2)
    given = cast(F32, *given)
    first, second = (run_on(place, *given, upstream, op=kept, topk=2, compute_dtype=stored) for _ in range(2))
    for a, b in zip((*first[0], first[1]), (*second[0], second[1]), strict=True):
        assert torch.equal(a, b)


@pytest.mark.usefixtures("poison", "any_ids")
@pytest.mark.parametrize(("n", "padding"), [(257, 300), (0, 5)])
def test_class_ids_may_end_in_no_class(place, n, padding):
    x, w = cast(F32, *problem(5, 24, 900)[:2])
    ids, y, ones = (
        torch.randperm(900)[:n].sort().values,
        torch.randint(-1, max(n, 1), (5,)).clamp(max=n - 1),
        torch.ones(5),
    )
    ends = []
    for more in (0, padding):
        given = moved(place[0], x, w, y, torch.cat((ids, torch.full((more,), -1))), ones)
        functions, p = IMPLS[place[1]].functions, Problem(*given[:3], None, given[3])
        rest, _, classes, *saved = functions["fwd"](p, 0, True, keep_exponentials=True)
        out = functions["bwd"](p, BackwardInput(rest, classes, *saved, given[4], -given[4], None), True, True, False)
        assert not out.dw[n:].any()
        ends.append(moved("cpu", rest, out.dx, out.dw[:n]))
    for a, b in zip(*ends, strict=True):
        finite = b.isfinite()
        assert torch.equal(a[~finite], b[~finite]) and (error(a[finite], b[finite]) < 4e-6 or not finite.any())


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("rule", ["sgd", "adamw"])
@pytest.mark.parametrize("cached", [False, True])
def test_a_step_in_the_backward_pass(place, stored, rule, cached):
    device, backend = place
    functions = IMPLS[backend].functions
    if "bwd_update" not in functions or (cached and stored is None):
        pytest.skip("makes its step from the whole gradient, or keeps no operands")
    x, w, y = moved(device, *cast(F32, *problem(9, 24, 600)[:3]))
    d_rest, hyper = torch.rand(9, device=device), [0.1, 0.9, 0.01, 0.0]
    hyper = hyper if rule == "sgd" else [0.1, 0.01, 0.9, 0.99, 1e-8, 0.1, 0.1]
    parts = {}
    if cached:
        parts = dict(operands=torch.empty_like(w, dtype=stored), scales=w.new_empty(2, 600))
        functions["operands"](w, True, *parts.values())
    p, state = Problem(x, w, y, compute_dtype=stored), [torch.zeros_like(w) for _ in range(1 if rule == "sgd" else 2)]
    rest, _, classes, *saved = functions["fwd"](p, 0, True, keep_exponentials=True, **parts)
    given = BackwardInput(rest, classes, *saved, d_rest, -d_rest, None)
    dx, dw, _ = functions["bwd"](p, given, True, True, False)
    want, want_state = w.clone(), [t.clone() for t in state]
    class_update.IMPLS[backend].functions["update"](want, dw, None, Step(want_state, rule, hyper, None))
    got_dx, _ = functions["bwd_update"](p, given, True, False, Step(state, rule, hyper, None), **parts)
    for a, b in zip((w, got_dx, *state), (want, dx, *want_state), strict=True):
        assert torch.equal(a, b)
    if cached:
        fresh = [torch.empty_like(t) for t in parts.values()]
        functions["operands"](w, True, *fresh)
        assert all(torch.equal(a, b) for a, b in zip(parts.values(), fresh, strict=True))


def test_a_head_keeps_within_its_budget(place):
    """Two graphs fit, a third does not and makes them again; a graph that is backpropagated makes room."""
    device, backend = place
    size = 6 * pitch_of(300) * 4
    head = fm.MarginHead(8, 300, fm.ArcFace(), keep_bytes=2 * size, backend=backend).to(device)
    x, y = moved(device, torch.randn(6, 8), torch.randint(0, 300, (6,)))

    def gradient(loss):
        head.weight.grad = None
        loss.backward()
        return head.weight.grad

    losses = []
    for held in (1, 2, 2):
        losses.append(head(x, y).loss)
        assert sum(not ref.expired() for ref, _ in head.kept.held) == held
    first, second, third = (gradient(loss) for loss in losses)
    assert torch.equal(first, second) and not torch.equal(first, third) and error(third, first) < 1e-5
    assert all(ref.expired() for ref, _ in head.kept.held) and head.kept.admit(2 * size)
    with torch.no_grad():
        head(x, y)
    head.nearest(x, 1)
    assert head.kept.admit(2 * size)


@pytest.mark.parametrize(("normalize", "dtype"), [(True, F16), (False, None)])
def test_what_would_leave_the_range_is_refused(place, normalize, dtype):
    device, backend = place
    p = Problem(
        *moved(device, torch.randn(2, 4), torch.randn(5, 4), torch.zeros(2).long()), None, None, normalize, dtype
    )
    with pytest.raises(ValueError, match="want normalized weights, and bfloat16 or float32 operands"):
        IMPLS[backend].functions["fwd"](p, 0, True, keep_exponentials=True)


@pytest.mark.skipif(INTERPRETED, reason="raw ops of csrc/cuda")
def test_other_exponentials_are_refused(place):
    device, backend = place
    functions, given = IMPLS[backend].functions, moved(device, torch.randn(3, 4), torch.randn(70, 4), torch.arange(3))
    p = Problem(*given)
    rest, _, classes, expected, e = functions["fwd"](p, 0, True, keep_exponentials=True)
    assert e.shape == (3, 128) and e.dtype == torch.float32
    wrong = {
        "exponentials [3, 128]": (e[:, :70].contiguous(), e[:2], e.flatten()),
        "Float on": (e.double(), e.to(BF16)),
        "contiguous": (e.T.contiguous().T,),
    }
    for message, tensors in wrong.items():
        for t in tensors:
            with pytest.raises(ValueError, match=re.escape(message)):
                functions["bwd"](p, BackwardInput(rest, classes, expected, t, rest, rest, None), True, True, False)


def test_a_limit_of_zero_keeps_nothing():
    assert not KeptBytes(0).admit(1)
