"""Untrusted files of torch.save: no code in them is run, and only tensors that are used are read from disk."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


def read_tensor(file: Path, *names: str) -> Tensor:
    """The matrix at [names[0]][names[1]]... of the nested dicts in a file, memory-mapped.

    ValueError for a file that torch.save did not write, that has anything but tensors and plain values in it, or that
    has no such matrix.
    """
    try:
        found: Any = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:
        raise ValueError(f"{file}: not a file of torch.save with tensors and plain values alone ({error})") from error
    for name in names:
        if not isinstance(found, Mapping) or name not in found:
            has = f"it has {', '.join(map(str, found))}" if isinstance(found, Mapping) else "it is no dict"
            raise ValueError(f"{file}: no {name!r} of {'/'.join(names)}: {has}")
        found = found[name]
    if not isinstance(found, Tensor) or not found.is_floating_point() or found.dim() != 2:
        raise ValueError(f"{file}: {'/'.join(names)} is {described(found)}: want a matrix of floating point")
    return found


def described(found: Any) -> str:
    return f"{found.dtype} {[*found.shape]}" if isinstance(found, Tensor) else f"a {type(found).__name__}"
