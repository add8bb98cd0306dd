"""All that this package uses of torch by private names; they may change with its version (tests/test_torch_private.py).

Three names stand in classes elsewhere, since torch looks for them there:

    Optimizer._step_supports_amp_scaling    optim: GradScaler.step then sets grad_scale and found_inf on the optimizer,
                                            and does not wait for the device
    Module._replicate_for_data_parallel     head.class_weights: DataParallel calls it for every replica
    Module._parameters                      head.class_weights: the weight itself, past the head's own __getattr__
"""

from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel


def within_backward_pass() -> bool:
    """Whether the caller runs inside a backward pass, as the recomputed part of activation checkpointing does."""
    return torch._C._current_graph_task_id() != -1


def within_ddp(module: nn.Module) -> bool:
    """Whether the caller runs in the forward pass of a DistributedDataParallel that contains the module."""
    ddp = DistributedDataParallel._active_ddp_module
    return ddp is not None and any(part is module for part in ddp.module.modules())


def version_of(tensor: Tensor) -> int:
    """How often autograd has seen the tensor, or one that shares its memory, written in place."""
    return tensor._version


def preserved_version(tensor: Tensor) -> AbstractContextManager[Any]:
    """Writes to the tensor in its body are not counted, so that graphs which saved it do not raise."""
    return torch.autograd._unsafe_preserve_version_counter(tensor)


class GradScaler(torch.amp.GradScaler):
    """torch's, with a method that sees the marks of gradients that are not finite before anything reads them."""

    def on_found_inf(self, found_inf: dict[torch.device, Tensor]) -> None:  # [1] each
        """Called once for each optimizer and step; may change the marks in place. 1.0: some gradient is not finite."""

    def _unscale_grads_(self, *arguments: Any) -> dict[torch.device, Tensor]:
        found_inf = super()._unscale_grads_(*arguments)
        self.on_found_inf(found_inf)
        return found_inf
