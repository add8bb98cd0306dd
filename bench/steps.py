"""A whole step of a head: forward, backward, SGD with momentum and decay. The interface of contestants.py.

Everyone owns a copy of the weights [C, d] and the momentum of the same size. PartialFC's rows of a step are drawn by
its rule, all positives and random others; the step is torch's SGD on a Parameter of those rows, copied out and back, as
its second version does. At rate 1 it is torch's SGD on all.
"""

import math
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import arcface
import torch
from arcface import M, S
from torch import Tensor, nn

from fastmargin import ArcFace, MarginHead, optim
from fastmargin.backends import BUILD

LR, MOMENTUM, DECAY = 0.1, 0.9, 5e-4
WHOLE, TENTH = "all classes", "a tenth of the classes"
RATE = {WHOLE: 1.0, TENTH: 0.1}

Inputs = tuple[Tensor, Tensor, Tensor]  # features [B, d], weight [C, d], labels [B]
Pass = Callable[[], object]
Made = tuple[Pass, Callable[[], Tensor]]  # a step, and the weights [C, d] as they are
Start = Callable[[Tensor, Tensor, Tensor, float], Made]


def inputs(B: int, d: int, C: int) -> Inputs:
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(C, d, generator=generator).mul_(0.01)
    y = torch.randint(0, C, (B,), generator=generator)
    return torch.randn(B, d, generator=generator).add_(20 * w[y]).requires_grad_(), w, y


def clear(f: Tensor, *_: Tensor) -> None:  # [B, d]
    f.grad = None


def torch_sgd(parameters: Iterable[nn.Parameter]) -> torch.optim.SGD:
    return torch.optim.SGD(parameters, LR, MOMENTUM, weight_decay=DECAY)


def ours(f: Tensor, w: Tensor, y: Tensor, rate: float, in_backward: bool, **options: Any) -> Made:
    head = MarginHead(1, len(w), ArcFace(S, M), sample_rate=rate, **options)
    head.weight = nn.Parameter(w.clone())
    optimizer = optim.ClassSGD(head, LR, MOMENTUM, DECAY, in_backward=in_backward)

    def step() -> None:
        optimizer.zero_grad()
        head(f, y).loss.backward()
        optimizer.step()

    return step, lambda: head.weight


def whole(loss: Callable[[Tensor, Tensor, Tensor], Tensor], f: Tensor, w: Tensor, y: Tensor, rate: float) -> Made:
    weight = nn.Parameter(w.clone())
    optimizer = torch_sgd([weight])

    def step() -> None:
        optimizer.zero_grad()
        loss(f, weight, y).backward()
        optimizer.step()

    return step, lambda: weight


def partial_fc(f: Tensor, w: Tensor, y: Tensor, rate: float) -> Made:
    """InsightFace's PartialFC, its operations in their order."""
    if rate == 1:
        return whole(arcface.insightface_loss, f, w, y, rate)
    weight, momentum = w.clone(), torch.zeros_like(w)

    def step() -> None:
        draw = torch.rand(len(weight))
        draw[y] = 2.0
        rows = draw.topk(math.ceil(rate * len(weight))).indices.sort().values
        active = nn.Parameter(weight[rows])
        optimizer = torch_sgd([active])
        optimizer.state[active]["momentum_buffer"] = momentum[rows]
        arcface.insightface_loss(f, active, torch.searchsorted(rows, y)).backward()
        optimizer.step()
        weight[rows] = active.detach()
        momentum[rows] = optimizer.state[active]["momentum_buffer"]

    return step, lambda: weight


def metric_learning(f: Tensor, w: Tensor, y: Tensor, rate: float) -> Made:
    from pytorch_metric_learning.losses import ArcFaceLoss

    loss = ArcFaceLoss(*w.shape, margin=math.degrees(M), scale=S, weight_init_func=lambda given: given)
    loss.W = nn.Parameter(w.T.contiguous())
    optimizer = torch_sgd([loss.W])

    def step() -> None:
        optimizer.zero_grad()
        loss(f, y).backward()
        optimizer.step()

    return step, lambda: loss.W.T


EAGER = "InsightFace's PartialFC, torch's SGD"
STEPS: dict[str, Start] = {
    EAGER: partial_fc,
    "eager, torch's SGD": partial(whole, arcface.eager_loss),
    "pytorch-metric-learning, torch's SGD": metric_learning,
    "fastmargin, ClassSGD": partial(ours, in_backward=False),
    "fastmargin, ClassSGD in backward": partial(ours, in_backward=True),
    "fastmargin, bfloat16, ClassSGD in backward": partial(ours, in_backward=True, compute_dtype=torch.bfloat16),
}


def here(measure: str) -> list[str]:
    """Who can take part: of sampled classes, those who sample."""
    fit = [n for n in STEPS if measure == WHOLE or n == EAGER or "fastmargin" in n]
    return [n for n in fit if "bfloat16" not in n or "bfloat16" in BUILD.facts.get("compute", "")]


def passes(measure: str, given: Inputs, names: Iterable[str]) -> dict[str, Pass]:
    """The steps of these contestants, each with weights and momentum of its own."""
    return {name: STEPS[name](*given, RATE[measure])[0] for name in names}
