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
backward pass for dw alone; native on a GPU and triton do both in the backward pass, or keep the exponentials of the
forward pass (exponentials.py) and make z once.
Letters: B rows, C classes, d features, k nearest classes.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastmargin.ops import class_update, target_logit
from fastmargin.ops import nontarget_lse_native as native
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
from fastmargin.ops.exponentials import Keep, KeptBytes, check_kept
from fastmargin.ops.problem import BackwardInput, ForwardOutput, Gradients, LSEOutput, Problem


class Options(NamedTuple):
    normalize_weight: bool
    compute_dtype: torch.dtype | None
    topk: int
    backend: str
    need_expected_weight: bool
    optimizer: class_update.SteppingBackward | None
    kept: KeptBytes | None  # where the forward pass is to keep its exponentials: counts them


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
        o, functions = options, IMPLS[options.backend].functions
        p = Problem(x, w, y, bias, class_ids, o.normalize_weight, o.compute_dtype)
        keep = {} if o.kept is None else {"keep_exponentials": True}
        out = functions["fwd"](p, o.topk, o.need_expected_weight, **keep, **cached_operands(p, o))
        if o.kept is not None:
            o.kept.add(out.exponentials)
        topk_values, topk_classes = out.topk_values, out.topk_classes
        if o.topk:  # each backend sorts NaN in its own way
            undefined = x.isnan().any(1, keepdim=True)
            topk_values = topk_values.masked_fill(undefined, torch.nan)
            topk_classes = topk_classes.masked_fill(undefined, -1)
        target = target_logit.IMPLS[o.backend].functions["fwd"](x, w, y, bias, class_ids, o.normalize_weight)
        saved = out.rest, topk_classes, out.expected_weight, out.exponentials
        ctx.save_for_backward(x, w, y, bias, class_ids, *saved)
        ctx.options = o
        ctx.mark_non_differentiable(topk_classes)
        ctx.set_materialize_grads(False)
        return out.rest, target, topk_values, topk_classes

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any,
        d_rest: Tensor | None,  # [B]
        d_target: Tensor | None,  # [B]
        d_topk: Tensor | None,  # [B, k]
        _: None,
    ) -> tuple[Any, ...]:
        x, w, y, bias, class_ids, rest, topk_classes, expected_weight, exponentials = ctx.saved_tensors
        need_dx, need_dw, _, need_db = ctx.needs_input_grad[:4]
        d_rest = torch.zeros_like(rest) if d_rest is None else d_rest
        d_target = torch.zeros_like(rest) if d_target is None else d_target
        o = ctx.options
        p = Problem(x, w, y, bias, class_ids, o.normalize_weight, o.compute_dtype)
        given = BackwardInput(rest, topk_classes, expected_weight, exponentials, d_rest, d_target, d_topk)
        if o.optimizer is None or not need_dw:
            dx, dw, db = gradients(o, p, given, need_dx, need_dw, need_db)
        elif "bwd_update" in IMPLS[o.backend].functions:
            dx, dw, db = fused_step(o, o.optimizer, p, given, need_dx, need_db)
        else:
            dx, dw, db = step_after(o, o.optimizer, p, given, need_dx, need_db)
        return dx if need_dx else None, dw, None, scatter(db, class_ids, bias) if need_db else None, None, None


def gradients(
    o: Options, p: Problem, given: BackwardInput, need_dx: bool, need_dw: bool, need_db: bool
) -> tuple[Tensor, Tensor | None, Tensor]:  # dx [B, d], dw [C, d], db [n]
    dx, dw, db = IMPLS[o.backend].functions["bwd"](p, given, need_dx, need_dw, need_db)
    return dx, scatter(dw, p.class_ids, p.w) if need_dw else None, db


def fused_step(
    o: Options,
    optimizer: class_update.SteppingBackward,
    p: Problem,  # w is changed
    given: BackwardInput,
    need_dx: bool,
    need_db: bool,
) -> tuple[Tensor, None, Tensor]:  # dx [B, d], None, db [n]
    """The op makes the optimizer's step, a block of classes at a time."""
    cached = cached_operands(p, o)
    step = optimizer.begin_backward()
    dx, db = IMPLS[o.backend].functions["bwd_update"](p, given, need_dx, need_db, step, **cached)
    class_update.count_write(p.w, optimizer.operand_cache if cached else None)
    return dx, None, db


def step_after(
    o: Options,
    optimizer: class_update.SteppingBackward,
    p: Problem,  # w is changed
    given: BackwardInput,
    need_dx: bool,
    need_db: bool,
) -> tuple[Tensor, None, Tensor]:  # dx [B, d], None, db [n]
    """For the backends that have no such op: the whole gradient, then the step."""
    step = optimizer.begin_backward()
    dx, dw, db = IMPLS[o.backend].functions["bwd"](p, given, need_dx, True, need_db)
    class_update.IMPLS[o.backend].functions["update"](p.w, dw, p.class_ids, step)
    class_update.count_write(p.w)
    return dx, None, db


