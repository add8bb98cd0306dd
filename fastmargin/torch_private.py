"""What torch tells by private names alone; they may change with its version."""

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel


def within_backward_pass() -> bool:
    """Whether the caller runs inside a backward pass, as the recomputed part of activation checkpointing does."""
    return torch._C._current_graph_task_id() != -1


def within_ddp(module: nn.Module) -> bool:
    """Whether the caller runs in the forward pass of a DistributedDataParallel that contains the module."""
    ddp = DistributedDataParallel._active_ddp_module
    return ddp is not None and any(part is module for part in ddp.module.modules())
