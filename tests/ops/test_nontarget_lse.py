"""nontarget_lse and target_logit against a dense float64 composition, on every backend."""

import math

import pytest
import torch
import torch.nn.functional as F
from check import assert_as_good, error
from dense import F32, F64, NAN_BITS, cast, dense, leaves, problem, run

from fastmargin.ops import target_logit
from fastmargin.ops.nontarget_lse import IMPLS, nontarget_lse
from fastmargin.ops.problem import Problem

SHAPES = [(1, 2, 2, 1), (3, 96, 1009, 5), (256, 16, 700, 64), (257, 33, 300, 1), (600, 8, 513, 3), (5, 130, 257, 0)]


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("plain", [False, True], ids=["normalized", "bias"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_float64_equals_the_definition(backend, shape, plain):
    B, d, C, k = shape
    k = min(k, C - 1)
    *given, upstream = problem(B, d, C, k, plain=plain)
    options = dict(normalize_weight=not plain, topk=k)
    got, classes = run(nontarget_lse, *given, upstream, backend=backend, **options)
    truth, order = run(dense, *given, upstream, **options)
    assert torch.equal(classes, order)
    for a, b in zip(got, truth, strict=True):
        assert error(a, b) < 1e-12


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("cosine", [None, 0.5, 0.9, 1.0], ids=["random", "cos .5", "cos .9", "cos 1"])
@pytest.mark.parametrize("s", [30.0, 64.0, 200.0])
def test_float32_errs_at_most_twice_as_much_as_plain_pytorch(backend, cosine, s):
    *given, upstream = problem(130, 96, 1009, 3, s=s, cosine=cosine)
    given32 = cast(F32, *given)
    truth, _ = run(dense, *cast(F64, *given32), upstream, topk=3)
    plain, _ = run(dense, *given32, upstream, topk=3)
    got, _ = run(nontarget_lse, *given32, upstream, topk=3, backend=backend)
    for a, p, t in zip(got, plain, truth, strict=True):
        assert_as_good(a, p, t)


@pytest.mark.parametrize("plain", [False, True], ids=["normalized", "bias"])
def test_gradcheck(backend, plain):
    x, w, _, bias, _ = problem(4, 3, 7, s=2.0, plain=plain)
    y = torch.tensor([1, -1, 3, 0])

    def op(x, w, bias):
        return nontarget_lse(x, w, y, bias=bias, normalize_weight=not plain, topk=2, backend=backend)[:3]

    assert torch.autograd.gradcheck(op, leaves(x, w, bias))


def test_a_label_held_elsewhere_leaves_every_class_a_negative(backend):
    x, w, _, _, _ = problem(6, 5, 40)
    rest, target, values, classes = nontarget_lse(x, w, torch.full((6,), -1), topk=40, backend=backend)
    z = x @ F.normalize(w).T
    assert error(rest, z.logsumexp(1)) < 1e-14
    assert torch.equal(target, torch.zeros(6, dtype=F64))
    assert torch.equal(classes, z.argsort(1, descending=True))
    assert error(values, z.sort(dim=1, descending=True).values) < 1e-14


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize("C", [0, 1, 2, 3])
def test_fewer_classes_than_asked_for(backend, dtype, C):
    x, w = torch.randn(5, 4, dtype=dtype), torch.randn(C, 4, dtype=dtype)
    y = torch.tensor([0, 0, C - 1, 0, -1]).clamp(max=C - 1)
    x, w = leaves(x, w)
    rest, target, values, classes = nontarget_lse(x, w, y, topk=3, backend=backend)
    others = C - (y >= 0).long()
    assert torch.equal((classes >= 0).sum(1), others.clamp(max=3))
    assert torch.equal(values == -torch.inf, classes == -1)
    assert torch.equal(rest == -torch.inf, others == 0)
    d_rest = torch.ones_like(rest)
    torch.autograd.backward((rest, target), (d_rest, torch.ones_like(target)))
    assert x.grad.isfinite().all() and w.grad.isfinite().all()
    if C == 1:  # a class alone: g stays d_target at the row's own class, and is 0 elsewhere
        unit = F.normalize(w.detach())
        assert torch.allclose(x.grad, unit.expand_as(x))


@pytest.mark.usefixtures("poison")
def test_no_rows(backend):
    x, w = leaves(torch.randn(0, 4), torch.randn(9, 4))
    rest, target, values, classes = nontarget_lse(x, w, torch.zeros(0, dtype=torch.int64), topk=2, backend=backend)
    (rest.sum() + target.sum() + values.sum()).backward()
    assert values.shape == classes.shape == (0, 2)
    assert torch.equal(w.grad, torch.zeros(9, 4)) and x.grad.shape == (0, 4)


def test_zero_rows_and_zero_weights(backend):
    x, w = leaves(torch.randn(4, 6), torch.randn(12, 6))
    with torch.no_grad():
        x[1], w[3], w[5] = 0, 0, 1e-20
    y = torch.tensor([3, 2, 5, 3])
    rest, target, *_ = nontarget_lse(x, w, y, backend=backend)
    (rest.sum() + target.sum()).backward()
    assert torch.equal(target[[0, 1, 2, 3]], torch.zeros(4))
    assert torch.allclose(rest[1], torch.tensor(11.0).log())
    assert torch.equal(w.grad[[3, 5]], torch.zeros(2, 6))
    assert x.grad.isfinite().all() and w.grad.isfinite().all()


@pytest.mark.usefixtures("poison")
def test_ties_go_to_the_smaller_class(backend, threads):
    """Small integers: every product is exact, so equal logits are equal, and there are many."""
    x = torch.randint(-2, 3, (70, 6)).float()
    w = torch.randint(-1, 2, (900, 6)).float()
    y = torch.randint(0, 900, (70,))
    _, _, values, classes = nontarget_lse(x, w, y, normalize_weight=False, topk=20, backend=backend)
    _, _, want, order = dense(x, w, y, normalize_weight=False, topk=20)
    assert torch.equal(values, want)
    assert torch.equal(classes, order)


@pytest.mark.parametrize("layout", ["columns", "every other class", "one row repeated", "offset"])
def test_any_strides(backend, layout):
    x, y = torch.randn(10, 7, 2, dtype=F64)[:, :, 0], torch.randint(0, 30, (10,))
    w = {
        "columns": lambda: torch.randn(7, 30, dtype=F64).T,
        "every other class": lambda: torch.randn(60, 7, dtype=F64)[::2],
        "one row repeated": lambda: torch.randn(1, 7, dtype=F64).expand(30, 7),
        "offset": lambda: torch.randn(40, 11, dtype=F64)[5:35, 2:9],
    }[layout]()
    upstream = torch.rand(10, dtype=F64), torch.rand(10, dtype=F64), torch.rand(10, 2, dtype=F64)
    x.requires_grad_()
    w = w.detach().requires_grad_()
    out = nontarget_lse(x, w, y, topk=2, backend=backend)
    got = torch.autograd.grad(out[:3], (x, w), upstream)
    expected = dense(x, w, y, topk=2)
    truth = torch.autograd.grad(expected[:3], (x, w), upstream)
    for a, b in zip((*out[:3], got[0]), (*expected[:3], truth[0]), strict=True):
        assert error(a, b) < 1e-12
    if layout != "one row repeated":  # ties: the definition does not say which class gets the top-k gradient
        assert error(got[1], truth[1]) < 1e-12


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("plain", [False, True], ids=["normalized", "bias"])
def test_rows_are_the_whole_of_a_smaller_problem(backend, plain):
    x, w, _, bias, upstream = problem(40, 12, 800, 3, plain=plain)
    class_ids = torch.randperm(800)[:333].sort().values
    y = torch.randint(-1, 333, (40,))
    options = dict(class_ids=class_ids, normalize_weight=not plain, topk=3)
    got, classes = run(nontarget_lse, x, w, y, bias, upstream, backend=backend, **options)
    truth, order = run(dense, x, w, y, bias, upstream, **options)
    assert torch.equal(classes, order)
    for a, b in zip(got, truth, strict=True):
        assert error(a, b) < 1e-12


def test_rows_labels_and_bias_of_any_strides(backend):
    x, w, _, bias, upstream = problem(6, 5, 40, 2, plain=True)
    class_ids = torch.tensor([0, 39, 5, 38, 7, 37, 9, 36])[::2]
    y = torch.tensor([0, 9, 3, 9, -1, 9, 2, 9, 1, 9, 0, 9])[::2]
    spread = torch.stack((bias, bias + 1), 1)[:, 0]
    options = dict(normalize_weight=False, topk=2)
    got, classes = run(nontarget_lse, x, w, y, spread, upstream, class_ids=class_ids, backend=backend, **options)
    truth, order = run(dense, x, w, y, bias, upstream, class_ids=class_ids.clone(), **options)
    assert torch.equal(classes, order)
    for a, b in zip(got, truth, strict=True):
        assert error(a, b) < 1e-12
    with pytest.raises(ValueError, match=r"class_ids\[2\] = 1000000"):
        nontarget_lse(x, w, y, class_ids=torch.tensor([0, 1, 2, 3, 10**6, 10**6])[::2], backend=backend)


def test_a_tiny_weight_beside_long_rows(backend):
    """1/||w|| multiplies exp(z): the product must not overflow where the gradient itself is small."""
    x, w = leaves(torch.randn(4, 8), torch.randn(50, 8))
    with torch.no_grad():
        x.mul_(80 / x.norm(dim=1, keepdim=True))
        w[7] = 1e-9 * x[0]
    y = torch.zeros(4, dtype=torch.int64)
    rest, target, *_ = nontarget_lse(x, w, y, backend=backend)
    (dx,) = torch.autograd.grad((rest - target).sum(), x)
    truth = x.detach().double().requires_grad_()
    want, own, *_ = dense(truth, w.double(), y)
    assert error(rest, want) < 1e-6
    assert error(dx, torch.autograd.grad((want - own).sum(), truth)[0]) < 1e-5


def test_gradients_over_rows_are_sparse(backend):
    x, w, bias = leaves(torch.randn(3, 4), torch.randn(9, 4), torch.randn(9))
    class_ids = torch.tensor([1, 4, 8])
    rest, *_ = nontarget_lse(
        x, w, torch.tensor([0, 2, -1]), bias=bias, class_ids=class_ids, normalize_weight=False, backend=backend
    )
    rest.sum().backward()
    for t in (w, bias):
        assert t.grad.is_sparse and t.grad.shape == t.shape and torch.equal(t.grad.coalesce().indices()[0], class_ids)


def test_no_gradient_where_none_is_needed(backend):
    x, w, y = torch.randn(5, 4), torch.randn(9, 4), torch.randint(0, 9, (5,))
    for x_needs, w_needs in ((True, False), (False, True)):
        x.requires_grad_(x_needs).grad, w.requires_grad_(w_needs).grad = None, None
        nontarget_lse(x, w, y, backend=backend)[0].sum().backward()
        assert (x.grad is not None) == x_needs and (w.grad is not None) == w_needs


@pytest.mark.parametrize("C", [10, 300_000])
@pytest.mark.parametrize("side", [1.0, -1.0])
def test_the_fixed_offset_holds_at_its_bound(backend, C, side):
    """All classes at the same cosine, +1 or -1: the largest and the smallest sum there is."""
    norm = 86 - math.log(C) / 2
    x, w = torch.tensor([[norm]]), torch.full((C, 1), side)
    x.requires_grad_()
    rest, *_ = nontarget_lse(x, w, torch.tensor([0]), backend=backend)
    assert abs(rest.item() - (side * norm + math.log(C - 1))) < 1e-4
    assert abs(float(torch.autograd.grad(rest.sum(), x)[0]) - side) < (2e-3 if backend == "reference" else 1e-4)


@pytest.mark.parametrize("norm", [0.0, 1.0, 80.0, 100.0, 1e4])
def test_any_norm(backend, norm, threads):
    x, w, y, _, upstream = cast(F32, *problem(20, 8, 600, 0, s=norm)[:3], None, torch.zeros(0))
    del upstream
    rest, *_ = nontarget_lse(x, w, y, backend=backend)
    truth = dense(x.double(), w.double(), y)[0]
    assert torch.allclose(rest.double(), truth, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("bits", NAN_BITS)
def test_not_a_number_is_not_hidden(backend, bits):
    nan = torch.tensor(bits, dtype=torch.int32).view(F32)
    x, w, y = torch.randn(3, 4), torch.randn(50, 4), torch.tensor([0, 1, 2])
    x[1, 2] = nan
    rest, target, *_ = nontarget_lse(x, w, y, backend=backend)
    assert rest[1].isnan() and target[1].isnan()
    assert rest[[0, 2]].isfinite().all()
    x[1, 2], w[7, 1] = 1, nan
    assert nontarget_lse(x, w, y, backend=backend)[0].isnan().all()
    w[7, 1], bias = 1, torch.zeros(50)
    bias[9] = nan
    assert nontarget_lse(x, w, y, bias=bias, normalize_weight=False, backend=backend)[0].isnan().all()


def test_options_to_come_are_refused(backend):
    x, w, y = torch.randn(2, 3), torch.randn(4, 3), torch.tensor([0, 1])
    fwd = IMPLS[backend].functions["fwd"]
    with pytest.raises(ValueError, match="bend"):
        fwd(Problem(x, w, y, bend=torch.zeros(2, 4)), 0, False)
    with pytest.raises(ValueError, match="pool"):
        fwd(Problem(x, w, y, pool=3), 0, False)


X, W, Y = torch.zeros(4, 3), torch.zeros(9, 3), torch.zeros(4, dtype=torch.int64)


@pytest.mark.parametrize(
    "args, options, says",
    [
        ((X[0], W, Y), {}, r"x \[B, d\]"),
        ((X, W[:, :2], Y), {}, r"got \[4, 3\], \[9, 2\]"),
        ((X, W, Y[:3]), {}, r"y \[B\]"),
        ((X[:, :0], W[:, :0], Y), {}, "d is 0"),
        ((X.half(), W.half(), Y), {}, "float32 or both float64"),
        ((X, W.double(), Y), {}, "float64"),
        ((X, W, Y.int()), {}, "int64"),
        ((X, W.to("meta"), Y), {}, "meta"),
        ((X, W, Y), {"topk": -1}, "topk = -1"),
        ((X, W, Y), {"topk": 1.5}, "topk = 1.5"),
        ((X, W, Y), {"backend": "fast"}, "native.*stream.*reference|stream.*reference"),
        ((X, W, Y), {"bias": torch.zeros(9)}, "normalize_weight=False"),
        ((X, W, Y), {"bias": torch.zeros(8), "normalize_weight": False}, r"bias \[C\]"),
        ((X, W, Y), {"class_ids": torch.zeros(2)}, r"class_ids \[n\] int64"),
        ((X, W, Y), {"compute_dtype": torch.int8}, "compute_dtype = torch.int8 for torch.float32 rows"),
        ((X, W, Y), {"compute_dtype": F64}, "compute_dtype = torch.float64 for torch.float32 rows"),
        ((X.double(), W.double(), Y), {"compute_dtype": torch.bfloat16}, "for torch.float64 rows: want None"),
        ((X, W, Y), {"topk": True}, "topk = True"),
    ],
)
def test_bad_arguments(args, options, says):
    with pytest.raises(ValueError, match=says):
        nontarget_lse(*args, **options)


@pytest.mark.parametrize("label", [9, -2, 10**12])
def test_a_label_out_of_range_is_named(backend, label):
    y = torch.tensor([0, 1, label, 3])
    with pytest.raises(ValueError, match=rf"label {label} of row 2 .*\[-1, 9\)"):
        nontarget_lse(X, W, y, backend=backend)
    with pytest.raises(ValueError, match=rf"label {label} of row 2"):
        target_logit.IMPLS[backend].functions["fwd"](X, W, y, None, None, True)


@pytest.mark.parametrize("class_ids", [[1, 1], [3, 2], [0, 9], [-1, 2]])
def test_rows_out_of_order_or_range_are_named(backend, class_ids):
    with pytest.raises(ValueError, match=r"class_ids\[\d\] = -?\d"):
        nontarget_lse(X, W, Y, class_ids=torch.tensor(class_ids), backend=backend)


@pytest.mark.parametrize("output", [0, 1, 2], ids=["rest", "target", "topk"])
def test_a_second_derivative_raises(output):
    """Also through a plain sum, whose gradient does not itself require one."""
    x, w, y = torch.randn(5, 8, requires_grad=True), torch.randn(20, 8), torch.arange(5)
    first = torch.autograd.grad(nontarget_lse(x, w, y, topk=2)[output].sum(), x, create_graph=True)[0]
    with pytest.raises(RuntimeError, match="differentiate twice"):
        (first.square().sum() + x.square().sum()).backward()


@pytest.mark.parametrize("by", [0, 1], ids=["rows", "weights"])
def test_a_second_derivative_by_some_inputs_alone_raises(by):
    """autograd.grad visits only what leads to the inputs it is given."""
    given = torch.randn(5, 8, requires_grad=True), torch.randn(20, 8, requires_grad=True)
    for first in torch.autograd.grad(nontarget_lse(*given, torch.arange(5))[0].sum(), given, create_graph=True):
        with pytest.raises(RuntimeError, match="differentiate twice"):
            torch.autograd.grad(first.square().sum() + given[by].square().sum(), given[by])
