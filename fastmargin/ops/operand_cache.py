"""OperandCache: class weights rounded for the matrix products of a GPU, kept from one pass to the next.

    o_j = w_j exponent_scale_j, rounded to 16 bits
    exponent_scale_j residual_scale_j = 1 / ||w_j||, or 1 where weights are not normalized

Without a cache the forward pass and the backward pass each read w, compute norms and round. An optimizer step within
the backward pass has every new row at hand and writes its o, exponent_scale and residual_scale as well, for the next
passes. Then the forward pass reads 2 bytes a number and not 4; the backward pass reads o, and w for the projection and
the step. The numbers are the same as without a cache, bit for bit.

A cache is valid for the memory, the version counter and the dtype of the weights that it was made from; a step that
writes the cache updates its version. After any other write that autograd counts (copy_, load_state_dict, imprint) the
next pass rebuilds the cache. Writes that autograd does not count are not detected: into `weight.data`, by a
collective into `weight.detach()`, by a replay of a CUDA graph. If the weights get other memory (`weight.data = t`), the
cache keeps the old memory alive until the next pass. It is not part of the optimizer's state, and is never saved.
Letters: C classes, d features.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from fastmargin.torch_private import version_of


class OperandCache:
    """Holds the operands of one weight at a time; empty at first."""

    def __init__(self) -> None:
        self.invalidate()

    def invalidate(self) -> None:
        """Drops the operands."""
        self.source: Tensor | None = None  # [C, d] the weight; held, so that its memory is not reused by another
        self.key: tuple[int, bool, torch.dtype] | None = None  # version, normalize_weight, dtype of the operands
        self.parts: dict[str, Tensor] = {}

    def get(
        self,
        w: Tensor,  # [C, d]
        normalize_weight: bool,
        dtype: torch.dtype,
        make: Callable[[Tensor, bool, Tensor, Tensor], None],
    ) -> dict[str, Tensor]:  # operands [C, d], scales [2, C]: exponent_scale and residual_scale
        """The operands of w as it is now; made by `make`, the op `class_operands`, if they are missing or stale."""
        key = version_of(w), normalize_weight, dtype
        if self.source is None or not self.source.is_set_to(w) or self.key != key:
            self.invalidate()
            parts = {"operands": torch.empty_like(w, dtype=dtype), "scales": w.new_empty(2, len(w))}
            make(w, normalize_weight, *parts.values())
            self.source, self.key, self.parts = w.detach(), key, parts
        return self.parts

    def mark_current(self, w: Tensor) -> None:  # [C, d]
        """Call after a step that wrote w and the operands, once autograd has counted it."""
        if self.key is not None:
            self.key = version_of(w), *self.key[1:]
