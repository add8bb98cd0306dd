"""pairwise_potential on GPUs: the CUDA and the Triton kernels, the same tests for both.

Values are checked wherever the kernels can run: CUDA's on the CPU by the stand-in of cuda_on_cpu/, Triton's in its
interpreter, both on a GPU where one is. The interpreter must be chosen before Triton is imported, so its tests run in a
child process. What only a GPU can show comes last. test_cuda.py compiles the CUDA kernels for every architecture.
"""

import os
import re
import subprocess
import sys

import pytest
import torch
from check import error
from dense import F32, F64, problem
from emulation import ROOT, wants_compiler
from pairwise import between_distances, check, clouds, dense, run, run_on

from fastmargin.ops.backends import native_can_run
from fastmargin.ops.nontarget_lse import nontarget_lse
from fastmargin.ops.pairwise_potential import IMPLS, pairwise_potential

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
KINDS = [("inverse", None), ("hinge", 9.0)]
no_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: nothing is run on one")
here_only = pytest.mark.skipif(INTERPRETED, reason="this process is for interpreted kernels")
PLACES = [
    pytest.param("emulated", marks=[wants_compiler, here_only]),
    pytest.param("cuda", marks=[pytest.mark.gpu, no_cuda]),
    pytest.param("triton", marks=[pytest.mark.gpu, no_cuda]),
]


@pytest.fixture(params=["interpreted"] if INTERPRETED else PLACES)
def place(request):
    """(device, backend)"""
    if request.param == "emulated":
        return request.getfixturevalue("emulated")
    if request.param == "cuda":
        if not native_can_run(torch.empty(0, device="cuda")):
            pytest.skip("built without CUDA: the CUDA kernels are NOT run")
        return "cuda", "native"
    request.getfixturevalue("small_chunks")
    return "cpu" if INTERPRETED else "cuda", "triton"


@pytest.fixture
def small_chunks(monkeypatch):
    """Triton's chunks are made so small that a test has several; the emulated kernels are built with small ones."""
    kernels = pytest.importorskip("fastmargin.kernels.pairwise_potential", reason="triton is not installed")
    monkeypatch.setattr(kernels, "ROWS", 64)
    monkeypatch.setattr(kernels, "WORKSPACE", 64 * 256)


# ---------------------------------------------------------------------------------------------- values

