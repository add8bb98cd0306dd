"""One rank of one contestant of bench_step.py, in a process of its own:

    python -m contestants.stepping NAME MEASURE THREADS B d C

It makes two steps and prints the peak memory of the second in MiB. Then it reads lines: for "step" it makes two more
and prints the seconds of the second, for "weights" it prints the weights. Where the environment has RANK, with the
other variables that torchrun sets, it joins a Gloo group.
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
    given = steps.local_inputs(steps.inputs(*map(int, shape)))
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
