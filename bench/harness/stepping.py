"""One rank of one contestant of bench_step.py, in a process of its own: `harness.stepping NAME MEASURE THREADS B d C`.

It makes two steps and prints the peak memory of the second in MiB. Then, for each line that it is sent, "step" makes
two more and prints the seconds of the second, "weights" prints the weights. What torchrun sets in the environment makes
it a rank.
"""

import json
import os
import sys
import time

import torch
import torch.distributed as dist
from contestants import steps
from harness import measure


def main() -> None:
    name, what, threads, *shape = sys.argv[1:]
    torch.set_num_threads(int(threads))
    if "RANK" in os.environ:
        dist.init_process_group("gloo")
    given = steps.part_of(steps.inputs(*map(int, shape)))
    step, weight = steps.STEPS[name](*given, steps.RATE[what])

    def timed() -> float:
        step()
        if dist.is_initialized():
            dist.barrier()
        begin = time.perf_counter()
        step()
        return time.perf_counter() - begin

    answers = {"step": timed, "weights": lambda: weight().tolist()}
    print(json.dumps(measure.peak_of(step, lambda: steps.clear(*given))), flush=True)
    for line in sys.stdin:
        print(json.dumps(answers[line.strip()]()), flush=True)


if __name__ == "__main__":
    main()
