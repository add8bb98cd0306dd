"""All of the head on FakeTensors of device cuda: shapes, dtypes, one device, no host sync, without a GPU."""

import subprocess
from importlib import import_module

import pytest
import torch
from emulation import ROOT, compiler, torch_flags, wants_compiler
from fake_cuda import CUDA, backward, in_order, install, moved
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException

import fastmargin as fm
from fastmargin.ops.exponentials import pitch_of
from fastmargin.ops.nontarget_lse import IMPLS

pytestmark = wants_compiler
BACKENDS = [name for name in ("native", "triton", "stream", "reference") if name in IMPLS]
MARGINS = [fm.Softmax, fm.NormFace, fm.L2Softmax, fm.SphereFace, fm.CosFace, fm.AMSoftmax, fm.ArcFace,
           fm.CombinedMargin, fm.AdaFace, fm.MagFace, fm.ElasticFace]  # fmt: skip
BF16, F16 = torch.bfloat16, torch.float16
B, d, C = 5, 16, 1009


@pytest.fixture(scope="session")
def guard(tmp_path_factory):
    library = tmp_path_factory.mktemp("guard") / "libguard.so"
    source = ROOT / "tests" / "cuda_on_cpu" / "device_guard.cpp"
    link = [f"-L{path}" for path in torch.utils.cpp_extension.library_paths()]
    command = [compiler, *torch_flags(), "-shared", "-fPIC", str(source), *link, "-lc10", "-o", str(library)]
    subprocess.run(command, check=True)
    return library


@pytest.fixture
def gpu(monkeypatch, guard):
    with install(monkeypatch, guard):
        yield


@pytest.fixture(params=BACKENDS)
def name(request):
    if request.param == "triton":
        pytest.importorskip("triton", reason="triton is not installed")
    return request.param


def batch(b=B):
    return torch.randn(b, d, device=CUDA, requires_grad=True), torch.randint(0, C, (b,), device=CUDA)


def step(head, **given):
    x, y = batch()
    out = head(x, y, **given)
    backward(out.loss)
    return x, out


@pytest.mark.parametrize("margin", MARGINS)
def test_every_margin(gpu, name, margin):
    head = moved(fm.MarginHead(d, C, margin(), bias=margin in (fm.Softmax, fm.L2Softmax), topk=3, backend=name))
    x, out = step(head)
    assert {t.device for t in out} == {x.grad.device} == {head.weight.grad.device} == {CUDA}
    assert x.grad.shape == x.shape and head.weight.grad.shape == head.weight.shape
    assert out.hard_classes.shape == out.hard_scores.shape == (B, 3) and out.hard_classes.dtype == torch.int64


@pytest.mark.parametrize("dtype", [BF16, F16])
def test_rounded_operands(gpu, name, dtype):
    x, out = step(moved(fm.MarginHead(d, C, fm.ArcFace(), topk=1, compute_dtype=dtype, backend=name)))
    assert out.loss.dtype == x.grad.dtype == torch.float32


@pytest.mark.parametrize("kind", [None, fm.optim.ClassSGD])
@pytest.mark.parametrize("dtype", [None, BF16])
def test_kept_exponentials(gpu, name, dtype, kind):
    head = moved(fm.MarginHead(d, C, fm.ArcFace(), compute_dtype=dtype, backend=name, keep_bytes=2**20))
    if kind is not None:
        kind(head, 0.1, in_backward=True)
    x, y = batch()
    out = head(x, y)
    saved = [t for t in of_the_op(out.loss.grad_fn).saved_tensors if t is not None and t.dim() == 2]
    kept = [t for t in saved if t.shape == (B, pitch_of(C))]
    assert [t.dtype for t in kept] == ([dtype or torch.float32] if IMPLS[name].keeps_exponentials(x) else [])
    backward(out.loss)
    assert x.grad.shape == x.shape


def of_the_op(node):
    """The node of nontarget_lse in the graph."""
    return next(node for node in in_order(node) if node.name() == "NontargetLSEBackward")


@pytest.mark.parametrize("dtype", [BF16, F16])
def test_features_of_autocast(gpu, name, dtype):
    head, (x, y) = moved(fm.MarginHead(d, C, fm.ArcFace(), backend=name)), batch()
    half = x.detach().to(dtype).requires_grad_()
    with torch.autocast("cuda", dtype):
        out = head(half, y)
    backward(out.loss)
    assert half.grad.dtype == dtype and out.loss.dtype == torch.float32


