"""What updates the weights of a run: optimizers, learning rate, gradient clipping, and an average of the weights.

The class weights have an optimizer of their own, ClassSGD or ClassAdamW of fastmargin.optim. Unless gradients are
accumulated or clipped first, it steps inside the backward pass, and the gradient of the class weights is never stored.
All other parameters have torch's optimizer. The learning rate lr(n) and the averaged weights a(n), where n counts the
steps made, w is the warm-up, T the steps of a cycle, t those made in it, f = final_lr:

    lr(n) = lr (n + 1) / w                                n < w
          = lr (f + (1 - f) (1 + cos(pi t / T)) / 2)      cosine; with cycle = T the warm restarts of SGDR (Loshchilov
                                                          and Hutter 2017, eq. 5), each cycle_factor times as long
          = lr milestone_factor^(milestones up to n)      steps
          = lr                                            constant
    a(n)  = b a(n - 1) + (1 - b) weights,  b = min(ema, (1 + n) / (10 + n)): a young average forgets the initial weights

A gradient that is not finite leaves weights and moments unchanged, without a host sync: GradScaler marks it on the
device (found_inf), and torch's fused optimizers and ours read the mark there and skip the step. So there is always a
GradScaler. With fp16 it is the usual one, which searches for a loss scale and skips steps on the way. Otherwise its
scale starts at 1 and can only fall: `failed`, asked on logging steps, says whether it has. (torch._assert_async would
end the process on a GPU without an explanation. ClassSGD inside the backward pass steps, if the gradient of the class
weights is finite, before that of the backbone is known.)

Of N processes each has all weights except those of other ranks' classes. Gradients of what all ranks have are averaged,
hence equal on all, and so are the steps and what GradScaler finds. Each rank has its own class weights: if their
gradient is not finite on one rank, all ranks skip the step and keep the same scale. (A step inside the backward pass
skips single rows.)
"""

import copy
import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from fastmargin.distributed.layout import Group
from fastmargin.driver.config import OptimConfig
from fastmargin.driver.training.processes import average
from fastmargin.head.margin_head import MarginHead
from fastmargin.optim import ClassAdamW, ClassSGD
from fastmargin.optim.base import ClassOptimizer
from fastmargin.torch_private import GradScaler

NEVER = 2**31 - 1  # steps


