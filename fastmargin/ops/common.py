"""What the portable implementations of several ops share. Letters: B rows, n classes, k of them."""

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def without_autocast(op: Callable[..., Any]) -> Callable[..., Any]:
    """Runs the op outside autocast: z and all sums keep the dtype of the operands."""

    @functools.wraps(op)
    def run(x: Tensor, *args: Any) -> Any:
        with torch.autocast(x.device.type, enabled=False):
            return op(x, *args)

    return run


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
    """The k largest, equal values by the smaller class.

    torch.topk leaves the order of equal values open: its k-th value is used, and of the entries equal to it the first.
    """
    if 0 < k < values.shape[1]:
        kth = values.topk(k).values[:, -1:]
        above, equal = values > kth, values == kth
        keep = above | (equal & (equal.cumsum(1) <= k - above.sum(1, keepdim=True)))
        places = torch.arange(values.shape[1], 0, -1, device=values.device) * keep
        at = places.topk(k).indices
        values, classes = values.gather(1, at), classes.gather(1, at)
    values, order = values.sort(dim=1, descending=True, stable=True)
    return padded(values, classes.gather(1, order), k)
