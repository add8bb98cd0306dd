"""nontarget_lse by the ops of csrc: calls with a Problem, and what shapes they return (for torch.compile)."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastmargin.ops.class_update import Step
from fastmargin.ops.exponentials import pitch_of
from fastmargin.ops.problem import BackwardInput, ForwardOutput, Gradients, Problem


def functions(ops: Any) -> dict[str, Callable[..., Any]]:
    """By role. ops: torch.ops.fastmargin. cached: operands and scales of an OperandCache, see `cached_operands`."""

    def fwd(
        p: Problem, topk: int, need_expected_weight: bool, keep_exponentials: bool = False, **cached: Tensor
    ) -> ForwardOutput:
        asked = dict(topk=topk, need_expected_weight=need_expected_weight, keep_exponentials=keep_exponentials)
        return ForwardOutput(*ops.nontarget_lse_fwd.default(**p._asdict(), **asked, **cached))

    def bwd(p: Problem, given: BackwardInput, need_dx: bool, need_dw: bool, need_db: bool) -> Gradients:
        asked = dict(need_dx=need_dx, need_dw=need_dw, need_db=need_db)
        return Gradients(*ops.nontarget_lse_bwd.default(**p._asdict(), **given._asdict(), **asked))

    def bwd_update(
        p: Problem, given: BackwardInput, need_dx: bool, need_db: bool, step: Step, **cached: Tensor
    ) -> tuple[Tensor, Tensor]:
        asked = dict(need_dx=need_dx, need_db=need_db, **step._asdict())
        return ops.nontarget_lse_bwd_update.default(**p._asdict(), **given._asdict(), **asked, **cached)

    return {"fwd": fwd, "bwd": bwd, "bwd_update": bwd_update, "operands": ops.class_operands.default}


def register_fakes() -> None:
    @torch.library.register_fake("fastmargin::nontarget_lse_fwd")
    def _(  # type: ignore[no-untyped-def]
        x, w, y, bias, class_ids, bend, normalize_weight, pool, topk, compute_dtype, need_expected_weight,
        operands=None, scales=None, keep_exponentials=False,
    ):  # fmt: skip
        B, n = x.shape[0], w.shape[0] if class_ids is None else class_ids.shape[0]
        # where it keeps no exponentials, a GPU sums dx in the backward pass
        summed = need_expected_weight and (x.device.type == "cpu" or keep_exponentials)
        expected_weight = x.new_empty(x.shape if summed else (0,))
        kept = (B, pitch_of(n)) if keep_exponentials else (0,)
        exponentials = x.new_empty(kept, dtype=compute_dtype or x.dtype)
        return x.new_empty(B), x.new_empty(B, topk), y.new_empty(B, topk), expected_weight, exponentials

    @torch.library.register_fake("fastmargin::nontarget_lse_bwd")
    def _(  # type: ignore[no-untyped-def]
        x, w, y, bias, class_ids, bend, normalize_weight, pool, compute_dtype,
        rest, topk_classes, expected_weight, exponentials, d_rest, d_target, d_topk, need_dx, need_dw, need_db,
    ):  # fmt: skip
        n = w.shape[0] if class_ids is None else class_ids.shape[0]
        return (
            x.new_empty(x.shape if need_dx else (0,)),
            x.new_empty((n, x.shape[1]) if need_dw else (0,)),
            x.new_empty(n if need_db else 0),
        )

    @torch.library.register_fake("fastmargin::nontarget_lse_bwd_update")
    def _(  # type: ignore[no-untyped-def]
        x, w, y, bias, class_ids, bend, normalize_weight, pool, compute_dtype,
        rest, topk_classes, expected_weight, exponentials, d_rest, d_target, d_topk, need_dx, need_db,
        state, rule, hyper, grad_scale, operands=None, scales=None,
    ):  # fmt: skip
        n = w.shape[0] if class_ids is None else class_ids.shape[0]
        return x.new_empty(x.shape if need_dx else (0,)), x.new_empty(n if need_db else 0)

    @torch.library.register_fake("fastmargin::class_operands")
    def _(w, normalize_weight, operands, scales):  # type: ignore[no-untyped-def]
        return None
