"""The places where the GPU kernels run."""

import pytest
import torch
from emulation import wants_compiler
from places import INTERPRETED

from fastmargin.ops import nontarget_lse as op
from fastmargin.ops import target_logit
from fastmargin.ops.backends import native_can_run

BF16, F16 = torch.bfloat16, torch.float16
on_gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: nothing is run on a GPU"),
]
PLACES = [
    pytest.param(("cpu", "emulated"), marks=wants_compiler, id="emulated"),
    pytest.param(("cuda", "native"), marks=on_gpu, id="native"),
    pytest.param(("cuda", "triton"), marks=on_gpu, id="triton"),
]
if INTERPRETED:
    PLACES = [pytest.param(("cpu", "triton"), id="interpreted")]


@pytest.fixture(params=PLACES)
def place(request, monkeypatch):
    """(device, backend); problems of a few hundred classes have several chunks, of several strips and blocks."""
    _, backend = request.param
    if backend == "emulated":
        request.getfixturevalue("emulated")
    if backend == "native" and not native_can_run(torch.empty(0, device="cuda")):
        pytest.skip("built without CUDA: the CUDA kernels are NOT run")
    if backend == "triton":
        pytest.importorskip("triton", reason="triton is not installed: its kernels are NOT tested")
        from fastmargin.kernels import operands, tile_table

        monkeypatch.setattr(operands, "WORKSPACE", 2**14)
        monkeypatch.setattr(tile_table, "LAUNCH", 0.0)
        monkeypatch.setattr(tile_table, "multiprocessors", lambda device: 1)
    return request.param


@pytest.fixture(params=[None, BF16, F16], ids=str)
def compute_dtype(request, place):
    return computed(request.param)


@pytest.fixture(params=[BF16, F16], ids=str)
def rounded(request, place):
    return computed(request.param)


def computed(dtype):
    if INTERPRETED and dtype == BF16:
        pytest.skip("Triton's interpreter multiplies bfloat16 wrongly")
    return dtype


@pytest.fixture
def any_ids(monkeypatch):
    """As on a GPU, where class_ids are not checked."""
    for module in (op, target_logit):
        monkeypatch.setattr(module, "check_ids", lambda *given: None)
