"""A whole step of a head, update included, against PartialFC, eager PyTorch and pytorch-metric-learning.

`make bench ARGS=bench/cases/bench_step.py` runs it: first the weights after two steps must agree, then the contestants
are timed in turn. Each has processes of its own, one per rank, which keep its weights and momentum; the ranks share the
threads. Figures go to `extra_info` and results/.
"""

import json
import os
import socket
import statistics
import subprocess
import sys
from typing import Any

import pytest
import torch
from contestants import steps
from contestants.steps import EAGER, RATE, STEPS, TENTH, WHOLE, here
from harness import results
from harness.measure import BENCH

Case = tuple[str, int, int, int, int]  # measure, ranks, B of all ranks, d, C

CASES: list[Case] = [
    (measure, ranks, *shape)
    for shape in ((256, 512, 100_000), (256, 128, 1_000_000))
    for measure in (WHOLE, TENTH)
    for ranks in (1, 2)
]
ROUNDS = 5
THREADS = torch.get_num_threads()
RIGHT = "eager, torch's SGD"


class Contestant:
    """The processes of a contestant, one per rank. `ask` sends a line to all and returns the answer of each."""

    def __init__(self, name: str, measure: str, ranks: int, *shape: int) -> None:
        command = [
            sys.executable,
            "-m",
            "contestants.stepping",
            name,
            measure,
            str(max(1, THREADS // ranks)),
            *map(str, shape),
        ]
        pipes: dict[str, Any] = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=BENCH)
        where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(ranks)}
        self.ranks = [
            subprocess.Popen(command, env=os.environ | (where | {"RANK": str(rank)} if ranks > 1 else {}), **pipes)
            for rank in range(ranks)
        ]
        self.peak_mib = max(self.answers())

    def ask(self, line: str) -> list[Any]:
        for process in self.ranks:
            process.stdin.write(f"{line}\n")  # type: ignore[union-attr]
            process.stdin.flush()  # type: ignore[union-attr]
        return self.answers()

    def answers(self) -> list[Any]:
        return [json.loads(process.stdout.readline()) for process in self.ranks]  # type: ignore[union-attr]

    def end(self) -> None:
        for process in self.ranks:
            process.communicate()  # closes its input, at whose end it exits


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.mark.parametrize(("name", "ranks"), [(name, ranks) for ranks in (1, 2) for name in here(WHOLE, ranks)])
def test_contestants_agree(name: str, ranks: int) -> None:
    """The change of the weights in two steps. PartialFC's differs more: it trains with psi of slope 1."""
    given = steps.inputs(20, 16, 300)
    contestant = Contestant(name, WHOLE, ranks, 20, 16, 300)
    moved = torch.cat([torch.tensor(part) for part in contestant.ask("weights")]) - given[1]
    contestant.end()
    step, weight = STEPS[RIGHT](*given, RATE[WHOLE])
    step(), step()
    right = weight().detach() - given[1]
    error = float((moved - right).abs().max() / right.abs().max())
    assert error < (0.5 if name == EAGER else 0.05 if "bfloat16" in name else 1e-3)


def measured(case: Case) -> dict[str, tuple[list[float], float]]:
    """Seconds of each contestant, one number per round, and its peak memory. All are in memory; one steps at a time."""
    measure, ranks, *shape = case
    contestants = {name: Contestant(name, measure, ranks, *shape) for name in here(measure, ranks)}
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(ROUNDS):
        for name, contestant in contestants.items():
            seconds[name].append(max(contestant.ask("step")))
    for contestant in contestants.values():
        contestant.end()
    return {name: (values, contestants[name].peak_mib) for name, values in seconds.items()}


@pytest.mark.timeout(0)
@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)))
def test_ratios(benchmark: Any, case: Case) -> None:
    found = benchmark.pedantic(measured, (case,), rounds=1)
    eager = statistics.median(found[EAGER][0])
    figures = {
        name: {
            "median": round(statistics.median(seconds), 5),
            "min": round(min(seconds), 5),
            "times_eager": round(eager / statistics.median(seconds), 2),
            "peak_mib": round(peak, 1),
        }
        for name, (seconds, peak) in found.items()
    }
    record = dict(zip(("measure", "ranks", "B", "d", "C"), case, strict=True)) | results.stamp(ROUNDS)
    record |= {"contestants": figures}
    benchmark.extra_info |= record | {"threads": THREADS}
    results.store_table(results.STEPS, record, THREADS)
    print(f"\n{results.table_section(results.STEPS, record)}")
