"""The processes that train one run between them, as torchrun starts them: what the driver knows of ranks.

Each rank has a share of the rows of a batch and of the classes, all have the same network, and all take every step
together. The first, rank 0, alone prints and writes; of a checkpoint every rank writes its classes.

Two groups. `group` carries tensors: Gloo on CPUs, NCCL on GPUs, with torch's own timeouts. `host` is Gloo and carries
what the processes tell each other beside a step: a signal to stop, a record, a folder. A wait for the first rank, which
packs images or evaluates, is one of these, and may be as long as PATIENCE. A rank that dies is noticed sooner: its
connections close, and torchrun ends the others.
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

PATIENCE = timedelta(days=1)
ECHO = 5.0  # seconds after another rank in which the first may come to make the same mistake


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
        """Rows in as equal parts as can be, the larger ones first."""
        whole, rest = divmod(rows, self.count)
        return Layout(self.group, tuple(whole + (rank < rest) for rank in range(self.count)))

    def log(self, log: Log) -> Log:
        return log if self.rank == 0 else silent

    def all_reduce_max(self, number: int) -> int:
        """The largest that any rank brings."""
        if self.host is None:
            return number
        largest = torch.tensor(number)
        dist.all_reduce(largest, dist.ReduceOp.MAX, group=self.host)
        return int(largest)

    def mean(self, numbers: Sequence[float]) -> list[float]:
        """Of each number over the ranks, the same on all of them."""
        if self.host is None:
            return list(numbers)
        total = torch.tensor(numbers, dtype=torch.float64)
        dist.all_reduce(total, group=self.host)
        return (total / self.count).tolist()

    def by_first(self, action: Callable[[], T]) -> T:
        """What action() returns on the first rank, small and picklable, on all; its OSError or ValueError, too."""
        if self.host is None:
            return action()
        told: list[Any] = [None, None]
        if self.rank == 0:
            try:
                told[0] = action()
            except (OSError, ValueError) as mistake:
                told[1] = mistake
        dist.broadcast_object_list(told, group_src=0, group=self.host)
        result, error = told
        if error is not None:
            raise error
        return result

    @contextmanager
    def in_turn(self) -> Iterator[None]:
        """The body on the first rank of each machine, then on the others, who find what it has put into a cache."""
        first = os.environ.get("LOCAL_RANK", str(self.rank)) == "0"
        if self.host is not None and not first:
            dist.barrier(self.host)
        try:
            yield
        finally:  # its mistakes are made by the others as well, and said once: see `only_once`
            if self.host is not None and first:
                dist.barrier(self.host)

    def replicated(self, model: nn.Module, shape: Sequence[int]) -> nn.Module:
        """The model under DDP, which makes all ranks' weights and buffers those of the first, and averages gradients.

        shape: of an image. Buffers, the statistics of batch norm, are sent anew before each pass: they are those of the
        first rank's rows. ValueError for a parameter that has no part in the embeddings.
        """
        if self.group is None or not any(p.requires_grad for p in model.parameters()):
            return model
        device = next(model.parameters()).device
        replica = DistributedDataParallel(model, [device] if device.type == "cuda" else None, process_group=self.group)
        # After its first pass DDP regroups the gradients, and of three ranks' then adds others first. So that the first
        # step of a resumed run adds as any other does, a pass of black images comes before.
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
        """Makes all ranks' those of the first."""
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
    """Of several processes each takes the GPU of its own number."""
    if name is None:
        return processes.device("cuda" if torch.cuda.is_available() else "cpu")
    kind, _, number = name.partition(":")
    wanted = "cpu, or cuda:N of a GPU that PyTorch finds here" if torch.cuda.is_available() else "cpu: there is no GPU"
    known = kind == "cpu" and not number
    known |= kind == "cuda" and (number or "0").isdecimal() and int(number or 0) < torch.cuda.device_count()
    require(known, "device", name, wanted)
    if processes.count == 1:
        return torch.device(name)
    require(not number, "device", name, "cuda, cpu or null: each process takes a GPU of its own")
    return processes.device(kind)


def silent(text: str) -> None:
    pass


def unreduced(model: nn.Module) -> AbstractContextManager[None]:
    """In it a backward pass through what `replicated` gave adds to gradients that are averaged later."""
    return model.no_sync() if isinstance(model, DistributedDataParallel) else nullcontext()


def average(parameters: Sequence[nn.Parameter], group: Group | None) -> None:
    """Averages gradients over the ranks; one that a rank's rows gave none is 0 there."""
    if group is None:
        return
    for p in parameters:
        p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        dist.all_reduce(p.grad, group=group)
        p.grad /= group.size()


@contextmanager
def process_group() -> Iterator[Processes]:
    """The processes of a run: those of torch.distributed, where it runs; those that torchrun started; or this one."""
    ours = not dist.is_initialized()
    if ours and not launched():
        yield ALONE
        return
    if ours:
        dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    try:
        yield Processes(dist.group.WORLD, dist.new_group(backend="gloo", timeout=PATIENCE))
    finally:
        if ours and not isinstance(sys.exception(), Exception):  # then the others wait until this one has said it
            dist.destroy_process_group()


def launched() -> bool:
    """Whether torchrun has started this process and others."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def only_once(text: str) -> str | None:
    """What this process should print of what all of them may want to say: None where the first one says the same.

    They tell each other through torchrun's store, which outlives them.
    """
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return text
    rank, said = int(os.environ["RANK"]), f"fastmargin/{os.environ['TORCHELASTIC_RESTART_COUNT']}/said"
    store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]))
    if rank == 0:
        store.set(said, text)
        return text
    late = time.monotonic() + ECHO
    while not store.check([said]) and time.monotonic() < late:
        time.sleep(0.05)
    return None if store.check([said]) and store.get(said) == text.encode() else f"rank {rank}: {text}"
