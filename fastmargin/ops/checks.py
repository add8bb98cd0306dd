"""Checks of op arguments, in Python where the message can name what was given."""

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.float64)


def check_operands(
    x: Tensor,  # [B, d]
    w: Tensor,  # [C, d]
    y: Tensor,  # [B]
    bias: Tensor | None,  # [C]
    class_ids: Tensor | None,  # [n]
    normalize_weight: bool,
) -> None:
    """Shapes, dtypes and devices; no look at the data. Raises ValueError."""
    for name, given in {"x": x, "w": w, "y": y, "bias": bias, "class_ids": class_ids}.items():
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
    if class_ids is not None and (class_ids.ndim != 1 or class_ids.dtype != torch.int64):
        raise ValueError(f"want class_ids [n] int64; got {[*class_ids.shape]} {class_ids.dtype}")
    check_one_device({"x": x, "w": w, "y": y, "bias": bias, "class_ids": class_ids})


def check_one_device(tensors: dict[str, Tensor | None]) -> None:
    (first, one), *others = ((name, t.device) for name, t in tensors.items() if t is not None)
    elsewhere = sorted({str(device) for _, device in others} - {str(one)})
    if elsewhere:
        raise ValueError(f"{first} is on {one}, other arguments on {', '.join(elsewhere)}")


def check_ids(
    y: Tensor,  # [B]
    class_ids: Tensor | None,  # [n]
    num_classes: int,
) -> None:
    """Labels in [-1, n) and class_ids sorted, unique, in [0, C), for the portable backends on the CPU.

    The native op checks for itself; a check on a GPU would stall it.
    """
    if y.device.type != "cpu" or torch.compiler.is_compiling():
        return
    n = num_classes
    if class_ids is not None:
        n = len(class_ids)
        wrong = (class_ids < 0) | (class_ids >= num_classes)
        wrong[1:] |= class_ids[1:] <= class_ids[:-1]
        for j in wrong.nonzero()[:1].flatten().tolist():
            raise ValueError(
                f"class_ids[{j}] = {int(class_ids[j])}: want sorted, unique class ids in [0, {num_classes})"
            )
    for i in ((y < -1) | (y >= n)).nonzero()[:1].flatten().tolist():
        raise ValueError(f"label {int(y[i])} of row {i} is outside [-1, {n})")


def check_points(
    a: Tensor,  # [N, d]
    b: Tensor,  # [M, d]
    a_ids: Tensor,  # [N]
    b_ids: Tensor,  # [M]
    b_weight: Tensor | None,  # [M]
) -> None:
    """Shapes, dtypes and devices; no look at the data. Raises ValueError."""
    for name, given in {"a": a, "b": b, "a_ids": a_ids, "b_ids": b_ids, "b_weight": b_weight}.items():
        if not isinstance(given, Tensor) and (given is not None or name != "b_weight"):
            raise ValueError(f"{name} is a {type(given).__name__}: want a tensor")
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1] or a.shape[1] == 0:
        raise ValueError(f"want a [N, d] and b [M, d], d above 0; got {[*a.shape]}, {[*b.shape]}")
    if a.dtype not in DTYPES or b.dtype != a.dtype:
        raise ValueError(f"want a and b both float32 or both float64; got {a.dtype} and {b.dtype}")
    for name, ids, points in (("a_ids", a_ids, a), ("b_ids", b_ids, b)):
        if ids.shape != points.shape[:1] or ids.dtype != torch.int64:
            raise ValueError(f"want int64 {name} [{len(points)}]; got {ids.dtype} {[*ids.shape]}")
    if b_weight is not None and (b_weight.shape != b.shape[:1] or b_weight.dtype != b.dtype):
        raise ValueError(f"want b_weight {b.dtype} [{len(b)}]; got {b_weight.dtype} {[*b_weight.shape]}")
    if b_weight is not None and b_weight.requires_grad:
        raise ValueError("b_weight needs a gradient, and has none: detach it")
    check_one_device({"a": a, "b": b, "a_ids": a_ids, "b_ids": b_ids, "b_weight": b_weight})
