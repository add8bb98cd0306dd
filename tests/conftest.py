import pytest
import torch

from fastmargin.ops.nontarget_lse import IMPLS


def pytest_ignore_collect(collection_path, config):
    """`pytest -m gpu` imports only the files it runs: a machine with a GPU need not have the driver's packages."""
    if config.option.markexpr == "gpu" and collection_path.suffix == ".py":
        return "mark.gpu" not in collection_path.read_text() or None
    return None


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture
def poison():
    """Fresh memory holds NaN (the largest integer), in Python and in C++: an element that is not written shows."""
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
    """Small batches are not worth sharing, and waiting for a second core costs more than it gives."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


ROUNDINGS = [
    (backend, dtype)
    for backend in ("native", "stream", "reference")
    for dtype in (torch.bfloat16, torch.float16)
    if (backend, dtype) != ("native", torch.float16)  # has none anywhere
]


@pytest.fixture(params=ROUNDINGS, ids=lambda pair: f"{pair[0]}, {str(pair[1]).removeprefix('torch.')}")
def rounding(request):
    """A backend and an operand dtype that it has here, as options of nontarget_lse."""
    name, dtype = request.param
    if name not in IMPLS or dtype not in IMPLS[name].compute(torch.empty(0)):
        pytest.skip(f"no {dtype} operands in the {name} kernels of this machine")
    return {"backend": name, "compute_dtype": dtype}
