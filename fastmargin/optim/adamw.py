"""AdamW of class weights. Its skipped steps have no product as those of SGD: rows that were not drawn are left as they
are, as in SparseAdam."""

import math
from typing import Any

from fastmargin.head.margin_head import MarginHead
from fastmargin.ops.class_update import Step
from fastmargin.optim.base import ClassOptimizer, check_range


class ClassAdamW(ClassOptimizer):
    """torch.optim.AdamW for the class weights of a head. A step leaves classes that were not sampled unchanged.

    For steps inside the backward pass, and for sampled classes: torch's own takes the dense gradient of all classes.

    Args:
        head: the MarginHead, after it has been moved to its device and dtype.
        lr, betas, eps, weight_decay: as torch.optim.AdamW.
        in_backward, scaler, cache_operands: as `ClassSGD`.

    Raises:
        ValueError, RuntimeError: as `ClassSGD`.
    """

    def __init__(
        self,
        head: MarginHead,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        in_backward: bool = False,
        scaler: Any = None,
        cache_operands: bool = False,
    ) -> None:
        check_range("lr", lr, 0, math.inf)
        check_range("betas[0]", betas[0], 0, 1)
        check_range("betas[1]", betas[1], 0, 1)
        check_range("eps", eps, 0, math.inf)
        check_range("weight_decay", weight_decay, 0, math.inf)
        defaults = dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)
        super().__init__(head, defaults, in_backward, scaler, cache_operands)

    def _next_step(self) -> Step:
        group, t = self.param_groups[0], self.state[self.weight].get("step", 0) + 1
        (beta1, beta2), lr, decay, eps = group["betas"], group["lr"], group["weight_decay"], group["eps"]
        hyper = [lr, decay, beta1, beta2, eps, 1 - beta1**t, math.sqrt(1 - beta2**t)]
        state = [self.state_tensor("exp_avg"), self.state_tensor("exp_avg_sq")]
        return Step(state, "adamw", [float(h) for h in hyper], None)