@pytest.mark.parametrize("kind", [fm.optim.ClassSGD, fm.optim.ClassAdamW])
@pytest.mark.parametrize("in_backward", [False, True])
@pytest.mark.parametrize("sample_rate", [1.0, 0.1])
def test_every_optimizer(gpu, name, kind, in_backward, sample_rate):
    """With sampled classes, stream and reference wait for the device: they drop the places without a class."""
    head = moved(fm.MarginHead(d, C, fm.ArcFace(), sample_rate=sample_rate, backend=name))
    optimizer = kind(head, 0.1, in_backward=in_backward)
    if sample_rate < 1 and name in ("stream", "reference"):
        with pytest.raises(DynamicOutputShapeException):
            step(head)
        return
    for _ in range(3):
        optimizer.zero_grad()
        step(head)
        optimizer.step()
    assert {t.device for t in optimizer.state[head.weight].values() if isinstance(t, torch.Tensor)} <= {CUDA}


@pytest.mark.parametrize("margin", [fm.ArcFace, fm.L2Softmax])
def test_sampled_classes_and_the_gradients_of_several_passes(gpu, name, margin):
    if name in ("stream", "reference"):
        pytest.skip("these wait for the device where classes are sampled")
    head = moved(fm.MarginHead(d, C, margin(), bias=margin is fm.L2Softmax, sample_rate=0.1, topk=3, backend=name))
    optimizer = fm.optim.ClassSGD(head, 0.1, momentum=0.9)
    hard = torch.randint(-1, C, (B, 2), device=CUDA)
    for _ in range(2):
        for _ in range(2):
            _, out = step(head, hard_classes=hard)
        assert out.hard_classes.shape == (B, 3) and len(head.sampled) == 101 + 3 * B  # of 1009, and the required
        head.grad_norm()
        optimizer.step()
        optimizer.zero_grad()


def test_a_head_answers(gpu, name):
    head, (x, _) = moved(fm.MarginHead(d, C, fm.ArcFace(), backend=name)), batch()
    assert {t.device for t in head.nearest(x, 3)} == {head.get_logits(x).device} == {CUDA}
    head.load_full_weight(torch.empty(C, d, device=CUDA))
    with pytest.raises(DataDependentOutputException):  # the one call that waits for the device, and says so
        head.check()


def test_losses_of_centers(gpu, name, monkeypatch):
    monkeypatch.setenv("FASTMARGIN_BACKEND", name)
    (x, y), centers = batch(), torch.randn(C, d, device=CUDA, requires_grad=True)
    backward(fm.center_loss(x, y, centers))
    assert centers.grad.device == x.grad.device == CUDA
    if name not in ("stream", "reference"):  # these look, in every tile, whether pairs are near: a host sync
        centers.grad = None
        backward(fm.minimum_margin_loss(centers, margin=1.0, scope="all"))


def test_a_weight_that_moved_alone(gpu):
    """As in `head.weight = w`: its buffers are where they were."""
    head = fm.MarginHead(d, C, fm.ArcFace())
    head.weight = torch.nn.Parameter(torch.empty(C, d, device=CUDA))
    with pytest.raises(ValueError, match=r"the weight is on cuda:0, bad_label on cpu: move the whole head"):
        head(*batch())


def test_devices_are_not_mixed(gpu, name):
    head, (x, _) = moved(fm.MarginHead(d, C, fm.ArcFace(), backend=name)), batch()
    with pytest.raises(ValueError, match=r"labels are on cpu"):
        head(x, torch.zeros(B, dtype=torch.int64))


def test_contestants_of_ours(gpu, monkeypatch):
    """Those of bench/gpu.py run: a pass and its gradients."""
    monkeypatch.setattr(torch.nn.Module, "to", lambda module, _: moved(module))  # torch's own swaps no FakeTensors
    bench = import_module("gpu")
    (f, y), w = batch(), torch.nn.Parameter(torch.randn(C, d, device=CUDA))
    given = f, w, y
    ours = [(who, prepare) for who, prepare in bench.contestants(CUDA) if "fastmargin" in who]
    assert len(ours) >= 10
    for _, prepare in ours:
        given[0].grad = given[1].grad = None
        run = prepare(*given)
        for _ in range(2):
            backward(run())
        assert given[0].grad.device == CUDA


def test_pairs_of_ours(gpu):
    bench = import_module("gpu")
    plain = bench.pairs.inputs(6, 7, 8)
    given = [torch.empty(t.shape, dtype=t.dtype, device=CUDA, requires_grad=t.requires_grad) for t in plain]
    kernels = [(who, p) for who, p in bench.pair_contestants(CUDA) if who in ("fastmargin native", "fastmargin triton")]
    assert kernels
    for _, prepare in kernels:
        backward(prepare(*given)())
