"""The CUDA kernels: on the CPU by a stand-in for CUDA, through nvcc for every architecture, and on a GPU where one is.

cuda_on_cpu/cuda_runtime.h runs the kernels and the host code as they are, with barriers and shuffles, so their values
are checked here; what it cannot show is a GPU's memory model and speed.
"""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from check import error
from dense import F32, F64, cast, dense, leaves, problem, run, seen, without_topk
from emulation import ROOT, built, compiler, torch_flags, wants_compiler
from places import check, moved, run_on

from fastmargin.backends import native_can_run
from fastmargin.ops import target_logit
from fastmargin.ops.nontarget_lse import IMPLS, nontarget_lse

CUDA = ROOT / "csrc" / "cuda"
KERNELS = sorted(CUDA.glob("*.cu"))
BF16, F16 = torch.bfloat16, torch.float16


@pytest.fixture(
    params=[
        pytest.param("emulated", marks=wants_compiler),
        pytest.param(
            "cuda",
            marks=[
                pytest.mark.gpu,
                pytest.mark.skipif(
                    not torch.cuda.is_available(), reason="no CUDA device: the CUDA kernels are NOT run"
                ),
            ],
        ),
    ]
)
def place(request):
    """(device, backend)"""
    if request.param == "emulated":
        return request.getfixturevalue("emulated")
    if not native_can_run(torch.empty(0, device="cuda")):
        pytest.skip("built without CUDA: the CUDA kernels are NOT run")
    return "cuda", "native"


# ---------------------------------------------------------------------------------------------- values

