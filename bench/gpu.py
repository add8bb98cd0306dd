"""On a GPU: the rates of its matrix units and its memory, then time and peak memory of the head and of sums over pairs,
by every contestant at every shape. Run by gpu.sh, or by hand:

    python bench/gpu.py OUT [--shapes 1024x512x1000000 ...] [--pairs 512x512x512 ...] [--ours | --rivals | --tiles]
        [--only WORDS ...] [--device cpu]

OUT/gpu.json is rewritten after every figure, so that a run that is cut short leaves what it measured. Times are medians
of repeated passes between device events; memory is what the allocator held at the peak above the inputs. --ours and
--rivals measure one side alone (OUT/rivals.json), --only contestants whose names contain one of these. --tiles measures
the Triton kernels alone, in every tile that they might use (OUT/tiles.json), so that the table in kernels/tile_table.py
can be given the fastest. --device cpu is for trying the script out. Exit status 1: a contestant of ours failed.
"""

import argparse
import gc
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from contestants import arcface, normface, pairs
from contestants.arcface import Loss, Prepare, head
from torch import Tensor

from fastmargin import ArcFace, MarginHead, NormFace, optim
from fastmargin.ops.backends import describe, native_can_run

SHAPES = ["256x512x100000", "1024x512x1000000", "4096x512x10000000"]  # B, d, C
PAIRS = ["512x512x512", "4096x2048x512"]  # N, M, d
HUGE = 10_000_000  # classes: here only bfloat16 fits in memory and time
SECONDS = 0.5  # of repeated passes, at least
SLOW = 1.0  # seconds of a pass that is repeated less
BF16 = torch.bfloat16


def cut_cross_entropy(impl: str) -> Prepare:
    """Its kernels need bfloat16 operands."""

    def prepare(f: Tensor, w: Tensor, y: Tensor) -> Loss:  # [B, d], [C, d], [B]
        loss = import_module("cut_cross_entropy").linear_cross_entropy
        return lambda: loss(*(t.to(BF16) for t in normface.operands(f, w)), y, impl=impl)

    return prepare


def liger(f: Tensor, w: Tensor, y: Tensor) -> Loss:  # [B, d], [C, d], [B]
    loss = import_module("liger_kernel.transformers").LigerFusedLinearCrossEntropyLoss()

    def run() -> Tensor:
        x, unit = (t.to(BF16) for t in normface.operands(f, w))
        return loss(unit, x, y)

    return run


def in_backward(**options: Any) -> Prepare:
    """A whole step, made in the backward pass; the next pass calls its `step()`. Momentum and operand cache, which stay
    allocated, are not in the peaks."""

    def prepare(f: Tensor, w: Tensor, y: Tensor) -> Loss:  # [B, d], [C, d], [B]
        model = MarginHead(1, len(w), ArcFace(s=arcface.S, m=arcface.M), compute_dtype=BF16, backend="native")
        model.to(w.device).weight = w
        rate = 0.0  # the weights are the next contestant's too
        optimizer = optim.ClassSGD(model, rate, 0.9, 5e-4, in_backward=True, **options)

        def run() -> Tensor:
            optimizer.step()
            return model(f, y).loss

        return run

    return prepare


def contestants(device: torch.device) -> Iterator[tuple[str, Prepare]]:
    """Ours first, in the order in which their figures are wanted."""
    yield from heads(device)
    yield "eager, bfloat16 by autocast", arcface.under_autocast(arcface.eager)
    yield "InsightFace's op sequence", arcface.insightface
    if find_spec("liger_kernel"):
        yield "NormFace: Liger fused linear cross entropy, bfloat16", liger
    if find_spec("cut_cross_entropy"):
        yield "NormFace: cut-cross-entropy cce_exact, bfloat16", cut_cross_entropy("cce_exact")
        yield "NormFace: cut-cross-entropy cce, bfloat16", cut_cross_entropy("cce")
    yield "torch.compile of eager, bfloat16 by autocast", arcface.under_autocast(arcface.compiled)
    yield "eager", arcface.eager


