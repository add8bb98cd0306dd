"""pairwise_potential: sums over pairs of points of a function of their squared distance, no N x M array stored.

    u_ij        = ||a_i - b_j||^2
    potential_i = sum_j v_j phi(u_ij)                         over the pairs with different ids
    slope_i     = d potential_i / d a_i = sum_j v_j 2 phi'(u_ij) (a_i - b_j)

    inverse     phi = 1 / (1 + u)        2 phi' = -2 phi^2               the Git term (Git Loss eq. 1)
    hinge       phi = max(M - u, 0)      2 phi' = -2 where u < M         the minimum margin (MML eq. 13, as meant)

The gradients need no second kernel. With g_i the incoming gradient, da_i = g_i slope_i, where slope is summed together
with the potential; and db is the slope of b with a and b exchanged, weighted by g: db_j = v_j slope_j(b, a, g). Where b
is a, the CPU computes each pair once.

u comes from a matrix product of rows minus the mean of b. Where u is small compared with |a|^2 + |b|^2, this loses
digits: pairs with u < 1e-2 (|a|^2 + |b|^2) are recomputed from the differences of the rows, in u and in the slope.
Letters: N and M points, d features.
"""

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from fastmargin.ops import pairwise_potential_portable as portable
from fastmargin.ops.backends import BUILD, Impl, native_can_run, pick, triton_can_run
from fastmargin.ops.checks import check_points
from fastmargin.ops.common import once_differentiable, without_autocast


@dataclass(frozen=True)
class Options:
    kind: str
    margin: float
    want_slope: bool
    backend: str


class PairwisePotential(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        a: Tensor,  # [N, d]
        b: Tensor | None,  # [M, d]; None: a
        a_ids: Tensor,  # [N]
        b_ids: Tensor | None,  # [M]
        b_weight: Tensor | None,  # [M]
        options: Options,
    ) -> Tensor:  # [N]
        o = options
        fwd = IMPLS[o.backend].functions["fwd"]
        potential, slope = fwd(a, b, a_ids, b_ids, b_weight, o.kind, o.margin, o.want_slope)
        ctx.save_for_backward(a, b, a_ids, b_ids, b_weight, slope)
        ctx.options = o
        return potential

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any,
        g: Tensor,  # [N]
    ) -> tuple[Any, ...]:
        a, b, a_ids, b_ids, b_weight, slope = ctx.saved_tensors
        o, fwd = ctx.options, IMPLS[ctx.options.backend].functions["fwd"]
        if b is None and g.stride() == (0,):  # expanded, from a plain sum: both rows of a pair have the same g
            return 2 * g[:, None] * slope, None, None, None, None, None
        da = g[:, None] * slope if ctx.needs_input_grad[0] else None
        db = None
        if b is None:
            da += fwd(a, a, a_ids, a_ids, g.contiguous(), o.kind, o.margin, True)[1]
        elif ctx.needs_input_grad[1]:
            db = fwd(b, a, b_ids, a_ids, g.contiguous(), o.kind, o.margin, True)[1]
            db = db if b_weight is None else db * b_weight[:, None]
        return da, db, None, None, None, None


def pairwise_potential(
    a: Tensor,  # [N, d]
    b: Tensor,  # [M, d]
    a_ids: Tensor,  # [N] int64
    b_ids: Tensor,  # [M] int64
    *,
    b_weight: Tensor | None = None,  # [M]
    kind: Literal["inverse", "hinge"],
    margin: float | None = None,
    backend: str | None = None,
) -> Tensor:  # [N]
    """For every row of `a`, the sum over the rows of `b` with another id of phi(squared distance), times b_weight.

    Differentiable once, in a and b. Coincident points have the largest potential and no slope; a row without a pair of
    another id is 0. A NaN feature of a makes the sum of its row NaN, one of b all sums (an infinite feature may also
    count as infinitely far). Where `b` is `a` and `b_ids` is `a_ids`, the same tensors, and there are no weights, the
    CPU computes each pair once.

    Args:
        a: [N, d] points, float32 or float64, any strides; distances are in the units of their features.
        b: [M, d] points of the same dtype.
        a_ids: [N] int64; pairs of equal ids do not count.
        b_ids: [M] int64.
        b_weight: [M], a factor for each row of b, of b's dtype; has no gradient.
        kind: "inverse", 1 / (1 + u), or "hinge", max(margin - u, 0), of the squared distance u.
        margin: of the hinge, on the squared distance; above 0.
        backend: "native", "triton", "stream" or "reference"; None: the first that runs on a's device and dtype.

    Returns:
        [N], in the dtype of a.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, an unknown kind, a hinge without a margin above 0, a
            margin beside "inverse", weights that need a gradient, a backend that cannot run.
    """
    check_points(a, b, a_ids, b_ids, b_weight)
    if kind not in portable.KINDS:
        raise ValueError(f"kind = {kind!r}: want one of {', '.join(portable.KINDS)}")
    if (kind == "hinge") != (margin is not None):
        raise ValueError(f"margin = {margin} with kind = {kind!r}: the hinge has one, the inverse has none")
    if margin is not None and not 0 < margin < math.inf:
        raise ValueError(f"margin = {margin}: want a squared distance above 0")
    want_slope = a.requires_grad and torch.is_grad_enabled()
    options = Options(kind, float(margin or 0), want_slope, pick(IMPLS, a, backend))
    if b is a and b_ids is a_ids and b_weight is None:
        return PairwisePotential.apply(a, None, a_ids, None, None, options)
    return PairwisePotential.apply(a, b, a_ids, b_ids, b_weight, options)


@without_autocast
def triton_fwd(
    a: Tensor,  # [N, d]
    *given: Any,
) -> tuple[Tensor, Tensor]:  # potential [N], slope [N, d] or [0]
    from fastmargin.kernels import pairwise_potential as kernels  # needs triton

    return kernels.forward(a, *given)


IMPLS: dict[str, Impl] = {}
if BUILD.facts:
    IMPLS["native"] = Impl({"fwd": torch.ops.fastmargin.pairwise_potential_fwd.default}, native_can_run)

    @torch.library.register_fake("fastmargin::pairwise_potential_fwd")
    def _(a, b, a_ids, b_ids, b_weight, kind, margin, want_slope):  # type: ignore[no-untyped-def]
        return a.new_empty(a.shape[0]), a.new_empty(a.shape if want_slope else (0,))


IMPLS["triton"] = Impl({"fwd": triton_fwd}, triton_can_run)
IMPLS["stream"] = Impl({"fwd": portable.stream_fwd}, lambda a: True)
IMPLS["reference"] = Impl({"fwd": portable.reference_fwd}, lambda a: True)
