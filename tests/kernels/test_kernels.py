"""Values of the GPU kernels, CUDA C++ and Triton, wherever they run: a place is (device, backend).

On a CPU the CUDA kernels run by a stand-in for CUDA, with barriers and shuffles (emulation.py), and Triton's in its
interpreter, in a process of their own: TRITON_INTERPRET must be set before Triton is imported (test_triton.py starts
it). Neither shows a GPU's memory model, rounding or speed: `pytest -m gpu` runs the same tests on a device.
"""

import pytest
import torch
from check import error
from dense import F32, F64, cast, dense, leaves, problem, run, seen, without_topk
from places import INTERPRETED, check, moved, run_on

from fastmargin.ops import class_update, target_logit
from fastmargin.ops import nontarget_lse as op
from fastmargin.ops.nontarget_lse import IMPLS, nontarget_lse
from fastmargin.ops.problem import BackwardInput, Problem

BF16, F16 = torch.bfloat16, torch.float16

SHAPES = [  # B, d, C, k, bias
    (1, 2, 2, 1, False),
    (3, 96, 1009, 5, False),
    (65, 33, 300, 1, True),
    (3, 8, 513, 40, True),
    (20, 24, 256, 0, False),
    (8, 8, 3549, 3, False),  # emulated: rows in one part, of which a thread has several quads at once; then odd ones
    (8, 8, 3549, 3, True),
    (1, 2, 5003, 2, False),
]
ROUNDED = [  # B, d, C, k, scale of the incoming gradients, bias
    *[(5, 24, 513, 1, scale, False) for scale in (1.0, 1e-30, 65536.0)],
    (5, 24, 513, 1, 65536.0, True),
    (130, 40, 300, 0, 1.0, False),
    (3, 33, 513, 2, 1.0, True),
]


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_and_gradients(place, shape):
    B, d, C, k, plain = shape
    k = min(k, C - 1)
    *given, upstream = problem(B, d, C, k, plain=plain)
    check(place, given, upstream, normalize_weight=not plain, topk=k)


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize(("s", "cosine"), [(64.0, 0.5), (64.0, 0.9), (200.0, 1.0)])
def test_confident_rows(place, s, cosine):
    *given, upstream = problem(8, 24, 600, 1, s=s, cosine=cosine)
    check(place, given, upstream, topk=1)


@pytest.mark.usefixtures("poison")
def test_selected_classes_are_a_smaller_problem(place):
    x, w, _, bias, upstream = problem(7, 12, 900, 3, plain=True)
    class_ids = torch.randperm(900)[:603].sort().values
    y = torch.randint(-1, 603, (7,))
    check(place, (x, w, y, bias), upstream, class_ids=class_ids, normalize_weight=False, topk=3)


def test_selected_classes_agree_to_the_bit_with_a_copy_of_their_weights(place, rounded):
    x, w, _, _, upstream = problem(5, 16, 700, 2)
    x, w, class_ids = x.float(), w.float(), torch.randperm(700)[:513].sort().values
    y, options = torch.randint(-1, 513, (5,)), dict(topk=2, compute_dtype=rounded)
    got, classes = run_on(place, x, w, y, None, upstream, class_ids=class_ids, **options)
    want, order = run_on(place, x, w[class_ids], y, None, upstream, **options)
    got[4] = got[4][class_ids]
    assert torch.equal(classes, order) and all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def directly(place, padding, x, w, y, bias, class_ids, upstream, k, dtype):
    """What the ops return: of the -1 that class_ids end in, the gradients are 0, and left out here."""
    device, backend = place
    n, class_ids = len(class_ids), torch.cat((class_ids, torch.full((padding,), -1)))
    x, w, y, bias, class_ids, *upstream = moved(device, x, w, y, bias, class_ids, *upstream)
    functions, plain = IMPLS[backend].functions, bias is not None
    p = Problem(x, w, y, bias, class_ids, not plain, dtype)
    rest, values, classes, *none = functions["fwd"](p, k, False)
    target = target_logit.IMPLS[backend].functions["fwd"](x, w, y, bias, class_ids, not plain)
    dx, dw, db = functions["bwd"](p, BackwardInput(rest, classes, *none, *upstream), True, True, plain)
    assert dw.shape == (n + padding, w.shape[1]) and not dw[n:].any() and not db[n:].any()
    return moved("cpu", rest, values, classes, target, dw[:n], db[:n], dx)


