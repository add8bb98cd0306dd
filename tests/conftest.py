import pytest
import torch

from fastmargin.ops.nontarget_lse import IMPLS


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
