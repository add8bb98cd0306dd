"""Optimizers of class weights: torch's SGD and AdamW on the rows that were used, optionally in the backward pass.

Which optimizer when: one of torch on `head.parameters()` takes the dense gradient of all classes; ClassSGD and
ClassAdamW are for steps inside the backward pass (no gradient of the weight's size) and for sampled classes (only their
rows are read and changed).

Each is a torch Optimizer of one parameter, `head.weight`: param_groups, state_dict and learning-rate schedulers work as
usual. All other parameters (the backbone, `head.replicated_parameters()`) need an ordinary optimizer of their own. A
head has one class optimizer at a time: `detach()` takes it off.

in_backward=True steps inside the backward pass, a block of classes at a time: the gradient of the whole weight is never
stored, only the weight and the optimizer's state are. `step()` still ends every step. Without it, `zero_grad()` does:
after a forward pass alone nothing has changed, and the head can be called again, or that pass still be back-propagated;
after a backward pass the weights have changed, and the step counts as if `step()` had been called. (The backends triton
and reference compute the whole gradient first.) Every backward pass changes the weights, also one by autograd.grad.
Graphs that saved the old weights then raise, as after any write in place: so if another loss term reads `head.weight`
and is back-propagated together with the head's loss, compute that term after the head's loss.

Where a head samples its classes, a step reads and changes those rows alone. The effect of an SGD step without a
gradient on a skipped row (momentum and weight decay go on) is linear in its (v, w):

    v' = mu v + lam w                 [v', w'] = M [v, w],   M = [[mu, lam], [-lr mu, 1 - lr lam]]
    w' = w - lr v'                    Nesterov: M = [[mu, lam], [-lr mu^2, 1 - lr lam (1 + mu)]]

so a row is updated lazily, when it is next used, by the product of the M of the steps it skipped, and the result is
that of the dense optimizer. The products M_t ... M_k are kept for every k, and each step multiplies all of them by its
M; dividing a prefix product by another would lose all digits. AdamW has no such product: skipped rows are frozen, as in
SparseAdam.
"""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastmargin.distributed.agreement import check_equal, is_replica
from fastmargin.head.margin_head import MarginHead
from fastmargin.ops.backends import HALVES, pick
from fastmargin.ops.class_update import IMPLS, Step, count_write
from fastmargin.ops.common import rows_of
from fastmargin.ops.nontarget_lse import IMPLS as LSE
from fastmargin.ops.operand_cache import OperandCache

HISTORY = 1024  # steps after which all rows are updated, so that the list of products stays short


