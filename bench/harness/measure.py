"""How figures are measured: time in one loop over all contestants, peak memory in a child process for each."""

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
    """Seconds of each, one number per round. A round runs all, so that a slow minute of the machine slows all.

    A timed pass follows an untimed one of the same contestant, as in training: no contestant pays for the state in
    which another left memory and caches. For the same reason the order differs from round to round, and `before`, which
    is not timed, is called before each pass.
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
    """MiB above the inputs at the peak of one pass of a contestant of the module `contestants`, in a child process."""
    command = [sys.executable, "-m", "harness.measure", contestants, name, measure, *map(str, shape), str(threads)]
    return float(json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True, cwd=BENCH).stdout))


def status(field: str) -> int:  # bytes
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) * 1024


def peak_of(run: Callable[[], object], clear: Callable[[], object]) -> float:
    """MiB at the peak of a pass above what this process holds before it; what a first pass allocates for good is not
    counted."""
    run()
    clear()
    ctypes.CDLL(None).malloc_trim(0)  # else the next pass would reuse, uncounted, memory that malloc kept
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