def heads(device: torch.device) -> Iterator[tuple[str, Prepare]]:
    margin = ArcFace(s=arcface.S, m=arcface.M)
    native = ["native"] if native_can_run(torch.empty(0, device=device)) else []
    fast = [*native, *(["triton"] if device.type == "cuda" else [])]
    for backend in fast:
        yield f"fastmargin {backend}, bfloat16", head(margin, backend=backend, compute_dtype=BF16)
    if native:
        yield "fastmargin native, bfloat16, ClassSGD in backward", in_backward()
    if native and device.type == "cuda":
        yield "fastmargin native, bfloat16, ClassSGD in backward, operand cache", in_backward(cache_operands=True)
    for backend in fast:
        yield f"fastmargin {backend}, bfloat16, k = 10", head(margin, backend=backend, compute_dtype=BF16, topk=10)
    yield "NormFace: fastmargin, bfloat16", head(NormFace(s=normface.S), compute_dtype=BF16)
    yield "fastmargin stream, bfloat16", head(margin, backend="stream", compute_dtype=BF16)
    for backend in [*fast, "stream"]:
        yield f"fastmargin {backend}", head(margin, backend=backend)


def wanted(who: str, shape: str, options: argparse.Namespace) -> bool:
    """By the options; with very many classes neither float32 nor what takes minutes."""
    if options.ours != options.rivals and options.ours != ("fastmargin" in who):
        return False
    if int(shape.split("x")[2]) >= HUGE and ("bfloat16" not in who or "stream" in who or "torch.compile" in who):
        return False
    return not options.only or any(words in who for words in options.only)


def pair_contestants(device: torch.device) -> Iterator[tuple[str, Callable[..., Loss]]]:
    """The Git term, with both gradients."""
    triton = {"fastmargin triton": partial(pairs.ours, "triton")} if device.type == "cuda" else {}
    for name, loss in (pairs.LOSSES | triton).items():
        if "native" not in name or native_can_run(torch.empty(0, device=device)):
            yield name, lambda *given, loss=loss: partial(loss, pairs.BOTH, *given)


def tiled(device: torch.device) -> Iterator[tuple[str, Prepare]]:
    """The Triton head in every candidate tile; the table of tiles holds one of them while it is measured."""
    tiles = import_module("fastmargin.kernels.tile_table")
    for dtype in (BF16, None):
        key = tiles.key_of(torch.empty(1, 512, dtype=dtype, device=device))
        chosen = tiles.TABLE[key]
        for tile in tiles.CANDIDATES[key]:
            tiles.TABLE[key] = ((None, tile),)
            name = f"fastmargin triton, {'bfloat16' if dtype else 'float32'}, {tile}"
            yield name, head(ArcFace(s=arcface.S, m=arcface.M), backend="triton", compute_dtype=dtype, topk=1)
        tiles.TABLE[key] = chosen


def seconds(run: Callable[[], object], device: torch.device) -> float:
    """Median of repeated passes, after three that are not counted; of two, after one, if a pass takes over a second."""
    slow = once(run, device) > SLOW
    for _ in range(0 if slow else 2):
        run()
    least = SECONDS if device.type == "cuda" else 0.0
    times: list[float] = []
    while len(times) < (2 if slow else 5) or (sum(times) < least and len(times) < 200):
        times.append(once(run, device))
    return statistics.median(times)


def once(run: Callable[[], object], device: torch.device) -> float:
    if device.type != "cuda":
        begin = time.perf_counter()
        run()
        return time.perf_counter() - begin
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    run()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


def ceilings(device: torch.device) -> dict[str, float]:
    """The rate of a bfloat16 product as large as one class chunk, and of a copy of 2 GiB, read plus written."""
    small = device.type != "cuda"
    m, n, k = (64, 64, 64) if small else (1024, 8448, 512)
    a, b = torch.randn(m, k, device=device, dtype=BF16), torch.randn(n, k, device=device, dtype=BF16)
    big = torch.randn(2**10 if small else 2**29, device=device)
    other = torch.empty_like(big)
    return {
        "product_tflops": 2 * m * n * k / seconds(lambda: a @ b.T, device) / 1e12,
        "copy_tb_per_s": 2 * big.nbytes / seconds(lambda: other.copy_(big), device) / 1e12,
    }


