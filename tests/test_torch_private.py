"""The private names of torch that the package uses: that this torch has them, and that it still does with them what is
relied on."""

import inspect
import re

import pytest
import torch
from emulation import ROOT
from torch import nn
from torch.nn.parallel import DistributedDataParallel, replicate

import fastmargin as fm
from fastmargin import torch_private

NAMES = (
    (torch._C, "_current_graph_task_id"),
    (DistributedDataParallel, "_active_ddp_module"),
    (torch.Tensor, "_version"),
    (torch.autograd, "_unsafe_preserve_version_counter"),
    (torch.amp.GradScaler, "_unscale_grads_"),
    (nn.Module, "_replicate_for_data_parallel"),
    (nn.Module(), "_parameters"),
)
PRIVATE = re.compile(r"\btorch\.(?:\w+\.)*_[A-Za-z]\w*|\._version\b|_active_ddp_module|def _unscale_grads_")


@pytest.mark.parametrize(("owner", "name"), NAMES, ids=[name for _, name in NAMES])
def test_this_torch_has_it(owner, name):
    assert hasattr(owner, name)


def test_private_names_stand_in_one_file():
    files = [path for folder in ("fastmargin", "kernels") for path in (ROOT / folder).rglob("*.py")]
    code = {path.name: re.sub(r'""".*?"""', "", path.read_text(), flags=re.DOTALL) for path in files}
    assert [name for name, text in code.items() if PRIVATE.search(text)] == ["torch_private.py"]
    listed = torch_private.__doc__ + (ROOT / "fastmargin" / "torch_private.py").read_text()
    assert [name for _, name in NAMES if name not in listed] == []


def test_versions_count_writes_but_those_that_are_preserved():
    w = torch.zeros(3)
    before = torch_private.version_of(w)
    w.add_(1)
    assert torch_private.version_of(w) == before + 1
    with torch_private.preserved_version(w):
        w.add_(1)
    assert torch_private.version_of(w) == before + 1 and w.tolist() == [2, 2, 2]


def test_a_backward_pass_is_seen():
    seen = []
    x = torch.ones(1, requires_grad=True)
    x.register_hook(lambda _: seen.append(torch_private.within_backward_pass()))
    (2 * x).backward()
    assert seen == [True] and not torch_private.within_backward_pass()


class Marked(torch.optim.SGD):
    """Notes what GradScaler.step has set, instead of a step."""

    def step(self, closure=None):
        self.seen = {name: float(getattr(self, name)) for name in ("grad_scale", "found_inf") if hasattr(self, name)}


@pytest.mark.parametrize("supports", [True, False])
def test_grad_scaler_reads_whether_an_optimizer_takes_its_marks(supports):
    parameter = nn.Parameter(torch.ones(2))
    optimizer, scaler = Marked([parameter], 0.1), torch.amp.GradScaler("cpu", init_scale=8.0)
    optimizer._step_supports_amp_scaling = supports
    scaler.scale(parameter.sum()).backward()
    scaler.step(optimizer)
    assert optimizer.seen == ({"grad_scale": 8.0, "found_inf": 0.0} if supports else {})
    assert fm.optim.ClassSGD._step_supports_amp_scaling


def test_marks_are_seen_before_anything_reads_them():
    class Raised(torch_private.GradScaler):
        def on_found_inf(self, found_inf):
            for mark in found_inf.values():
                mark.fill_(1.0)

    parameter = nn.Parameter(torch.ones(2))
    optimizer, scaler = torch.optim.SGD([parameter], 0.1), Raised("cpu")
    scaler.scale(parameter.sum()).backward()
    scaler.step(optimizer)
    assert parameter.tolist() == [1, 1], "a step that is skipped"


def test_data_parallel_asks_each_module_for_its_replica():
    assert "._replicate_for_data_parallel()" in inspect.getsource(replicate)
