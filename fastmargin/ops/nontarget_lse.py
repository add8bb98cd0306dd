"""nontarget_lse: everything a margin softmax needs from B x C logits, without storing them.

    z_ij     = <x_i, w_j / ||w_j||>                 (or <x_i, w_j> + b_j for a plain linear layer)
    rest_i   = log sum_{j != y_i} exp(z_ij)         over the classes given; -inf if there are none
    target_i = z_{i, y_i}                           0 where y_i = -1: ignored, or on another rank
    topk_i   = the k largest z_ij, j != y_i, with their classes (ties: the smaller id)

The loss with a margin psi on the target is -logsigmoid(r psi(target / r) - rest), where r = ||x_i|| is the scale: it
equals cross entropy (ArcFace eq. 9, CosFace, SphereFace, ...), and keeps full precision where lse - target is 0.

    g_ij = d_rest_i exp(z_ij - rest_i) for j != y_i, d_target_i at y_i; plus d_topk at its ids
    dx_i = sum_j g_ij w_j/||w_j||     dw_j = (1/||w_j||) (I - w^_j w^_j^T) sum_i g_ij x_i     db_j = sum_i g_ij

The d_rest part of dx is attention over the other classes, d_rest_i times expected_weight_i = sum_{j != y_i}
exp(z_ij - rest_i) w^_j. Native on the CPU, stream and reference sum it in the forward pass, and recompute z in the
backward pass for dw alone; native on a GPU and triton do both in the backward pass.
Letters: B rows, C classes, d features, k nearest classes.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastmargin.ops import class_update, target_logit
from fastmargin.ops import nontarget_lse_portable as portable
from fastmargin.ops import nontarget_lse_reference as reference
from fastmargin.ops.backends import (
    BUILD,
    HALVES,
    Impl,
    native_can_run,
    native_compute,
    pick,
    pick_compute,
    triton_can_run,
    triton_compute,
)
from fastmargin.ops.checks import check_ids, check_operands
from fastmargin.ops.common import once_differentiable, without_autocast


@dataclass(frozen=True)
class Options:
    normalize_weight: bool
    topk: int
    compute_dtype: torch.dtype | None
    backend: str
    need_expected_weight: bool
    optimizer: class_update.SteppingBackward | None


class NontargetLSE(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,  # [B, d]
        w: Tensor,  # [C, d]
        y: Tensor,  # [B]
        bias: Tensor | None,  # [C]
        class_ids: Tensor | None,  # [n]
        options: Options,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        o = options
        fwd = IMPLS[o.backend].functions["fwd"]
        rest, topk_values, topk_classes, expected_weight = fwd(
            x, w, y, bias, class_ids, None, o.normalize_weight, 1, o.topk, o.compute_dtype, o.need_expected_weight,
            **cached_operands(w, class_ids, o),
        )  # fmt: skip
        if o.topk:  # each backend sorts NaN in its own way
            undefined = x.isnan().any(1, keepdim=True)
            topk_values = topk_values.masked_fill(undefined, torch.nan)
            topk_classes = topk_classes.masked_fill(undefined, -1)
        target = target_logit.IMPLS[o.backend].functions["fwd"](x, w, y, bias, class_ids, o.normalize_weight)
        ctx.save_for_backward(x, w, y, bias, class_ids, rest, topk_classes, expected_weight)
        ctx.options = o
        ctx.mark_non_differentiable(topk_classes)
        ctx.set_materialize_grads(False)
        return rest, target, topk_values, topk_classes

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any,
        d_rest: Tensor,  # [B]
        d_target: Tensor,  # [B]
        d_topk: Tensor,  # [B, k]
        _: None,
    ) -> tuple[Any, ...]:
        x, w, y, bias, class_ids, rest, topk_classes, expected_weight = ctx.saved_tensors
        need_dx, need_dw, _, need_db = ctx.needs_input_grad[:4]
        d_rest = torch.zeros_like(rest) if d_rest is None else d_rest
        d_target = torch.zeros_like(rest) if d_target is None else d_target
        o, functions = ctx.options, IMPLS[ctx.options.backend].functions
        given = (x, w, y, bias, class_ids, None, o.normalize_weight, 1, o.compute_dtype,
                 rest, topk_classes, expected_weight, d_rest, d_target, d_topk, need_dx)  # fmt: skip
        if o.optimizer is None or not need_dw:
            dx, dw, db = functions["bwd"](*given, need_dw, need_db)
            dw = scatter(dw, class_ids, w) if need_dw else None
        elif "bwd_update" in functions:
            parts = cached_operands(w, class_ids, o)
            dx, db = functions["bwd_update"](*given, need_db, *o.optimizer.begin_backward(), **parts)
            dw = None
            class_update.count_write(w, o.optimizer.operand_cache if parts else None)
        else:
            step = o.optimizer.begin_backward()
            dx, dw, db = functions["bwd"](*given, True, need_db)
            class_update.IMPLS[o.backend].functions["update"](w, step.state, dw, class_ids, *step[1:])
            dw = None
            class_update.count_write(w)
        db = scatter(db, class_ids, bias) if need_db else None
        return dx if need_dx else None, dw, None, db, None, None


def cached_operands(
    w: Tensor,  # [C, d]
    class_ids: Tensor | None,  # [n]
    o: Options,
) -> dict[str, Tensor]:  # operands [C, d], scales [2, C]; or nothing
    """The operands that the ops read from the optimizer's OperandCache, if it has one: the same in both passes."""
    cache = None if o.optimizer is None else o.optimizer.operand_cache
    if cache is None:
        return {}
    make = IMPLS[o.backend].functions.get("operands")
    if make is None or class_ids is not None or o.compute_dtype is None:
        cache.invalidate()  # the step of this pass will not write it
        return {}
    return cache.get(w, o.normalize_weight, o.compute_dtype, make)