@pytest.mark.usefixtures("poison", "any_ids")
@pytest.mark.parametrize(("C", "n", "padding", "plain"), [
    (900, 513, 100, False), (900, 513, 600, True), (900, 257, 300, False), (9, 3, 4, True), (9, 0, 5, False),
])  # fmt: skip
def test_class_ids_may_end_in_no_class(place, compute_dtype, C, n, padding, plain):
    """A place of -1 counts for nothing, whatever chunk it is in, also where all of a chunk have none."""
    x, w, _, bias = cast(F32, *problem(5, 96, C, 4, plain=plain)[:4])
    upstream = [torch.randn(5), torch.randn(5), torch.randn(5, 4)]
    class_ids = torch.randperm(C)[:n].sort().values
    y = torch.randint(-1, max(n, 1), (5,)).clamp(max=n - 1)
    given = x, w, y, bias, class_ids, upstream, 4, compute_dtype
    got, want = directly(place, padding, *given), directly(place, 0, *given)
    assert torch.equal(got[2], want[2])
    for a, b in zip(got[:5], want[:5], strict=True):
        assert place[1] != "emulated" or torch.equal(a, b)
    for a, b in zip(got, want, strict=True):  # db and dx are summed in other parts
        finite = b.isfinite()
        assert torch.equal(a[~finite], b[~finite]) and (error(a[finite], b[finite]) < 4e-6 or not finite.any())


@pytest.mark.usefixtures("any_ids")
@pytest.mark.parametrize("rule", ["sgd", "adamw"])
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("n", [300, 0])
def test_an_update_leaves_no_class_as_it_is(place, rule, scaled, n):
    """The last row too, which -1 would be in Python; and the same bits as without padding."""
    device, backend = place
    C, d, padding = 400, 24, 300
    w, grad, p = torch.randn(C, d), torch.randn(n + padding, d), torch.randn(n + padding, 4)
    hyper = [0.1, 0.9, 0.01, 1.0] if rule == "sgd" else [0.1, 0.01, 0.9, 0.99, 1e-8, 0.1, 0.1]
    state = [torch.rand(C, d) for _ in range(1 if rule == "sgd" else 2)]
    grad[n:] = torch.nan
    for ids in (torch.randperm(C)[:n].sort().values, torch.arange(n) + C - n):
        ends = []
        for more in (0, padding):
            one, states = moved(device, w)[0].clone(), [t.clone() for t in moved(device, *state)]
            rows, g, products = moved(
                device, torch.cat((ids, torch.full((more,), -1))), grad[: n + more], p[: n + more]
            )
            scale = torch.tensor(2.0, device=device) if scaled else None
            functions = class_update.IMPLS[backend].functions
            functions["update"](one, g, rows, class_update.Step(states, rule, hyper, scale))
            functions["lazy_update"](one, states[0], rows, products)
            ends.append([one.cpu(), *moved("cpu", *states)])
        for a, b in zip(*ends, strict=True):
            assert torch.equal(a, b)
        others = torch.ones(C, dtype=torch.bool).index_fill(0, ids, False)
        assert torch.equal(ends[1][0][others], w[others])