class ClassOptimizer(torch.optim.Optimizer):
    """Base of both: takes a gradient that is dense, sparse, or consumed in the backward pass."""

    hyper: list[float]  # of the step that is being made
    _step_supports_amp_scaling = True  # see torch_private.py

    def __init__(
        self, head: MarginHead, defaults: dict[str, Any], in_backward: bool, scaler: Any, cache_operands: bool
    ) -> None:
        if not isinstance(head, MarginHead):
            raise ValueError(f"head is a {type(head).__name__}: want a MarginHead")
        if scaler is not None and not in_backward:
            raise ValueError("scaler is for in_backward=True; without it, call scaler.step(optimizer)")
        if in_backward and is_replica(head.classes.group):
            raise ValueError("in_backward=True with a head that other processes hold too: want MarginHead(group=...)")
        if cache_operands:
            check_operand_cache(head, in_backward)
        if head.class_optimizer is not None:
            kind = type(head.class_optimizer).__name__
            raise ValueError(f"the head has a {kind}: take that off first, by head.class_optimizer.detach()")
        self.head, self.in_backward, self.scaler = head, in_backward, scaler
        self.operand_cache = OperandCache() if cache_operands else None
        # "ready" for a forward pass, "forward" after it, "cleared" if zero_grad() was called then, "backward" from the
        # backward pass, which has changed the weights, to step(). Without in_backward always "ready"
        self.stage = "ready"
        self.compared = False  # with the other ranks of the head's group, since the options were set
        super().__init__([head.weight], defaults)
        head.class_optimizer = self

    def detach(self) -> None:
        """Takes the optimizer off its head, which then trains as one without; `step()` raises from then on.

        A step that the backward pass has made is ended, and pending updates of sampled classes are applied first. To go
        on, create another one and give it this one's `state_dict()`.
        """
        if self.stage == "backward":
            self.end_step()
        self.apply_lazy_updates()
        if self.head.class_optimizer is self:
            self.head.class_optimizer = None

    def check_attached(self) -> None:
        if self.head.class_optimizer is not self:
            raise RuntimeError(f"this {type(self).__name__} is detached from its head: create another one")

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        if self.param_groups:
            raise ValueError("a class optimizer has one parameter, head.weight: give others an optimizer of their own")
        super().add_param_group(param_group)

    @property
    def weight(self) -> Tensor:  # [C, d]
        (weight,) = self.param_groups[0]["params"]
        return weight

    def state_tensor(self, name: str) -> Tensor:  # [C, d]
        state = self.state[self.weight]
        if name not in state:
            state[name] = torch.zeros_like(self.weight, memory_format=torch.contiguous_format)
        return state[name]

    def next_step(self) -> Step:
        """The next step, without its gradient. No effect, except that missing state tensors are allocated."""
        raise NotImplementedError

    def apply_lazy_updates(self, subset: Tensor | None = None) -> None:  # [n] local indices; None: all rows
        """Applies the skipped steps of these rows, so that they are as the dense optimizer would have them."""

    def before_forward(self, subset: Tensor | None) -> None:  # [n] local indices; None: all rows
        """Called by the head before it reads these rows in training."""
        if self.stage in ("forward", "backward"):
            raise RuntimeError(
                "a second forward pass before step(): with in_backward=True every forward and backward pass is one "
                "step; gradient accumulation needs in_backward=False"
            )
        if self.stage == "cleared":
            count_write(self.weight)  # so that the pass before can no longer be back-propagated
        self.apply_lazy_updates(subset)
        self.subset = subset
        self.stage = "forward" if self.in_backward else "ready"

    def begin_backward(self) -> Step:
        """Called by the backward pass before it steps."""
        self.check_attached()
        if self.stage not in ("forward", "cleared"):
            raise RuntimeError("a second backward pass before step(): with in_backward=True each is a step of its own")
        self.compare_ranks()
        self.stage = "backward"
        scale = None if self.scaler is None else self.scaler.scale(self.weight.new_ones(()))
        step = self.next_step()._replace(grad_scale=scale)
        self.hyper = step.hyper
        return step

    def compare_ranks(self) -> None:
        """Raises ValueError, on every rank, if the optimizers of a head in a group have different options."""
        if self.compared:
            return
        options = {name: value for name, value in self.param_groups[0].items() if name != "params"}
        kind, scaled = type(self).__name__, self.scaler is not None
        own = {"optimizer": kind, "in_backward": self.in_backward, "whether there is a scaler": scaled}
        check_equal(own | options, self.head.classes.group)
        self.compared = True

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Applies `weight.grad` (dense, or sparse COO of some rows), or ends the step that the backward pass has made.

        Without a gradient nothing happens, as in torch.
        """
        self.check_attached()
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        grad = self.weight.grad
        if self.in_backward:
            if self.scaler is None and getattr(self, "grad_scale", None) is not None:  # within GradScaler.step
                raise RuntimeError(
                    "the backward pass has stepped by a scaled gradient: give scaler= to the optimizer and call step()"
                )
            if grad is not None:
                raise RuntimeError("the weight has a .grad, which in_backward=True does not make: call zero_grad()")
            self.end_step()
        else:
            self.compare_ranks()
            if grad is not None:
                self.apply(grad)
                self.advance()
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As torch's. With in_backward=True it also ends a pass that no `step()` has ended: see the module."""
        super().zero_grad(set_to_none)
        if self.stage == "forward":
            self.stage = "cleared"  # and not "ready": loss, zero_grad(), backward() is a common order
        elif self.stage == "backward":
            self.end_step()

    def end_step(self) -> None:
        """Counts the step if the backward pass has made one. The head is ready for the next forward pass."""
        if self.stage == "backward":
            self.advance()
        self.stage = "ready"

    def apply(self, grad: Tensor) -> None:  # [C, d], dense or sparse
        subset = None
        if grad.is_sparse:
            subset, grad = rows_of(grad)
        if grad.shape[1:] != self.weight.shape[1:] or grad.dtype != self.weight.dtype:
            raise ValueError(f"want a gradient of {self.weight.dtype} rows; got {grad.dtype} {[*grad.shape]}")
        self.subset = subset
        self.apply_lazy_updates(subset)
        state, rule, self.hyper, _ = self.next_step()
        update = IMPLS[pick(IMPLS, self.weight, self.head.backend)].functions["update"]
        update(self.weight, state, grad.contiguous(), subset, rule, self.hyper, self.divisor())
        count_write(self.weight)

    def divisor(self) -> Tensor | None:  # []
        """What gradients are divided by in GradScaler.step: NaN if one is not finite, so that no row changes."""
        scale, found_inf = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        if found_inf is None:
            return None
        scale = torch.ones_like(found_inf) if scale is None else scale
        return torch.where(found_inf > 0, torch.nan, scale).to(self.weight.dtype)

    def advance(self) -> None:
        """Counts a step on the rows `self.subset`, by the numbers `self.hyper`."""
        state = self.state[self.weight]
        state["step"] = state.get("step", 0) + 1

    def state_dict(self) -> dict[str, Any]:
        self.apply_lazy_updates()
        return super().state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.apply_lazy_updates()
        super().load_state_dict(state_dict)
        self.stage, self.compared = "ready", False