def scatter(
    gradient: Tensor,  # [n, ...]
    class_ids: Tensor | None,  # [n]
    like: Tensor,  # [C, ...]
) -> Tensor:  # [C, ...]
    """A gradient of the selected classes as a sparse COO tensor, of the shape of `like`."""
    if class_ids is None:
        return gradient
    ids = without_padding(class_ids) if class_ids.is_cuda else class_ids
    with torch.sparse.check_sparse_tensor_invariants(enable=False):  # torch 2.11 warns unless told here
        return torch.sparse_coo_tensor(ids[None], gradient, like.shape, is_coalesced=not class_ids.is_cuda)


def without_padding(class_ids: Tensor) -> Tensor:  # [n], perhaps -1 at the end -> [n]
    """The first class in place of -1: its rows, 0 there, add nothing to its gradient, and no other class gets one."""
    return torch.where(class_ids < 0, class_ids[:1].clamp(min=0), class_ids)


def nontarget_lse(
    x: Tensor,  # [B, d]
    w: Tensor,  # [C, d]
    y: Tensor,  # [B] int64 in [-1, C)
    *,
    bias: Tensor | None = None,  # [C]
    class_ids: Tensor | None = None,  # [n] int64, sorted and unique
    normalize_weight: bool = True,
    topk: int = 0,
    compute_dtype: torch.dtype | None = None,
    backend: str | None = None,
    optimizer: class_update.SteppingBackward | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # rest [B], target [B], topk_values [B, k], topk_classes [B, k]
    """Log-sum-exp over the classes that are not the row's own, the own class's logit, and the k nearest others.

    Differentiable once, in x, w and bias, through rest, target and topk_values. The scale of a cosine softmax lives
    in x: pass rows of norm s.

    Args:
        x: rows, float32 or float64, any strides. A row with a NaN has k values NaN, of class -1.
        w: class weights of x's dtype, any strides; normalized on the fly. A class weight shorter than 1e-12 counts as
            zero; its square must not overflow.
        y: the class of each row; -1: none of these classes, so all of them count as other classes.
        bias: only with normalize_weight=False.
        class_ids: restricts the classes to w[class_ids], gathered a tile at a time: rows of w, whatever global ids they
            have elsewhere (the head passes its `subset`). y and topk_classes then are indices into `class_ids`, and the
            gradients of w and bias are sparse COO tensors of these rows. On CUDA class_ids may end in -1, no class, so
            that the host need not know their number: nothing is computed or changed for these places. The sparse
            gradients are not coalesced there.
        topk: k; where fewer than k other classes exist, the last entries are class -1, value -inf. The cost is
            negligible up to about 10, and higher where classes happen to be sorted by rising similarity.
        compute_dtype: torch.bfloat16 or torch.float16: float32 x and w are rounded to it for the products, and so may
            be their coefficients in the gradients; z, all sums, the targets and the outputs stay float32. None: no
            rounding. Where a backend has no such kernels on this machine, it warns once and runs in float32. float16
            holds no number above 65,504: longer rows, and weights that are not normalized, may overflow.
        backend: "native", "triton", "stream" or "reference"; None: the first that runs on x's device and dtype.
        optimizer: one of `fastmargin.optim` with in_backward=True, for w: the backward pass makes its step, and w gets
            no gradient.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, a label outside [-1, C), class_ids not sorted and unique,
            topk < 0, a bias with normalized weights, a compute_dtype that x's dtype cannot be rounded to, a
            backend that cannot run. Labels and class_ids are not validated on CUDA, where it would synchronize: such
            labels count as -1 there, and with such class_ids the results are undefined.
    """
    check_operands(x, w, y, bias, class_ids, normalize_weight)
    if not isinstance(topk, int) or isinstance(topk, bool) or topk < 0:
        raise ValueError(f"topk = {topk!r}: want an int of 0 or more")
    need_expected_weight = x.requires_grad and torch.is_grad_enabled()
    backend = pick(IMPLS, x, backend)
    if class_ids is not None and class_ids.is_cuda and backend in ("stream", "reference"):
        class_ids = class_ids[class_ids >= 0]  # a host sync: they know no class -1
    options = Options(
        normalize_weight, topk, pick_compute(IMPLS, backend, x, compute_dtype), backend, need_expected_weight, optimizer
    )
    return NontargetLSE.apply(x, w, y, bias, class_ids, options)


@without_autocast
def triton_fwd(
    x: Tensor,  # [B, d]
    w: Tensor,  # [C, d]
    y: Tensor,  # [B]
    bias: Tensor | None,  # [C]
    class_ids: Tensor | None,  # [n]
    bend: Tensor | None,  # [B, 4]
    normalize_weight: bool,
    pool: int,
    topk: int,
    compute_dtype: torch.dtype | None,
    need_expected_weight: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # rest [B], topk values [B, k], topk classes [B, k], [0]
    from fastmargin.kernels import nontarget_lse as kernels  # needs triton

    portable.check_bend_pool(bend, pool)
    check_ids(y, class_ids, len(w))
    return kernels.forward(
        x, w, y, bias, class_ids, bend, normalize_weight, pool, topk, compute_dtype, need_expected_weight
    )


@without_autocast
def triton_bwd(x: Tensor, *saved: Any) -> tuple[Tensor, Tensor, Tensor]:  # [B, d] -> dx [B, d], dw [n, d], db [n]
    from fastmargin.kernels import nontarget_lse as kernels

    return kernels.backward(x, *saved)


IMPLS: dict[str, Impl] = {}
if BUILD.facts:
    _ops = torch.ops.fastmargin
    IMPLS["native"] = Impl(
        {
            "fwd": _ops.nontarget_lse_fwd.default,
            "bwd": _ops.nontarget_lse_bwd.default,
            "bwd_update": _ops.nontarget_lse_bwd_update.default,
            "operands": _ops.class_operands.default,
        },
        native_can_run,
        native_compute,
        lambda w: w.is_cuda,
    )

    @torch.library.register_fake("fastmargin::nontarget_lse_fwd")
    def _(  # type: ignore[no-untyped-def]
        x, w, y, bias, class_ids, bend, normalize_weight, pool, topk, compute_dtype, need_expected_weight,
        operands=None, scales=None,
    ):  # fmt: skip
        B = x.shape[0]
        summed = need_expected_weight and x.device.type == "cpu"  # a GPU sums dx in the backward pass
        expected_weight = x.new_empty(x.shape if summed else (0,))
        return x.new_empty(B), x.new_empty(B, topk), y.new_empty(B, topk), expected_weight

    @torch.library.register_fake("fastmargin::nontarget_lse_bwd")
    def _(  # type: ignore[no-untyped-def]
        x, w, y, bias, class_ids, bend, normalize_weight, pool, compute_dtype,
        rest, topk_classes, expected_weight, d_rest, d_target, d_topk, need_dx, need_dw, need_db,
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
        rest, topk_classes, expected_weight, d_rest, d_target, d_topk, need_dx, need_db, state, rule, hyper, grad_scale,
        operands=None, scales=None,
    ):  # fmt: skip
        n = w.shape[0] if class_ids is None else class_ids.shape[0]
        return x.new_empty(x.shape if need_dx else (0,)), x.new_empty(n if need_db else 0)

    @torch.library.register_fake("fastmargin::class_operands")
    def _(w, normalize_weight, operands, scales):  # type: ignore[no-untyped-def]
        return None


IMPLS["triton"] = Impl({"fwd": triton_fwd, "bwd": triton_bwd}, triton_can_run, triton_compute)
IMPLS["stream"] = Impl(
    {"fwd": portable.stream_fwd, "bwd": portable.stream_bwd, "bwd_update": portable.stream_bwd_update},
    lambda x: True,
    lambda x: HALVES,
)
IMPLS["reference"] = Impl(
    {"fwd": reference.reference_fwd, "bwd": reference.reference_bwd}, lambda x: True, lambda x: HALVES
)
