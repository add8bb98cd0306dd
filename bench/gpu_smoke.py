"""Does every backend compute the right thing here? For a GPU on which our kernels have never run. Run by gpu.sh, or by
hand with tests/support on the PYTHONPATH:

    python bench/gpu_smoke.py OUT [--device cpu]

Each backend with each type of operands, and its sums over pairs, on small ragged shapes against the reference in
float64 on the CPU. OUT/smoke.json has the error of each, or what went wrong; it is rewritten after each. Every case has
a process of its own: an illegal access on a GPU spoils its process. Exit status 1: one is wrong or cannot run. On the
CPU only what it has kernels for is tried.
"""

import argparse
import json
import multiprocessing as mp
import sys
from collections.abc import Callable
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pairwise
import torch
from check import error
from dense import F32, F64, cast, problem, without_topk
from places import moved, run_on

from fastmargin import ArcFace, MarginHead, optim
from fastmargin.ops.nontarget_lse import IMPLS

Place = tuple[torch.device, str]
BACKENDS = ("native", "triton", "stream")
TYPES = (torch.bfloat16, torch.float16, None)  # of operands; None: float32
SHAPES = ((37, 41, 1009), (70, 64, 5001))  # B, d, C; rows of the second are whole vectors, as the copy engine wants
TRUTH = ("cpu", "reference")
SECONDS = 120  # of a case, with its compilation


def op(place: Place, compute_dtype: torch.dtype | None) -> float:
    """Outputs and gradients; of the three nearest classes the values, and that they are the values of those classes."""
    worst = 0.0
    for B, d, C in SHAPES:
        *given, upstream = problem(B, d, C, 3)
        given, upstream = cast(F32, *given), without_topk(upstream)
        given[2][:2] = -1
        got, classes = run_on(place, *given, upstream, topk=3, compute_dtype=compute_dtype)
        truth, _ = run_on(TRUTH, *cast(F64, *given), upstream, topk=3)
        x, w, *_ = cast(F64, *given)
        named = torch.einsum("bd,bkd->bk", x, torch.nn.functional.normalize(w)[classes])
        pairs = [*zip(got, truth, strict=True), (got[2], named)]
        worst = max(worst, *(error(a, b) for a, b in pairs))
    return worst


def step_in_backward(place: Place, compute_dtype: torch.dtype | None) -> float:
    """Two steps of momentum in the backward pass: how far the weights moved, and the gradients of the features."""
    _, d, C = SHAPES[0]
    start = torch.randn(C, d)
    got, truth = (
        steps(where, start, dtype, compute_dtype=rounding)
        for where, dtype, rounding in ((place, F32, compute_dtype), (TRUTH, F64, None))
    )
    return max(error(a, b) for a, b in zip(got, truth, strict=True))


def steps(
    place: Place,
    start: torch.Tensor,  # [C, d]
    dtype: torch.dtype,
    **options: Any,
) -> list[torch.Tensor]:
    device, backend = place
    (B, d, C), generator = SHAPES[0], torch.Generator().manual_seed(1)
    head = MarginHead(d, C, ArcFace(s=16.0), backend=backend, **options)
    head.load_full_weight(start)
    head.to(device, dtype)
    optimizer = optim.ClassSGD(head, 1.0, 0.9, 5e-4, in_backward=True)
    gradients = []
    for _ in range(2):
        f = torch.randn(B, d, generator=generator).to(device, dtype).requires_grad_()
        head(f, torch.randint(0, C, (B,), generator=generator).to(device)).loss.backward()
        optimizer.step()
        gradients += moved("cpu", f.grad)
    return [head.weight.detach().cpu().double() - start, *gradients]


def pairs(place: Place, kind: str) -> float:
    """Potentials and both gradients, near pairs included."""
    N, M, d = 70, 300, 33
    a, b, *ids = pairwise.clouds(N, M, d)
    options = dict(kind=kind, margin=pairwise.between_distances(a, b) if kind == "hinge" else None)
    given = a, b, *ids, torch.rand(M)
    got = pairwise.run_on(place, *given, **options)
    truth = pairwise.run_on(TRUTH, *given, dtype=F64, **options)
    return max(error(x, t) for x, t in zip(got, truth, strict=True))


def cases(device: torch.device) -> dict[str, tuple[Callable[[Place], float], str, float]]:
    """{its name: (how to run it, the backend, the largest error)}"""
    found = {}
    for backend in BACKENDS:
        for dtype in TYPES:
            if device.type == "cpu" and not runs_on_cpu(backend, dtype):
                continue
            name, most = (str(dtype).removeprefix("torch."), 2e-2) if dtype else ("float32", 1e-5)
            for run in (op, step_in_backward):
                found[f"{backend}, {name}, {run.__name__}"] = partial(run, compute_dtype=dtype), backend, most
        if device.type != "cpu" or runs_on_cpu(backend, None):
            for kind in ("inverse", "hinge"):
                found[f"{backend}, {kind} pairs"] = partial(pairs, kind=kind), backend, 1e-4
    return found


def runs_on_cpu(backend: str, dtype: torch.dtype | None) -> bool:
    x = torch.empty(0)
    return backend in IMPLS and IMPLS[backend].can_run(x) and (dtype is None or dtype in IMPLS[backend].compute(x))


def in_a_process(run: Callable[[Place], float], place: Place) -> tuple[mp.Process, Connection]:
    """Forked: this process has imported everything and never asked for the device."""
    context = mp.get_context("fork")
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=answer, args=(run, place, there), daemon=True)
    process.start()
    there.close()
    return process, here


def answer(run: Callable[[Place], float], place: Place, there: Connection) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    try:
        there.send(run(place))
    except Exception as problem:
        there.send(f"{type(problem).__name__}: {problem}".splitlines()[0])


def judged(process: mp.Process, here: Connection, most: float) -> float | str:
    """The error, or what is wrong with it."""
    if not here.poll(SECONDS):
        process.kill()
        return f"no answer in {SECONDS} s"
    try:
        got = here.recv()
        process.join()
    except EOFError:
        process.join()
        return f"died with exit code {process.exitcode}"
    return got if isinstance(got, str) or got <= most else f"error {got:.1e}: want at most {most:.0e}"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("--device", default="cuda", type=torch.device)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    record: dict[str, float | str] = {}
    started = [
        (who, in_a_process(run, (options.device, backend)), most)
        for who, (run, backend, most) in cases(options.device).items()
    ]
    for who, (process, here), most in started:
        record[who] = judged(process, here, most)
        print(who, record[who], flush=True)
        (options.out / "smoke.json").write_text(json.dumps(record, indent=1) + "\n")
    if wrong := [f"{who}: {said}" for who, said in record.items() if isinstance(said, str)]:
        sys.exit("\n".join(["wrong or not run:", *wrong]))


if __name__ == "__main__":
    main()
