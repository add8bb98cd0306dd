"""One ArcFace training step of the head (loss, gradients of features and weights), done by each contestant.

A contestant is a function of (features [B, d], weight [C, d], labels [B]) that leaves gradients in .grad of both.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from fastmargin import ArcFace, MarginHead

S, M = 64.0, 0.5
Step = Callable[[Tensor, Tensor, Tensor], Tensor]


def eager(f: Tensor, w: Tensor, y: Tensor) -> Tensor:
    """What a user writes without a library: normalise both, all cosines, margin on the target, cross entropy."""
    cos = F.linear(F.normalize(f), F.normalize(w))
    target = cos.gather(1, y[:, None])
    sine = ((1 - target) * (1 + target)).clamp(min=1e-6).sqrt()
    psi = target * torch.cos(torch.tensor(M)) - sine * torch.sin(torch.tensor(M))
    loss = F.cross_entropy(S * cos.scatter(1, y[:, None], psi), y)
    loss.backward()
    return loss.detach()


def four_products(f: Tensor, w: Tensor, y: Tensor) -> Tensor:
    """The floor of plain PyTorch: the four matrix products of a step that recomputes z, and nothing else."""
    with torch.no_grad():
        z = f @ w.T
        f.grad = z @ w
        z = f @ w.T
        w.grad = z.T @ f
    return torch.tensor(0.0)


def head(topk: int, backend: str) -> Step:
    model = MarginHead(1, 1, ArcFace(S, M), topk=topk, backend=backend)

    def step(f: Tensor, w: Tensor, y: Tensor) -> Tensor:
        model.weight = w  # type: ignore[assignment]
        loss = model(f, y).loss
        loss.backward()
        return loss.detach()

    return step


CONTESTANTS: dict[str, Step] = {
    "eager": eager,
    "4 products (torch.mm)": four_products,
    "fastmargin native": head(0, "native"),
    "fastmargin native, k = 10": head(10, "native"),
    "fastmargin stream": head(0, "stream"),
}


def inputs(B: int, d: int, C: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """Random features and weights; a quarter of the rows lies near to its class (cosine .9 and 1)."""
    generator = torch.Generator().manual_seed(0)
    f = torch.randn(B, d, generator=generator, dtype=dtype)
    w = 0.01 * torch.randn(C, d, generator=generator, dtype=dtype)
    y = torch.randint(0, C, (B,), generator=generator)
    own = F.normalize(w[y]) * f.norm(dim=1, keepdim=True)
    f[: B // 8] = own[: B // 8]
    f[B // 8 : B // 4] = 2 * own[B // 8 : B // 4] + f[B // 8 : B // 4]
    return f.requires_grad_(), torch.nn.Parameter(w), y


def step_of(name: str, f: Tensor, w: Tensor, y: Tensor) -> Tensor:
    f.grad = w.grad = None
    return CONTESTANTS[name](f, w, y)
