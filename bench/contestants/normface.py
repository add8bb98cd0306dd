"""The loss without a margin (NormFace, s = 64), cross entropy of scaled cosines, by libraries that have no margins.

Those that fuse a linear layer with the loss take its operands: they are given normalized ones, the features times s.
"""

from importlib import import_module

import torch
import torch.nn.functional as F
from contestants.arcface import Loss, Prepare, S, head
from torch import Tensor

from fastmargin import NormFace


def operands(f: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:  # [B, d], [C, d] -> [B, d], [C, d]
    return S * F.normalize(f), F.normalize(w)


def eager_loss(f: Tensor, w: Tensor, y: Tensor) -> Tensor:  # [B, d], [C, d], [B] -> []
    return F.cross_entropy(S * F.linear(F.normalize(f), F.normalize(w)), y)


def eager(f: Tensor, w: Tensor, y: Tensor) -> Loss:  # [B, d], [C, d], [B]
    return lambda: eager_loss(f, w, y)


def cut_cross_entropy(f: Tensor, w: Tensor, y: Tensor) -> Loss:  # [B, d], [C, d], [B]
    """Its torch path, which it compiles itself: its Triton kernels need a GPU."""
    loss = import_module("cut_cross_entropy").linear_cross_entropy
    return lambda: loss(*operands(f, w), y, impl="torch_compile")


def linear_cross_entropy(f: Tensor, w: Tensor, y: Tensor) -> Loss:  # [B, d], [C, d], [B]
    return lambda: F.linear_cross_entropy(*operands(f, w), y)


def chunked(f: Tensor, w: Tensor, y: Tensor) -> Loss:  # [B, d], [C, d], [B]
    # By default it takes chunks of one row with this many classes: minutes a step.
    options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=64, chunking_method=None)
    return lambda: F.linear_cross_entropy(*operands(f, w), y, options=options)


NORMFACE: dict[str, Prepare] = {
    "NormFace: eager": eager,
    "NormFace: cut-cross-entropy, torch path": cut_cross_entropy,
    "NormFace: F.linear_cross_entropy": linear_cross_entropy,
    "NormFace: F.linear_cross_entropy, 64-row chunks": chunked,
    "NormFace: fastmargin native": head(NormFace(s=S), backend="native"),
}
