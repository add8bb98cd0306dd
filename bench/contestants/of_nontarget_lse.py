"""`nontarget_lse` under a head: who takes part in which measure, on which inputs, and who is left out here."""

from collections.abc import Callable, Iterable
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from contestants import floors
from contestants.arcface import ARCFACE, Loss
from contestants.normface import NORMFACE
from harness.measure import FORWARD, FORWARD_BACKWARD
from torch import Tensor

from fastmargin.ops.backends import BUILD

LOSSES = ARCFACE | NORMFACE
FLOORS = {FORWARD: floors.FORWARD, FORWARD_BACKWARD: floors.FORWARD_BACKWARD}
EVERYONE = LOSSES | FLOORS[FORWARD] | FLOORS[FORWARD_BACKWARD]

Inputs = tuple[Tensor, Tensor, Tensor]  # features [B, d], weight [C, d], labels [B]
Pass = Callable[[], object]


def eager_of(name: str) -> str:
    """Whom a contestant is compared with: eager PyTorch with the same loss; a floor, eager PyTorch with the margin."""
    return "NormFace: eager" if name in NORMFACE else "eager"


def lacking(name: str) -> str:
    """Why a contestant cannot take part here; empty where it can."""
    if "native" in name and BUILD.problem:
        return "not built"
    if "bfloat16" in name and "bfloat16" not in BUILD.facts.get("compute", ""):
        return "no bfloat16 kernels on this machine"
    if "F.linear_cross_entropy" in name and not hasattr(F, "linear_cross_entropy"):
        return f"not in torch {torch.__version__}"
    if "in cache" in name and not floors.COMPILER:
        return "no C++ compiler"
    if "oneDNN" in name and not torch.backends.mkldnn.is_available():
        return "not in this build of torch"
    packages = [p for p in ("pytorch-metric-learning", "cut-cross-entropy") if p in name]
    return "" if all(find_spec(p.replace("-", "_")) for p in packages) else "not installed"


def here(names: Iterable[str]) -> list[str]:
    return [name for name in names if not lacking(name)]


def inputs(B: int, d: int, C: int, dtype: torch.dtype = torch.float32, exact: bool = False) -> Inputs:
    """Random features and weights. A quarter of the rows is near its class weight; `exact`: half of those equal it."""
    generator = torch.Generator().manual_seed(0)
    f = torch.randn(B, d, generator=generator, dtype=dtype)
    w = torch.randn(C, d, generator=generator, dtype=dtype).mul_(0.01)
    y = torch.randint(0, C, (B,), generator=generator)
    own = F.normalize(w[y]) * f.norm(dim=1, keepdim=True)
    f[: B // 4] += 2 * own[: B // 4]
    if exact:
        f[: B // 8] = own[: B // 8]
    return f.requires_grad_(), torch.nn.Parameter(w), y


def clear(f: Tensor, w: Tensor, y: Tensor) -> None:  # [B, d], [C, d], [B]
    f.grad = w.grad = None


def forward(loss: Loss) -> Tensor:  # []
    with torch.no_grad():
        return loss()


def forward_backward(loss: Loss) -> Tensor:  # []
    value = loss()
    value.backward()
    return value.detach()


def passes(measure: str, given: Inputs, names: Iterable[str]) -> dict[str, Pass]:
    """The passes of these contestants, prepared on these inputs."""
    torch._dynamo.reset()  # code compiled for other inputs counts against dynamo's limit, and past that it runs eager
    run = forward if measure == FORWARD else forward_backward
    ready = {name: EVERYONE[name](*given) for name in names}
    return {name: (lambda loss=loss: run(loss)) if name in LOSSES else loss for name, loss in ready.items()}
