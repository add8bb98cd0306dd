"""What only a GPU can show: streams, graphs, no host sync, more logits than 32 bits count, memory, bad labels."""

import pytest
import torch
from check import error
from dense import dense, problem

import fastmargin as fm
from fastmargin.ops import backends
from fastmargin.ops.nontarget_lse import IMPLS, nontarget_lse

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: nothing here is run"),
]
BF16 = torch.bfloat16


@pytest.fixture(params=["native", "triton", "stream"])
def gpu_backend(request):
    if request.param not in IMPLS or not IMPLS[request.param].can_run(torch.empty(0, device="cuda")):
        pytest.skip(f"{request.param} cannot run on this GPU")
    return request.param


@pytest.fixture(params=[None, BF16, torch.float16], ids=str)
def compute_dtype(request):
    return request.param


def given(B, d, C, device="cuda"):
    generator = torch.Generator(device).manual_seed(0)
    x = 16 * torch.nn.functional.normalize(torch.randn(B, d, device=device, generator=generator))
    w = torch.randn(C, d, device=device, generator=generator).mul_(0.1)
    return x.requires_grad_(), w.requires_grad_(), torch.randint(0, C, (B,), device=device, generator=generator)


def step(x, w, y, **options):
    """Outputs and gradients."""
    rest, target, values, classes = nontarget_lse(x, w, y, topk=3, **options)
    gradients = torch.autograd.grad((rest - target).sum() + values.sum(), (x, w))
    return [t.detach() for t in (rest, target, values, classes, *gradients)]


def equal(a, b):
    return all(torch.equal(p, q) for p, q in zip(a, b, strict=True))


def test_the_cuda_kernels_are_the_default():
    if "cuda" not in backends.NATIVE_DEVICES:
        pytest.skip("built without CUDA")
    assert backends.pick(IMPLS, torch.empty(0, device="cuda")) == "native"


def test_another_stream(gpu_backend, compute_dtype):
    x, w, y = given(64, 32, 5000)
    want = step(x, w, y, backend=gpu_backend, compute_dtype=compute_dtype)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        got = step(x, w, y, backend=gpu_backend, compute_dtype=compute_dtype)
    side.synchronize()
    assert equal(got, want)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU here")
def test_a_device_that_is_not_the_current_one(gpu_backend, compute_dtype):
    options = dict(backend=gpu_backend, compute_dtype=compute_dtype)
    want = step(*given(64, 32, 5000), **options)
    x, w, y = (t.detach().to("cuda:1") for t in given(64, 32, 5000))
    assert torch.cuda.current_device() == 0
    got = step(x.requires_grad_(), w.requires_grad_(), y, **options)
    assert all(torch.equal(a.cpu(), b.cpu()) for a, b in zip(got, want, strict=True))


def test_a_step_does_not_wait_for_the_device(gpu_backend, compute_dtype):
    x, w, y = given(64, 32, 5000)
    options = dict(backend=gpu_backend, compute_dtype=compute_dtype)
    step(x, w, y, **options)
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(x, w, y, **options)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_capture_and_replay(gpu_backend, compute_dtype):
    x, w, y = given(64, 32, 5000)
    options = dict(backend=gpu_backend, compute_dtype=compute_dtype)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step(x, w, y, **options)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(x, w, y, **options)
    with torch.no_grad():
        x.copy_(x.flip(0))
        y.copy_(y.flip(0))
    graph.replay()
    torch.cuda.synchronize()
    got = [t.clone() for t in captured]
    want = step(x, w, y, **options)
    assert torch.equal(got[3], want[3])
    for a, b in zip(got, want, strict=True):
        # a product may be split otherwise while it is captured, and flip a rounding of g
        assert error(a, b) < (1e-5 if compute_dtype is None else 5e-3)


def test_more_logits_than_32_bits_count(gpu_backend, compute_dtype):
    B, d, C = 4096, 16, 600_000
    x, w, y = given(B, d, C)
    y[:4] = torch.tensor([0, C - 1, C // 2, -1])
    rest, target, values, _, dx, dw = step(x, w, y, backend=gpu_backend, compute_dtype=compute_dtype)
    at = [0, 1, 2, 3, B - 1]
    loose = 1e-5 if compute_dtype is None else 5e-3
    want = dense(*(t.detach().double().cpu() for t in (x[at], w)), y[at].cpu(), topk=3)
    assert error(rest[at].cpu(), want[0]) < loose and error(target[at].cpu(), want[1]) < 1e-5
    assert error(values[at].cpu(), want[2]) < loose
    assert dx.isfinite().all() and dw.isfinite().all() and dw[C - 1].any()
    along = (dw * torch.nn.functional.normalize(w.detach())).sum(1)
    assert float(along.abs().max() / dw.norm(dim=1).max()) < 1e-4


def test_memory(gpu_backend, compute_dtype):
    """B x C would be 819 MB; the transient beyond dw must stay under 100."""
    x, w, y = given(1024, 64, 200_000)
    options = dict(backend=gpu_backend, compute_dtype=compute_dtype)
    step(x, w, y, **options)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step(x, w, y, **options)
    extra = torch.cuda.max_memory_allocated() - before - 4 * w.numel()
    assert extra < 100e6, f"{extra / 1e6:.0f} MB"


def test_a_bad_label_has_no_loss_and_is_told_when_asked(gpu_backend):
    head = fm.MarginHead(16, 300, fm.ArcFace(), reduction="none", backend=gpu_backend).cuda()
    f, y = torch.randn(4, 16, device="cuda", requires_grad=True), torch.tensor([1, 300, 5, -7], device="cuda")
    loss = head(f, y).loss
    loss.sum().backward()
    assert torch.equal(loss == 0, torch.tensor([False, True, False, True], device="cuda"))
    assert not f.grad[[1, 3]].any() and f.grad[[0, 2]].any()
    with pytest.raises(ValueError, match=r"label 300 of row 1 is outside \[0, 300\)"):
        head.check()


def test_it_agrees_with_the_cpu(gpu_backend):
    *tensors, _ = problem(40, 24, 3000)
    x, w, y, _ = tensors
    want = dense(x, w, y, topk=3)
    got = nontarget_lse(x.float().cuda(), w.float().cuda(), y.cuda(), topk=3, backend=gpu_backend)
    assert torch.equal(got[3].cpu(), want[3])
    assert error(got[0].cpu(), want[0]) < 2e-6
