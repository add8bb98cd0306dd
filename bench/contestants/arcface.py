"""The loss of an ArcFace head, s = 64, m = 0.5, by every contestant.

A contestant is a function of the inputs, which is not timed. It returns a function that computes the loss [], which is
timed. The backward pass of that loss leaves gradients in .grad of features and weight.
"""

import math
from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from fastmargin import ArcFace, MarginHead
from fastmargin.margins.base import Margin

S, M = 64.0, 0.5
Loss = Callable[[], Tensor]
Prepare = Callable[[Tensor, Tensor, Tensor], Loss]  # features [B, d], weight [C, d], labels [B]


def eager_loss(f: Tensor, w: Tensor, y: Tensor, detached: bool = False) -> Tensor:  # [B, d], [C, d], [B] -> []
    """What a user writes without a library: normalize both, all cosines, margin on the target, cross entropy.

    detached: psi with slope 1, as InsightFace trains.
    """
    cos = F.linear(F.normalize(f), F.normalize(w))
    target = cos.gather(1, y[:, None])
    sine = ((1 - target) * (1 + target)).clamp(min=1e-6).sqrt()
    psi = target * math.cos(M) - sine * math.sin(M)
    psi = target + (psi - target).detach() if detached else psi
    return F.cross_entropy(S * cos.scatter(1, y[:, None], psi), y)


def eager(f: Tensor, w: Tensor, y: Tensor) -> Loss:  # [B, d], [C, d], [B]
    return lambda: eager_loss(f, w, y)


def compiled(f: Tensor, w: Tensor, y: Tensor) -> Loss:  # [B, d], [C, d], [B]
    """fullgraph: a graph break raises, where torch.compile would fall back to eager."""
    loss = torch.compile(eager_loss, fullgraph=True)
    return lambda: loss(f, w, y)


def all_reduced(values: Tensor, operation: Any = dist.ReduceOp.SUM) -> Tensor:
    if dist.is_initialized():
        dist.all_reduce(values, operation)
    return values


class PartialFCLoss(torch.autograd.Function):
    """The loss of InsightFace's PartialFC: softmax in place, log of the target, one-hot backward.

    Written from the description of its operations, in their order. On several ranks each has the logits of all rows
    for its own classes; a label is -1 where another rank holds the class.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, y: Tensor) -> Tensor:  # [B, C], [B] -> []
        logits.sub_(all_reduced(logits.amax(1, keepdim=True), dist.ReduceOp.MAX))
        logits.exp_()
        logits.div_(all_reduced(logits.sum(1, keepdim=True)))
        here = torch.where(y != -1)[0]
        ctx.save_for_backward(logits, y, here)
        target = logits.new_zeros(len(y), 1)
        target[here] = logits[here].gather(1, y[here, None])
        return all_reduced(target).clamp_min(1e-30).log().mean().neg()

    @staticmethod
    def backward(ctx: Any, d_loss: Tensor) -> tuple[Tensor, None]:  # [] -> [B, C]
        logits, y, here = ctx.saved_tensors
        one_hot = logits.new_zeros(len(here), logits.shape[1]).scatter_(1, y[here, None], 1)
        logits[here] -= one_hot
        return logits.div_(len(y)) * d_loss.item(), None


def insightface_loss(f: Tensor, w: Tensor, y: Tensor) -> Tensor:  # [B, d], [C, d], [B] -> []
    """arcface_torch's head at rate 1: clamp, then angles of the whole matrix under no_grad, so that psi has slope 1."""
    logits = F.linear(F.normalize(f), F.normalize(w)).clamp(-1, 1)
    with torch.no_grad():
        logits.arccos_()
        here = torch.where(y != -1)[0]
        logits[here, y[here]] += M
        logits.cos_()
    return PartialFCLoss.apply(logits * S, y)


def under_autocast(prepare: Prepare) -> Prepare:
    """Autocast makes the products with bfloat16 operands and results: the logits are rounded."""

    def prepared(f: Tensor, w: Tensor, y: Tensor) -> Loss:  # [B, d], [C, d], [B]
        loss = prepare(f, w, y)

        def run() -> Tensor:
            with torch.autocast(f.device.type, dtype=torch.bfloat16):
                return loss()

        return run

    return prepared


def insightface(f: Tensor, w: Tensor, y: Tensor) -> Loss:  # [B, d], [C, d], [B]
    return lambda: insightface_loss(f, w, y)


def metric_learning(f: Tensor, w: Tensor, y: Tensor) -> Loss:  # [B, d], [C, d], [B]
    """pytorch-metric-learning's ArcFaceLoss, in degrees, on a Parameter W [d, C] of its own: a copy of the weights."""
    loss = import_module("pytorch_metric_learning.losses").ArcFaceLoss(
        *w.shape, margin=math.degrees(M), scale=S, weight_init_func=lambda given: given
    )
    loss.W = torch.nn.Parameter(w.detach().T.contiguous())

    def hand_over(W: Tensor) -> None:  # [d, C]
        w.grad, W.grad = W.grad.T, None

    loss.W.register_post_accumulate_grad_hook(hand_over)
    return lambda: loss(f, y)


def head(margin: Margin, **options: Any) -> Prepare:
    """fastmargin's, with these options of MarginHead."""

    def prepare(f: Tensor, w: Tensor, y: Tensor) -> Loss:  # [B, d], [C, d], [B]
        model = MarginHead(1, len(w), margin, **options)
        model.to(w.device).weight = w
        return lambda: model(f, y).loss

    return prepare


NATIVE = {"margin": ArcFace(s=S, m=M), "backend": "native"}
BFLOAT16 = NATIVE | {"compute_dtype": torch.bfloat16}

ARCFACE: dict[str, Prepare] = {
    "eager": eager,
    "eager, bfloat16 by autocast": under_autocast(eager),
    "torch.compile of eager": compiled,
    "InsightFace's op sequence": insightface,
    "pytorch-metric-learning": metric_learning,
    "fastmargin native": head(**NATIVE),
    "fastmargin native, k = 1": head(**NATIVE, topk=1),
    "fastmargin native, k = 10": head(**NATIVE, topk=10),
    "fastmargin native, bfloat16": head(**BFLOAT16),
    "fastmargin native, bfloat16, k = 10": head(**BFLOAT16, topk=10),
    "fastmargin stream": head(ArcFace(s=S, m=M), backend="stream"),
}
