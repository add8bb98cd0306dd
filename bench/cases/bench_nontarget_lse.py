"""nontarget_lse under a head, against eager PyTorch, libraries, and the floors of its matrix products.

`make bench` runs it: first all contestants must agree with float64, then they are timed. One shape alone, by the name
of its case: `make bench ARGS="-k 64x128x100000"`; agreement is checked there too.

The published figures are those of `test_ratios`, one interleaved loop per shape and measure. They are kept in
`extra_info` and in results/, which is rewritten after every shape. `test_pass` has the same passes as pytest-benchmark
cases, to look at one contestant alone; it takes one round of the first shape, because all shapes would double the 40
minutes of a run on two slow cores.
"""

import functools
import statistics
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from contestants import arcface, normface
from contestants.of_nontarget_lse import EVERYONE, FLOORS, LOSSES, clear, eager_of, here, inputs, lacking, passes
from harness import results
from harness.measure import FORWARD, FORWARD_BACKWARD, interleaved, peak_memory
from torch import Tensor

Shape = tuple[int, int, int]  # B, d, C

LARGEST = (128, 512, 1_000_000)
SHAPES = [(256, 512, 100_000), (128, 512, 200_000), (64, 128, 100_000), (1024, 512, 20_000), LARGEST]
THREADS = torch.get_num_threads()


def measures(shape: Shape) -> list[str]:
    return [FORWARD] if shape == LARGEST else [FORWARD, FORWARD_BACKWARD]


def names(measure: str) -> list[str]:
    return here(LOSSES | FLOORS[measure])


def title(shape: Shape) -> str:
    return "x".join(map(str, shape))


@pytest.fixture(autouse=True, scope="module")
def say_who_is_left_out() -> None:
    for name in EVERYONE:
        if lacking(name):
            print(f"\nleft out: {name} ({lacking(name)})", end="")


def truth(name: str, f: Tensor, w: Tensor, y: Tensor) -> Tensor:  # [B, d], [C, d], [B] -> []
    if eager_of(name) == "eager":
        return arcface.eager_loss(f, w, y, detached="InsightFace" in name)
    return normface.eager_loss(f, w, y)


@functools.cache
def disagreement(name: str) -> str:
    """Where a contestant differs from eager PyTorch in float64, confident rows included; empty where it agrees."""
    exact = name != "pytorch-metric-learning"  # whose gradients are NaN for a row on its class weight
    loss_error, gradient_error = (2e-3, 2e-2) if "bfloat16" in name else (1e-5, 1e-4)
    # Two chunks of 64 rows. d is so large that no row's loss reaches 69, where InsightFace's clamp would cut it off.
    true_f, true_w, y = inputs(100, 200, 3000, torch.float64, exact)
    want = truth(name, true_f, true_w, y)
    want.backward()
    f, w = true_f.detach().float().requires_grad_(), torch.nn.Parameter(true_w.detach().float())
    for measure in (FORWARD, FORWARD_BACKWARD):
        loss = passes(measure, (f, w, y), [name])[name]()
        if not torch.allclose(loss.double(), want, rtol=loss_error):
            return f"its loss without gradients is {loss}, not {want}"
    for which, got, want in (("features", f.grad, true_f.grad), ("weight", w.grad, true_w.grad)):
        error = float((got - want).abs().max() / want.abs().max())
        if not error < gradient_error:
            return f"the gradient of the {which} errs by {error:.1e}"
    return ""


@pytest.mark.parametrize("name", here(LOSSES))
def test_contestants_agree(name: str) -> None:
    assert disagreement(name) == ""


CASES = [(measure, name) for measure in measures(SHAPES[0]) for name in names(measure)]


@pytest.mark.parametrize("shape", SHAPES[:1], ids=title)
@pytest.mark.parametrize(("measure", "name"), CASES)
def test_pass(benchmark: Any, shape: Shape, measure: str, name: str) -> None:
    given = inputs(*shape)
    benchmark.group = f"{measure}, B, d, C = {shape}"
    run = passes(measure, given, [name])[name]
    benchmark.pedantic(run, setup=lambda: clear(*given), rounds=1, warmup_rounds=1)


def summary(seconds: Sequence[float], eager: Sequence[float]) -> dict[str, float]:
    median = statistics.median(seconds)
    ratio = statistics.median(eager) / median
    return {"median": round(median, 6), "min": round(min(seconds), 6), "times_eager": round(ratio, 3)}


def timed(shape: Shape, rounds: int) -> dict[str, dict[str, Any]]:
    """By contestant and measure: seconds, and how many times as fast as eager. Only those that agree are timed."""
    given = inputs(*shape)
    figures: dict[str, dict[str, Any]] = {}
    for measure in measures(shape):
        fit = [name for name in names(measure) if name in FLOORS[measure] or not disagreement(name)]
        seconds = interleaved(passes(measure, given, fit), lambda: clear(*given), rounds)
        for name, values in seconds.items():
            figures.setdefault(name, {})[measure] = summary(values, seconds[eager_of(name)])
    return figures


@pytest.mark.timeout(0)
@pytest.mark.parametrize("shape", SHAPES, ids=title)
def test_ratios(benchmark: Any, shape: Shape) -> None:
    rounds = 3 if shape == LARGEST else 7
    figures = benchmark.pedantic(timed, (shape, rounds), rounds=1)
    for name in LOSSES.keys() & figures.keys():
        figures[name]["peak_mib"] = round(
            peak_memory("contestants.of_nontarget_lse", name, measures(shape)[-1], shape, THREADS), 1
        )
    record = dict(zip("BdC", shape, strict=True)) | results.stamp(rounds) | {"contestants": figures}
    benchmark.extra_info |= record | {"threads": THREADS}
    results.store(record, THREADS)
    print(f"\n{results.section(record)}")
