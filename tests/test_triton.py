"""The Triton kernels: values in Triton's interpreter or on a GPU, and compilation ahead of time.

The interpreter must be chosen before Triton is imported, so its tests run in a child process. `pytest -m gpu` runs the
same tests of values on a device, compiled.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from check import error
from dense import F32, F64, cast, dense, leaves, problem, run, seen, without_topk
from places import check, moved, run_on

from fastmargin.backends import describe, pick
from fastmargin.ops.nontarget_lse import IMPLS, nontarget_lse

triton = pytest.importorskip("triton", reason="triton is not installed: its kernels are NOT tested")
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from fastmargin.kernels import nontarget_lse as kernels  # noqa: E402

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
no_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: compiled kernels are NOT run")
compiled_only = pytest.mark.skipif(INTERPRETED, reason="this process interprets its kernels")
not_interpreted = pytest.mark.skipif(INTERPRETED, reason="Triton's interpreter multiplies bfloat16 wrongly")
on_device = pytest.mark.parametrize("device", ["cpu"] if INTERPRETED else [pytest.param("cuda", marks=pytest.mark.gpu)])


def on_every_device(test):
    """The test runs on the CPU where kernels are interpreted, else on a GPU; with small waves and few strips."""
    test = on_device(pytest.mark.usefixtures("poison", "small")(test))
    return test if INTERPRETED else no_cuda(test)


@pytest.fixture
def small(monkeypatch):
    """Problems of a few hundred classes have several strips, of several blocks, and several waves."""
    monkeypatch.setattr(kernels, "PROGRAMS", 4)
    monkeypatch.setattr(kernels, "WORKSPACE", 256 * 192)


# ---------------------------------------------------------------------------------------------- values


@on_every_device
@pytest.mark.parametrize("plain", [False, True], ids=["normalised", "bias"])
@pytest.mark.parametrize("shape", [(1, 2, 2, 1), (3, 96, 1009, 5), (70, 33, 300, 1), (65, 8, 513, 3)], ids=str)
def test_values_and_gradients(device, shape, plain):
    B, d, C, k = shape
    *given, upstream = problem(B, d, C, k, plain=plain)
    check((device, "triton"), given, upstream, normalize_weight=not plain, topk=k)


@on_every_device
@pytest.mark.parametrize("cosine", [0.5, 0.9, 1.0])
def test_confident_rows(device, cosine):
    *given, upstream = problem(20, 24, 200, 2, s=64.0, cosine=cosine)
    check((device, "triton"), given, upstream, topk=2)


@on_every_device
@pytest.mark.parametrize("plain", [False, True], ids=["normalised", "bias"])
def test_rows_are_the_whole_of_a_smaller_problem(device, plain):
    x, w, _, bias, upstream = problem(17, 12, 400, 3, plain=plain)
    rows = torch.randperm(400)[:203].sort().values
    y = torch.randint(-1, 203, (17,))
    check((device, "triton"), (x, w, y, bias), upstream, rows=rows, normalize_weight=not plain, topk=3)


@on_every_device
def test_any_strides(device):
    x, w, y, _, upstream = problem(9, 20, 150, 2)
    spread = torch.stack((y, y + 1), 1)[:, 0]
    x32, w32 = (t.float().T.contiguous().T for t in (x, w))
    got, classes = run_on((device, "triton"), x32, w32, spread, None, upstream, topk=2)
    truth, order = run(dense, x, w, y, None, upstream, topk=2)
    assert torch.equal(classes, order)
    assert max(error(a, b) for a, b in zip(got, truth, strict=True)) < 2e-6


@on_every_device
@pytest.mark.parametrize("k", [1, 3, 20])
def test_ties_go_to_the_smaller_class(device, k):
    """Small integers: every product is exact, so equal logits are equal, and there are many, in every group."""
    x = torch.randint(-2, 3, (20, 6)).float()
    w = torch.randint(-1, 2, (500, 6)).float()
    y = torch.randint(0, 500, (20,))
    options = dict(normalize_weight=False, topk=k)
    _, _, values, classes = nontarget_lse(*moved(device, x, w, y), backend="triton", **options)
    _, _, want, order = dense(x, w, y, **options)
    assert torch.equal(values.cpu(), want)
    assert torch.equal(classes.cpu(), order)


@on_every_device
@pytest.mark.parametrize("C", [0, 1, 2, 3])
def test_fewer_classes_than_asked_for(device, C):
    x, w = leaves(*moved(device, torch.randn(5, 4), torch.randn(C, 4)))
    y = torch.tensor([0, 0, C - 1, 0, -1]).clamp(max=C - 1).to(device)
    rest, target, values, classes = nontarget_lse(x, w, y, topk=3, backend="triton")
    others = C - (y >= 0).long()
    assert torch.equal((classes >= 0).sum(1), others.clamp(max=3))
    assert torch.equal(values == -torch.inf, classes == -1)
    assert torch.equal(rest == -torch.inf, others == 0)
    torch.autograd.backward((rest, target), (torch.ones_like(rest), torch.ones_like(target)))
    assert x.grad.isfinite().all() and w.grad.isfinite().all()
    if C == 1:  # a class alone: g stays d_target at the row's own class, and is 0 elsewhere
        wanted = torch.nn.functional.normalize(w.detach()).expand_as(x) * torch.ones(5, 1, device=device)
        assert torch.allclose(x.grad, wanted)


@on_every_device
def test_classes_that_a_bias_rules_out_have_no_gradient(device):
    """No other class: g is 0 but at the row's own."""
    x, w, y = moved(device, torch.randn(3, 4), torch.randn(70, 4), torch.tensor([66, 66, 66]))
    bias = torch.full((70,), -torch.inf, device=device)
    bias[66] = 0.5
    x, w = leaves(x, w)
    rest, target, *_ = nontarget_lse(x, w, y, bias=bias, normalize_weight=False, backend="triton")
    assert (rest == -torch.inf).all()
    torch.autograd.backward((rest, target), (torch.ones_like(rest), torch.ones_like(target)))
    assert torch.allclose(x.grad, w[66].detach().expand_as(x)) and torch.allclose(w.grad[66], x.detach().sum(0))
    assert not w.grad[:66].any() and not w.grad[67:].any()


