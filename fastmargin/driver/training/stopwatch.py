"""Where the seconds of a step go, and on which machine.

    loader     the wait for the batch
    backbone   the network, forward and backward
    head       head and terms, forward and backward; the step of the class weights where it is made in the backward pass
    rest       other optimisers, mining, records, checkpoints

The two backward passes are one call; a hook on the embeddings, which runs once their gradient is whole, parts them.
On a CPU a mark is the time of day. On a GPU, which works behind Python's back, it is an event in the stream: seconds
are those between the device's passing two marks, and nothing waits for it until they are read.
"""

import platform
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

PARTS = ("loader", "backbone", "head", "rest")


class Stopwatch:
    """`watch(part)`: what has happened since the last mark was that part. Made at the start of the first step."""

    def __init__(self, device: torch.device | None = None) -> None:  # None: the CPU
        self.on_gpu = device is not None and device.type == "cuda"
        self.last = self.now()
        self.marks: list[tuple[str, Any]] = []  # what had ended, when

    def __call__(self, part: str) -> None:
        self.marks.append((part, self.now()))

    def split(
        self,
        embeddings: Tensor,  # [B, d]
    ) -> None:
        """In the backward pass to come, what happens before their gradient is there was the head's."""
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
    """The processor, the threads torch uses, the GPU if the run is on one, and how many processes have as much."""
    told = Path("/proc/cpuinfo").read_text() if platform.system() == "Linux" else ""
    names = [line.partition(":")[2].strip() for line in told.splitlines() if line.startswith("model name")]
    threads = torch.get_num_threads()
    gpu = f", {torch.cuda.get_device_name(device)}" if device.type == "cuda" else ""
    several = f", {processes} such processes" if processes > 1 else ""
    processor = names[0] if names else platform.machine()
    return f"{processor}, {threads} {'thread' if threads == 1 else 'threads'}{gpu}{several}"
