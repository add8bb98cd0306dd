"""SGD of class weights, with the steps that a class skipped applied when it is next used.

Where a head samples its classes, a step reads and changes those rows alone. The effect of an SGD step without a
gradient on a skipped row (momentum and weight decay go on) is linear in its (v, w):

    v' = mu v + lam w                 [v', w'] = M [v, w],   M = [[mu, lam], [-lr mu, 1 - lr lam]]
    w' = w - lr v'                    Nesterov: M = [[mu, lam], [-lr mu^2, 1 - lr lam (1 + mu)]]

so a row is updated lazily, when it is next used, by the product of the M of the steps it skipped, and the result is
that of the dense optimizer. The products M_t ... M_k are kept for every k, and each step multiplies all of them by its
M; dividing a prefix product by another would lose all digits.
"""

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastmargin.head.margin_head import MarginHead
from fastmargin.ops.backends import pick
from fastmargin.ops.class_update import IMPLS, Step
from fastmargin.optim.base import ClassOptimizer, check_range

HISTORY = 1024  # steps after which all rows are updated, so that the list of products stays short


class ClassSGD(ClassOptimizer):
    """torch.optim.SGD (dampening 0) for the class weights of a head; exact for sampled classes too.

    For steps inside the backward pass, and for sampled classes: torch's own takes the dense gradient of all classes.

    Args:
        head: the MarginHead, after it has been moved to its device and dtype.
        lr, momentum, weight_decay, nesterov: as torch.optim.SGD.
        in_backward: step inside the backward pass; one forward and one backward pass a step, no gradient clipping over
            the weight, no accumulation, no replica of the head under DDP.
        scaler: a GradScaler, with in_backward=True: gradients are divided by its scale, and rows whose gradient is not
            finite keep their weight and state; the step counts nevertheless, and skipped rows are updated as usual.
            Without in_backward, scaler.step(optimizer) does so for all rows of a step if one gradient is not finite.
        cache_operands: on a GPU, with in_backward=True, a compute_dtype and all classes: the step also writes the
            weights rounded to compute_dtype, 2 bytes a number more, and the next forward and backward passes read these
            instead of rounding again; results are the same. Any other write to the weight makes the cache stale, and
            the next pass rebuilds it; writes that autograd does not count are not detected: into `weight.data`, by a
            collective into `weight.detach()`, by replays of a CUDA graph. Has not run on a GPU.

    Raises:
        ValueError: options out of range, a head that has a class optimizer, or cache_operands where there can be no
            cache; in the first step, if the ranks of the head's group have different options.
        RuntimeError: a second forward or backward pass before `step()` or `zero_grad()`; a step after `detach()`.
    """

    def __init__(
        self,
        head: MarginHead,
        lr: float,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        *,
        nesterov: bool = False,
        in_backward: bool = False,
        scaler: Any = None,
        cache_operands: bool = False,
    ) -> None:
        check_range("lr", lr, 0, math.inf)
        check_range("momentum", momentum, 0, 1)
        check_range("weight_decay", weight_decay, 0, math.inf)
        if nesterov and momentum == 0:
            raise ValueError("nesterov=True with momentum = 0: want a momentum above 0")
        defaults = dict(lr=lr, momentum=momentum, weight_decay=weight_decay, nesterov=nesterov)
        super().__init__(head, defaults, in_backward, scaler, cache_operands)
        self._mark_current()

    def _mark_current(self) -> None:
        """Call when all rows are up to date: forgets the steps so far, so that T, their number, is 0 again."""
        # [T + 1, 2, 2] products[i]: of the M of steps i + 1 to T, what a row needs that has had i of the T steps
        self.products = np.eye(2)[None]
        # [C + 1] int32: i of each row; the last entry is that of -1, no class, in a subset. None: T for all
        self.steps_applied: Tensor | None = None

    def _next_step(self) -> Step:
        group = self.param_groups[0]
        state = [self.state_tensor("momentum_buffer")] if group["momentum"] else []
        hyper = [float(group[name]) for name in ("lr", "momentum", "weight_decay", "nesterov")]
        return Step(state, "sgd", hyper, None)

    @torch.no_grad()
    def apply_lazy_updates(self, subset: Tensor | None = None) -> None:  # [n]
        """Applies the skipped steps of these rows, so that they are as the dense optimizer would have them.

        Args:
            subset: [n] local indices, on CUDA then perhaps -1; None: all rows.
        """
        if self.steps_applied is None:
            return
        T = len(self.products) - 1
        if subset is not None and not subset.is_cuda:  # there it would be a host sync; the last product is the identity
            subset = subset[self.steps_applied[subset] < T]  # without rows that the forward pass has updated already
        products = self._device_products()
        applied = self.steps_applied[:-1] if subset is None else self.steps_applied[subset]
        state = self._next_step().state
        lazy_update = IMPLS[pick(IMPLS, self.weight, self.head.backend)].functions["lazy_update"]
        lazy_update(self.weight, state[0] if state else None, subset, products[applied.long()])
        if subset is None:
            self._mark_current()
        else:
            self.steps_applied[subset] = T

    def _device_products(self) -> Tensor:  # [T + 1, 4]
        """Copied from pinned memory: from any other the host would wait."""
        products = torch.from_numpy(self.products.reshape(-1, 4)).to(self.weight.dtype)
        pinned = torch.empty(products.shape, dtype=products.dtype, pin_memory=self.weight.is_cuda)
        return pinned.copy_(products).to(self.weight.device, non_blocking=True)

    def _advance(self) -> None:
        super()._advance()
        if self.subset is None and self.steps_applied is None:
            return
        if self.steps_applied is None:
            self.steps_applied = torch.zeros(len(self.weight) + 1, dtype=torch.int32, device=self.weight.device)
        lr, mu, lam, nesterov = self.hyper  # and not those of now: a schedule may have stepped since the backward pass
        w_row = np.array([-lr * mu * mu, 1 - lr * lam * (1 + mu)] if nesterov else [-lr * mu, 1 - lr * lam])
        self.products = np.concatenate([np.array([[mu, lam], w_row]) @ self.products, np.eye(2)[None]])
        self.steps_applied[slice(None) if self.subset is None else self.subset] = len(self.products) - 1
        if len(self.products) > HISTORY:
            self.apply_lazy_updates()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._mark_current()
