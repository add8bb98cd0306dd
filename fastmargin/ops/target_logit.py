"""target_logit: each row's logit for its own class.

    target_i = <x_i, w_{y_i} / ||w_{y_i}||>     (or <x_i, w_{y_i}> + b_{y_i}); 0 where y_i = -1
    1 / ||w|| := 0 for ||w|| < 1e-12

A separate op without autograd: the backward pass is in `nontarget_lse`. Letters: B rows, C classes, d features.
"""

import torch
from torch import Tensor

from fastmargin.ops.backends import BUILD, Impl, native_can_run, triton_can_run
from fastmargin.ops.checks import check_ids


def inverse_norms(w: Tensor) -> Tensor:  # [C, d] -> [C]
    norm = w.norm(dim=1)
    return torch.where(norm < 1e-12, 0.0, 1 / norm)


def target_logit(
    x: Tensor,  # [B, d]
    w: Tensor,  # [C, d]
    y: Tensor,  # [B] in [-1, n): class ids, or indices into `class_ids`
    bias: Tensor | None,  # [C]
    class_ids: Tensor | None,  # [n]
    normalize_weight: bool,
) -> Tensor:  # [B]
    check_ids(y, class_ids, len(w))
    n = len(w) if class_ids is None else len(class_ids)
    if n == 0:
        return x.new_zeros(len(x))
    inside = (y >= 0) & (y < n)
    safe = torch.where(inside, y, 0)
    ids = safe if class_ids is None else class_ids[safe]
    wy = w[ids]
    target = (x * wy).sum(1)
    if normalize_weight:
        target = target * inverse_norms(wy)
    if bias is not None:
        target = target + bias[ids]
    return target.masked_fill(~inside, 0.0)


IMPLS: dict[str, Impl] = {}
if BUILD.facts:
    IMPLS["native"] = Impl({"fwd": torch.ops.fastmargin.target_logit.default}, native_can_run)

    @torch.library.register_fake("fastmargin::target_logit")
    def _(x, w, y, bias, class_ids, normalize_weight):  # type: ignore[no-untyped-def]
        return x.new_empty(x.shape[0])


IMPLS["triton"] = Impl({"fwd": target_logit}, triton_can_run)
IMPLS["stream"] = IMPLS["reference"] = Impl({"fwd": target_logit}, lambda x: True)