@pytest.mark.usefixtures("any_ids")
def test_a_step_in_the_backward_pass_leaves_no_class_as_it_is(place, compute_dtype):
    device, backend = place
    if "bwd_update" not in IMPLS[backend].functions:
        pytest.skip("makes its step from the whole gradient")
    x, w = cast(F32, *problem(5, 96, 900)[:2])
    ids, y, ones = torch.randperm(900)[:513].sort().values, torch.randint(-1, 513, (5,)), torch.ones(5)
    ends = []
    for padding in (0, 600):
        rows = torch.cat((ids, torch.full((padding,), -1)))
        one, v, *given = moved(device, w.clone(), torch.zeros_like(w), x, y, rows, ones)
        p = Problem(given[0], one, given[1], None, given[2], True, compute_dtype)
        rest, _, classes, *none = IMPLS[backend].functions["fwd"](p, 0, False)
        saved = BackwardInput(rest, classes, *none, given[3], -given[3], None)
        step = class_update.Step([v], "sgd", [0.1, 0.9, 0.01, 0.0], None)
        IMPLS[backend].functions["bwd_update"](p, saved, True, False, step)
        ends.append(moved("cpu", one, v))
    for a, b in zip(*ends, strict=True):
        assert torch.equal(a, b) if backend == "emulated" else error(a, b) < 2e-6
    assert not torch.equal(ends[1][0], w)


def test_any_strides(place):
    x, w, y, _, upstream = problem(9, 20, 450, 2)
    upstream = [t[:1].expand_as(t) for t in upstream]
    spread = torch.stack((y, y + 1), 1)[:, 0]
    x32, w32 = (t.float().T.contiguous().T for t in (x, w))
    got, classes = run_on(place, x32, w32, spread, None, upstream, topk=2)
    truth, order = run(dense, x, w, y, None, upstream, topk=2)
    assert torch.equal(classes, order)
    assert max(error(a, b) for a, b in zip(got, truth, strict=True)) < 2e-6


@pytest.mark.parametrize(("B", "C", "k"), [(4, 900, 1), (4, 900, 20), (8, 3549, 20)])
def test_ties_go_to_the_smaller_class(place, compute_dtype, B, C, k):
    """Small integers: every product is exact, so equal logits are equal, and there are many, in every chunk."""
    device, backend = place
    x, w = torch.randint(-2, 3, (B, 8)).float(), torch.randint(-1, 2, (C, 8)).float()
    y = torch.randint(0, C, (B,))
    given, options = moved(device, x, w, y), dict(normalize_weight=False, topk=k)
    _, _, values, classes = nontarget_lse(*given, backend=backend, compute_dtype=compute_dtype, **options)
    _, _, want, order = dense(x, w, y, **options)
    assert torch.equal(values.cpu(), want)
    assert torch.equal(classes.cpu(), order)


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize(("B", "C"), [(5, 0), (5, 1), (5, 2), (5, 3), (0, 9)])
def test_fewer_classes_than_asked_for_and_no_rows(place, B, C):
    device, backend = place
    x, w = leaves(*moved(device, torch.randn(B, 4), torch.randn(C, 4)))
    y = torch.tensor([0, 0, C - 1, 0, -1])[:B].clamp(max=C - 1).to(device)
    rest, target, values, classes = nontarget_lse(x, w, y, topk=3, backend=backend)
    others = C - (y >= 0).long()
    assert torch.equal((classes >= 0).sum(1), others.clamp(max=3))
    assert torch.equal(values == -torch.inf, classes == -1)
    assert torch.equal(rest == -torch.inf, others == 0)
    torch.autograd.backward((rest, target), (torch.ones_like(rest), torch.ones_like(target)))
    assert x.grad.isfinite().all() and w.grad.isfinite().all()
    if B and C == 1:  # a class alone: g stays d_target at the row's own class, and is 0 elsewhere
        unit = torch.nn.functional.normalize(w.detach()).expand_as(x) * (y >= 0)[:, None]
        assert torch.allclose(x.grad, unit + (y < 0)[:, None] * torch.nn.functional.normalize(w.detach()))


def test_tiny_weights_zero_rows_and_nan(place):
    device, backend = place
    x, w = torch.randn(4, 6), torch.randn(570, 6)
    x[1], w[3], w[5] = 0, 0, 1e-20
    x[2, 1] = torch.nan
    x, w = leaves(*moved(device, x, w))
    rest, target, *_ = nontarget_lse(x, w, torch.tensor([3, 2, 4, 5]).to(device), topk=1, backend=backend)
    assert torch.allclose(rest[1].cpu(), torch.tensor(569.0).log())
    assert rest[2].isnan() and target[2].isnan()
    (rest[[0, 1, 3]].sum() + target[[0, 1, 3]].sum()).backward()
    assert x.grad[[0, 1, 3]].isfinite().all() and rest[[0, 1, 3]].isfinite().all()


