"""Sums over pairs of points: who computes them, on which inputs. The interface of of_nontarget_lse.py.

    Git term           sum_ij v_j / (1 + ||a_i - b_j||^2)         samples a and centers b with other ids
    minimum margin     sum_{i < j} max(M - ||c_i - c_j||^2, 0)    over all classes

The floors are the matrix products alone. "In cache" is `blocks.cpp`, which makes the product a b^T twice: 4 products
for both gradients. By torch.mm, which stores a b^T and makes it once, they are 3; with detached centers 2.
"""

from collections.abc import Callable, Iterable
from functools import partial

import torch
from contestants import floors
from torch import Tensor

from fastmargin import pairwise_potential
from fastmargin.ops.backends import BUILD

BOTH, DETACHED, ALL = "both gradients", "centers detached", "all classes"
MARGIN = 200.0  # on the squared distance, MML's

Inputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]  # a [N, d], b [M, d], a_ids [N], b_ids [M], v [M]
Pass = Callable[[], object]


def inputs(N: int, M: int, d: int, dtype: torch.dtype = torch.float32) -> Inputs:
    """Samples around their centers; one center per id."""
    generator = torch.Generator().manual_seed(0)
    b = torch.randn(M, d, generator=generator, dtype=dtype)
    a_ids = torch.randint(0, M, (N,), generator=generator)
    a = b[a_ids] + 0.3 * torch.randn(N, d, generator=generator, dtype=dtype)
    v = torch.randint(1, 9, (M,), generator=generator).to(dtype)
    return a.requires_grad_(), b.requires_grad_(), a_ids, torch.arange(M), v


def clear(a: Tensor, b: Tensor, *_: Tensor) -> None:  # [N, d], [M, d]
    a.grad = b.grad = None


def expanded(a: Tensor, b: Tensor) -> Tensor:  # [N, d], [M, d] -> [N, M]
    return a.square().sum(1)[:, None] + b.square().sum(1) - 2 * a @ b.T


def cdist(a: Tensor, b: Tensor) -> Tensor:  # [N, d], [M, d] -> [N, M]
    return torch.cdist(a, b).square()


def git(squares: Callable[..., Tensor], a: Tensor, b: Tensor, a_ids: Tensor, b_ids: Tensor, v: Tensor) -> Tensor:
    other = a_ids[:, None] != b_ids
    return torch.where(other, v / (1 + squares(a, b)), 0.0).sum()


def minimum_margin(squares: Callable[..., Tensor], c: Tensor) -> Tensor:  # [C, d] -> []
    return (MARGIN - squares(c, c)).clamp(min=0).fill_diagonal_(0).sum() / 2


def ours(backend: str, measure: str, a: Tensor, b: Tensor, a_ids: Tensor, b_ids: Tensor, v: Tensor) -> Tensor:
    if measure == ALL:
        return pairwise_potential(b, b, b_ids, b_ids, kind="hinge", margin=MARGIN, backend=backend).sum() / 2
    return pairwise_potential(a, b, a_ids, b_ids, b_weight=v, kind="inverse", backend=backend).sum()


def eager(squares: Callable[..., Tensor], measure: str, *given: Tensor) -> Tensor:
    return minimum_margin(squares, given[1]) if measure == ALL else git(squares, *given)


LOSSES: dict[str, Callable[..., Tensor]] = {
    "eager, expanded squares": partial(eager, expanded),
    "eager, torch.cdist": partial(eager, cdist),
    "torch.compile of expanded squares": torch.compile(partial(eager, expanded)),
    "fastmargin native": partial(ours, "native"),
    "fastmargin stream": partial(ours, "stream"),
}
EAGER = list(LOSSES)[:2]
FLOORS = {
    BOTH: {"3 products, torch.mm": floors.mm_3, "4 products, in cache": floors.in_cache(4)},
    DETACHED: {"2 products, torch.mm": lambda a, b: lambda: torch.mm(torch.mm(a, b.T), b)},
    ALL: {},
}


def here(names: Iterable[str]) -> list[str]:
    return [
        name for name in names if ("native" not in name or BUILD.facts) and ("cache" not in name or floors.COMPILER)
    ]


def step(loss: Callable[..., Tensor], measure: str, given: Inputs) -> Tensor:  # []
    a, b, *rest = given
    value = loss(measure, a, b.detach() if measure == DETACHED else b, *rest)
    value.backward()
    return value.detach()


def passes(measure: str, given: Inputs, names: Iterable[str]) -> dict[str, Pass]:
    """The passes of these contestants, prepared on these inputs."""
    torch._dynamo.reset()
    a, b = given[0].detach(), given[1].detach()
    return {
        name: partial(step, LOSSES[name], measure, given) if name in LOSSES else FLOORS[measure][name](a, b)
        for name in names
    }