@on_every_device
def test_no_rows(device):
    x, w, y = moved(device, torch.randn(0, 4), torch.randn(9, 4), torch.zeros(0, dtype=torch.int64))
    x, w = leaves(x, w)
    rest, target, values, classes = nontarget_lse(x, w, y, topk=2, backend="triton")
    (rest.sum() + target.sum() + values.sum()).backward()
    assert values.shape == classes.shape == (0, 2)
    assert not w.grad.any() and x.grad.shape == (0, 4)


@on_every_device
def test_tiny_weights_zero_rows_and_what_is_not_a_number(device):
    x, w = torch.randn(4, 6), torch.randn(70, 6)
    x[1], w[3], w[5] = 0, 0, 1e-20
    x[2, 1] = torch.nan
    x, w = leaves(*moved(device, x, w))
    rest, target, values, _ = nontarget_lse(x, w, torch.tensor([3, 2, 4, 5]).to(device), topk=1, backend="triton")
    assert torch.allclose(rest[1].cpu(), torch.tensor(69.0).log())
    assert rest[2].isnan() and target[2].isnan() and values[2].isnan()
    (rest[[0, 1, 3]].sum() + target[[0, 1, 3]].sum()).backward()
    assert x.grad[[0, 1, 3]].isfinite().all()
    assert rest[[0, 1, 3]].isfinite().all()


@on_every_device
@pytest.mark.parametrize("norm", [1.0, 100.0, 1e4])
def test_any_norm(device, norm):
    x, w, y, _, _ = problem(5, 8, 300, s=norm)
    rest, *_ = nontarget_lse(*moved(device, *cast(F32, x, w, y)), backend="triton")
    assert torch.allclose(rest.cpu().double(), dense(x, w, y)[0], rtol=2e-6, atol=2e-6)


@on_every_device
def test_no_gradient_where_none_is_needed(device):
    x, w, y = moved(device, torch.randn(5, 4), torch.randn(9, 4), torch.randint(0, 9, (5,)))
    for x_needs, w_needs in ((True, False), (False, True)):
        x.requires_grad_(x_needs).grad, w.requires_grad_(w_needs).grad = None, None
        nontarget_lse(x, w, y, backend="triton")[0].sum().backward()
        assert (x.grad is not None) == x_needs and (w.grad is not None) == w_needs


@on_every_device
@pytest.mark.parametrize("plain", [False, True], ids=["normalised", "bias"])
@pytest.mark.parametrize("dtype", [torch.float16, pytest.param(torch.bfloat16, marks=not_interpreted)], ids=str)
def test_rounded_operands_have_float32_sums(device, dtype, plain):
    """Values err as float32 does, against float64 on the rounded operands; gradients by the rounding alone."""
    *given, upstream = problem(70, 24, 200, 3, plain=plain)
    x, w, y, bias = cast(F32, *given)
    if not plain:
        w *= torch.logspace(-8, 8, 200)[:, None]  # of any norm
    upstream, options = without_topk(upstream), dict(normalize_weight=not plain, topk=3)
    got, classes = run_on((device, "triton"), x, w, y, bias, upstream, compute_dtype=dtype, **options)
    rest, _, values, order = dense(*seen(dtype, x, w, not plain), y, bias, normalize_weight=False, topk=3)
    assert torch.equal(classes, order)
    assert error(got[0], rest) < 1e-6 and error(got[2], values) < 1e-6
    truth, _ = run(dense, *cast(F64, x, w, y, bias), upstream, **options)
    assert error(got[1], truth[1]) < 1e-6  # the target is not rounded
    unit = w.norm(dim=1, keepdim=True) if not plain else 1.0  # dw goes with 1/||w||
    eps = 8 * torch.finfo(dtype).eps
    assert error(got[3], truth[3]) < eps and error(got[4] * unit, truth[4] * unit) < eps


# ---------------------------------------------------------------------------------------------- choice


