"""How bench figures are taken: contestants in turn within one loop, medians, and peak memory in a child each."""

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

HERE = Path(__file__).parent


def interleaved(steps: dict[str, Callable[[], object]], before: Callable[[], None], rounds: int) -> dict[str, float]:
    """Median seconds of each; one round runs all of them, so that a slow minute of the machine slows all.

    `before` is called, untimed, ahead of every step: nobody pays for freeing what another left.
    """
    for step in steps.values():
        before()
        step()
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            before()
            begin = time.perf_counter()
            step()
            seconds[name].append(time.perf_counter() - begin)
    return {name: statistics.median(values) for name, values in seconds.items()}


def peak_memory(name: str, shape: tuple[int, int, int], threads: int) -> float:
    """MiB above the inputs at the peak of one step, in a process of its own."""
    child = subprocess.run(
        [sys.executable, str(HERE / "measure.py"), name, *map(str, shape), str(threads)],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    return float(json.loads(child.stdout))


def status(field: str) -> int:  # bytes
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) * 1024


def main() -> None:
    import torch
    from contestants import inputs, step_of

    name, *shape, threads = sys.argv[1:]
    torch.set_num_threads(int(threads))
    given = inputs(*map(int, shape))
    step_of(name, *given)  # what is allocated once does not count
    given[0].grad = given[1].grad = None
    Path("/proc/self/clear_refs").write_text("5")
    before = status("VmRSS")
    step_of(name, *given)
    print(json.dumps((status("VmHWM") - before) / 2**20))


if __name__ == "__main__":
    main()
