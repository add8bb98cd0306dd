"""bench/harness/counts.py against what the kernels' host code really launches."""

import math

import pytest
import torch
from harness import counts
from harness.counts import Shape
from places import INTERPRETED

from fastmargin.ops.class_update import Step
from fastmargin.ops.nontarget_lse import IMPLS
from fastmargin.ops.problem import BackwardInput, Problem

BF16 = torch.bfloat16
SHAPES = [
    Shape(5, 24, 1500, 0),
    Shape(5, 24, 1500, 1),
    Shape(5, 24, 1500, 1, kept=True),
    Shape(40, 32, 900, 2, in_backward=True),
    Shape(40, 32, 900, 2, in_backward=True, cached=True),
    Shape(40, 32, 900, 2, kept=True, in_backward=True),
    Shape(40, 32, 900, 2, kept=True, in_backward=True, cached=True),
]


def run(backend, s, dtype):
    functions = IMPLS[backend].functions
    x, w, y = torch.randn(s.B, s.d), torch.randn(s.n, s.d), torch.randint(0, s.n, (s.B,))
    p, parts = Problem(x, w, y, compute_dtype=dtype), {}
    if s.cached:
        parts = dict(operands=torch.zeros(s.n, s.d, dtype=dtype), scales=torch.ones(2, s.n))
    rest, _, classes, *saved = functions["fwd"](p, s.topk, True, keep_exponentials=s.kept, **parts)
    given = BackwardInput(rest, classes, *saved, torch.rand(s.B), torch.rand(s.B), None)
    if s.in_backward:
        step = Step([torch.zeros_like(w)], "sgd", [0.1, 0.9, 0.0, 0.0], None)
        functions["bwd_update"](p, given, True, False, step, **parts)
    else:
        functions["bwd"](p, given, True, True, False)


@pytest.mark.skipif(INTERPRETED, reason="of CUDA C++")
@pytest.mark.parametrize("s", SHAPES, ids=str)
def test_launches_of_cuda(emulated, emulated_ops, s):
    emulated_ops.launches()
    run("emulated", s, BF16)
    assert counts.launches(counts.step("native", s, chunk_bytes=2**16, launch=0.0)) == tuple(emulated_ops.launches())


@pytest.mark.skipif(not INTERPRETED, reason="of Triton")
@pytest.mark.parametrize("s", [s._replace(e=4) for s in SHAPES[:3]], ids=str)
def test_launches_of_triton_interpreted(place, s, monkeypatch):
    from triton.runtime.interpreter import InterpretedFunction

    from fastmargin.kernels import gradients, nontarget_lse

    launched = [0, 0]

    def counted(at, function):
        def call(*args, **options):
            launched[at] += 1
            return function(*args, **options)

        return call

    monkeypatch.setattr(InterpretedFunction, "run", counted(0, InterpretedFunction.run))
    for name in ("multiply", "add_row_products"):
        monkeypatch.setattr(nontarget_lse, name, counted(1, getattr(gradients, name)))
    run("triton", s, None)
    assert counts.launches(counts.step("triton", s)) == tuple(launched)


@pytest.mark.skipif(INTERPRETED, reason="no kernel is run")
@pytest.mark.parametrize("backend", ["native", "triton"])
@pytest.mark.parametrize("s", [Shape(1024, 512, 10**6), Shape(4096, 512, 10**7)], ids=str)
def test_a_kept_step_has_three_products_and_is_not_bound_by_the_host(s, backend):
    pytest.importorskip("triton", reason="triton is not installed: its chunks are NOT counted")
    product, floor = 2.0 * s.B * s.d * s.n, counts.FLOPS
    for kept, products in ((False, 4), (True, 3)):
        parts = counts.step(backend, s._replace(kept=kept))
        assert sum(p.flops for p in parts) == products * product
        device, host = counts.seconds(parts, backend)
        assert host < device and products * product / floor < device < 2.6 * products * product / floor
        assert math.isfinite(sum(p.memory + p.cache for p in parts))
