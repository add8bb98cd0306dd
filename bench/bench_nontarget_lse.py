"""nontarget_lse under an ArcFace head: forward and backward, against eager PyTorch and the floor of its products.

`make bench` runs it. The published ratios are those of `test_ratios`: one interleaved loop, in `extra_info`.
"""

import pytest
import torch
from contestants import CONTESTANTS, clear, eager_loss, inputs, step_of
from measure import interleaved, peak_memory

SHAPE = (256, 512, 100_000)  # B, d, C
THREADS = 2
LOSSES = [name for name in CONTESTANTS if "products" not in name]


@pytest.fixture(autouse=True, scope="module")
def threads():
    before = torch.get_num_threads()
    torch.set_num_threads(THREADS)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("name", LOSSES)
def test_contestants_agree(name):
    """With dense float64 eager, confident rows included, before anything is timed."""
    exact = name != "pytorch-metric-learning"  # whose gradients are NaN for a row on its class weight
    truth_f, truth_w, y = inputs(64, 96, 3000, torch.float64, exact)
    truth = eager_loss(truth_f, truth_w, y, detached="InsightFace" in name)
    truth.backward()
    f, w = truth_f.detach().float().requires_grad_(), torch.nn.Parameter(truth_w.detach().float())
    loss = step_of(name, f, w, y)
    assert torch.allclose(loss.double(), truth, rtol=1e-5)
    for got, want in ((f.grad, truth_f.grad), (w.grad, truth_w.grad)):
        assert float((got - want).abs().max() / want.abs().max()) < 1e-4


@pytest.mark.parametrize("name", CONTESTANTS)
def test_step(benchmark, name):
    given = inputs(*SHAPE)
    benchmark.group = f"forward + backward, B, d, C = {SHAPE}"
    benchmark.pedantic(step_of, (name, *given), rounds=3, warmup_rounds=1)


def test_ratios(benchmark):
    given = inputs(*SHAPE)
    steps = {name: lambda name=name: step_of(name, *given) for name in CONTESTANTS}
    seconds = benchmark.pedantic(interleaved, (steps, lambda: clear(*given), 7), rounds=1)
    memory = {name: peak_memory(name, SHAPE, THREADS) for name in CONTESTANTS}
    ratios = {name: seconds["eager"] / value for name, value in seconds.items()}
    benchmark.extra_info |= {"shape": SHAPE, "threads": THREADS, "times_eager": ratios, "peak_mib": memory}
    benchmark.extra_info |= {"seconds": seconds}
    print(f"\nB, d, C = {SHAPE}, {THREADS} threads\n{'':28}{'s':>8}{'x eager':>10}{'peak MiB':>10}")
    for name, value in seconds.items():
        print(f"{name:28}{value:8.3f}{ratios[name]:9.2f}x{memory[name]:10.0f}")
