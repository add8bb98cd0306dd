"""How bench figures are taken: contestants in turn within one loop, and peak memory in a child each."""

import ctypes
import json
import random
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from pathlib import Path

BENCH = Path(__file__).parents[1]
FORWARD, FORWARD_BACKWARD = "forward", "forward + backward"  # without gradients; gradients of features and weights


def interleaved(
    passes: Mapping[str, Callable[[], object]], before: Callable[[], None], rounds: int
) -> dict[str, list[float]]:
    """Seconds of each, a number a round; one round runs all, so that a slow minute of the machine slows all.

    A timed pass follows an untimed one of the same contestant, as in training: nobody pays for what memory another left
    behind. For the same reason each round has an order of its own, and `before` is called, untimed, ahead of a pass.
    """
    seconds: dict[str, list[float]] = {name: [] for name in passes}
    for turn in range(rounds):
        for name in random.Random(turn).sample(list(passes), len(passes)):
            before()
            passes[name]()
            before()
            begin = time.perf_counter()
            kept = passes[name]()
            seconds[name].append(time.perf_counter() - begin)
            del kept
    return seconds


def peak_memory(contestants: str, name: str, measure: str, shape: Sequence[int], threads: int) -> float:
    """MiB above the inputs at the peak of one pass, in a process of its own; of a module's contestant."""
    command = [sys.executable, "-m", "harness.measure", contestants, name, measure, *map(str, shape), str(threads)]
    return float(json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True, cwd=BENCH).stdout))


def status(field: str) -> int:  # bytes
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) * 1024


def peak_of(run: Callable[[], object], clear: Callable[[], object]) -> float:
    """MiB above what this process holds now, at the peak of a pass; what is allocated once does not count."""
    run()
    clear()
    ctypes.CDLL(None).malloc_trim(0)  # else what malloc kept of it would not count in the next pass either
    Path("/proc/self/clear_refs").write_text("5")
    before = status("VmRSS")
    run()
    return (status("VmHWM") - before) / 2**20


def main() -> None:
    import torch

    contestants, name, measure, *shape, threads = sys.argv[1:]
    module = import_module(contestants)
    torch.set_num_threads(int(threads))
    given = module.inputs(*map(int, shape))
    run = module.passes(measure, given, [name])[name]
    print(json.dumps(peak_of(run, lambda: module.clear(*given))))


if __name__ == "__main__":
    main()
