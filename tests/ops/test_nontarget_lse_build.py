"""nontarget_lse as a compiled op: schemas, compilation, threads, autocast, large offsets and memory."""

import os
import subprocess
import sys

import pytest
import torch
from check import error
from dense import F32, F64, cast, problem, run

from fastmargin.ops.nontarget_lse import IMPLS, nontarget_lse

native_only = pytest.mark.skipif("native" not in IMPLS, reason="native kernels not built")


@native_only
def test_two_runs_agree_to_the_bit(threads):
    x, w, y, _, upstream = problem(300, 64, 3000, 5)
    given = cast(F32, x, w, y, None)
    first, second = (run(nontarget_lse, *given, upstream, topk=5, backend="native") for _ in range(2))
    for a, b in zip((*first[0], first[1]), (*second[0], second[1]), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("kind", [F32, F64])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_changes_nothing(backend, kind, dtype, threads):
    x, w, y, _, upstream = problem(40, 32, 2000, 2)
    given = cast(kind, x, w, y, None)
    plain, _ = run(nontarget_lse, *given, upstream, topk=2, backend=backend)
    with torch.autocast("cpu", dtype=dtype):
        mixed, _ = run(nontarget_lse, *given, upstream, topk=2, backend=backend)
    for a, b in zip(plain, mixed, strict=True):
        assert torch.equal(a, b)


@native_only
@pytest.mark.parametrize("dtype", [F32, F64])
def test_opcheck(dtype):
    x, w, y = torch.randn(6, 5, dtype=dtype), torch.randn(20, 5, dtype=dtype), torch.randint(-1, 20, (6,))
    class_ids, bias = torch.tensor([0, 3, 7, 19]), torch.randn(20, dtype=dtype)
    ops = torch.ops.fastmargin
    for y_, bias_, rows_, normalize in ((y, None, None, True), (y.clamp(max=3), bias, class_ids, False)):
        torch.library.opcheck(ops.target_logit, (x, w, y_, bias_, rows_, normalize))
        fwd = (x, w, y_, bias_, rows_, None, normalize, 1, 2, None, True)
        torch.library.opcheck(ops.nontarget_lse_fwd, fwd)
        rest, _, classes, a, e = ops.nontarget_lse_fwd(*fwd)
        g = torch.randn_like(rest)
        for need in ((True, True, True), (True, False, False)):
            bwd = (
                x,
                w,
                y_,
                bias_,
                rows_,
                None,
                normalize,
                1,
                None,
                rest,
                classes,
                a,
                e,
                g,
                g,
                torch.randn(6, 2, dtype=dtype),
            )
            torch.library.opcheck(ops.nontarget_lse_bwd, (*bwd, *need))


@native_only
def test_compiles_whole_with_backward():
    x, w, y, _, upstream = problem(12, 8, 50, 2)

    def op(x, w, y, bias, **options):
        return nontarget_lse(x, w, y, **options)

    compiled = torch.compile(op, fullgraph=True)
    got, classes = run(compiled, x, w, y, None, upstream, topk=2)
    plain, order = run(op, x, w, y, None, upstream, topk=2)
    assert torch.equal(classes, order)
    for a, b in zip(got, plain, strict=True):
        assert error(a, b) < 1e-14


@native_only
def test_offsets_beyond_32_bits():
    """The last of 2^31 / 64 + 3 classes; the memory in between is never touched."""
    C, d = 2**31 // 64 + 3, 64
    w = torch.empty(C, d)
    class_ids = torch.tensor([0, 5, C - 1])
    w[class_ids] = torch.randn(3, d)
    x = torch.randn(4, d)
    y = torch.tensor([0, 1, 2, 2])
    got, classes = run_rows(x, w, y, class_ids)
    truth, order = run_rows(x, w[class_ids], y, None)
    assert torch.equal(classes, order)
    for a, b in zip(got, truth, strict=True):
        assert error(a, b) < 1e-6


def run_rows(x, w, y, class_ids):
    x, w = x.clone().requires_grad_(), w.requires_grad_()
    rest, target, values, classes = nontarget_lse(x, w, y, class_ids=class_ids, topk=2, backend="native")
    (dx, dw) = torch.autograd.grad(rest.sum() + 2 * target.sum() + values.sum(), (x, w))
    return [rest, target, values, dx, dw.coalesce().values() if class_ids is not None else dw], classes


PLAIN_BLAS = """
import torch
from fastmargin.ops.nontarget_lse import nontarget_lse
torch.manual_seed(0)
torch.set_num_threads(2)
x, w, y = torch.randn(300, 40), torch.randn(1500, 40), torch.randint(0, 1500, (300,))
grads = {}
for backend in ("native", "reference"):
    a, b = x.clone().requires_grad_(), w.clone().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rest, target, *_ = nontarget_lse(a, b, y, backend=backend)
    (rest - target).sum().backward()
    grads[backend] = torch.cat((rest.detach(), a.grad.flatten(), b.grad.flatten()))
print(float((grads["native"] - grads["reference"]).abs().max()))
"""


@native_only
@pytest.mark.parametrize("short", ["rest", "topk_classes", "a", "d_rest", "d_target", "d_topk"])
def test_the_raw_backward_op_reads_nothing_it_was_not_given(short):
    x, w, y = torch.randn(6, 5), torch.randn(20, 5), torch.randint(0, 20, (6,))
    ops = torch.ops.fastmargin
    rest, _, classes, a, e = ops.nontarget_lse_fwd(x, w, y, None, None, None, True, 1, 2, None, True)
    saved = dict(rest=rest, topk_classes=classes, a=a, e=e, d_rest=rest, d_target=rest)
    saved["d_topk"] = torch.randn(6, 2)
    given = (x, w, y, None, None, None, True, 1, None)
    with pytest.raises(ValueError, match=short):
        ops.nontarget_lse_bwd(*given, *(saved | {short: saved[short][:1]}).values(), True, True, False)
    with pytest.raises(ValueError, match="topk_classes holds 1000000"):
        ops.nontarget_lse_bwd(
            *given, *(saved | {"topk_classes": classes + 10**6 - classes}).values(), True, True, False
        )


@native_only
def test_lines_far_apart():
    """Row strides beyond what a matrix product takes as its leading dimension."""
    w = torch.empty(2**28 * 2 + 16).as_strided((3, 16), (2**28, 1))
    w.copy_(torch.randn(3, 16))
    x, y = torch.randn(4, 16), torch.tensor([0, 1, 2, 2])
    rest, *_ = nontarget_lse(x, w, y, backend="native")
    assert error(rest, nontarget_lse(x, w.clone(), y, backend="reference")[0]) < 1e-6


@native_only
def test_an_older_instruction_set():
    """Every thread makes its own BLAS call there, instead of oneDNN's kernel."""
    env = {**os.environ, "ONEDNN_MAX_CPU_ISA": "SSE41"}
    child = subprocess.run([sys.executable, "-c", PLAIN_BLAS], env=env, capture_output=True, text=True)
    assert child.returncode == 0, child.stderr
    assert float(child.stdout) < 2e-5


PEAK = """
import sys, torch
from fastmargin.ops.nontarget_lse import nontarget_lse
torch.set_num_threads(2)
compute_dtype = getattr(torch, sys.argv[1])

def memory(field):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(field)) * 1024

def step(B, C, d):
    x, w = torch.randn(B, d).requires_grad_(), torch.randn(C, d).requires_grad_()
    y = torch.randint(0, C, (B,))
    with open("/proc/self/clear_refs", "w") as reset:
        reset.write("5")  # resets the peak
    before = memory("VmRSS")
    rest, target, *_ = nontarget_lse(x, w, y, topk=1, compute_dtype=compute_dtype, backend="native")
    (rest - target).sum().backward()
    return memory("VmHWM") - before - 4 * (w.numel() + x.numel())

step(8, 500, 64)
print(step(1024, 200_000, 64))
"""


@native_only
@pytest.mark.parametrize("compute_dtype", ["float32", "bfloat16"])
def test_peak_memory(compute_dtype):
    """B x C would be 819 MB; above the inputs and dw it must stay under 32 MiB."""
    child = subprocess.run([sys.executable, "-c", PEAK, compute_dtype], capture_output=True, text=True)
    if "clear_refs" in child.stderr:
        pytest.skip("the peak of a process cannot be reset here")
    assert child.returncode == 0, child.stderr
    assert int(child.stdout) < 32 * 2**20, f"{int(child.stdout) / 2**20:.0f} MiB"
