"""class_update: one optimizer step of class weights, in place, on all classes or on the rows that were used.

    sgd      g += lam w;  v = mu v + g;  w -= lr v,  or with Nesterov momentum  w -= lr (g + mu v)
    adamw    w -= lr lam w;  m += (1 - b1)(g - m);  s += (1 - b2)(g^2 - s);  w -= (lr / c1) m / (sqrt(s / c2) + eps)

as torch.optim.SGD and torch.optim.AdamW; c1 = 1 - b1^t, c2 = 1 - b2^t.

class_lazy_update applies T skipped steps of SGD to a row at once: momentum and weight decay without a gradient are a
product of T 2 x 2 matrices on its (v, w); see optim/sgd.py. On a GPU class_ids may end in -1, no class: these places
change nothing. Letters: C classes, n of them selected, d features.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from fastmargin.ops.backends import BUILD, Impl, native_can_run
from fastmargin.ops.operand_cache import OperandCache
from fastmargin.torch_private import preserved_version


class Step(NamedTuple):
    """All that one optimizer step needs besides the gradient."""

    state: list[Tensor]  # [C, d] each, changed: [v] or [] for sgd, [m, s] for adamw
    rule: str  # "sgd" or "adamw"
    hyper: list[float]  # lr, momentum, weight_decay, nesterov; or lr, weight_decay, beta1, beta2, eps, c1, sqrt(c2)
    grad_scale: Tensor | None  # [] gradients are divided by it; rows whose gradient is not finite stay as they are


class SteppingBackward(Protocol):
    """An optimizer that steps inside the backward pass: `fastmargin.optim` with in_backward=True."""

    operand_cache: OperandCache | None

    def begin_backward(self) -> Step: ...


def count_write(w: Tensor, operand_cache: OperandCache | None = None) -> None:  # [C, d]
    """Bumps the version counter, so that graphs with the old weights raise: autograd does not see that an op wrote w.

    operand_cache: the cache that the step has written, too.
    """
    torch.autograd.graph.increment_version(w)
    if operand_cache is not None:
        operand_cache.mark_current(w)


def stream_update(
    w: Tensor,  # [C, d], changed
    grad: Tensor,  # [n, d]
    class_ids: Tensor | None,  # [n]
    step: Step,
) -> None:
    if class_ids is not None and class_ids.is_cuda:
        class_ids, grad = without_none(class_ids, grad)
    update_rows(w, grad, class_ids, None, step)


def triton_update(
    w: Tensor,  # [C, d], changed
    grad: Tensor,  # [n, d]
    class_ids: Tensor | None,  # [n], perhaps -1 at the end
    step: Step,
) -> None:
    """stream_update, without a host sync where class_ids end in -1."""
    is_class = None
    if class_ids is not None:
        class_ids, grad = first_for_none(class_ids, grad)
        is_class = (class_ids >= 0)[:, None]  # at least one, except where all are -1
    update_rows(w, grad, class_ids, is_class, step)


def without_none(class_ids: Tensor, of_each: Tensor) -> tuple[Tensor, Tensor]:  # [n], [n, ...] -> [m], [m, ...]
    keep = class_ids >= 0
    return class_ids[keep], of_each[keep]  # a host sync: the number of classes


def first_for_none(class_ids: Tensor, of_each: Tensor) -> tuple[Tensor, Tensor]:  # [n], [n, ...] -> the same
    """The first class and its numbers in place of -1: written more than once, its row gets the same bits each time."""
    places = torch.where(class_ids < 0, 0, torch.arange(len(class_ids), device=class_ids.device))
    return class_ids[places], of_each[places]


def update_rows(
    w: Tensor,  # [C, d], changed
    grad: Tensor,  # [n, d]
    class_ids: Tensor | None,  # [n]
    is_class: Tensor | None,  # [n, 1] rows that may change; None: all
    step: Step,
) -> None:
    rows = slice(None) if class_ids is None else class_ids
    tensors = w, *step.state
    old = [t[rows] for t in tensors]
    new = [t.clone() for t in old]
    grad = grad if step.grad_scale is None else grad / step.grad_scale
    rule_ = sgd_ if step.rule == "sgd" else adamw_
    rule_(*new, g=grad, hyper=step.hyper)
    finite = None if step.grad_scale is None else grad.isfinite().all(1, keepdim=True)
    for changes in (finite, is_class):
        if changes is not None:
            new = [torch.where(changes, after, before) for after, before in zip(new, old, strict=True)]
    for t, after in zip(tensors, new, strict=True):
        t[rows] = after


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
    products: Tensor,  # [n, 4] of each row, a 2 x 2 matrix on (v, w)
) -> None:
    if class_ids is not None and class_ids.is_cuda:
        class_ids, products = without_none(class_ids, products)
    lazy_update_rows(w, v, class_ids, products)


def triton_lazy_update(
    w: Tensor,  # [C, d], changed
    v: Tensor | None,  # [C, d], changed
    class_ids: Tensor | None,  # [n], perhaps -1 at the end
    products: Tensor,  # [n, 4]
) -> None:
    """stream_lazy_update, without a host sync where class_ids end in -1."""
    if class_ids is not None:
        class_ids, products = first_for_none(class_ids, products)
        products = torch.where((class_ids < 0)[:, None], products.new_tensor((1, 0, 0, 1)), products)
    lazy_update_rows(w, v, class_ids, products)


def lazy_update_rows(
    w: Tensor,  # [C, d], changed
    v: Tensor | None,  # [C, d], changed
    class_ids: Tensor | None,  # [n]
    products: Tensor,  # [n, 4]
) -> None:
    rows = slice(None) if class_ids is None else class_ids
    vv, vw, wv, ww = products.T[:, :, None]
    old_w, old_v = w[rows], torch.zeros_like(w[rows]) if v is None else v[rows]  # views, if of all rows
    new_w, new_v = wv * old_v + ww * old_w, vv * old_v + vw * old_w
    with preserved_version(w):  # only late rows change, which no graph has read
        w[rows] = new_w
    if v is not None:
        v[rows] = new_v


def native_functions(ops: Any) -> dict[str, Callable[..., Any]]:  # of torch.ops.fastmargin
    def update(w: Tensor, grad: Tensor, class_ids: Tensor | None, step: Step) -> None:
        ops.class_update.default(w, step.state, grad, class_ids, step.rule, step.hyper, step.grad_scale)

    return {"update": update, "lazy_update": ops.class_lazy_update.default}


IMPLS: dict[str, Impl] = {}
if BUILD.facts:
    IMPLS["native"] = Impl(native_functions(torch.ops.fastmargin), native_can_run)

    @torch.library.register_fake("fastmargin::class_update")
    def _(w, state, grad, class_ids, rule, hyper, grad_scale):  # type: ignore[no-untyped-def]
        return None

    @torch.library.register_fake("fastmargin::class_lazy_update")
    def _(w, v, class_ids, products):  # type: ignore[no-untyped-def]
        return None


IMPLS["stream"] = Impl({"update": stream_update, "lazy_update": stream_lazy_update}, lambda w: True)
IMPLS["reference"] = IMPLS["stream"]
IMPLS["triton"] = Impl({"update": triton_update, "lazy_update": triton_lazy_update}, lambda w: True)
