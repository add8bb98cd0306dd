"""Where the seconds of a step go, and on which machine.

    loader     waiting for the batch
    backbone   the network, forward and backward
    head       head and terms, forward and backward, and the step of the class weights where the backward pass makes it
    rest       other optimizers, mining, records, checkpoints

Head and backbone have one backward call; a hook on the embeddings, which runs once their gradient is complete, tells
them apart. On a CPU a mark is a time. On a GPU, which runs asynchronously, it is a CUDA event, and seconds are those
between two events: there is no host sync until they are read.
"""

import platform
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

PARTS = ("loader", "backbone", "head", "rest")


class Stopwatch:
    """`watch(part)` ends a part: the time since the last mark is its own. To be made when the first step starts."""

    def __init__(self, device: torch.device | None = None) -> None:  # None: the CPU
        self.on_gpu = device is not None and device.type == "cuda"
        self.last = self.now()
        self.marks: list[tuple[str, Any]] = []  # part that ended, when

    def __call__(self, part: str) -> None:
        self.marks.append((part, self.now()))

    def split(
        self,
        embeddings: Tensor,  # [B, d]
    ) -> None:
        """In the next backward pass, the time until the gradient of the embeddings is complete is the head's."""
        if embeddings.requires_grad:
            embeddings.register_hook(lambda _: self("head"))

    def per_step(self, steps: int) -> dict[str, float]:
        """Seconds of every part in the steps since the last call, divided by their number; "rest" ends here."""
        self("rest")
        seconds = dict.fromkeys(PARTS, 0.0)
        for part, mark in self.marks:
            seconds[part] += self.between(self.last, mark)
            self.last = mark
        self.marks.clear()
        return {part: round(total / steps, 7) for part, total in seconds.items()}

    def now(self) -> Any:
        if not self.on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def between(self, earlier: Any, later: Any) -> float:  # seconds
        if not self.on_gpu:
            return later - earlier
        later.synchronize()
        return earlier.elapsed_time(later) / 1000


def machine(device: torch.device, processes: int = 1) -> str:
    """Processor, torch's threads, the GPU if the run is on one, and the number of processes, in one line."""
    cpuinfo = Path("/proc/cpuinfo").read_text() if platform.system() == "Linux" else ""
    names = [line.partition(":")[2].strip() for line in cpuinfo.splitlines() if line.startswith("model name")]
    threads = torch.get_num_threads()
    gpu = f", {torch.cuda.get_device_name(device)}" if device.type == "cuda" else ""
    several = f", {processes} such processes" if processes > 1 else ""
    processor = names[0] if names else platform.machine()
    return f"{processor}, {threads} {'thread' if threads == 1 else 'threads'}{gpu}{several}"
