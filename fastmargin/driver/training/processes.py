"""The processes that train one run together, as torchrun starts them: what the driver knows of ranks.

Each rank has some rows of a batch and some of the classes; the network is replicated, and all take every step together.
Only rank 0 prints and writes, except that every rank writes the class weights it holds into a checkpoint.

There are two process groups. `group` is for tensors: Gloo on CPUs, NCCL on GPUs, with torch's timeouts. `host` is Gloo
and for what is exchanged beside a step: a signal to stop, a record, the name of a folder. Ranks also wait in it while
rank 0 packs images or evaluates, so its timeout is HOST_TIMEOUT. A rank that dies is noticed sooner: its connections
close, and torchrun ends the others.
"""

import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from fastmargin.distributed.layout import Group, Layout
from fastmargin.driver.log import Log
from fastmargin.require import require

T = TypeVar("T")

HOST_TIMEOUT = timedelta(days=1)
ECHO = 5.0  # seconds to wait for rank 0 to print the same error


@dataclass(frozen=True)
class Processes:
    """group, host: None where one process trains alone."""

    group: Group | None = None
    host: Group | None = None

    @property
    def rank(self) -> int:
        return 0 if self.group is None else self.group.rank()

    @property
    def count(self) -> int:
        return 1 if self.group is None else self.group.size()

    def share(self, rows: int) -> Layout:
        """Rows split over the ranks as evenly as possible, the larger parts first."""
        whole, rest = divmod(rows, self.count)
        return Layout.of(self.group, (whole + (rank < rest) for rank in range(self.count)))

    def log(self, log: Log) -> Log:
        return log if self.rank == 0 else silent

    def all_reduce_max(self, number: int) -> int:
        """The largest of the ranks' numbers."""
        if self.host is None:
            return number
        largest = torch.tensor(number)
        dist.all_reduce(largest, dist.ReduceOp.MAX, group=self.host)
        return int(largest)

    def mean(self, numbers: Sequence[float]) -> list[float]:
        """The mean of each number over the ranks, equal on all of them."""
        if self.host is None:
            return list(numbers)
        total = torch.tensor(numbers, dtype=torch.float64)
        dist.all_reduce(total, group=self.host)
        return (total / self.count).tolist()

    def by_first(self, action: Callable[[], T]) -> T:
        """Calls action() on rank 0 alone and returns its result, small and picklable, on all ranks.

        An OSError or ValueError of action() is raised on all ranks.
        """
        if self.host is None:
            return action()
        outcome: list[Any] = [None, None]  # result, error
        if self.rank == 0:
            try:
                outcome[0] = action()
            except (OSError, ValueError) as mistake:
                outcome[1] = mistake
        dist.broadcast_object_list(outcome, group_src=0, group=self.host)
        result, error = outcome
        if error is not None:
            raise error
        return result

    @contextmanager
    def in_turn(self) -> Iterator[None]:
        """Runs the body on the first rank of each machine, then on the others, which find the cache filled."""
        first = os.environ.get("LOCAL_RANK", str(self.rank)) == "0"
        if self.host is not None and not first:
            dist.barrier(self.host)
        try:
            yield
        finally:  # also after an error: the others run into it, too, and it is printed once, see `only_once`
            if self.host is not None and first:
                dist.barrier(self.host)

    def replicated(self, model: nn.Module, shape: Sequence[int]) -> nn.Module:
        """The model under DDP, which copies rank 0's weights and buffers to all ranks, and averages gradients.

        shape: of an image. DDP broadcasts rank 0's buffers before each forward pass, so the statistics of batch norm
        are those of rank 0's rows. ValueError for a parameter that the embeddings do not depend on.
        """
        if self.group is None or not any(p.requires_grad for p in model.parameters()):
            return model
        device = next(model.parameters()).device
        replica = DistributedDataParallel(model, [device] if device.type == "cuda" else None, process_group=self.group)
        # After the first pass DDP rebuilds its buckets, which changes the order in which three or more ranks' gradients
        # are added. A pass of black images comes first, so that the first step of a resumed run adds as all others do.
        buffers = [buffer.clone() for buffer in model.buffers()]
        replica(torch.zeros(2, *shape, device=device)).sum().backward()
        for buffer, before in zip(model.buffers(), buffers, strict=True):
            buffer.copy_(before)
        unused = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
        if unused:
            raise ValueError(f"the network makes no use of {', '.join(unused)}: freeze or remove them")
        model.zero_grad()
        return replica

    def copy_buffers(self, model: nn.Module) -> None:
        """Broadcasts rank 0's buffers to all ranks."""
        if self.group is not None:
            for buffer in model.buffers():
                dist.broadcast(buffer, group_src=0, group=self.group)

    def device(self, kind: str) -> torch.device:
        """The CPU, or the GPU of this process. ValueError if there is none for it."""
        if self.group is None or kind == "cpu":
            return torch.device(kind)
        number = int(os.environ.get("LOCAL_RANK", self.rank))
        if number >= torch.cuda.device_count():
            raise ValueError(f"rank {self.rank} wants GPU {number}, and there are {torch.cuda.device_count()} here")
        torch.cuda.set_device(number)
        return torch.device("cuda", number)


