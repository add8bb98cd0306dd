"""A whole head step, update included, against PartialFC's, eager PyTorch's and pytorch-metric-learning's.

`make bench ARGS=bench/bench_step.py` runs it: first the contestants' weights after three steps must agree, then they
are timed in turn, each in a process of its own that keeps its weights and its momentum. Figures go to `extra_info` and
results/.
"""

import json
import statistics
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import results
import steps
import torch
from measure import peak_memory
from steps import EAGER, RATE, STEPS, TENTH, WHOLE, here

Case = tuple[str, int, int, int]  # measure, B, d, C

CASES: list[Case] = [
    (measure, *shape) for shape in ((256, 512, 100_000), (256, 128, 1_000_000)) for measure in (WHOLE, TENTH)
]
ROUNDS = 5
THREADS = torch.get_num_threads()
RIGHT = "eager, torch's SGD"
SERVER = """
import sys, time, torch, steps
name, measure, threads, *shape = sys.argv[1:]
torch.set_num_threads(int(threads))
run = steps.passes(measure, steps.inputs(*map(int, shape)), [name])[name]
run()
for _ in sys.stdin:
    run()
    begin = time.perf_counter()
    run()
    print(time.perf_counter() - begin, flush=True)
"""


@pytest.mark.parametrize("name", here(WHOLE))
def test_contestants_agree(name: str) -> None:
    """How far they have moved in three steps; PartialFC trains with a slope of 1."""
    given = steps.inputs(20, 16, 300)
    moved = {}
    for who in (name, RIGHT):
        step, weight = STEPS[who](*given, RATE[WHOLE])
        for _ in range(3):
            step()
        moved[who] = weight().detach() - given[1]
    error = float((moved[name] - moved[RIGHT]).abs().max() / moved[RIGHT].abs().max())
    assert error < (0.5 if name == EAGER else 0.05 if "bfloat16" in name else 1e-3)


def timed(case: Case) -> dict[str, list[float]]:
    """Seconds of each contestant, a number a round; all processes live at once, and one steps at a time."""
    measure, *shape = case
    names, rest = here(measure), [measure, str(THREADS), *map(str, shape)]
    seconds: dict[str, list[float]] = {name: [] for name in names}
    pipes: dict[str, Any] = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parent)
    with ExitStack() as stack:
        servers = {
            name: stack.enter_context(subprocess.Popen([sys.executable, "-c", SERVER, name, *rest], **pipes))
            for name in names
        }
        for _ in range(ROUNDS):
            for name, server in servers.items():
                server.stdin.write("go\n")
                server.stdin.flush()
                seconds[name].append(json.loads(server.stdout.readline()))
        for server in servers.values():
            server.stdin.close()
    return seconds


@pytest.mark.timeout(0)
@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)))
def test_ratios(benchmark: Any, case: Case) -> None:
    seconds = benchmark.pedantic(timed, (case,), rounds=1)
    eager = statistics.median(seconds[EAGER])
    figures: dict[str, dict[str, float]] = {}
    for name, values in seconds.items():
        median = statistics.median(values)
        figures[name] = {
            "median": round(median, 5),
            "min": round(min(values), 5),
            "times_eager": round(eager / median, 2),
        }
        figures[name]["peak_mib"] = round(peak_memory("steps", name, case[0], case[1:], THREADS), 1)
    record = dict(zip(("measure", "B", "d", "C"), case, strict=True)) | results.made(ROUNDS) | {"contestants": figures}
    benchmark.extra_info |= record | {"threads": THREADS}
    results.store_table(results.STEPS, record, THREADS)
    print(f"\n{results.table_section(results.STEPS, record)}")