SHAPES = [(1, 2, 2, 1), (3, 96, 1009, 5), (70, 33, 700, 1), (17, 8, 513, 40), (40, 24, 256, 0)]


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("plain", [False, True], ids=["normalised", "bias"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_and_gradients(place, shape, plain):
    B, d, C, k = shape
    k = min(k, C - 1)
    *given, upstream = problem(B, d, C, k, plain=plain)
    check(place, given, upstream, normalize_weight=not plain, topk=k)


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("cosine", [0.5, 0.9, 1.0])
@pytest.mark.parametrize("s", [64.0, 200.0])
def test_confident_rows(place, cosine, s):
    *given, upstream = problem(20, 24, 600, 2, s=s, cosine=cosine)
    check(place, given, upstream, topk=2)


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("plain", [False, True], ids=["normalised", "bias"])
def test_rows_are_the_whole_of_a_smaller_problem(place, plain):
    x, w, _, bias, upstream = problem(17, 12, 1200, 3, plain=plain)
    rows = torch.randperm(1200)[:803].sort().values
    y = torch.randint(-1, 803, (17,))
    check(place, (x, w, y, bias), upstream, rows=rows, normalize_weight=not plain, topk=3)


def test_any_strides(place):
    x, w, y, _, upstream = problem(9, 20, 450, 2)
    spread = torch.stack((y, y + 1), 1)[:, 0]
    x32, w32 = (t.float().T.contiguous().T for t in (x, w))
    got, classes = run_on(place, x32, w32, spread, None, upstream, topk=2)
    truth, order = run(dense, x, w, y, None, upstream, topk=2)
    assert torch.equal(classes, order)
    assert max(error(a, b) for a, b in zip(got, truth, strict=True)) < 2e-6


@pytest.mark.parametrize("k", [1, 3, 20])
def test_ties_go_to_the_smaller_class(place, k):
    """Small integers: every product is exact, so equal logits are equal, and there are many, in every wave."""
    device, backend = place
    x, w = torch.randint(-2, 3, (20, 6)).float(), torch.randint(-1, 2, (900, 6)).float()
    y = torch.randint(0, 900, (20,))
    options = dict(normalize_weight=False, topk=k)
    _, _, values, classes = nontarget_lse(*moved(device, x, w, y), backend=backend, **options)
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


def test_tiny_weights_zero_rows_and_what_is_not_a_number(place):
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


def test_labels_out_of_range_read_no_memory_that_is_not_theirs(place):
    """On a GPU nobody looks at labels before: such a row has no class here, as with -1."""
    device, backend = place
    x, w = torch.randn(3, 4), torch.randn(300, 4)
    fwd = IMPLS[backend].functions["fwd"]
    target = target_logit.IMPLS[backend].functions["fwd"]
    bad, none = torch.tensor([300, -7, 2**40]), torch.tensor([-1, -1, -1])
    x, w, bad, none = moved(device, x, w, bad, none)
    rest = [fwd(x, w, y, None, None, None, True, 1, 0, None, False)[0] for y in (bad, none)]
    assert torch.equal(*rest) and not target(x, w, bad, None, None, True).any()
    one, bwd = torch.ones_like(rest[0]), IMPLS[backend].functions["bwd"]
    got, want = (
        bwd(x, w, y, None, None, None, True, 1, None, rest[0], y[:, None], one[:0], one, one, one[:, None],
            True, True, False)
        for y in (bad, none)
    )  # fmt: skip
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_classes_that_a_bias_rules_out_have_no_gradient(place):
    """No other class: g is 0 but at the row's own."""
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


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: several waves of full size are NOT run")
@pytest.mark.parametrize("dtype", [None, BF16, F16], ids=str)
def test_several_waves_of_full_size(dtype):
    """On a GPU a wave has thousands of classes: gradients over several, each in split products."""
    *given, upstream = problem(1024, 64, 40_000, 3)
    given, upstream = cast(F32, *given), without_topk(upstream)
    got, _ = run_on(("cuda", "native"), *given, upstream, topk=3, compute_dtype=dtype)
    truth, _ = run_on(("cuda", "reference"), *cast(F64, *given), upstream, topk=3)
    for a, t in zip(got, truth, strict=True):
        assert error(a, t) < (2e-6 if dtype is None else 2e-2)


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("plain", [False, True], ids=["normalised", "bias"])
@pytest.mark.parametrize("scale", [1.0, 1e-7, 1e-30, 65536.0], ids="gradients times {}".format)
@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
def test_rounded_operands_have_float32_sums(place, dtype, plain, scale):
    """Values err as float32 does, against float64 on the rounded operands; gradients by the rounding alone."""
    *given, upstream = problem(70, 24, 700, 3, plain=plain)
    x, w, y, bias = cast(F32, *given)
    if not plain:
        w *= torch.logspace(-8, 8, 700)[:, None]  # of any norm
    upstream, options = [scale * t for t in without_topk(upstream)], dict(normalize_weight=not plain, topk=3)
    got, classes = run_on(place, x, w, y, bias, upstream, compute_dtype=dtype, **options)
    rest, _, values, order = dense(*seen(dtype, x, w, not plain), y, bias, normalize_weight=False, topk=3)
    assert torch.equal(classes, order)
    assert error(got[0], rest) < 1e-6 and error(got[2], values) < 1e-6
    truth, _ = run(dense, *cast(F64, x, w, y, bias), upstream, **options)
    assert error(got[1], truth[1]) < 1e-6  # the target is not rounded
    unit = w.norm(dim=1, keepdim=True) if not plain else 1.0  # dw goes with 1/||w||
    eps = 8 * torch.finfo(dtype).eps
    assert error(got[3], truth[3]) < eps and error(got[4] * unit, truth[4] * unit) < eps
    for a, t in zip(got[3:], truth[3:], strict=True):
        a, t = (a.double() * unit, t * unit) if a.shape == w.shape else (a.double(), t)
        assert abs(float((a * t).sum() / (t * t).sum()) - 1) < 1e-3  # to the nearest: no bias


@pytest.mark.parametrize("scale", [0.0, 1e-38])
def test_gradients_that_vanish_do_so_without_overflow(place, scale):
    *given, upstream = problem(5, 8, 300)
    got, _ = run_on(place, *cast(F32, *given), [scale * t for t in upstream], compute_dtype=F16)
    assert all(t.isfinite().all() and t.abs().max() < 1e-30 for t in got[3:])


@pytest.mark.parametrize("dtype", [None, BF16, F16], ids=str)
def test_two_runs_agree_to_the_bit(place, dtype):
    *given, upstream = problem(60, 16, 900, 5)
    given = cast(F32, *given)
    first, second = (run_on(place, *given, upstream, topk=5, compute_dtype=dtype) for _ in range(2))
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
    """Sums and lists of a wave are merged with those of the waves before: any order gives the same."""
    x, w, y, _, upstream = problem(20, 16, 1500, 4)
    given = cast(F32, x, w, y, None)
    want, order = run_on(place, *given, upstream, topk=4)
    for _ in range(3):
        shuffle = torch.randperm(1500)
        got, classes = run_on(place, given[0], given[1][shuffle], shuffle.argsort()[y], None, upstream, topk=4)
        assert torch.equal(shuffle[classes], order)
        got[4] = got[4][shuffle.argsort()]
        assert max(error(a, b) for a, b in zip(got, want, strict=True)) < 2e-6


WRONG = """
import sys, torch
torch.ops.load_library(sys.argv[1])
x, w, y = torch.randn(5, 8), torch.randn(600, 8), torch.randint(0, 600, (5,))
rest = torch.ops.fastmargin_emulated.nontarget_lse_fwd(x, w, y, None, None, None, True, 1, 0, None, False)[0]
z = x.double() @ torch.nn.functional.normalize(w.double()).T
want = z.scatter(1, y[:, None], -torch.inf).logsumexp(1)
print(float((rest - want).abs().max() / want.abs().max()))
"""


@wants_compiler
@pytest.mark.parametrize(
    ("constant", "wrong"), [("5.0000001201e-1", "5.0000001201e-1"), ("5.0000001201e-1", "5.01e-1")]
)
def test_a_wrong_constant_in_the_shared_arithmetic_is_seen(constant, wrong, tmp_path):
    """csrc/tile.h is what CPU and GPU kernels share: a constant that is off by a thousandth fails these tests."""
    for part in ("csrc", "tests/cuda_on_cpu"):
        shutil.copytree(ROOT / part, tmp_path / part)
    tile = tmp_path / "csrc" / "tile.h"
    tile.write_text(tile.read_text().replace(constant, wrong))
    library = built(tmp_path, tmp_path)
    done = subprocess.run([sys.executable, "-c", WRONG, str(library)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (float(done.stdout) < 1e-6) == (constant == wrong)


# ---------------------------------------------------------------------------------------------- compilation

ARCHITECTURES = ["sm_80", "sm_90a", "sm_100"]
INSTANCES = {"O": 3, "Phi": 2}  # of a kernel, by its template's parameter


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not here: the CUDA kernels are NOT compiled")
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("source", KERNELS, ids=lambda path: path.name)
def test_kernels_compile_without_spills(source, architecture, tmp_path):
    flags = ["-std=c++20", "-Xptxas", "-v", f"-arch={architecture}"]
    done = subprocess.run(
        ["nvcc", *flags, "-cubin", str(source), "-o", str(tmp_path / "kernel.cubin")], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    said = re.findall(
        r"Compiling entry function '(\w+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads"
        r".*?Used (\d+) registers",
        done.stderr,
        re.DOTALL,
    )
    text = source.read_text()
    templates = re.findall(r"template <typename (\w+)>\n__global__", text)
    assert len(said) == text.count("__global__") + sum(INSTANCES[name] - 1 for name in templates)
    for name, stack, stores, loads, registers in said:
        kernel = re.search(r"\d([a-z_]+_kernel)", name)[1]
        print(f"{architecture} {kernel}: {registers} registers, {stack} bytes of stack")
        assert int(stores) == int(loads) == 0


@wants_compiler
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="CUDA's headers are not here: the glue is NOT compiled")
@pytest.mark.parametrize("unit", sorted(path.name for path in CUDA.glob("*.cpp")))
def test_the_glue_compiles_against_torch_without_cuda(unit):
    said = subprocess.run(["nvcc", "--dryrun", "x.cu"], capture_output=True, text=True).stderr
    toolkit = Path(re.search(r"TOP=(\S+)", said)[1])
    flags = [*torch_flags(), f"-I{toolkit / 'include'}", "-DC10_CUDA_NO_CMAKE_CONFIGURE_FILE", "-fsyntax-only", "-Wall"]
    done = subprocess.run([compiler, *flags, str(CUDA / unit)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