def cached_operands(p: Problem, o: Options) -> dict[str, Tensor]:  # operands [C, d], scales [2, C]; or nothing
    """The operands that the ops read from the optimizer's OperandCache, if it has one: the same in both passes."""
    cache = None if o.optimizer is None else o.optimizer.operand_cache
    if cache is None:
        return {}
    make = IMPLS[o.backend].functions.get("operands")
    if make is None or p.class_ids is not None or p.compute_dtype is None:
        cache.invalidate()  # the step of this pass will not write it
        return {}
    return cache.get(p.w, p.normalize_weight, p.compute_dtype, make)


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
) -> LSEOutput:
    """Log-sum-exp over the classes that are not the row's own, the own class's logit, and the k nearest others.

    Differentiable once, in x, w and bias, through rest, target and topk_values. The scale of a cosine softmax lives
    in x: pass rows of norm s.

    Args:
        x: [B, d] rows, float32 or float64, any strides. A row with a NaN has k values NaN, of class -1.
        w: [C, d] class weights of x's dtype, any strides; normalized on the fly. A class weight shorter than 1e-12
            counts as zero; its square must not overflow.
        y: [B] int64, the class of each row; -1: none of these classes, so all of them count as other classes.
        bias: [C], only with normalize_weight=False.
        class_ids: [n] int64, sorted and unique: restricts the classes to w[class_ids], gathered a tile at a time: rows
            of w, whatever global ids they have elsewhere (the head passes its `subset`). y and topk_classes then are
            indices into `class_ids`, and the gradients of w and bias are sparse COO tensors of these rows. On CUDA
            class_ids may end in -1, no class, so that the host need not know their number: nothing is computed or
            changed for these places. The sparse gradients are not coalesced there.
        normalize_weight: whether z is of w_j / ||w_j||, as for cosines, or of w_j.
        topk: k; where fewer than k other classes exist, the last entries are class -1, value -inf. The cost is
            negligible up to about 10, and higher where classes happen to be sorted by rising similarity.
        compute_dtype: torch.bfloat16 or torch.float16: float32 x and w are rounded to it for the products, and so may
            be their coefficients in the gradients; z, all sums, the targets and the outputs stay float32. None: no
            rounding. Where a backend has no such kernels on this machine, it warns once and runs in float32. float16
            holds no number above 65,504: longer rows, and weights that are not normalized, may overflow.
        backend: "native", "triton", "stream" or "reference"; None: the first that runs on x's device and dtype.

    Returns:
        rest [B], target [B], topk_values [B, k] and topk_classes [B, k] (int64), as a NamedTuple.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, a label outside [-1, C), class_ids not sorted and unique,
            topk < 0, a bias with normalized weights, a compute_dtype that x's dtype cannot be rounded to, a
            backend that cannot run. Labels and class_ids are not validated on CUDA, where it would synchronize: such
            labels count as -1 there, and with such class_ids the results are undefined.
    """
    return log_sum_exp(Problem(x, w, y, bias, class_ids, normalize_weight, compute_dtype), topk, backend)


def log_sum_exp(
    p: Problem,
    topk: int,
    backend: str | None,
    optimizer: class_update.SteppingBackward | None = None,
    keep: Keep | None = None,
) -> LSEOutput:
    """`nontarget_lse`. optimizer: of w: the backward pass makes its step, and w gets no gradient."""
    check_operands(p.x, p.w, p.y, p.bias, p.class_ids, p.normalize_weight)
    if not isinstance(topk, int) or isinstance(topk, bool) or topk < 0:
        raise ValueError(f"topk = {topk!r}: want an int of 0 or more")
    need_expected_weight = p.x.requires_grad and torch.is_grad_enabled()
    backend, class_ids = pick(IMPLS, p.x, backend), p.class_ids
    if class_ids is not None and class_ids.is_cuda and backend in ("stream", "reference"):
        class_ids = class_ids[class_ids >= 0]  # a host sync: they know no class -1
    compute_dtype = pick_compute(IMPLS, backend, p.x, p.compute_dtype)
    kept = None
    if keep is not None and p.w.requires_grad and torch.is_grad_enabled() and IMPLS[backend].keeps_exponentials(p.x):
        kept = keep.kept if keep.admits(p._replace(compute_dtype=compute_dtype)) else None
    options = Options(p.normalize_weight, compute_dtype, topk, backend, need_expected_weight, optimizer, kept)
    return LSEOutput(*NontargetLSE.apply(p.x, p.w, p.y, p.bias, class_ids, options))


@without_autocast
def triton_fwd(p: Problem, topk: int, need_expected_weight: bool, keep_exponentials: bool = False) -> ForwardOutput:
    """expected_weight is that of kept exponentials: without them the backward pass computes all of dx."""
    from fastmargin.kernels import nontarget_lse as kernels  # needs triton

    p.check_reserved()
    check_ids(p.y, p.class_ids, len(p.w))
    check_kept(p, keep_exponentials)
    return kernels.forward(p, topk, need_expected_weight, keep_exponentials)


@without_autocast
def triton_bwd(p: Problem, given: BackwardInput, need_dx: bool, need_dw: bool, need_db: bool) -> Gradients:
    from fastmargin.kernels import nontarget_lse as kernels

    p.check_reserved()
    return kernels.backward(p, given, need_dx, need_dw, need_db)


IMPLS: dict[str, Impl] = {}
if BUILD.facts:
    functions = native.functions(torch.ops.fastmargin)
    IMPLS["native"] = Impl(
        functions,
        native_can_run,
        native_compute,
        keeps_operands=lambda w: w.is_cuda,
        keeps_exponentials=lambda x: x.is_cuda,
    )
    native.register_fakes()
IMPLS["triton"] = Impl(
    {"fwd": triton_fwd, "bwd": triton_bwd}, triton_can_run, triton_compute, keeps_exponentials=lambda x: True
)
IMPLS["stream"] = Impl(
    {"fwd": portable.stream_fwd, "bwd": portable.stream_bwd, "bwd_update": portable.stream_bwd_update},
    lambda x: True,
    lambda x: HALVES,
)
IMPLS["reference"] = Impl(
    {"fwd": reference.reference_fwd, "bwd": reference.reference_bwd}, lambda x: True, lambda x: HALVES
)
