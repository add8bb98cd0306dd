"""Checks of op arguments, in Python where the message can name what was given."""

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.float64)


def check_operands(
    x: Tensor,  # [B, d]
    w: Tensor,  # [C, d]
    y: Tensor,  # [B]
    bias: Tensor | None,  # [C]
    rows: Tensor | None,  # [n]
    normalize_weight: bool,
) -> None:
    """Shapes, dtypes and devices; no look at the data. Raises ValueError."""
    for name, given in {"x": x, "w": w, "y": y, "bias": bias, "rows": rows}.items():
        if not isinstance(given, Tensor) and (given is not None or name in "xwy"):
            raise ValueError(f"{name} is a {type(given).__name__}: want a tensor")
    if x.ndim != 2 or w.ndim != 2 or x.shape[1] != w.shape[1] or y.shape != x.shape[:1]:
        raise ValueError(f"want x [B, d], w [C, d], y [B]; got {[*x.shape]}, {[*w.shape]}, {[*y.shape]}")
    if x.shape[1] == 0:
        raise ValueError("x and w have no features: d is 0")
    if x.dtype not in DTYPES or w.dtype != x.dtype:
        raise ValueError(f"want x and w both float32 or both float64; got {x.dtype} and {w.dtype}")
    if y.dtype != torch.int64:
        raise ValueError(f"want y int64; got {y.dtype}")
    if bias is not None and (bias.shape != w.shape[:1] or bias.dtype != w.dtype):
        raise ValueError(f"want bias [C] of w's dtype; got {[*bias.shape]} {bias.dtype} for w {[*w.shape]} {w.dtype}")
    if bias is not None and normalize_weight:
        raise ValueError("a bias has no meaning beside normalised weights: pass normalize_weight=False")
    if rows is not None and (rows.ndim != 1 or rows.dtype != torch.int64):
        raise ValueError(f"want rows [n] int64; got {[*rows.shape]} {rows.dtype}")
    others = {str(t.device) for t in (w, y, bias, rows) if t is not None} - {str(x.device)}
    if others:
        raise ValueError(f"x is on {x.device}, other arguments on {', '.join(sorted(others))}")


def check_ids(
    y: Tensor,  # [B]
    rows: Tensor | None,  # [n]
    num_classes: int,
) -> None:
    """Labels in [-1, n) and rows sorted, unique, in [0, C), for the portable backends on the CPU.

    The native op checks for itself; a check on a GPU would stall it.
    """
    if y.device.type != "cpu" or torch.compiler.is_compiling():
        return
    n = num_classes
    if rows is not None:
        n = len(rows)
        wrong = (rows < 0) | (rows >= num_classes)
        wrong[1:] |= rows[1:] <= rows[:-1]
        for j in wrong.nonzero()[:1].flatten().tolist():
            raise ValueError(f"rows[{j}] = {int(rows[j])}: want sorted, unique class ids in [0, {num_classes})")
    for i in ((y < -1) | (y >= n)).nonzero()[:1].flatten().tolist():
        raise ValueError(f"label {int(y[i])} of row {i} is outside [-1, {n})")
