"""Time and memory of a head step as `fastmargin plan --device cpu` estimates them, beside those measured here.

`python bench/plan.py` measures every case in a process of its own: ClassSGD in backward, the median of the steps, and
the peak memory above that of a process which has made a small step. The time is processor time on one thread, which
other work on the machine disturbs least, halved, since the plan is for two cores. The plan's rates are those of the
machine in NOTES.md; on another machine the times differ.
"""

import ctypes
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from contestants.steps import ours
from harness.measure import status

from fastmargin.driver.sizing.plan import Plan, memory, seconds

STEPS = 5
CASES = [  # B, d, C, rate, bf16
    (B, d, C, rate, half)
    for B, d, C in ((256, 512, 100_000), (256, 128, 1_000_000), (1024, 512, 20_000))
    for rate in (1.0, 0.1)
    for half in (False, True)
]


def step_of(B: int, d: int, C: int, rate: float, half: bool):  # type: ignore[no-untyped-def]
    w = torch.randn(C, d).mul_(0.01)
    f, y = torch.randn(B, d, requires_grad=True), torch.randint(C, (B,))
    options = {"compute_dtype": torch.bfloat16} if half else {}
    return ours(f, w, y, rate, in_backward=True, **options)[0]


def measured(B: int, d: int, C: int, rate: float, half: bool) -> dict[str, float]:
    torch.set_num_threads(1)
    step_of(16, 16, 5000, rate, half)()  # memory that is allocated once is not counted
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = status("VmRSS")
    step, times = step_of(B, d, C, rate, half), []
    for _ in range(STEPS):
        begin = time.process_time()
        step()
        times.append(time.process_time() - begin)
    return {"seconds": statistics.median(times) / 2, "bytes": status("VmHWM") - before}


def main() -> None:
    if len(sys.argv) > 1:
        return print(json.dumps(measured(*json.loads(sys.argv[1]))))
    print("| B, d, C | classes in a step | products | s | plan | MiB | plan |")
    print("| --- | --- | --- | ---: | ---: | ---: | ---: |")
    for B, d, C, rate, half in CASES:
        child = [sys.executable, __file__, json.dumps([B, d, C, rate, half])]
        got = json.loads(subprocess.run(child, stdout=subprocess.PIPE, check=True).stdout)
        dtype = "bf16" if half else "fp32"
        p = Plan(C, d, B, 1, sample_rate=rate, device="cpu", compute_dtype=dtype, topk=0)
        cells = [f"{B:,}, {d}, {C:,}", "all" if rate == 1 else f"{rate:g}", dtype]
        cells += [f"{got['seconds']:.3f}", f"{seconds(p):.3f}"]
        cells += [f"{got['bytes'] / 2**20:,.0f}", f"{sum(memory(p).values()) / 2**20:,.0f}"]
        print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
