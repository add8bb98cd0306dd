"""pairwise_potential under the Git term and the minimum margin, against eager PyTorch and the floors of its products.

`make bench ARGS=bench/cases/bench_pairwise_potential.py` runs it: first all contestants must agree with float64, then
they are timed in one interleaved loop per shape. Figures are kept in `extra_info` and in results/.
"""

import statistics
from typing import Any

import pytest
import torch
from contestants.pairs import ALL, BOTH, DETACHED, EAGER, FLOORS, LOSSES, clear, here, inputs, passes
from harness import results
from harness.measure import interleaved, peak_memory

Case = tuple[str, int, int, int]  # measure, N samples, M centers, d

GIT = [(measure, *shape) for shape in ((512, 512, 512), (4096, 2048, 512)) for measure in (BOTH, DETACHED)]
CASES: list[Case] = [*GIT, (ALL, 1, 10_000, 128), (ALL, 1, 50_000, 128)]
LARGEST = CASES[-1]  # one matrix of all squared distances takes 10 GB: eager PyTorch is left out
THREADS = torch.get_num_threads()


def names(case: Case) -> list[str]:
    return here(name for name in LOSSES if case != LARGEST or "fastmargin" in name)


@pytest.mark.parametrize("name", here(LOSSES))
@pytest.mark.parametrize("measure", [BOTH, DETACHED, ALL])
def test_contestants_agree(name: str, measure: str) -> None:
    true = inputs(300, 200, 96, torch.float64)
    want = next(iter(passes(measure, true, EAGER[:1]).values()))()
    given = tuple(t.detach().float() if t.is_floating_point() else t for t in true)
    a, b = (t.requires_grad_() for t in given[:2])
    got = passes(measure, given, [name])[name]()
    assert torch.allclose(got.double(), want, rtol=1e-5)
    for mine, right in ((a.grad, true[0].grad), (b.grad, true[1].grad)):
        assert (mine is None) == (right is None)
        assert mine is None or float((mine - right).abs().max() / right.abs().max()) < 1e-4


def timed(case: Case, rounds: int) -> dict[str, dict[str, Any]]:
    measure, *shape = case
    given = inputs(*shape)
    seconds = interleaved(passes(measure, given, names(case) + here(FLOORS[measure])), lambda: clear(*given), rounds)
    eager = min((statistics.median(seconds[name]) for name in EAGER if name in seconds), default=None)
    figures: dict[str, dict[str, Any]] = {}
    for name, values in seconds.items():
        median = statistics.median(values)
        figures[name] = {"median": round(median, 6), "min": round(min(values), 6)}
        figures[name]["times_eager"] = eager and round(eager / median, 3)
    return figures


@pytest.mark.timeout(0)
@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)))
def test_ratios(benchmark: Any, case: Case) -> None:
    rounds = 3 if case == LARGEST else 9
    figures = benchmark.pedantic(timed, (case, rounds), rounds=1)
    for name in names(case):
        figures[name]["peak_mib"] = round(peak_memory("contestants.pairs", name, case[0], case[1:], THREADS), 1)
    record = dict(zip(("measure", "N", "M", "d"), case, strict=True)) | results.stamp(rounds) | {"contestants": figures}
    benchmark.extra_info |= record | {"threads": THREADS}
    results.store_table(results.PAIRS, record, THREADS)
    print(f"\n{results.table_section(results.PAIRS, record)}")
