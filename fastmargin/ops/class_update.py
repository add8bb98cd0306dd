"""class_update: one optimiser step of class weights, in place, on all classes or on the rows that were used.

    sgd      g += lam w;  v = mu v + g;  w -= lr v,  or with Nesterov's look ahead  w -= lr (g + mu v)
    adamw    w -= lr lam w;  m += (1 - b1)(g - m);  s += (1 - b2)(g^2 - s);  w -= (lr / c1) m / (sqrt(s / c2) + eps)

as torch.optim.SGD and torch.optim.AdamW; c1 = 1 - b1^t, c2 = 1 - b2^t. And class_lazy_update: a row that sat out T
steps of SGD has moved all the same, by a product of T 2 x 2 matrices on its (v, w). Letters: C classes, n of
them selected, d features.
"""

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from fastmargin.ops.backends import BUILD, Impl, native_can_run
from fastmargin.ops.operand_cache import OperandCache


class Step(NamedTuple):
    """A step of an optimiser, but for the gradient."""

    state: list[Tensor]  # [C, d] each, changed: [v] or [] for sgd, [m, s] for adamw
    rule: str  # "sgd" or "adamw"
    hyper: list[float]  # lr, momentum, weight_decay, nesterov; or lr, weight_decay, beta1, beta2, eps, c1, sqrt(c2)
    grad_scale: Tensor | None  # [] gradients are divided by it; rows whose gradient is not finite stay as they are


class SteppingBackward(Protocol):
    """An optimiser that steps inside the backward pass: `fastmargin.optim` with in_backward=True."""

    operand_cache: OperandCache | None

    def begin_backward(self) -> Step: ...


def count_write(w: Tensor, operand_cache: OperandCache | None = None) -> None:  # [C, d]
    """Tells autograd, which does not see what an op writes, of a step: a graph that has the weights of before in use
    raises. The cache is what that step wrote."""
    torch.autograd.graph.increment_version(w)
    if operand_cache is not None:
        operand_cache.mark_current(w)


def stream_update(
    w: Tensor,  # [C, d], changed
    state: list[Tensor],  # [C, d] each, changed
    grad: Tensor,  # [n, d]
    class_ids: Tensor | None,  # [n]
    rule: str,
    hyper: list[float],
    grad_scale: Tensor | None,  # []
) -> None:
    at = slice(None) if class_ids is None else class_ids
    old = [t[at] for t in (w, *state)]
    new = [t.clone() for t in old]
    grad = grad if grad_scale is None else grad / grad_scale
    if rule == "sgd":
        sgd_(*new, g=grad, hyper=hyper)
    else:
        adamw_(*new, g=grad, hyper=hyper)
    if grad_scale is not None:
        finite = grad.isfinite().all(1, keepdim=True)
        new = [torch.where(finite, after, before) for after, before in zip(new, old, strict=True)]
    for t, after in zip((w, *state), new, strict=True):
        t[at] = after


def sgd_(
    w: Tensor,  # [n, d]
    v: Tensor | None = None,  # [n, d]
    *,
    g: Tensor,  # [n, d]
    hyper: list[float],
) -> None:
    lr, momentum, weight_decay, nesterov = hyper
    g = g + weight_decay * w
    v = g if v is None else v.mul_(momentum).add_(g)
    w.sub_(g + momentum * v if nesterov else v, alpha=lr)


def adamw_(
    w: Tensor,  # [n, d]
    m: Tensor,  # [n, d]
    s: Tensor,  # [n, d]
    *,
    g: Tensor,  # [n, d]
    hyper: list[float],
) -> None:
    lr, weight_decay, beta1, beta2, eps, c1, root_c2 = hyper
    w.mul_(1 - lr * weight_decay)
    m.lerp_(g, 1 - beta1)
    s.lerp_(g.square(), 1 - beta2)
    w.sub_(m / (s.sqrt() / root_c2 + eps), alpha=lr / c1)


def stream_lazy_update(
    w: Tensor,  # [C, d], changed
    v: Tensor | None,  # [C, d], changed
    class_ids: Tensor | None,  # [n]
    products: Tensor,  # [n, 4]
) -> None:
    at = slice(None) if class_ids is None else class_ids
    vv, vw, wv, ww = products.T[:, :, None]
    old_w, old_v = w[at], torch.zeros_like(w[at]) if v is None else v[at]  # of all rows they are views
    new_w, new_v = wv * old_v + ww * old_w, vv * old_v + vw * old_w
    with torch.autograd._unsafe_preserve_version_counter(w):  # no write: rows that a graph has in use are up to date
        w[at] = new_w
    if v is not None:
        v[at] = new_v


IMPLS: dict[str, Impl] = {}
if BUILD.facts:
    _ops = torch.ops.fastmargin
    IMPLS["native"] = Impl(
        {"update": _ops.class_update.default, "lazy_update": _ops.class_lazy_update.default},
        native_can_run,
    )

    @torch.library.register_fake("fastmargin::class_update")
    def _(w, state, grad, class_ids, rule, hyper, grad_scale):  # type: ignore[no-untyped-def]
        return None

    @torch.library.register_fake("fastmargin::class_lazy_update")
    def _(w, v, class_ids, products):  # type: ignore[no-untyped-def]
        return None


IMPLS["stream"] = Impl({"update": stream_update, "lazy_update": stream_lazy_update}, lambda w: True)
IMPLS["triton"] = IMPLS["reference"] = IMPLS["stream"]