class ClassSGD(ClassOptimizer):
    """torch.optim.SGD (dampening 0) for the class weights of a head; exact for sampled classes too.

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
        self.mark_current()

    def mark_current(self) -> None:
        """Call when all rows are up to date: forgets the steps so far, so that T, their number, is 0 again."""
        # [T + 1, 2, 2] products[i]: of the M of steps i + 1 to T, what a row needs that has had i of the T steps
        self.products = np.eye(2)[None]
        # [C + 1] int32: i of each row; the last entry is that of -1, no class, in a subset. None: T for all
        self.steps_applied: Tensor | None = None

    def next_step(self) -> Step:
        group = self.param_groups[0]
        state = [self.state_tensor("momentum_buffer")] if group["momentum"] else []
        hyper = [float(group[name]) for name in ("lr", "momentum", "weight_decay", "nesterov")]
        return Step(state, "sgd", hyper, None)

    @torch.no_grad()
    def apply_lazy_updates(self, subset: Tensor | None = None) -> None:  # [n]
        if self.steps_applied is None:
            return
        T = len(self.products) - 1
        if subset is not None and not subset.is_cuda:  # there it would be a host sync; the last product is the identity
            subset = subset[self.steps_applied[subset] < T]  # without rows that the forward pass has updated already
        products = self.device_products()
        applied = self.steps_applied[:-1] if subset is None else self.steps_applied[subset]
        state = self.next_step().state
        lazy_update = IMPLS[pick(IMPLS, self.weight, self.head.backend)].functions["lazy_update"]
        lazy_update(self.weight, state[0] if state else None, subset, products[applied.long()])
        if subset is None:
            self.mark_current()
        else:
            self.steps_applied[subset] = T

    def device_products(self) -> Tensor:  # [T + 1, 4]
        """Copied from pinned memory: from any other the host would wait."""
        products = torch.from_numpy(self.products.reshape(-1, 4)).to(self.weight.dtype)
        pinned = torch.empty(products.shape, dtype=products.dtype, pin_memory=self.weight.is_cuda)
        return pinned.copy_(products).to(self.weight.device, non_blocking=True)

    def advance(self) -> None:
        super().advance()
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
        self.mark_current()


class ClassAdamW(ClassOptimizer):
    """torch.optim.AdamW for the class weights of a head. A step leaves classes that were not sampled unchanged.

    Args and errors as ClassSGD; lr, betas, eps and weight_decay as torch.optim.AdamW.
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

    def next_step(self) -> Step:
        group, t = self.param_groups[0], self.state[self.weight].get("step", 0) + 1
        (beta1, beta2), lr, decay, eps = group["betas"], group["lr"], group["weight_decay"], group["eps"]
        hyper = [lr, decay, beta1, beta2, eps, 1 - beta1**t, math.sqrt(1 - beta2**t)]
        state = [self.state_tensor("exp_avg"), self.state_tensor("exp_avg_sq")]
        return Step(state, "adamw", [float(h) for h in hyper], None)


def check_operand_cache(head: MarginHead, in_backward: bool) -> None:
    """Raises ValueError where the class weights can have no OperandCache."""
    backend = pick(LSE, head.weight, head.backend)
    for met, given, want in (
        (in_backward, "in_backward=False", "in_backward=True, whose step writes it"),
        (head.compute_dtype in HALVES, f"compute_dtype = {head.compute_dtype}", "torch.bfloat16 or torch.float16"),
        (head.sample_rate == 1, f"sample_rate = {head.sample_rate}", "1.0: all classes"),
        (LSE[backend].keeps_operands(head.weight), f"the {backend} backend on {head.weight.device}", "native on a GPU"),
    ):
        if not met:
            raise ValueError(f"cache_operands=True with {given}: want {want}")


def check_range(name: str, given: float, low: float, high: float) -> None:
    if not low <= given < high:
        raise ValueError(f"{name} = {given}: want {low} or more, below {high}")