@pytest.mark.parametrize("norm", [0.0, 1.0, 100.0, 1e4])
def test_any_norm(place, norm):
    device, backend = place
    x, w, y, _, _ = problem(5, 8, 700, s=norm)
    rest, *_ = nontarget_lse(*moved(device, *cast(F32, x, w, y)), backend=backend)
    assert torch.allclose(rest.cpu().double(), dense(x, w, y)[0], rtol=2e-6, atol=2e-6)


def test_labels_out_of_range_read_no_memory_that_is_not_theirs(place, monkeypatch):
    """On a GPU labels are not checked before: such a row has no class here, as with -1."""
    device, backend = place
    for module in (op, target_logit):
        monkeypatch.setattr(module, "check_ids", lambda *given: None)
    x, w = torch.randn(3, 4), torch.randn(300, 4)
    fwd = IMPLS[backend].functions["fwd"]
    target = target_logit.IMPLS[backend].functions["fwd"]
    bad, none = torch.tensor([300, -7, 2**40]), torch.tensor([-1, -1, -1])
    x, w, bad, none = moved(device, x, w, bad, none)
    rest = [fwd(Problem(x, w, y), 0, False).rest for y in (bad, none)]
    assert torch.equal(*rest) and not target(x, w, bad, None, None, True).any()
    one, bwd = torch.ones_like(rest[0]), IMPLS[backend].functions["bwd"]
    got, want = (
        bwd(
            Problem(x, w, y),
            BackwardInput(rest[0], y[:, None], one[:0], one[:0], one, one, one[:, None]),
            True,
            True,
            False,
        )
        for y in (bad, none)
    )
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_classes_that_a_bias_rules_out_have_no_gradient(place):
    """No other class is left: g is 0 except at the row's own."""
    device, backend = place
    x, w, y = moved(device, torch.randn(3, 4), torch.randn(570, 4), torch.tensor([566, 566, 566]))
    bias = torch.full((570,), -torch.inf, device=device)
    bias[566] = 0.5
    x, w = leaves(x, w)
    rest, target, *_ = nontarget_lse(x, w, y, bias=bias, normalize_weight=False, backend=backend)
    assert (rest == -torch.inf).all()
    torch.autograd.backward((rest, target), (torch.ones_like(rest), torch.ones_like(target)))
    assert torch.allclose(x.grad, w[566].detach().expand_as(x)) and torch.allclose(w.grad[566], x.detach().sum(0))
    assert not w.grad[:566].any() and not w.grad[567:].any()


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("shape", ROUNDED, ids=str)
def test_rounded_operands_have_float32_sums(place, rounded, shape):
    """Against float64 on the rounded operands, values have the error of float32; gradients, that of the rounding."""
    B, d, C, k, scale, plain = shape
    *given, upstream = problem(B, d, C, k, plain=plain)
    x, w, y, bias = cast(F32, *given)
    if not plain:
        w *= torch.logspace(-8, 8, C)[:, None]  # norms of all sizes
    upstream, options = [scale * t for t in without_topk(upstream)], dict(normalize_weight=not plain, topk=k)
    got, classes = run_on(place, x, w, y, bias, upstream, compute_dtype=rounded, **options)
    rest, _, values, order = dense(*seen(rounded, x, w, not plain), y, bias, normalize_weight=False, topk=k)
    assert torch.equal(classes, order)
    assert error(got[0], rest) < 1e-6 and error(got[2], values) < 1e-6
    truth, _ = run(dense, *cast(F64, x, w, y, bias), upstream, **options)
    assert error(got[1], truth[1]) < 1e-6  # the target is not rounded
    unit = w.norm(dim=1, keepdim=True) if not plain else 1.0  # dw goes with 1/||w||
    eps = 8 * torch.finfo(rounded).eps
    assert error(got[3], truth[3]) < eps and error(got[4] * unit, truth[4] * unit) < eps
    for a, t in zip(got[3:], truth[3:], strict=True):
        a, t = (a.double() * unit, t * unit) if a.shape == w.shape else (a.double(), t)
        assert abs(float((a * t).sum() / (t * t).sum()) - 1) < 1e-3  # to the nearest: no bias


