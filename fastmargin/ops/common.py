"""Helpers of several portable ops and of the modules above them. Letters: B rows, n classes, d features,
k nearest ones."""

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def without_autocast(op: Callable[..., Any]) -> Callable[..., Any]:
    """Disables autocast in the op: z and all sums keep the dtype of the operands. Its first argument has a device."""

    @functools.wraps(op)
    def run(first: Any, *args: Any, **options: Any) -> Any:
        with torch.autocast(first.device.type, enabled=False):
            return op(first, *args, **options)

    return run


class Once(torch.autograd.Function):
    """A gradient as it is; to differentiate it is an error."""

    @staticmethod
    def forward(ctx: Any, gradient: Tensor, *origins: Tensor) -> Tensor:
        return gradient.detach()

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> Any:
        raise RuntimeError("trying to differentiate twice a function that was marked with @once_differentiable")


def once_differentiable(backward: Callable[..., Any]) -> Callable[..., Any]:
    """As torch's, but a second derivative always raises RuntimeError.

    With torch's it is silently zero where no incoming gradient requires one, as that of a plain sum, and in
    autograd.grad, which visits only what leads to its inputs: so the error's node leads to all that the gradient
    depends on.
    """

    @functools.wraps(backward)
    def run(ctx: Any, *gradients: Tensor | None) -> Any:
        with torch.no_grad():
            found = backward(ctx, *gradients)
        if not torch.is_grad_enabled():  # without create_graph=True
            return found
        origins = [t for t in (*gradients, *ctx.saved_tensors) if t is not None and t.requires_grad]
        return tuple(Once.apply(t, *origins) if isinstance(t, Tensor) else t for t in found)

    return run


def unit_rows(x: Tensor) -> tuple[Tensor, Tensor]:  # [B, d] -> [B, d], norms [B]
    """Rows of length 1 and their norms, without over- or underflow: a row is brought near 1 by a power of two first.

    The gradient of a unit row is divided by max(norm, 1e-6). A zero row stays zero, and its gradient is exactly 0.
    """
    exponent = x.detach().abs().amax(1, keepdim=True).frexp()[1].clamp(-125, 125)
    down, up = torch.ones_like(x[:, :1]).ldexp(-exponent), torch.ones_like(x[:, :1]).ldexp(exponent)
    near_one = x * down
    norms = near_one.norm(dim=1, keepdim=True)
    unit = near_one / torch.where(norms == 0, 1.0, norms)
    norms = norms * up
    slope = (norms.detach() / 1e-6).clamp(max=1.0)
    return unit.detach() + (slope * unit - (slope * unit).detach()), norms[:, 0]


def padded(
    values: Tensor,  # [B, n]
    classes: Tensor,  # [B, n]
    k: int,
) -> tuple[Tensor, Tensor]:  # [B, k], [B, k]
    """The first k columns, with (-inf, -1) where there are fewer or where a value is -inf."""
    missing = max(k - values.shape[1], 0)
    values = torch.nn.functional.pad(values[:, :k], (0, missing), value=-math.inf)
    classes = torch.nn.functional.pad(classes[:, :k], (0, missing), value=-1)
    return values, classes.masked_fill(values == -math.inf, -1)


def stable_topk(
    values: Tensor,  # [B, n]
    classes: Tensor,  # [B, n] ascending where values are equal
    k: int,
) -> tuple[Tensor, Tensor]:  # [B, k], [B, k]
    """The k largest; of equal values the smaller class.

    The order of equal values is undefined in torch.topk. So only its k-th value is used: every larger entry is taken,
    and of those equal to it the first ones.
    """
    if 0 < k < values.shape[1]:
        kth = values.topk(k).values[:, -1:]
        above, equal = values > kth, values == kth
        keep = above | (equal & (equal.cumsum(1) <= k - above.sum(1, keepdim=True)))
        priority = torch.arange(values.shape[1], 0, -1, device=values.device) * keep  # n, ..., 1; 0 where not kept
        index = priority.topk(k).indices
        values, classes = values.gather(1, index), classes.gather(1, index)
    values, order = values.sort(dim=1, descending=True, stable=True)
    return padded(values, classes.gather(1, order), k)


def rows_of(gradient: Tensor) -> tuple[Tensor, Tensor]:  # sparse COO [C, ...] -> ids [n], rows [n, ...]
    """The rows of a sparse gradient, those of one class added up, by rising class.

    On CUDA without a host sync: the ids end in -1, with rows of 0.
    """
    if gradient.is_cuda:
        return merged_rows(gradient._indices()[0], gradient._values())
    gradient = gradient.coalesce()
    return gradient.indices()[0], gradient.values()


def merged_rows(ids: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:  # [n], [n, ...] -> [n], [n, ...]
    ordered, order = ids.sort(stable=True)
    is_first = ordered.diff(prepend=ordered.new_full((1,), -1)) != 0
    ordered_place = is_first.cumsum(0) - 1
    place = torch.empty_like(order).scatter_(0, order, ordered_place)
    merged = torch.zeros_like(rows).index_put_((place,), rows, accumulate=True)  # sorted on a GPU: no atomics
    return torch.full_like(ids, -1).scatter_(0, ordered_place, ordered), merged


def rank_in_group(groups: Tensor) -> Tensor:  # [n] ids, equal ones adjacent -> [n]
    """The number of each item in its group: 0, 1, 2, ... from the first."""
    sizes = groups.unique_consecutive(return_counts=True)[1]
    starts = sizes.cumsum(0) - sizes
    return torch.arange(len(groups), device=groups.device) - starts.repeat_interleave(sizes, output_size=len(groups))
