"""nontarget_lse with bfloat16 and float16 operands: what is rounded, what is not, and machines without such kernels."""

import json
import os
import re
import shutil
import subprocess
import sys
import warnings

import pytest
import torch
from check import assert_as_good, error
from dense import F32, F64, NAN_BITS, cast, dense, leaves, problem, run, seen, without_topk
from emulation import ROOT

from fastmargin.ops import backends
from fastmargin.ops.nontarget_lse import IMPLS, nontarget_lse

BF16, F16 = torch.bfloat16, torch.float16
SHAPES = [(1, 2, 2, 1), (3, 95, 1009, 5), (256, 16, 700, 64), (257, 33, 301, 1), (600, 8, 513, 3), (5, 130, 257, 0)]


# ---------------------------------------------------------------------------------------------- values and gradients


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("plain", [False, True], ids=["normalized", "bias"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_err_as_float32_does_on_the_rounded_operands(rounding, shape, plain):
    B, d, C, k = shape
    *given, _ = problem(B, d, C, k, plain=plain)
    x, w, y, bias = cast(F32, *given)
    rest, target, values, classes = nontarget_lse(
        x, w, y, bias=bias, normalize_weight=not plain, topk=min(k, C - 1), **rounding
    )
    operands = seen(rounding["compute_dtype"], x, w, not plain)
    truth = dense(*operands, y, bias, normalize_weight=False, topk=min(k, C - 1))
    plain32 = dense(*(t.float() for t in operands), y, bias, normalize_weight=False, topk=min(k, C - 1))
    assert_as_good(rest, plain32[0], truth[0])
    assert_as_good(values, plain32[2], truth[2])
    assert error(target, dense(*cast(F64, x, w), y, bias, normalize_weight=not plain)[1]) < 1e-6
    z = operands[0] @ operands[1].T if bias is None else operands[0] @ operands[1].T + bias
    assert error(z.gather(1, classes), values) < 1e-6 if k else classes.shape == (B, 0)
    assert not (classes == y[:, None]).any()


def rounded_gradients(dtype, x, w, y, bias, upstream, normalize_weight):
    """dx, dw and db in float64 from the rounded operands; the target's share from unrounded ones."""
    seen_x, seen_w = seen(dtype, x, w, normalize_weight)
    x, w, (d_rest, d_target, _) = x.double(), w.double(), upstream
    scale = 1 / w.norm(dim=1, keepdim=True) if normalize_weight else torch.ones(len(w), 1, dtype=F64)
    is_target = (y[:, None] == torch.arange(len(w))).double()
    z = seen_x @ seen_w.T + (0 if bias is None else bias.double())
    p = torch.where(is_target > 0, -torch.inf, z).softmax(1).nan_to_num(0)
    g, target = d_rest[:, None] * p, d_target[:, None] * is_target
    dw = g.T @ seen_x + target.T @ x
    if normalize_weight:
        dw = scale * (dw - (dw * (scale * w)).sum(1, keepdim=True) * (scale * w))
    return g @ seen_w + target @ (scale * w), dw, (g + target).sum(0)


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("plain", [False, True], ids=["normalized", "bias"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gradients_err_by_the_rounding_of_e_and_g_alone(rounding, shape, plain, threads):
    B, d, C, _ = shape
    *given, upstream = problem(B, d, C, plain=plain)
    given32 = cast(F32, *given)
    got, _ = run(nontarget_lse, *given32, upstream, normalize_weight=not plain, **rounding)
    truth = rounded_gradients(rounding["compute_dtype"], *given32, upstream, not plain)
    for name, a, t in zip(("dx", "dw", "db"), got[3:], truth, strict=False):
        assert error(a, t) < (2e-6 if name == "db" else 6e-3), name


@pytest.mark.parametrize("needs", [(True, False), (False, True)], ids=["weights frozen", "rows frozen"])
def test_no_gradient_where_none_is_needed(rounding, needs):
    x, w, y, _, _ = problem(300, 12, 500)
    x, w = cast(F32, x, w)
    grads = []
    for x_needs, w_needs in ((True, True), needs):
        leaf = [t.clone().requires_grad_(need) for t, need in zip((x, w), (x_needs, w_needs), strict=True)]
        rest, target, *_ = nontarget_lse(*leaf, y, **rounding)
        (rest.sum() - target.sum()).backward()
        grads.append([t.grad for t in leaf])
    for both, alone, need in zip(*grads, needs, strict=True):
        assert torch.equal(both, alone) if need else alone is None


def test_any_strides(rounding):
    x, w, y, _, upstream = problem(9, 21, 300, 2)
    x, w = cast(F32, x, w)
    want, order = run(nontarget_lse, x, w, y, None, upstream, topk=2, **rounding)
    for strided in (w.T.contiguous().T, torch.stack((w, w), 1)[:, 0]):
        got, classes = run(nontarget_lse, x.T.contiguous().T, strided, y, None, upstream, topk=2, **rounding)
        assert torch.equal(classes, order)
        assert max(error(a, b) for a, b in zip(got, want, strict=True)) < 1e-5


def test_ties_go_to_the_smaller_class(rounding, threads):
    """Small integers: every product is exact, so equal logits are equal, and there are many."""
    x, w = torch.randint(-2, 3, (70, 6)).float(), torch.randint(-1, 2, (900, 6)).float()
    y = torch.randint(0, 900, (70,))
    _, _, values, classes = nontarget_lse(x, w, y, normalize_weight=False, topk=20, **rounding)
    _, _, want, order = dense(x, w, y, normalize_weight=False, topk=20)
    assert torch.equal(values, want) and torch.equal(classes, order)


@pytest.mark.parametrize("norm", [74.0, 76.0, 80.0, 84.0, 85.6, 90.0])
def test_far_classes_keep_their_gradient(rounding, norm):
    """The only other class has cosine -1: exp(z - offset) and its products must not underflow."""
    w = torch.randn(1, 512)
    w = torch.cat((w, -w)).requires_grad_()
    x = (norm * torch.nn.functional.normalize(w[:1].detach())).requires_grad_()
    rest, *_ = nontarget_lse(x, w, torch.tensor([0]), **rounding)
    rest.sum().backward()
    assert error(rest, torch.tensor([-norm])) < 5e-3
    assert error(x.grad, torch.nn.functional.normalize(w[1:].detach())) < 1e-2


def eager(dtype):
    """The definition with its product in `dtype` by autocast, as a user would write it; z then is rounded too."""

    def op(*args, compute_dtype, backend, **options):
        with torch.autocast("cpu", dtype=dtype):
            return dense(*args, **options)

    return op


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("cosine", [None, 0.5, 0.9, 1.0], ids=["random", "cos .5", "cos .9", "cos 1"])
@pytest.mark.parametrize("s", [16.0, 64.0, 200.0])
def test_gradients_err_at_most_twice_as_much_as_eager_of_the_same_dtype(rounding, cosine, s, threads):
    *given, upstream = problem(130, 96, 1009, 3, s=s, cosine=cosine)
    given32, upstream = cast(F32, *given), without_topk(upstream)
    truth, _ = run(dense, *cast(F64, *given32), upstream, topk=3)
    theirs, _ = run(eager(rounding["compute_dtype"]), *given32, upstream, topk=3, **rounding)
    ours, _ = run(nontarget_lse, *given32, upstream, topk=3, **rounding)
    for a, p, t in zip(ours, theirs, truth, strict=True):
        assert_as_good(a, p, t)


@pytest.mark.parametrize("plain", [False, True], ids=["normalized", "bias"])
@pytest.mark.parametrize("k", [0, 2])
def test_the_target_and_the_best_are_not_rounded_in_native_gradients(plain, k):
    """If only these outputs have a gradient, it is that of float32."""
    if BF16 not in backends.CPU_COMPUTE:
        pytest.skip("no bfloat16 kernels on this machine")
    x, w, y, bias, (_, *upstream) = problem(20, 24, 300, k, plain=plain)
    if k:  # of rounded operands, so that both have the same top-k classes
        x, w = cast(BF16, x, w)
    given, upstream = cast(F32, x, w, y, bias), (torch.zeros(20), *upstream)
    options = dict(normalize_weight=not plain, topk=k, backend="native")
    got, classes = run(nontarget_lse, *given, upstream, compute_dtype=BF16, **options)
    want, order = run(nontarget_lse, *given, upstream, **options)
    assert torch.equal(classes, order) and torch.equal(got[1], want[1])
    for a, b in zip(got[3:], want[3:], strict=True):
        assert error(a, b) < 1e-6


def test_rounding_has_no_bias(rounding):
    """Round to nearest: the error of truncation would add up, to 2^-9 of a gradient in bfloat16."""
    *given, upstream = problem(256, 64, 2000)
    given32 = cast(F32, *given)
    ours, _ = run(nontarget_lse, *given32, upstream, **rounding)
    truth, _ = run(dense, *cast(F64, *given32), upstream)
    for a, t in zip(ours[3:], truth[3:], strict=True):
        assert abs(float((a.double() * t).sum() / (t * t).sum()) - 1) < 3e-4


def test_the_gradient_of_a_weight_has_no_part_along_it():
    if BF16 not in backends.CPU_COMPUTE:
        pytest.skip("no bfloat16 kernels on this machine")
    *given, upstream = problem(64, 32, 500)
    x, w, y, _ = cast(F32, *given)
    got, _ = run(nontarget_lse, x, w, y, None, upstream, backend="native", compute_dtype=BF16)
    along = (got[4] * torch.nn.functional.normalize(w)).sum(1)
    assert float(along.abs().max() / got[4].norm(dim=1).max()) < 1e-6


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("plain", [False, True], ids=["normalized", "bias"])
def test_rows_are_the_whole_of_a_smaller_problem(rounding, plain, threads):
    x, w, _, bias, upstream = problem(40, 13, 800, 3, plain=plain)
    class_ids = torch.randperm(800)[:333].sort().values
    y = torch.randint(-1, 333, (40,))
    x, w, bias = cast(F32, x, w, bias)
    options = dict(normalize_weight=not plain, topk=3, **rounding)
    got, classes = run(nontarget_lse, x, w, y, bias, upstream, class_ids=class_ids, **options)
    part = None if bias is None else bias[class_ids]
    whole, order = run(nontarget_lse, x, w[class_ids], y, part, upstream, **options)
    assert torch.equal(classes, order)
    for a, b in zip(got, whole, strict=True):
        full = a[class_ids] if a.shape[:1] == (800,) else a
        assert torch.equal(full, b)


def test_weights_of_any_norm(rounding):
    x, w, y, _, _ = problem(9, 24, 200, s=30.0)
    x, w = cast(F32, x, w)
    w *= torch.logspace(-8, 8, 200)[:, None]
    x, w = leaves(x, w)
    rest, *_ = nontarget_lse(x, w, y, **rounding)
    operands = seen(rounding["compute_dtype"], x.detach(), w.detach())
    assert error(rest, dense(*operands, y, normalize_weight=False)[0]) < 1e-6
    rest.sum().backward()
    assert x.grad.isfinite().all() and w.grad.isfinite().all()


@pytest.mark.parametrize("norm", [0.0, 1.0, 80.0, 100.0, 1e4])
def test_rows_of_any_norm(rounding, norm, threads):
    x, w, y, *_ = cast(F32, *problem(20, 8, 600, 0, s=norm)[:3], None)
    rest, *_ = nontarget_lse(x, w, y, **rounding)
    truth = dense(*seen(rounding["compute_dtype"], x, w), y, normalize_weight=False)[0]
    assert torch.allclose(rest.double(), truth, rtol=2e-6, atol=2e-6)


def test_zero_rows_few_classes_and_no_rows(rounding):
    for B, C in ((4, 1), (4, 2), (1, 3), (0, 5), (3, 0)):
        x, w = leaves(torch.randn(B, 6), torch.randn(C, 6))
        with torch.no_grad():
            x[:1], w[:1] = 0, 0
        y = torch.full((B,), C - 1)
        rest, target, values, classes = nontarget_lse(x, w, y, topk=2, **rounding)
        assert torch.equal(rest == -torch.inf, torch.full((B,), C <= 1))
        (target.sum() + torch.where(rest == -torch.inf, 0.0, rest).sum()).backward()
        assert x.grad.isfinite().all() and w.grad.isfinite().all()
        assert torch.equal(values == -torch.inf, classes == -1)


@pytest.mark.parametrize("bits", NAN_BITS)
def test_not_a_number_is_not_hidden(rounding, bits):
    x, w, y = torch.randn(3, 4), torch.randn(50, 4), torch.tensor([0, 1, 2])
    x[1, 2] = torch.tensor(bits, dtype=torch.int32).view(F32)
    x, w = leaves(x, w)
    rest, target, *_ = nontarget_lse(x, w, y, **rounding)
    assert rest[1].isnan() and target[1].isnan() and rest[[0, 2]].isfinite().all()
    rest.sum().backward()
    assert x.grad[1].isnan().all() and x.grad[[0, 2]].isfinite().all() and w.grad.isnan().any()


# ---------------------------------------------------------------------------------------------- the compiled op


def test_two_runs_agree_to_the_bit(rounding, threads):
    *given, upstream = problem(300, 64, 3001, 5)
    given = cast(F32, *given)
    first, second = (run(nontarget_lse, *given, upstream, topk=5, **rounding) for _ in range(2))
    for a, b in zip((*first[0], first[1]), (*second[0], second[1]), strict=True):
        assert torch.equal(a, b)


@pytest.mark.skipif(BF16 not in backends.CPU_COMPUTE, reason="no bfloat16 kernels on this machine")
def test_opcheck():
    x, w, y = torch.randn(6, 5), torch.randn(20, 5), torch.randint(-1, 20, (6,))
    fwd = (x, w, y, None, None, None, True, 1, 2, BF16, True)
    torch.library.opcheck(torch.ops.fastmargin.nontarget_lse_fwd, fwd)
    rest, _, classes, *kept = torch.ops.fastmargin.nontarget_lse_fwd(*fwd)
    saved = (rest, classes, *kept, rest, rest, torch.randn(6, 2))
    bwd = (x, w, y, None, None, None, True, 1, BF16, *saved, True, True, True)
    torch.library.opcheck(torch.ops.fastmargin.nontarget_lse_bwd, bwd)


def test_compiled_code_rounds_too(rounding):
    """A compiler must not cancel a cast and the cast back."""

    def op(x, w, y, bias, **options):
        return nontarget_lse(x, w, y, **options)

    *given, upstream = problem(6, 32, 200, 2)
    given, options = cast(F32, *given), dict(topk=2, **rounding)
    plain, order = run(op, *given, upstream, **options)
    got, classes = run(torch.compile(op, fullgraph=True), *given, upstream, **options)
    assert torch.equal(classes, order)
    for a, b in zip(got, plain, strict=True):
        assert error(a, b) < 1e-5  # without the rounding it would be 1e-3


@pytest.mark.skipif("native" not in IMPLS, reason="native kernels not built")
@pytest.mark.parametrize("dtype", [F16, F64, torch.int8])
def test_the_raw_op_refuses_what_it_cannot_do(dtype):
    x, w, y = torch.randn(2, 3), torch.randn(4, 3), torch.tensor([0, 1])
    with pytest.raises(ValueError, match="compute_dtype"):
        torch.ops.fastmargin.nontarget_lse_fwd(x, w, y, None, None, None, True, 1, 0, dtype, False)
    with pytest.raises(ValueError, match="compute_dtype"):
        torch.ops.fastmargin.nontarget_lse_fwd(x.double(), w.double(), y, None, None, None, True, 1, 0, BF16, False)


# ---------------------------------------------------------------------------------------------- other machines


def test_the_dtype_of_the_rows_is_no_rounding(backend):
    for dtype in (F32, F64):
        x, w, y, *_ = cast(dtype, *problem(5, 4, 30)[:3], None)
        same = nontarget_lse(x, w, y, compute_dtype=dtype, backend=backend)
        assert torch.equal(same[0], nontarget_lse(x, w, y, backend=backend)[0])


def test_missing_kernels_are_warned_of_once_and_float32_runs(monkeypatch):
    name = "native" if "native" in IMPLS else "stream"
    monkeypatch.setitem(IMPLS, name, IMPLS[name]._replace(compute=lambda x: ()))
    backends.warn_of_float32.cache_clear()
    x, w, y, *_ = cast(F32, *problem(5, 4, 30)[:3], None)
    with pytest.warns(UserWarning, match=rf"no torch.float16 in the {name} kernels of this machine; using float32"):
        rest, *_ = nontarget_lse(x, w, y, compute_dtype=F16, backend=name)
    assert torch.equal(rest, nontarget_lse(x, w, y, backend=name)[0])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        nontarget_lse(x, w, y, compute_dtype=F16, backend=name)


OTHER_MACHINE = """
import json, warnings, torch
from fastmargin.ops.backends import BUILD
from fastmargin.ops.nontarget_lse import nontarget_lse
torch.manual_seed(0)
x, w, y = torch.randn(7, 12), torch.randn(300, 12), torch.randint(0, 300, (7,))

def step(dtype):
    a, b = x.clone().requires_grad_(), w.clone().requires_grad_()
    rest, target, *_ = nontarget_lse(a, b, y, compute_dtype=dtype, backend="native")
    (rest - target).sum().backward()
    return torch.cat((rest.detach(), a.grad.flatten(), b.grad.flatten()))

with warnings.catch_warnings(record=True) as seen:
    warnings.simplefilter("always")
    rounded = [step(torch.bfloat16) for _ in range(2)][0]
messages = [str(w.message) for w in seen if "fastmargin" in str(w.message)]
print(json.dumps([BUILD.facts["compute"], messages, torch.equal(rounded, step(None))]))
"""


@pytest.mark.skipif("native" not in IMPLS, reason="native kernels not built")
@pytest.mark.parametrize(
    "environment",
    [{"ATEN_CPU_CAPABILITY": "avx2"}, {"ATEN_CPU_CAPABILITY": "default"}, {"ONEDNN_MAX_CPU_ISA": "AVX2"}],
    ids=lambda e: "=".join(*e.items()),
)
def test_machines_without_bfloat16_products(environment):
    done = subprocess.run(
        [sys.executable, "-c", OTHER_MACHINE], env=os.environ | environment, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    compute, messages, equal = json.loads(done.stdout)
    assert compute == "" and equal
    assert len(messages) == 1 and "no torch.bfloat16 in the native kernels" in messages[0]


def zmm_lines(path):
    code = subprocess.run(["objdump", "-d", str(path)], capture_output=True, text=True, check=True).stdout
    return len(re.findall(r"%zmm", code)), code.count("\n")


@pytest.mark.skipif(shutil.which("objdump") is None, reason="objdump is not here: object code is NOT looked at")
def test_only_the_avx512_objects_hold_its_instructions():
    objects = sorted((ROOT / "build").glob("*/CMakeFiles/*.dir/csrc/**/*.o"))
    if not objects:
        pytest.skip("built elsewhere: object code is NOT looked at")
    kernels = [path for path in objects if "kernels_AVX512.dir" in str(path)]
    assert kernels and all(zmm_lines(path)[0] > 100 for path in kernels)
    assert {path.name: zmm_lines(path)[0] for path in objects if path not in kernels and zmm_lines(path)[0]} == {}