class Scaler(GradScaler):
    """A GradScaler whose found_inf is 1 on all ranks of a group if it is 1 on any.

    ShardedGradScaler of torch 2.13 adds found_inf over the ranks, and fused optimizers skip a step only where it is 1.
    """

    def __init__(self, group: Group | None, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.group = group

    def on_found_inf(self, found_inf: dict[torch.device, Tensor]) -> None:
        if self.group is not None:
            for found in found_inf.values():
                dist.all_reduce(found, dist.ReduceOp.MAX, group=self.group)


class Optimizers:
    """The optimizers of a run, stepped together.

    model, terms: what is trained beside the head. `classes` updates head.weight, `rest` all other parameters. In a
    group DDP averages the gradients of the model, the head those of its replicated parameters, and this class those of
    the terms.
    """

    def __init__(self, config: OptimConfig, head: MarginHead, model: nn.Module, terms: nn.Module) -> None:
        self.config, self.head, self.group = config, head, head.classes.group
        self.terms = [p for p in terms.parameters() if p.requires_grad]
        self.others = others = [*(p for p in model.parameters() if p.requires_grad), *self.terms]
        replicated = [p for p in head.replicated_parameters() if p.requires_grad]
        in_backward = config.clip is None and config.accumulation == 1 and bool(others)
        self.scaler = build_scaler(config, head.weight.device, self.group)
        self.classes = build_classes(config, head, in_backward, self.scaler)
        groups = [{"params": others, "factor": 1.0}, {"params": replicated, "factor": config.head_lr}]
        self.rest = build_rest(config, groups)
        self.classes.param_groups[0]["factor"] = config.head_lr
        self.each = [self.rest, self.classes] if others or replicated else [self.classes]
        self.rate = 0.0  # of the last step

    def set_rate(self, step: int) -> None:
        self.rate = learning_rate(self.config, step)
        for optimizer in self.each:
            for group in optimizer.param_groups:
                group["lr"] = self.rate * group["factor"]

    def zero_grad(self) -> None:
        for optimizer in self.each:
            optimizer.zero_grad()

    def backward(self, loss: Tensor) -> None:  # []
        self.scaler.scale(loss).backward()

    def step(self) -> None:
        average(self.terms, self.group)
        if self.config.clip is not None:
            self.clip(self.config.clip)
        for optimizer in self.each:
            if optimizer is self.classes and self.classes.in_backward:
                self.classes.step()
            else:
                self.scaler.step(optimizer)
        self.scaler.update()

    def clip(self, max_norm: float) -> None:
        for optimizer in self.each:
            self.scaler.unscale_(optimizer)
        trained = [p for optimizer in self.each for group in optimizer.param_groups for p in group["params"]]
        nn.utils.clip_grads_with_norm_(trained, max_norm, self.head.grad_norm(self.others))

    def failed(self) -> bool:
        """Whether a gradient was not finite; with fp16, whether it is so even at a loss scale of 1. A host sync."""
        return self.scaler.get_scale() < 1

    def tensors(
        self,
        named: Mapping[str, nn.Parameter],  # all that is trained
    ) -> dict[str, Tensor]:
        """The optimizer state of every parameter, as "NAME.SLOT"."""
        self.classes.apply_lazy_updates()
        held = {**self.rest.state, **self.classes.state}
        return {
            f"{name}.{slot}": torch.as_tensor(value)
            for name, p in named.items()
            for slot, value in held.get(p, {}).items()
        }

    def load_tensors(
        self,
        named: Mapping[str, nn.Parameter],
        saved: Mapping[str, Tensor],
    ) -> None:
        for key, value in saved.items():
            name, _, slot = key.rpartition(".")
            p = named[name]
            if p is self.head.weight:  # the rows of this rank's classes
                self.classes.state[p][slot] = int(value) if slot == "step" else torch.empty_like(p).copy_(value)
            else:  # in the memory format of the parameter, as torch makes it; AdamW's `step` is a scalar
                like = p if value.shape == p.shape else value
                self.rest.state[p][slot] = torch.empty_like(like, device=p.device).copy_(value)


def build_scaler(config: OptimConfig, device: torch.device, group: Group | None) -> torch.amp.GradScaler:
    if config.precision == "fp16":
        return Scaler(group, device.type)
    return Scaler(group, device.type, init_scale=1.0, growth_interval=NEVER)


def build_classes(
    config: OptimConfig, head: MarginHead, in_backward: bool, scaler: torch.amp.GradScaler
) -> ClassOptimizer:
    inside = scaler if in_backward else None
    if config.name == "adamw":
        return ClassAdamW(
            head, config.lr, config.betas, weight_decay=config.weight_decay, in_backward=in_backward, scaler=inside
        )
    return ClassSGD(
        head,
        config.lr,
        config.momentum,
        config.weight_decay,
        nesterov=config.nesterov,
        in_backward=in_backward,
        scaler=inside,
    )


def build_rest(config: OptimConfig, groups: list[dict[str, object]]) -> torch.optim.Optimizer:
    """Fused: of torch's optimizers only these can skip a step without a host sync."""
    if config.name == "adamw":
        return torch.optim.AdamW(groups, config.lr, config.betas, weight_decay=config.weight_decay, fused=True)
    optimizer = torch.optim.SGD(
        groups,
        config.lr,
        momentum=config.momentum,
        weight_decay=config.weight_decay,
        nesterov=config.nesterov,
        fused=True,
    )
    if config.momentum:  # torch 2.13 leaves the buffer uninitialized if the very first step is skipped
        for group in optimizer.param_groups:
            for p in group["params"]:
                optimizer.state[p]["momentum_buffer"] = torch.zeros_like(p)
    return optimizer


def learning_rate(config: OptimConfig, step: int) -> float:
    warmup = config.warm_up()
    if step < warmup:
        return config.lr * (step + 1) / warmup
    if config.schedule == "constant":
        return config.lr
    if config.schedule == "steps":
        return config.lr * config.milestone_factor ** sum(milestone <= step for milestone in config.milestones)
    done, length = position_in_cycle(config, step - warmup)
    turn = math.pi * done / length
    return config.lr * (config.final_lr + (1 - config.final_lr) * (1 + math.cos(turn)) / 2)


def position_in_cycle(config: OptimConfig, done: int) -> tuple[int, int]:
    """Of the cycle that the next step belongs to: the steps made, and its length."""
    if config.cycle is None:
        return done, config.steps - config.warm_up()
    length = config.cycle
    while done >= length:
        done, length = done - length, length * config.cycle_factor
    return done, length


def build_average(config: OptimConfig, model: nn.Module) -> nn.Module | None:
    return None if config.ema is None else copy.deepcopy(model).requires_grad_(False)


def update_average(average: nn.Module, model: nn.Module, decay: float, step: int) -> None:
    """After `step` steps. Buffers, such as batch norm's statistics, are averaged, too; integer ones are copied.

    A number that is not finite stays out of the average.
    """
    pairs = list(zip(average.state_dict().values(), model.state_dict().values(), strict=True))
    ours, theirs = zip(*[pair for pair in pairs if pair[0].is_floating_point()], strict=True)
    theirs = tuple(torch.where(its.isfinite(), its, mine) for mine, its in zip(ours, theirs, strict=True))
    get_ema_multi_avg_fn(min(decay, (1 + step) / (10 + step)))(ours, theirs, step)
    for mine, its in pairs:
        if not mine.is_floating_point():
            mine.copy_(its)
