"""A shadow of class weights: the operands of a GPU's matrix products, kept from one pass to the next.

    o_j = w_j power_j, rounded to 16 bits;    power_j factor_j = 1 / ||w_j||, or 1 where weights are not normalised

Without one, the forward pass and the backward pass each read w, take norms and round. The step that a backward pass
makes has every new row at hand and writes its o, power and factor too: the products of the next passes read these. The
forward pass then reads 2 bytes a number and not 4; the backward pass reads o, and w for the projection and the step.
They are the numbers that those passes would have made, bit for bit.

A shadow holds for the memory, the version and the rounding of the weights it was made of; a step that writes it counts
the version of both. After any other write that autograd counts (copy_, load_state_dict, imprint) the next pass makes it
anew; one into `weight.data`, by a collective into `weight.detach()` or by a replay of a CUDA graph goes unseen. Where
the weights get other memory (`weight.data = t`) it keeps the old until that next pass. It is no part of an optimiser's
state, and is never saved. Letters: C classes, d features.
"""

from collections.abc import Callable

import torch
from torch import Tensor


class OperandCache:
    """Of one weight at a time; empty at first."""

    def __init__(self) -> None:
        self.invalidate()

    def invalidate(self) -> None:
        """What it has does not hold any more."""
        self.source: Tensor | None = None  # [C, d] the weight; while it is here, its memory is given to no other
        self.made: tuple[int, bool, torch.dtype] | None = None
        self.parts: dict[str, Tensor] = {}

    def get(
        self,
        w: Tensor,  # [C, d]
        normalize_weight: bool,
        dtype: torch.dtype,
        make: Callable[[Tensor, bool, Tensor, Tensor], None],
    ) -> dict[str, Tensor]:  # operands [C, d], scales [2, C]: power and factor
        """The shadow of w as it is now, made by the op `class_operands` where there is none."""
        wanted = w._version, normalize_weight, dtype
        if self.source is None or not self.source.is_set_to(w) or self.made != wanted:
            self.invalidate()
            parts = {"operands": torch.empty_like(w, dtype=dtype), "scales": w.new_empty(2, len(w))}
            make(w, normalize_weight, *parts.values())
            self.source, self.made, self.parts = w.detach(), wanted, parts
        return self.parts

    def mark_current(self, w: Tensor) -> None:  # [C, d]
        """It is of w as a step has left it, and as autograd has counted that step."""
        if self.made is not None:
            self.made = w._version, *self.made[1:]
