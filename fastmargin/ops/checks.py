"""Checks of the arguments of ops and losses. In Python, so that messages can name the argument."""

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
    """Shapes, dtypes and devices, not values: no synchronization. Raises ValueError."""
    given = {"x": x, "w": w, "y": y, "bias": bias, "class_ids": class_ids}
    check_tensors(given, optional=("bias", "class_ids"))
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
        raise ValueError("a bias has no meaning beside normalized weights: pass normalize_weight=False")
    if class_ids is not None and (class_ids.ndim != 1 or class_ids.dtype != torch.int64):
        raise ValueError(f"want class_ids [n] int64; got {[*class_ids.shape]} {class_ids.dtype}")
    check_one_device(given)


def check_tensors(given: dict[str, Tensor | None], optional: tuple[str, ...]) -> None:
    for name, value in given.items():
        if not isinstance(value, Tensor) and (value is not None or name not in optional):
            raise ValueError(f"{name} is a {type(value).__name__}: want a tensor")


def check_int64(name: str, ids: Tensor, rows: int | None) -> None:  # [rows]; None: of any length B
    """Labels or ids, one for each row; not their values. Raises ValueError."""
    if ids.ndim != 1 or ids.dtype != torch.int64 or (rows is not None and len(ids) != rows):
        raise ValueError(f"want int64 {name} [{'B' if rows is None else rows}]; got {ids.dtype} {[*ids.shape]}")


def check_label_range(labels: Tensor, low: int, high: int) -> None:  # [B]
    """Labels in [low, high). Not validated in compiled code and on CUDA, where it would synchronize."""
    if labels.device.type != "cpu" or torch.compiler.is_compiling():
        return
    for i in ((labels < low) | (labels >= high)).nonzero()[:1].flatten().tolist():
        raise ValueError(f"label {int(labels[i])} of row {i} is outside [{low}, {high})")


def check_one_device(tensors: dict[str, Tensor | None]) -> None:
    (first, device), *others = ((name, t.device) for name, t in tensors.items() if t is not None)
    different = sorted({str(other) for _, other in others} - {str(device)})
    if different:
        raise ValueError(f"{first} is on {device}, other arguments on {', '.join(different)}")


def check_ids(
    y: Tensor,  # [B]
    class_ids: Tensor | None,  # [n]
    num_classes: int,
) -> None:
    """Labels in [-1, n) and class_ids sorted, unique, in [0, C), for the portable backends: the native op checks them.

    Not validated in compiled code and on CUDA, where it would synchronize.
    """
    if y.device.type != "cpu" or torch.compiler.is_compiling():
        return
    n = num_classes
    if class_ids is not None:
        n = len(class_ids)
        invalid = (class_ids < 0) | (class_ids >= num_classes)
        invalid[1:] |= class_ids[1:] <= class_ids[:-1]
        for j in invalid.nonzero()[:1].flatten().tolist():
            raise ValueError(
                f"class_ids[{j}] = {int(class_ids[j])}: want sorted, unique class ids in [0, {num_classes})"
            )
    check_label_range(y, -1, n)


def check_points(
    a: Tensor,  # [N, d]
    b: Tensor,  # [M, d]
    a_ids: Tensor,  # [N]
    b_ids: Tensor,  # [M]
    b_weight: Tensor | None,  # [M]
) -> None:
    """Shapes, dtypes and devices, not values: no synchronization. Raises ValueError."""
    given = {"a": a, "b": b, "a_ids": a_ids, "b_ids": b_ids, "b_weight": b_weight}
    check_tensors(given, optional=("b_weight",))
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1] or a.shape[1] == 0:
        raise ValueError(f"want a [N, d] and b [M, d], d above 0; got {[*a.shape]}, {[*b.shape]}")
    if a.dtype not in DTYPES or b.dtype != a.dtype:
        raise ValueError(f"want a and b both float32 or both float64; got {a.dtype} and {b.dtype}")
    for name, ids, points in (("a_ids", a_ids, a), ("b_ids", b_ids, b)):
        check_int64(name, ids, len(points))
    if b_weight is not None and (b_weight.shape != b.shape[:1] or b_weight.dtype != b.dtype):
        raise ValueError(f"want b_weight {b.dtype} [{len(b)}]; got {b_weight.dtype} {[*b_weight.shape]}")
    if b_weight is not None and b_weight.requires_grad:
        raise ValueError("b_weight needs a gradient, and has none: detach it")
    check_one_device(given)
