"""What the optimizers of class weights share: the order of the passes of a head, and the step (see __init__.py)."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastmargin.distributed.agreement import check_equal, is_replica
from fastmargin.head.margin_head import MarginHead
from fastmargin.ops.backends import HALVES, pick
from fastmargin.ops.class_update import IMPLS, Step, count_write
from fastmargin.ops.common import rows_of
from fastmargin.ops.nontarget_lse import IMPLS as LSE
from fastmargin.ops.operand_cache import OperandCache


class ClassOptimizer(torch.optim.Optimizer):
    """Base of both: takes a gradient that is dense, sparse, or consumed in the backward pass.

    State of the step that is being made: `stage`, see below; `subset` [n], the local indices of its classes, None for
    all; `hyper`, its numbers. `compared`: whether the ranks of the head's group have compared their options.
    """

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
            self._end_step()
        self.apply_lazy_updates()
        if self.head.class_optimizer is self:
            self.head.class_optimizer = None

    def _check_attached(self) -> None:
        if self.head.class_optimizer is not self:
            raise RuntimeError(f"this {type(self).__name__} is detached from its head: create another one")

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        if self.param_groups:
            raise ValueError("a class optimizer has one parameter, head.weight: give others an optimizer of their own")
        super().add_param_group(param_group)

    @property
    def weight(self) -> Tensor:  # [C, d]
        """The parameter [C, d]."""
        (weight,) = self.param_groups[0]["params"]
        return weight

    def state_tensor(self, name: str) -> Tensor:  # [C, d]
        """A tensor of the state of the weight; made, of zeros, if it is missing.

        Args:
            name: as torch's optimizer calls it: momentum_buffer, exp_avg or exp_avg_sq.

        Returns:
            [C, d], of this rank's classes; changed in place by each step.
        """
        state = self.state[self.weight]
        if name not in state:
            state[name] = torch.zeros_like(self.weight, memory_format=torch.contiguous_format)
        return state[name]

    def _next_step(self) -> Step:
        """The next step, without its gradient. No effect, except that missing state tensors are allocated."""
        raise NotImplementedError

    def apply_lazy_updates(self, subset: Tensor | None = None) -> None:  # [n] local indices; None: all rows
        """Applies the skipped steps of these rows, so that they are as the dense optimizer would have them.

        Args:
            subset: [n] local indices; None: all rows.
        """

    def before_forward(self, subset: Tensor | None) -> None:  # [n] local indices; None: all rows
        """Called by the head before it reads these rows in training.

        Args:
            subset: [n] local indices; None: all rows.

        Raises:
            RuntimeError: with in_backward=True, a second forward pass before `step()` or `zero_grad()`.
        """
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
        """Called by the backward pass before it steps.

        Returns:
            The step to make, without its gradient.

        Raises:
            RuntimeError: a second backward pass before `step()`, or one after `detach()`.
            ValueError: the ranks of the head's group have different options.
        """
        self._check_attached()
        if self.stage not in ("forward", "cleared"):
            raise RuntimeError("a second backward pass before step(): with in_backward=True each is a step of its own")
        self._compare_ranks()
        self.stage = "backward"
        scale = None if self.scaler is None else self.scaler.scale(self.weight.new_ones(()))
        step = self._next_step()._replace(grad_scale=scale)
        self.hyper = step.hyper
        return step

    def _compare_ranks(self) -> None:
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
        self._check_attached()
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
            self._end_step()
        else:
            self._compare_ranks()
            if grad is not None:
                self._apply(grad)
                self._advance()
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As torch's. With in_backward=True it also ends a pass that no `step()` has ended: see the module."""
        super().zero_grad(set_to_none)
        if self.stage == "forward":
            self.stage = "cleared"  # and not "ready": loss, zero_grad(), backward() is a common order
        elif self.stage == "backward":
            self._end_step()

    def _end_step(self) -> None:
        """Counts the step if the backward pass has made one. The head is ready for the next forward pass."""
        if self.stage == "backward":
            self._advance()
        self.stage = "ready"

    def _apply(self, grad: Tensor) -> None:  # [C, d], dense or sparse
        subset = None
        if grad.is_sparse:
            subset, grad = rows_of(grad)
        if grad.shape[1:] != self.weight.shape[1:] or grad.dtype != self.weight.dtype:
            raise ValueError(f"want a gradient of {self.weight.dtype} rows; got {grad.dtype} {[*grad.shape]}")
        self.subset = subset
        self.apply_lazy_updates(subset)
        step = self._next_step()._replace(grad_scale=self._divisor())
        self.hyper = step.hyper
        update = IMPLS[pick(IMPLS, self.weight, self.head.backend)].functions["update"]
        update(self.weight, grad.contiguous(), subset, step)
        count_write(self.weight)

    def _divisor(self) -> Tensor | None:  # []
        """What gradients are divided by in GradScaler.step: NaN if one is not finite, so that no row changes."""
        scale, found_inf = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        if found_inf is None:
            return None
        scale = torch.ones_like(found_inf) if scale is None else scale
        return torch.where(found_inf > 0, torch.nan, scale).to(self.weight.dtype)

    def _advance(self) -> None:
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
