"""class_update, class_lazy_update and the backward pass that updates, against torch's optimizers and each other."""

import pytest
import torch
from check import error
from dense import F32, F64, cast, problem
from emulation import wants_compiler

from fastmargin.ops.class_update import IMPLS, Step
from fastmargin.ops.nontarget_lse import IMPLS as LSE
from fastmargin.ops.problem import BackwardInput, Problem

LIMIT = {F32: 2e-6, F64: 1e-13}
SGD = [0.3, 0.9, 5e-2, 0.0]
NESTEROV = [0.3, 0.9, 5e-2, 1.0]
PLAIN = [0.3, 0.0, 5e-2, 0.0]
RULES = {
    "sgd": ("sgd", SGD, 1, lambda p: torch.optim.SGD(p, 0.3, 0.9, weight_decay=5e-2)),
    "nesterov": ("sgd", NESTEROV, 1, lambda p: torch.optim.SGD(p, 0.3, 0.9, weight_decay=5e-2, nesterov=True)),
    "without momentum": ("sgd", PLAIN, 0, lambda p: torch.optim.SGD(p, 0.3, weight_decay=5e-2)),
    "adamw": ("adamw", None, 2, lambda p: torch.optim.AdamW(p, 0.1, (0.8, 0.95), 1e-6, 5e-2)),
}


def hyper_of(hyper, t):
    return hyper or [0.1, 5e-2, 0.8, 0.95, 1e-6, 1 - 0.8**t, (1 - 0.95**t) ** 0.5]


@pytest.fixture(params=["native", "stream", pytest.param("emulated", marks=wants_compiler)])
def backend(request):
    """ "emulated": the CUDA kernels on the CPU; float32."""
    if request.param == "emulated":
        request.getfixturevalue("emulated")
    elif request.param not in IMPLS:
        pytest.skip("native kernels not built")
    return request.param


def dtypes(backend):
    return [F32] if backend == "emulated" else [F32, F64]


@pytest.mark.parametrize("selected", [False, True], ids=["all classes", "some classes"])
@pytest.mark.parametrize("rule", RULES)
def test_steps_are_those_of_torch(backend, rule, selected, threads):
    for dtype in dtypes(backend):
        check_steps(backend, rule, selected, dtype)


def check_steps(backend, rule, selected, dtype):
    name, hyper, states, optimizer = RULES[rule]
    C, d = 301, 37
    w = torch.randn(C, d, dtype=F64)
    class_ids = torch.randperm(C)[:120].sort().values if selected else None
    at = slice(None) if class_ids is None else class_ids
    want = w[at].clone().requires_grad_()
    torch_one = optimizer([want])
    got, state = w.to(dtype), [torch.zeros(C, d, dtype=dtype) for _ in range(states)]
    untouched = got.clone()
    for t in range(1, 5):
        want.grad = torch.randn_like(want)
        torch_one.step()
        step = Step(state, name, hyper_of(hyper, t), None)
        IMPLS[backend].functions["update"](got, want.grad.to(dtype), class_ids, step)
    assert error(got[at], want) < LIMIT[dtype]
    if selected:
        others = torch.ones(C, dtype=torch.bool).index_fill(0, class_ids, False)
        assert torch.equal(got[others], untouched[others]) and not any(s[others].any() for s in state)


@pytest.mark.parametrize("rule", RULES)
def test_a_scale_is_taken_out_and_rows_that_overflowed_stay(backend, rule):
    name, hyper, states, _ = RULES[rule]
    w, g, scale = torch.randn(70, 33), torch.randn(70, 33), torch.tensor(1024.0)
    run = IMPLS[backend].functions["update"]
    want, want_state = w.clone(), [torch.rand(70, 33) for _ in range(states)]
    got, state = w.clone(), [s.clone() for s in want_state]
    before = [s.clone() for s in want_state]
    run(want, g, None, Step(want_state, name, hyper_of(hyper, 1), None))
    lost = torch.zeros(70, dtype=torch.bool)
    lost[[0, 33, 69]] = True
    scaled = g * scale
    scaled[0, 5], scaled[33, 32], scaled[69, 0] = torch.inf, torch.nan, -torch.inf
    run(got, scaled, None, Step(state, name, hyper_of(hyper, 1), scale))
    for after, right, old in zip((got, *state), (want, *want_state), (w, *before), strict=True):
        assert error(after[~lost], right[~lost]) < 1e-6
        assert torch.equal(after[lost], old[lost])