def test_gradients_of_targets_and_of_the_nearest_are_not_rounded(place, rounded):
    x, w, y, _, (_, d_target, d_topk) = problem(12, 24, 700, 2)
    x, w = cast(F32, x, w)
    y[1:8] = y[0]  # many rows of one class
    upstream = torch.zeros_like(d_target), d_target, d_topk
    got, classes = run_on(place, x, w, y, None, upstream, topk=2, compute_dtype=rounded)
    x, w = leaves(*cast(F64, x, w))
    z = x @ torch.nn.functional.normalize(w).T
    picked = z.gather(1, torch.cat((y[:, None], classes), 1)) * torch.cat((d_target[:, None], d_topk), 1)
    picked.sum().backward()
    assert error(got[3], x.grad) < 1e-6 and error(got[4], w.grad) < 1e-6


@pytest.mark.parametrize("scale", [0.0, 1e-38])
def test_gradients_that_vanish_do_so_without_overflow(place, scale):
    *given, upstream = problem(5, 8, 300)
    got, _ = run_on(place, *cast(F32, *given), [scale * t for t in upstream], compute_dtype=F16)
    assert all(t.isfinite().all() and t.abs().max() < 1e-30 for t in got[3:])


@pytest.mark.skipif(INTERPRETED, reason="one thread cannot disagree with itself")
def test_two_runs_agree_to_the_bit(place, compute_dtype):
    *given, upstream = problem(5, 16, 600, 2)
    given = cast(F32, *given)
    first, second = (run_on(place, *given, upstream, topk=2, compute_dtype=compute_dtype) for _ in range(2))
    for a, b in zip((*first[0], first[1]), (*second[0], second[1]), strict=True):
        assert torch.equal(a, b)


def test_no_gradient_where_none_is_needed(place):
    device, backend = place
    x, w, y = moved(device, torch.randn(5, 4), torch.randn(9, 4), torch.randint(0, 9, (5,)))
    for x_needs, w_needs in ((True, False), (False, True)):
        x.requires_grad_(x_needs).grad, w.requires_grad_(w_needs).grad = None, None
        nontarget_lse(x, w, y, backend=backend)[0].sum().backward()
        assert (x.grad is not None) == x_needs and (w.grad is not None) == w_needs


def test_the_order_of_classes_does_not_matter(place):
    """Sums and lists of a chunk are merged with those of the chunks before: any order gives the same."""
    x, w, y, _, upstream = problem(4, 16, 1100, 3)
    x, w = cast(F32, x, w)
    want, order = run_on(place, x, w, y, None, upstream, topk=3)
    shuffle = torch.randperm(1100)
    got, classes = run_on(place, x, w[shuffle], shuffle.argsort()[y], None, upstream, topk=3)
    assert torch.equal(shuffle[classes], order)
    got[4] = got[4][shuffle.argsort()]
    assert max(error(a, b) for a, b in zip(got, want, strict=True)) < 2e-6


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: several chunks of full size are NOT run")
@pytest.mark.parametrize("backend", ["native", "triton"])
@pytest.mark.parametrize("dtype", [None, BF16, F16], ids=str)
def test_several_chunks_of_full_size(dtype, backend):
    """On a GPU a chunk has thousands of classes: gradients over several chunks, each in split products."""
    *given, upstream = problem(1024, 64, 40_000, 3)
    given, upstream = cast(F32, *given), without_topk(upstream)
    got, _ = run_on(("cuda", backend), *given, upstream, topk=3, compute_dtype=dtype)
    truth, _ = run_on(("cuda", "reference"), *cast(F64, *given), upstream, topk=3)
    for a, t in zip(got, truth, strict=True):
        assert error(a, t) < (2e-6 if dtype is None else 2e-2)
