"""Inputs of the metrics, checked; unit vectors; blocks of scores that fit in memory."""

from collections.abc import Iterator
from typing import TypeAlias

import numpy as np
from torch import Tensor

Array: TypeAlias = np.ndarray | Tensor

BLOCK = 2**22  # scores in memory at once, 16 MB of float32


def blocks(rows: int, columns: int) -> Iterator[slice]:
    """Slices over the rows of a rows x columns array of scores, of at most BLOCK scores, but at least one row."""
    step = max(1, BLOCK // max(1, columns))
    return (slice(start, min(start + step, rows)) for start in range(0, rows, step))


def unit(x: Array) -> np.ndarray:  # [n, d] -> float64 unit vectors
    """ValueError as `vectors`, and for a row of zeros, which has no direction."""
    rows = vectors(x)
    if not (nonzero := rows.any(1)).all():
        raise ValueError(f"embedding {nonzero.argmin()} of {len(rows)} is zero; want a direction")
    rows = rows / np.abs(rows).max(1, keepdims=True)  # so that no square overflows or vanishes
    return rows / np.sqrt((rows**2).sum(1, keepdims=True))


def vectors(x: Array) -> np.ndarray:  # [n, d] -> float64
    """ValueError unless they are real, finite and two-dimensional."""
    rows = array(x)
    if rows.ndim != 2 or rows.dtype.kind not in "fiu":
        raise ValueError(f"embeddings are {rows.dtype} {rows.shape}; want real numbers [n, d]")
    rows = rows.astype(np.float64)
    if not (finite := np.isfinite(rows).all(1)).all():
        raise ValueError(f"embedding {finite.argmin()} of {len(rows)} is not finite; want numbers")
    return rows


def scores(name: str, x: Array) -> np.ndarray:  # [n]
    """ValueError, with their name, unless they are one-dimensional, finite and at least one."""
    given = array(x)
    if given.ndim != 1 or not given.size or not np.isfinite(given).all():
        raise ValueError(f"{name} scores have shape {given.shape}; want [n], at least one, all finite")
    return given


def identities(x: Array, images: int) -> np.ndarray:  # [N] of any kind -> [N] 0 to U-1
    """Labels, numbered from 0 in ascending order."""
    return np.unique(labels(x, images), return_inverse=True)[1]


def labels(x: Array, images: int) -> np.ndarray:  # [n]
    """ValueError unless there is one for each image."""
    given = array(x)
    if given.shape != (images,):
        raise ValueError(f"labels have shape {given.shape}; want one for each of {images} images")
    return given


def array(x: Array) -> np.ndarray:
    """As numpy; floating-point tensors as float64, since numpy has no bfloat16."""
    if isinstance(x, Tensor):
        x = x.detach().cpu()
        return (x.double() if x.is_floating_point() else x).numpy()
    return np.asarray(x)