@compiled_only
def test_under_the_interpreter():
    """The tests above, in a process that interprets the kernels."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", __file__, "-q", "-x", "-p", "no:cacheprovider", "-k", "cpu"],
        cwd=Path(__file__).parents[1], env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed and int(passed[1]) >= 20, done.stdout
    assert "2 skipped" in done.stdout, done.stdout  # bfloat16


def test_the_interpreter_is_never_chosen_by_silence(monkeypatch):
    monkeypatch.delenv("FASTMARGIN_BACKEND", raising=False)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    x = torch.ones(1, 2)
    assert pick(IMPLS, x) in ("native", "stream")
    assert pick(IMPLS, x, "triton") == "triton"
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(ValueError, match=r"backend 'triton' cannot run torch.float32 on cpu"):
        pick(IMPLS, x, "triton")


def test_the_order_of_preference(monkeypatch):
    monkeypatch.delenv("FASTMARGIN_BACKEND", raising=False)
    assert [name for name in IMPLS if name != "native"] == ["triton", "stream", "reference"]
    with torch._subclasses.FakeTensorMode():
        assert pick(IMPLS, torch.empty(1, device="cuda")) == "stream"  # until triton has been measured on one
        assert pick(IMPLS, torch.empty(1, device="cuda"), "triton") == "triton"
        assert pick(IMPLS, torch.empty(1, dtype=F64, device="cuda")) == "stream"


def test_info_does_not_claim_a_gpu():
    line = next(line for line in describe().splitlines() if line.startswith("triton"))
    assert "never run on a GPU" in line


# ---------------------------------------------------------------------------------------------- compilation


POINTERS = {name: "*i64" for name in ("y", "rows", "chosen")}
NUMBERS = {name: "i32" for name in ("B", "n", "first", "last", "blocks", "blocks_per_strip")}
STRIDES = {name: "i64" for name in ("x_row", "x_feature", "w_row", "w_feature")}


def compiled(kernel, capability, constants, options):
    """Machine code for a GPU that need not be here, as for contiguous lines that start at multiples of 16 bytes."""
    constants = constants | {name: 1 for name in ("x_feature", "w_feature") if name in kernel.arg_names}
    types = POINTERS | NUMBERS | STRIDES | {name: "constexpr" for name in constants}
    if "COMPUTE" in constants:
        types |= dict.fromkeys(("g", "x"), f"*{constants['COMPUTE'].name}")
    signature = {name: types.get(name, "*fp32") for name in kernel.arg_names}
    aligned = [i for i, name in enumerate(kernel.arg_names) if signature[name][0] == "*" or name in ("x_row", "w_row")]
    attributes = {(i,): [["tt.divisibility", 16]] for i in aligned}
    source = ASTSource(kernel, signature, constants, attributes)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def resources(code, folder):
    """Registers and bytes of stack of a compiled kernel: spilled registers would lie on the stack."""
    (folder / "kernel.cubin").write_bytes(code.asm["cubin"])
    tool = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", str(folder / "kernel.cubin")]
    said = subprocess.run(tool, capture_output=True, text=True, check=True).stdout
    return tuple(int(re.search(rf"{what}:(\d+)", said)[1]) for what in ("REG", "STACK", "LOCAL"))


def cases():
    """(kernel, what it is for, constants, options of the launch)"""
    for dtype, tile in kernels.TILES.items():
        options = tile.options()
        launch = {name: options.pop(name) for name in ("num_warps", "num_stages")}
        score = dict(COMPUTE=tile.compute, BLOCK_C=tile.classes, BLOCK_D=kernels.RESCORE_D)
        what = str(dtype).removeprefix("torch.") if dtype else "float32"
        yield "nontarget_lse_fwd_kernel", f"forward, {what}", dict(bias=None, rows=None, **options), launch
        yield "nontarget_lse_fwd_kernel", f"forward with rows and bias, {what}", dict(scale=None, **options), launch
        yield "nontarget_lse_bwd_kernel", f"backward, {what}", dict(bias=None, rows=None, **options), launch
        yield "nontarget_lse_bwd_kernel", f"backward with rows and bias, {what}", dict(scale=None, **options), launch
        yield "rescore_kernel", f"rescore, {what}", dict(bias=None, **score), {}
    yield "inverse_norms_kernel", "norms", dict(BLOCK_C=kernels.NORM_C, BLOCK_D=kernels.NORM_D), {}


CASES = list(cases())


@compiled_only
@pytest.mark.parametrize("capability", [80, 90], ids="sm_{}".format)
@pytest.mark.parametrize(("kernel", "what", "constants", "launch"), CASES, ids=[case[1] for case in CASES])
def test_compiles_ahead_of_time_without_spills(kernel, what, constants, launch, capability, tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    code = compiled(getattr(kernels, kernel), capability, constants | {"d": 512}, launch)
    registers, stack, local = resources(code, tmp_path)
    shared = code.metadata.shared
    print(f"{what}, sm_{capability}: {registers} registers, {stack + local} bytes spilled, {shared} bytes shared")
    assert 0 < registers <= 255 and stack == local == 0
    assert shared <= 99 * 1024  # what every GPU since sm_80 lends to a program
