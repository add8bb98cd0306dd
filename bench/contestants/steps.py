"""A whole step of a head: forward, backward, SGD with momentum and decay. The interface of of_nontarget_lse.py.

Every contestant has its own copy of the weights [C, d] and momentum of the same size. PartialFC samples by its own
rule: all positives and random negatives. Its step is torch's SGD on a Parameter of those rows, copied out and back, as
in its second version; at rate 1 it is torch's SGD on all rows.

On several ranks each has its part of the batch and its part of the classes: `local_inputs`.
"""

import math
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from contestants import arcface
from contestants.arcface import M, S
from torch import Tensor, nn

from fastmargin import ArcFace, MarginHead, optim
from fastmargin.ops.backends import BUILD

LR, MOMENTUM, DECAY = 0.1, 0.9, 5e-4
WHOLE, TENTH = "all classes", "a tenth of the classes"
RATE = {WHOLE: 1.0, TENTH: 0.1}

Inputs = tuple[Tensor, Tensor, Tensor]  # features [B, d], weight [C, d], labels [B]
Pass = Callable[[], object]
Made = tuple[Pass, Callable[[], Tensor]]  # one function makes a step, the other returns the weights [C, d]
Start = Callable[[Tensor, Tensor, Tensor, float], Made]


def inputs(B: int, d: int, C: int) -> Inputs:
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(C, d, generator=generator).mul_(0.01)
    y = torch.randint(0, C, (B,), generator=generator)
    return torch.randn(B, d, generator=generator).add_(20 * w[y]).requires_grad_(), w, y


def local_inputs(given: Inputs) -> Inputs:
    """This rank's rows and classes; all of them without a process group. Labels stay global class ids."""
    if not dist.is_initialized():
        return given
    f, w, y = given
    rank, ranks = dist.get_rank(), dist.get_world_size()
    own = f.detach().chunk(ranks)[rank].clone().requires_grad_()
    return own, w.chunk(ranks)[rank].clone(), y.chunk(ranks)[rank].clone()


class GatherFeatures(torch.autograd.Function):
    """As PartialFC does: an all-gather of the features. Backward: the gradients of all ranks are summed, each row's on
    the rank that it came from, and multiplied by the number of ranks."""

    @staticmethod
    def forward(ctx: Any, f: Tensor) -> Tensor:  # [b, d] -> [B, d]
        parts = [torch.empty_like(f) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, f)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, d_all: Tensor) -> Tensor:  # [B, d] -> [b, d]
        parts = list(d_all.chunk(dist.get_world_size()))
        work = [dist.reduce(part, to, async_op=True) for to, part in enumerate(parts)]
        for each in work:
            each.wait()
        return parts[dist.get_rank()] * len(parts)


def gathered(f: Tensor, y: Tensor, C: int) -> tuple[Tensor, Tensor]:  # [b, d], [b] -> [B, d], [B]
    """Features and labels of all ranks. A label becomes the local index of its class; -1: another rank holds it."""
    if not dist.is_initialized():
        return f, y
    parts = [torch.empty_like(y) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, y)
    index = torch.cat(parts) - C * dist.get_rank()  # every rank holds C classes
    return GatherFeatures.apply(f), torch.where((index >= 0) & (index < C), index, -1)


def clear(f: Tensor, *_: Tensor) -> None:  # [B, d]
    f.grad = None


def torch_sgd(parameters: Iterable[nn.Parameter]) -> torch.optim.SGD:
    return torch.optim.SGD(parameters, LR, MOMENTUM, weight_decay=DECAY)


def ours(f: Tensor, w: Tensor, y: Tensor, rate: float, in_backward: bool, **options: Any) -> Made:
    group, C = (dist.group.WORLD, len(w) * dist.get_world_size()) if dist.is_initialized() else (None, len(w))
    head = MarginHead(1, C, ArcFace(s=S, m=M), sample_rate=rate, group=group, **options)
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

    def loss(f: Tensor, w: Tensor, y: Tensor) -> Tensor:  # [b, d], [C, d], [b]
        features, local_index = gathered(f, y, len(w))
        return arcface.insightface_loss(features, w, local_index)

    if rate == 1:
        return whole(loss, f, w, y, rate)
    weight, momentum = w.clone(), torch.zeros_like(w)

    def step() -> None:
        features, local_index = gathered(f, y, len(weight))
        draw = torch.rand(len(weight))
        draw[local_index[local_index >= 0]] = 2.0
        sampled = draw.topk(math.ceil(rate * len(weight))).indices.sort().values
        active = nn.Parameter(weight[sampled])
        optimizer = torch_sgd([active])
        optimizer.state[active]["momentum_buffer"] = momentum[sampled]
        subset_index = torch.where(local_index >= 0, torch.searchsorted(sampled, local_index), -1)
        arcface.insightface_loss(features, active, subset_index).backward()
        optimizer.step()
        weight[sampled] = active.detach()
        momentum[sampled] = optimizer.state[active]["momentum_buffer"]

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


def here(measure: str, ranks: int = 1) -> list[str]:
    """Who can take part: with a tenth of the classes, those that can sample; on several ranks, those that can shard."""
    fit = [n for n in STEPS if (measure == WHOLE and ranks == 1) or n == EAGER or "fastmargin" in n]
    return [n for n in fit if "bfloat16" not in n or "bfloat16" in BUILD.facts.get("compute", "")]


def passes(measure: str, given: Inputs, names: Iterable[str]) -> dict[str, Pass]:
    """The steps of these contestants, each with weights and momentum of its own."""
    return {name: STEPS[name](*given, RATE[measure])[0] for name in names}