SHAPES = [(1, 1, 1), (37, 53, 7), (70, 300, 33), (9, 1500, 5), (5, 70, 300)]


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("weighted", [False, True], ids=["", "weighted"])
@pytest.mark.parametrize("kind", ["inverse", "hinge"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_and_gradients(place, shape, kind, weighted):
    a, b, a_ids, b_ids = clouds(*shape)
    w, g = (torch.rand(shape[1]) - 0.2 if weighted else None), torch.randn(shape[0])
    check(place, a, b, a_ids, b_ids, w, g, kind=kind, margin=between_distances(a, b) if kind == "hinge" else None)


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("uneven", [False, True], ids=["sum", "rows weighed"])
@pytest.mark.parametrize("kind", ["inverse", "hinge"])
@pytest.mark.parametrize("n", [2, 17, 130])
def test_points_among_themselves(place, n, kind, uneven):
    a, _, ids, _ = clouds(n, 0, 12)
    a[n // 2 : n // 2 + n // 4] = a[: n // 4] + 1e-2 * torch.randn(n // 4, 12)
    g, margin = (torch.randn(n) if uneven else None), (between_distances(a, a) if kind == "hinge" else None)
    check(place, a, None, ids, None, None, g, kind=kind, margin=margin)


@pytest.mark.parametrize("distance", [10.0**e for e in range(-3, 3)])
@pytest.mark.parametrize("norm", [0.1, 1.0, 100.0])
def test_small_distances_of_long_vectors(place, distance, norm):
    """A hinge of margin 2 u shows u: |u - u64| <= 1e-4 u + 1e-9, also where products would have lost it.

    The row meets 300 points, of which one has another id. Its slope, 2 (b - a), is as good.
    """
    b = norm * torch.nn.functional.normalize(torch.randn(300, 64))
    a = b[257:258] + distance * torch.nn.functional.normalize(torch.randn(1, 64))
    ids = torch.zeros(300, dtype=torch.int64).index_fill(0, torch.tensor(257), 1)
    apart = a.double() - b[257].double()
    u = float(apart.square().sum())
    out, da, db = run_on(place, a, b, ids[:1], ids, kind="hinge", margin=2 * u)
    assert abs(2 * u - float(out) - u) <= 1e-4 * u + 1e-9
    assert error(da, -2 * apart) < 1e-4 and error(db[257:258], 2 * apart) < 1e-4
    assert not db[ids == 0].any()


def test_all_pairs_near(place):
    """Two tight clusters: every pair of other ids within one of them is near."""
    centers = 20 * torch.nn.functional.normalize(torch.randn(2, 80))
    a, b = centers.repeat(3, 1) + 0.1 * torch.randn(6, 80), centers.repeat(150, 1) + 0.1 * torch.randn(300, 80)
    check(place, a, b, torch.arange(6), torch.arange(300) % 9, kind="inverse")


def test_few_pairs_near(place):
    """One in each of two spans of columns, read by different threads."""
    a, b = torch.randn(2, 8), torch.randn(1300, 8)
    b[[3, 1024 + 256 + 5]] = a[0] + 1e-3 * torch.randn(2, 8)
    check(place, a, b, torch.zeros(2, dtype=torch.int64), torch.ones(1300, dtype=torch.int64), kind="inverse")


@pytest.mark.parametrize(("kind", "margin", "top"), [("inverse", None, 1.0), ("hinge", 9.0, 9.0)])
def test_coincident_points_have_the_largest_potential_and_no_slope(place, kind, margin, top):
    a = torch.cat((torch.full((3, 5), 2.5), torch.full((1, 5), -50.0)))  # the mean is none of them
    out, da = run_on(place, a, None, torch.tensor([0, 1, 2, 2]), None, kind="hinge", margin=9.0)
    assert out.tolist() == [18.0, 18.0, 18.0, 0.0] and not da.any()
    out, da, db = run_on(place, a[:3], a[:3].clone(), torch.arange(3), torch.arange(3), kind=kind, margin=margin)
    assert torch.equal(out, torch.full((3,), 2 * top)) and not da.any() and not db.any()


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize(("kind", "margin"), KINDS)
@pytest.mark.parametrize(("N", "M", "ids"), [(0, 5, 9), (5, 0, 9), (5, 7, 1)])
def test_nothing_to_sum(place, N, M, ids, kind, margin):
    out, da, db = run_on(place, *clouds(N, M, 4, ids), kind=kind, margin=margin)
    assert out.shape == (N,) and not out.any() and not da.any() and not db.any()


@pytest.mark.parametrize(("kind", "margin"), KINDS)
def test_nan_stays_nan(place, kind, margin):
    a, b = torch.randn(20, 6), torch.randn(30, 6)
    a[3, 2] = torch.nan
    ids, other = torch.arange(20), -1 - torch.arange(30)
    out, da, _ = run_on(place, a, b, ids, other, kind=kind, margin=margin)
    assert out[3].isnan() and da[3].isnan().any()
    assert out[ids != 3].isfinite().all() and da[ids != 3].isfinite().all()
    b[0, 0] = torch.nan
    out, *_ = run_on(place, a, b, ids, other, kind=kind, margin=margin)
    assert out.isnan().all()


def test_ids_are_compared_in_full(place):
    a, b = torch.zeros(2, 3), torch.zeros(2, 3)
    a_ids, b_ids = torch.tensor([1, -(2**62)]), torch.tensor([1 + 2**32, -(2**62)])
    assert run_on(place, a, b, a_ids, b_ids, kind="inverse")[0].tolist() == [2.0, 1.0]


def test_any_strides_and_autocast(place):
    device, backend = place
    given = clouds(20, 300, 8)
    want = run_on(place, *given, torch.ones(300), kind="inverse")
    strided = [torch.stack((t, t + 1), -1).to(device).flatten(-2)[..., ::2] for t in (*given, torch.ones(300))]
    a, b, a_ids, b_ids, w = strided
    a = a.T.contiguous().T.requires_grad_()
    assert not any(t.is_contiguous() for t in (a, b, a_ids, b_ids, w))
    with torch.autocast(device, torch.bfloat16):
        out = pairwise_potential(a, b, a_ids, b_ids, b_weight=w, kind="inverse", backend=backend)
        out.sum().backward()
    assert out.dtype == F32 and error(out.cpu(), want[0]) < 1e-6 and error(a.grad.cpu(), want[1]) < 1e-6


@pytest.mark.parametrize(("kind", "margin"), KINDS)
def test_two_runs_agree_to_the_bit(place, kind, margin):
    given = *clouds(20, 100, 24), torch.randn(100), torch.randn(20)
    first, second = (run_on(place, *given, kind=kind, margin=margin) for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))


@pytest.fixture
def tf32():
    before = torch.backends.cuda.matmul.allow_tf32
    yield lambda allow: setattr(torch.backends.cuda.matmul, "allow_tf32", allow)
    torch.backends.cuda.matmul.allow_tf32 = before


def test_torch_may_allow_tf32(place, tf32):
    given, found = clouds(20, 100, 40), []
    for allow in (False, True):
        tf32(allow)
        found.append(run_on(place, *given, kind="inverse"))
    assert all(torch.equal(x, y) for x, y in zip(*found, strict=True))


@here_only
@wants_compiler
def test_the_stand_in_rounds_to_tf32_where_nothing_forbids_it(emulated, tf32):
    """Else the test above could not fail."""
    x, w, y, *_ = problem(5, 8, 300)
    found = []
    for allow in (False, True):
        tf32(allow)
        found.append(nontarget_lse(x.float(), w.float(), y, backend="emulated")[0])
    assert 1e-6 < error(*found) < 1e-2


def test_the_op_itself_checks_what_it_reads(emulated):
    a, ids, fwd = torch.zeros(3, 2), torch.arange(3), IMPLS["emulated"].functions["fwd"]
    for given, message in (
        ((a, a, ids[:2], ids, None, "inverse"), "want a_ids"),
        ((a, None, ids, None, torch.ones(3), "inverse"), "want b with its ids, or neither"),
        ((a, a.double(), ids, ids, None, "inverse"), "want b "),
        ((a.double(), None, ids, None, None, "inverse"), "want a "),
        ((a, a, ids, ids, None, "cosine"), "kind = cosine"),
    ):
        with pytest.raises(ValueError, match=message):
            fwd(*given, 0.0, False)


@here_only
def test_under_the_interpreter():
    """The tests of values, in a process that interprets Triton's kernels."""
    pytest.importorskip("triton", reason="triton is not installed: its kernels are NOT tested")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", __file__, "-q", "-x", "-p", "no:cacheprovider", "-k", "interpreted"],
        cwd=ROOT, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed and int(passed[1]) >= 60, done.stdout


# ---------------------------------------------------------------------------------------------- compilation of Triton's

TYPES = dict(near="*i32", a_ids="*i64", b_ids="*i64", n="i32", m="i32", margin="fp32")
TYPES |= dict.fromkeys(("a_row", "b_row", "a_feature", "b_feature"), "i64")
NO_WEIGHT = dict(weight=None, margin=None)
CASES = [
    ("pairs_kernel", "inverse", NO_WEIGHT),
    ("pairs_kernel", "inverse without slopes", NO_WEIGHT | dict(q=None)),
    ("pairs_kernel", "weighted hinge", {}),
    ("slopes_kernel", "slopes", {}),
]


@here_only
@pytest.mark.parametrize("capability", [80, 90], ids="sm_{}".format)
@pytest.mark.parametrize(("kernel", "what", "constants"), CASES, ids=[what for _, what, _ in CASES])
def test_compiles_ahead_of_time_without_spills(kernel, what, constants, capability, tmp_path, monkeypatch):
    pytest.importorskip("triton", reason="triton is not installed: its kernels are NOT compiled")
    from ahead_of_time import compiled, resources

    from fastmargin.kernels import pairwise_potential as kernels

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    options = (kernels.PAIRS if kernel == "pairs_kernel" else kernels.SLOPES).options()
    launch = {name: options.pop(name) for name in ("num_warps", "num_stages")}
    constants = constants | options | dict(a_feature=1, b_feature=1, d=512)
    code = compiled(getattr(kernels, kernel), capability, TYPES, constants, launch)
    registers, stack, local = resources(code, tmp_path)
    shared = code.metadata.shared
    print(f"{what}, sm_{capability}: {registers} registers, {stack + local} bytes spilled, {shared} bytes shared")
    assert 0 < registers <= 255 and stack == local == 0
    assert shared <= 99 * 1024  # what a program may have on every GPU since sm_80
    assert "fma" in code.asm["ptx"] and "mma" not in code.asm["ptx"].replace("comma", "")  # no tensor cores: no TF32


# ---------------------------------------------------------------------------------------------- on a GPU alone

on_gpu = [pytest.mark.gpu, no_cuda, here_only]


@pytest.fixture(params=[pytest.param(name, marks=on_gpu) for name in ("native", "triton")])
def gpu_backend(request):
    if request.param not in IMPLS or not IMPLS[request.param].can_run(torch.empty(0, device="cuda")):
        pytest.skip(f"{request.param} cannot run on this GPU")
    return request.param


def given_on_gpu(N, M, d, device="cuda"):
    a, b, a_ids, b_ids = (t.to(device) for t in clouds(N, M, d))
    return a.requires_grad_(), b.requires_grad_(), a_ids, b_ids


def step(a, b, a_ids, b_ids, backend):
    """Potentials and gradients, by two kernels of each direction."""
    out = pairwise_potential(a, b, a_ids, b_ids, kind="inverse", backend=backend)
    return [out.detach(), *torch.autograd.grad(out.sum(), (a, b))]


def equal(a, b):
    return all(torch.equal(p.cpu(), q.cpu()) for p, q in zip(a, b, strict=True))


def test_another_stream(gpu_backend):
    given = given_on_gpu(300, 200, 32)
    want = step(*given, gpu_backend)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        got = step(*given, gpu_backend)
    side.synchronize()
    assert equal(got, want)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU here")
def test_a_device_that_is_not_the_current_one(gpu_backend):
    given = given_on_gpu(300, 200, 32)
    there = [t.detach().to("cuda:1").requires_grad_(t.requires_grad) for t in given]
    assert torch.cuda.current_device() == 0
    assert equal(step(*there, gpu_backend), step(*given, gpu_backend))


def test_a_step_does_not_wait_for_the_device(gpu_backend):
    given = given_on_gpu(300, 200, 32)
    step(*given, gpu_backend)
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(*given, gpu_backend)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_capture_and_replay(gpu_backend):
    """A replay sees the near pairs that are there when it runs."""
    given = given_on_gpu(300, 200, 32)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step(*given, gpu_backend)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(*given, gpu_backend)
    with torch.no_grad():
        given[0].copy_(given[0].flip(0))
        given[2].copy_(given[2].flip(0))
    graph.replay()
    torch.cuda.synchronize()
    got = [t.clone() for t in captured]
    assert max(error(x, y) for x, y in zip(got, step(*given, gpu_backend), strict=True)) < 1e-5


def test_more_pairs_than_32_bits_count(gpu_backend):
    """And several chunks of full size in both directions."""
    given = given_on_gpu(60_000, 50_000, 16)
    out, da, db = (t.cpu() for t in step(*given, gpu_backend))
    at = torch.tensor([0, 1, 2, 59_999])
    points, others, ids, other_ids = (t.detach().cpu() for t in given)
    want = run(dense, points[at], others, ids[at], other_ids, dtype=F64, kind="inverse")
    assert error(out[at], want[0]) < 1e-5 and error(da[at], want[1]) < 1e-5
    at = torch.tensor([0, 1, 49_999])
    want = run(dense, others[at], points, other_ids[at], ids, dtype=F64, kind="inverse")
    assert error(db[at], want[1]) < 1e-5
    assert db.isfinite().all() and da.isfinite().all()


def test_memory(gpu_backend):
    """N x M would be 1.6 GB; the transient beyond the results must stay under 150 MB."""
    given = given_on_gpu(20_000, 20_000, 64)
    step(*given, gpu_backend)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step(*given, gpu_backend)
    extra = torch.cuda.max_memory_allocated() - before
    assert extra < 150e6, f"{extra / 1e6:.0f} MB"


@pytest.mark.gpu
@no_cuda
def test_cublaslt_with_tf32_is_refused(tf32):
    """cuBLASLt ignores the guard that forbids TF32."""
    if not native_can_run(torch.empty(0, device="cuda")):
        pytest.skip("built without CUDA")
    given, before = given_on_gpu(30, 20, 8), torch.backends.cuda.preferred_blas_library()
    torch.backends.cuda.preferred_blas_library("cublaslt")
    try:
        step(*given, "native")
        tf32(True)
        with pytest.raises(ValueError, match="cuBLASLt would round them to TF32"):
            step(*given, "native")
    finally:
        torch.backends.cuda.preferred_blas_library(before)