@pytest.mark.parametrize("with_momentum", [True, False])
@pytest.mark.parametrize("class_ids", [torch.arange(3, 40, 2), None], ids=["some classes", "all classes"])
def test_catching_up(backend, class_ids, with_momentum):
    dtype = dtypes(backend)[-1]
    w, v = torch.randn(50, 9, dtype=dtype), torch.randn(50, 9, dtype=dtype) if with_momentum else None
    at = torch.arange(50) if class_ids is None else class_ids
    p = torch.randn(len(at), 4, dtype=dtype)
    want_w, want_v = w.clone(), torch.zeros_like(w) if v is None else v.clone()
    old_v, old_w = want_v[at], want_w[at]
    want_v[at] = p[:, :1] * old_v + p[:, 1:2] * old_w
    want_w[at] = p[:, 2:3] * old_v + p[:, 3:] * old_w
    IMPLS[backend].functions["lazy_update"](w, v, class_ids, p)
    assert error(w, want_w) < LIMIT[dtype] and (v is None or error(v, want_v) < LIMIT[dtype])


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("selected", [False, True], ids=["all classes", "some classes"])
@pytest.mark.parametrize("plain", [False, True], ids=["normalized", "bias"])
@pytest.mark.parametrize("rule", ["sgd", "adamw"])
@pytest.mark.parametrize("shape", [(30, 24, 700, 3), (0, 5, 300, 0), (300, 8, 40, 1)], ids=str)
def test_a_backward_pass_that_updates(backend, shape, rule, plain, selected, threads):
    """The same dx, db, weights and states as a backward pass and a step after it."""
    B, d, C, k = shape
    dtype = dtypes(backend)[-1]
    x, w, y, bias, upstream = problem(B, d, C, k, plain=plain)
    x, w, bias, d_rest, d_target, d_topk = cast(dtype, x, w, bias, *upstream)
    class_ids = torch.arange(0, C, 2) if selected else None
    y = y // 2 if selected else y
    name, hyper, states, _ = RULES[rule]
    functions = LSE[backend].functions
    p = Problem(x, w, y, bias, class_ids, not plain)
    out = functions["fwd"](p, k, True)
    given = BackwardInput(out.rest, out.topk_classes, out.expected_weight, out.exponentials, d_rest, d_target, d_topk)
    want, state = w.clone(), [torch.rand(C, d, dtype=dtype) for _ in range(states)]
    got, got_state = w.clone(), [s.clone() for s in state]
    dx, dw, db = functions["bwd"](p, given, True, True, plain)
    step = Step(state, name, hyper_of(hyper, 2), None)
    IMPLS[backend].functions["update"](want, dw, class_ids, step)
    got_dx, got_db = functions["bwd_update"](p._replace(w=got), given, True, plain, step._replace(state=got_state))
    for mine, right in zip((got, *got_state, got_dx, got_db), (want, *state, dx, db), strict=True):
        assert error(mine, right) < LIMIT[dtype]


@pytest.mark.skipif("native" not in IMPLS, reason="native kernels not built")
def test_the_ops_check_what_they_change():
    op, w, g = torch.ops.fastmargin.class_update, torch.zeros(4, 3), torch.zeros(4, 3)
    for args, message in (
        ((w, [], g, None, "rmsprop", SGD, None), "rule = rmsprop: want sgd or adamw"),
        ((w, [g, g], g, None, "sgd", SGD, None), "at most 1 states; got 4 and 2"),
        ((w, [g], g, None, "adamw", SGD, None), "7 hyper-parameters"),
        ((w, [g[:2]], g, None, "sgd", SGD, None), "one shape, dtype and device"),
        ((w, [g.double()], g, None, "sgd", SGD, None), "one shape, dtype and device"),
        ((w.T, [], g.T, None, "sgd", SGD, None), "contiguous"),
        ((w, [], g[:2], None, "sgd", SGD, None), "want grad"),
        ((w, [], g[:2], torch.tensor([2, 1]), "sgd", SGD, None), r"class_ids\[1\] = 1: want sorted"),
        ((w, [], g[:1], torch.tensor([4]), "sgd", SGD, None), r"class_ids\[0\] = 4"),
    ):
        with pytest.raises(ValueError, match=message):
            op(*args)
    with pytest.raises(ValueError, match="want products"):
        torch.ops.fastmargin.class_lazy_update(w, None, None, torch.zeros(3, 4))


@pytest.mark.skipif("native" not in IMPLS, reason="native kernels not built")
def test_opcheck():
    x, w, y, _, (d_rest, d_target, d_topk) = problem(5, 4, 9, 1)
    x, w = cast(F32, x, w)
    d_rest, d_target, d_topk = cast(F32, d_rest, d_target, d_topk)
    op = torch.ops.fastmargin
    rest, _, classes, *kept = op.nontarget_lse_fwd(x, w, y, None, None, None, True, 1, 1, None, True)
    saved = (rest, classes, *kept, d_rest, d_target, d_topk, True, False)
    args = (x, w, y, None, None, None, True, 1, None, *saved, [torch.zeros(9, 4)], "sgd", SGD, None)
    torch.library.opcheck(op.nontarget_lse_bwd_update.default, args)
    torch.library.opcheck(op.class_update.default, (w, [torch.zeros(9, 4)], w.clone(), None, "sgd", SGD, None))
    torch.library.opcheck(op.class_lazy_update.default, (w, torch.zeros(9, 4), None, torch.rand(9, 4)))