def inputs(B: int, d: int, C: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator(device).manual_seed(0)
    f = torch.randn(B, d, device=device, generator=generator)
    w = torch.randn(C, d, device=device, generator=generator).mul_(0.01)
    return f.requires_grad_(), torch.nn.Parameter(w), torch.randint(0, C, (B,), device=device, generator=generator)


def pair_inputs(N: int, M: int, d: int, device: torch.device) -> tuple[Tensor, ...]:
    a, b, *rest = (t.detach().to(device) for t in pairs.inputs(N, M, d))
    return a.requires_grad_(), b.requires_grad_(), *rest


def measured(prepare: Callable[..., Loss], given: tuple[Tensor, ...]) -> dict[str, float]:
    """Seconds of the loss alone and with the gradients of the first two inputs; peak MiB of the latter, gradients
    included."""
    f, w, *_ = given
    loss = prepare(*given)

    def forward() -> None:
        with torch.no_grad():
            loss()

    def step() -> None:
        f.grad = w.grad = None
        loss().backward()

    figures = {"forward": seconds(forward, f.device), "forward + backward": seconds(step, f.device)}
    f.grad = w.grad = None
    if f.is_cuda:
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step()
        figures["peak_mib"] = (torch.cuda.max_memory_allocated() - before) / 2**20
    f.grad = w.grad = None
    return figures


def attempt(prepare: Callable[..., Loss], given: tuple[Tensor, ...]) -> Any:
    """Figures, or the error: a contestant that runs out of memory or raises does not end the run."""
    torch._dynamo.reset()
    try:
        return measured(prepare, given)
    except Exception as error:
        return f"{type(error).__name__}: {error}".splitlines()[0]
    finally:
        gc.collect()  # a head and its optimizer refer to each other
        if given[0].is_cuda:
            torch.cuda.empty_cache()


def failed(record: Any) -> list[str]:
    """Which of our own contestants have no figures, anywhere in a record."""
    if not isinstance(record, dict):
        return []
    own = [
        f"{name}: {figures}" for name, figures in record.items() if "fastmargin" in name and isinstance(figures, str)
    ]
    return own + [line for part in record.values() for line in failed(part)]


def measure_all(
    record: dict[str, Any],
    path: Path,
    what: str,
    shapes: Iterable[str],
    inputs: Callable[..., tuple[Tensor, ...]],
    contestants: Callable[[torch.device], Iterable[tuple[str, Callable[..., Loss]]]],
    options: argparse.Namespace,
) -> None:
    for shape in shapes:
        figures = record[what][shape] = {}
        given = inputs(*map(int, shape.split("x")), options.device)
        for who, prepare in contestants(options.device):
            if not wanted(who, shape, options):
                continue
            figures[who] = attempt(prepare, given)
            print(shape, who, figures[who], flush=True)
            path.write_text(json.dumps(record, indent=1) + "\n")
        del given


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("--shapes", nargs="*", default=SHAPES)
    parser.add_argument("--pairs", nargs="*", default=PAIRS)
    parser.add_argument("--only", nargs="*", default=[])
    part = parser.add_mutually_exclusive_group()
    for name in ("--ours", "--rivals", "--tiles"):
        part.add_argument(name, action="store_true")
    parser.add_argument("--device", default="cuda", type=torch.device)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    name = torch.cuda.get_device_name() if options.device.type == "cuda" else "cpu"
    record: dict[str, Any] = {"device": name, "torch": torch.__version__, "info": describe()}
    record |= {"ceilings": ceilings(options.device), "pairs": {}, "shapes": {}}
    path = options.out / ("tiles.json" if options.tiles else "rivals.json" if options.rivals else "gpu.json")
    path.write_text(json.dumps(record, indent=1) + "\n")
    measure_all(record, path, "shapes", options.shapes, inputs, tiled if options.tiles else contestants, options)
    if not options.tiles:
        measure_all(record, path, "pairs", options.pairs, pair_inputs, pair_contestants, options)
    if lines := failed(record):
        sys.exit("\n".join(["our own contestants failed:", *lines]))


if __name__ == "__main__":
    main()
