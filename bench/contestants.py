"""One ArcFace training step of the head (loss, gradients of features and weights), done by each contestant.

A contestant is a function of (features [B, d], weight [C, d], labels [B]) that leaves gradients in .grad of both.
"""

import functools
import math
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastmargin import ArcFace, MarginHead

S, M = 64.0, 0.5
Step = Callable[[Tensor, Tensor, Tensor], Tensor]


def eager_loss(f: Tensor, w: Tensor, y: Tensor, detached: bool = False) -> Tensor:
    """What a user writes without a library: normalise both, all cosines, margin on the target, cross entropy.

    detached: psi with slope 1, as InsightFace trains.
    """
    cos = F.linear(F.normalize(f), F.normalize(w))
    target = cos.gather(1, y[:, None])
    sine = ((1 - target) * (1 + target)).clamp(min=1e-6).sqrt()
    psi = target * math.cos(M) - sine * math.sin(M)
    psi = target + (psi - target).detach() if detached else psi
    return F.cross_entropy(S * cos.scatter(1, y[:, None], psi), y)


def eager(f: Tensor, w: Tensor, y: Tensor) -> Tensor:
    loss = eager_loss(f, w, y)
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


class PartialFCStep(torch.autograd.Function):
    """The loss of InsightFace's PartialFC on one process: softmax in place, log of the target, one-hot backward.

    Written from the description of its operations, in their order.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, y: Tensor) -> Tensor:  # [B, C], [B] -> []
        logits = logits - logits.amax(1, keepdim=True)
        logits.exp_()
        logits.div_(logits.sum(1, keepdim=True))
        ctx.save_for_backward(logits, y)
        return logits.gather(1, y[:, None]).clamp_min(1e-30).log().mean().neg()

    @staticmethod
    def backward(ctx: Any, d_loss: Tensor) -> tuple[Tensor, None]:
        logits, y = ctx.saved_tensors
        one_hot = torch.zeros_like(logits).scatter_(1, y[:, None], 1)
        return logits.sub_(one_hot).div_(len(y)).mul_(d_loss.item()), None


def insightface(f: Tensor, w: Tensor, y: Tensor) -> Tensor:
    """arcface_torch's head at rate 1: clamp, angles of the whole matrix under no_grad, so slope 1."""
    logits = F.linear(F.normalize(f), F.normalize(w)).clamp(-1, 1)
    with torch.no_grad():
        logits.arccos_()
        logits[torch.arange(len(y)), y] += M
        logits.cos_()
    loss = PartialFCStep.apply(logits * S, y)
    loss.backward()
    return loss.detach()


@functools.cache
def compiled() -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    return torch.compile(eager_loss)


def eager_compiled(f: Tensor, w: Tensor, y: Tensor) -> Tensor:
    loss = compiled()(f, w, y)
    loss.backward()
    return loss.detach()


@functools.lru_cache(maxsize=1)
def metric_learning_loss(w: Tensor) -> Any:
    """pytorch-metric-learning's ArcFaceLoss on these weights: a Parameter W [d, C] of its own, degrees."""
    loss = import_module("pytorch_metric_learning.losses").ArcFaceLoss(
        *w.shape, margin=math.degrees(M), scale=S, weight_init_func=lambda given: given
    )
    loss.W = torch.nn.Parameter(w.detach().T.contiguous())
    return loss


def metric_learning(f: Tensor, w: Tensor, y: Tensor) -> Tensor:
    model = metric_learning_loss(w)
    model.W.grad = None
    loss = model(f, y)
    loss.backward()
    w.grad = model.W.grad.T
    return loss.detach()


CONTESTANTS: dict[str, Step] = {
    "eager": eager,
    "torch.compile of eager": eager_compiled,
    "InsightFace's op sequence": insightface,
    **({"pytorch-metric-learning": metric_learning} if find_spec("pytorch_metric_learning") else {}),
    "4 products (torch.mm)": four_products,
    "fastmargin native": head(0, "native"),
    "fastmargin native, k = 10": head(10, "native"),
    "fastmargin stream": head(0, "stream"),
}


def inputs(
    B: int, d: int, C: int, dtype: torch.dtype = torch.float32, exact: bool = False
) -> tuple[Tensor, Tensor, Tensor]:  # [B, d], [C, d], [B]
    """Random features and weights; a quarter of the rows lies near to its class, half of those on it with `exact`."""
    generator = torch.Generator().manual_seed(0)
    f = torch.randn(B, d, generator=generator, dtype=dtype)
    w = 0.01 * torch.randn(C, d, generator=generator, dtype=dtype)
    y = torch.randint(0, C, (B,), generator=generator)
    own = F.normalize(w[y]) * f.norm(dim=1, keepdim=True)
    f[: B // 4] += 2 * own[: B // 4]
    if exact:
        f[: B // 8] = own[: B // 8]
    return f.requires_grad_(), torch.nn.Parameter(w), y


def clear(f: Tensor, w: Tensor, y: Tensor) -> None:
    f.grad = w.grad = None


def step_of(name: str, f: Tensor, w: Tensor, y: Tensor) -> Tensor:
    clear(f, w, y)
    return CONTESTANTS[name](f, w, y)
