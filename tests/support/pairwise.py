"""pairwise_potential by its definition, all differences in plain autograd, and problems to try it on."""

import torch
from check import assert_as_good
from dense import F32, F64, cast, leaves
from places import moved

from fastmargin.ops.pairwise_potential import pairwise_potential


def dense(a, b, a_ids, b_ids, b_weight=None, *, kind, margin=None):
    u = (a[:, None] - b).square().sum(2)
    phi = 1 / (1 + u) if kind == "inverse" else (margin - u).clamp(min=0)
    return (phi * (a_ids[:, None] != b_ids) * (1 if b_weight is None else b_weight)).sum(1)


def clouds(N, M, d, ids=9, apart=1e-2):
    """Two clouds far from the origin; a third of the pairs (i, i) nearly coincide. All are float32 numbers."""
    a, b = torch.randn(N, d) / 2 + 3, torch.randn(M, d) / 2 + 3
    near = (min(N, M) + 2) // 3
    b[:near] = a[:near] + apart * torch.randn(near, d)
    return a, b, torch.randint(0, ids, (N,)), torch.randint(0, ids, (M,))


def between_distances(a, b):
    """A margin at which rounding changes the side of no pair: the middle of the widest gap of the middle third."""
    u = (a.double()[:, None] - b.double()).square().sum(2).flatten().sort().values
    u = u[len(u) // 3 : 2 * len(u) // 3 + 2]
    at = int(u.diff().argmax()) if len(u) > 1 else 0
    return float(u[at : at + 2].mean()) + (len(u) == 1)


def run(op, a, b, a_ids, b_ids, w=None, g=None, *, dtype=F32, device="cpu", **options):
    """Potentials and gradients, on the CPU. `b` None: a, again. `g` None: the gradient of a plain sum."""
    a, b, a_ids, b_ids, w, g = moved(device, *cast(dtype, a, b, a_ids, b_ids, w, g))
    a, b = leaves(a, b)
    out = op(a, a if b is None else b, a_ids, a_ids if b is None else b_ids, b_weight=w, **options)
    out.sum().backward() if g is None else out.backward(g)
    return moved("cpu", out.detach(), *(t.grad for t in (a, b) if t is not None))


def run_on(place, *given, **options):
    device, backend = place
    return run(pairwise_potential, *given, device=device, backend=backend, **options)


def check(place, *given, **options):
    """In float32 it errs at most twice as much as plain PyTorch on all differences."""
    truth = run(dense, *given, dtype=F64, **options)
    plain = run(dense, *given, **options)
    for x, p, t in zip(run_on(place, *given, **options), plain, truth, strict=True):
        assert_as_good(x, p, t)