ALONE = Processes()


def pick_device(name: str | None, processes: Processes = ALONE) -> torch.device:
    """The named device; None is a GPU where there is one. Each of several processes takes the GPU of its local rank."""
    if name is None:
        return processes.device("cuda" if torch.cuda.is_available() else "cpu")
    kind, _, number = name.partition(":")
    want = "cpu, or cuda:N of a GPU that PyTorch finds here" if torch.cuda.is_available() else "cpu: there is no GPU"
    known = kind == "cpu" and not number
    known |= kind == "cuda" and (number or "0").isdecimal() and int(number or 0) < torch.cuda.device_count()
    require(known, "device", name, want)
    if processes.count == 1:
        return torch.device(name)
    require(not number, "device", name, "cuda, cpu or null: each process takes a GPU of its own")
    return processes.device(kind)


def silent(text: str) -> None:
    pass


def unreduced(model: nn.Module) -> AbstractContextManager[None]:
    """Gradient accumulation: within it a backward pass through a replica does not average gradients over the ranks."""
    return model.no_sync() if isinstance(model, DistributedDataParallel) else nullcontext()


def average(parameters: Sequence[nn.Parameter], group: Group | None) -> None:
    """Averages gradients over the ranks; where a rank has none, it counts as 0."""
    if group is None:
        return
    for p in parameters:
        p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        dist.all_reduce(p.grad, group=group)
        p.grad /= group.size()


@contextmanager
def process_group() -> Iterator[Processes]:
    """The processes of a run: those of torch.distributed, if initialized; those that torchrun started; or this one."""
    ours = not dist.is_initialized()
    if ours and not launched():
        yield ALONE
        return
    if ours:
        dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    try:
        yield Processes(dist.group.WORLD, dist.new_group(backend="gloo", timeout=HOST_TIMEOUT))
    finally:
        if ours and not isinstance(sys.exception(), Exception):  # else the others fail before the error is printed
            dist.destroy_process_group()


def launched() -> bool:
    """Whether torchrun has started this process and others."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def only_once(text: str) -> str | None:
    """The error that this process should print, where all may run into it: None if rank 0 prints the same one.

    They exchange it through torchrun's store, which outlives the processes.
    """
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return text
    rank, key = int(os.environ["RANK"]), f"fastmargin/{os.environ['TORCHELASTIC_RESTART_COUNT']}/said"
    store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]))
    if rank == 0:
        store.set(key, text)
        return text
    late = time.monotonic() + ECHO
    while not store.check([key]) and time.monotonic() < late:
        time.sleep(0.05)
    return None if store.check([key]) and store.get(key) == text.encode() else f"rank {rank}: {text}"
