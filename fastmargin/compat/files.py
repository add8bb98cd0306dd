"""torch.save's files of strangers: nothing in them is run, and what is not looked at is not read."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


def read_tensor(file: Path, *names: str) -> Tensor:
    """The tensor at names[0], in that at names[1], and so on, of the dicts in a file; mapped, so read when it is used.

    ValueError for a file that is not one of torch.save's, has anything but tensors and plain values in it, or has no
    such tensor.
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
