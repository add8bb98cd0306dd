import pytest
import torch
from emulation import ROOT, built
from ranks import Ranks

from fastmargin.ops import class_update, nontarget_lse_native, pairwise_potential, target_logit
from fastmargin.ops.backends import HALVES, Impl
from fastmargin.ops.nontarget_lse import IMPLS


def pytest_ignore_collect(collection_path, config):
    """`pytest -m gpu` imports only files with such tests: the driver's packages need not be there."""
    if config.option.markexpr == "gpu" and collection_path.suffix == ".py":
        return "mark.gpu" not in collection_path.read_text() or None
    return None


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture
def poison(monkeypatch):
    """Fresh memory holds NaN, or the largest integer, in Python and in C++: an element that is not written is seen."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # else torch refuses products on a GPU
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=["native", "stream", "reference"])
def backend(request):
    if request.param not in IMPLS:
        pytest.skip("native kernels not built")
    return request.param


@pytest.fixture(params=[1, 2])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def one_thread():
    """With small batches a second thread costs more time than it saves."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


ROUNDINGS = [
    (backend, dtype)
    for backend in ("native", "stream", "reference")
    for dtype in (torch.bfloat16, torch.float16)
    if (backend, dtype) != ("native", torch.float16)  # the native kernels have no float16 operands
]


@pytest.fixture(params=ROUNDINGS, ids=lambda pair: f"{pair[0]}, {str(pair[1]).removeprefix('torch.')}")
def rounding(request):
    """A backend and an operand dtype that it has here, as options of nontarget_lse."""
    name, dtype = request.param
    if name not in IMPLS or dtype not in IMPLS[name].compute(torch.empty(0)):
        pytest.skip(f"no {dtype} operands in the {name} kernels of this machine")
    return {"backend": name, "compute_dtype": dtype}


@pytest.fixture(scope="session")
def emulated_ops(tmp_path_factory):
    torch.ops.load_library(built(ROOT, tmp_path_factory.mktemp("emulated")))
    return torch.ops.fastmargin_emulated


@pytest.fixture(scope="module")
def emulated(emulated_ops):
    """Adds a backend "emulated" to the ops: the CUDA path on CPU tensors."""
    ops = emulated_ops
    IMPLS["emulated"] = Impl(nontarget_lse_native.functions(ops), is_float32, lambda x: HALVES, is_float32, is_float32)
    others = {
        target_logit: {"fwd": ops.target_logit.default},
        pairwise_potential: {"fwd": ops.pairwise_potential_fwd.default},
        class_update: class_update.native_functions(ops),
    }
    for op, functions in others.items():
        op.IMPLS["emulated"] = Impl(functions, is_float32)
    yield "cpu", "emulated"
    for op in others:
        del op.IMPLS["emulated"]
    del IMPLS["emulated"]


def is_float32(x):
    return x.dtype == torch.float32


@pytest.fixture(scope="session")
def ranks():
    """`ranks(N, task, *args)`: what task returns on each of N Gloo ranks; what one raises is raised here."""
    pool = Ranks(4)

    def run(count, task, *args):
        results = pool.run(count, task, *args)
        errors = [result for result in results if isinstance(result, Exception)]
        if errors:
            raise ExceptionGroup("on the ranks", errors)
        return results

    yield run
    pool.close()
