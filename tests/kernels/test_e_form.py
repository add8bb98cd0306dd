"""The arithmetic of the GPU kernels' two backward forms, modeled (e_form.py), on 96 settings and at its limits."""

import functools
import math

import pytest
import torch
import torch.nn.functional as F
from check import assert_as_good
from e_form import modeled, plain, truth, weights_of

from fastmargin.ops.exponentials import LARGEST_NORM

F64 = torch.float64
B = 16
ROWS = ("random", "cosine .5", "cosine .8", "cosine .95", "hard .9", "mixed")
SETTINGS = [
    (s, d, C, rows)
    for s in (16, 30, 64)
    for d, C in ((64, 1_000), (64, 10_000), (64, 100_000), (512, 1_000), (512, 10_000), (512, 100_000))
    for rows in ROWS
    if C < 100_000 or d == 64 or s == 64
]


@functools.lru_cache(maxsize=1)  # the largest are of 1 GB
def weights(C, d, seed=0):
    return weights_of(torch.randn(C, d, generator=torch.Generator().manual_seed(seed)) * 0.01)


def toward(f, center, cosine):
    """Unit rows of that cosine to the unit rows `center`, on the side of f."""
    across = F.normalize(f - (f * center).sum(1, keepdim=True) * center)
    return cosine * center + math.sqrt(1 - cosine**2) * across


def rows_of(kind, unit, y):
    """Unit rows; "hard": a wrong class is at cosine .9, the own one at .5 or less."""
    f = F.normalize(torch.randn(len(y), unit.shape[1], dtype=F64))
    hard = toward(toward(f, unit[y], 0.5), unit[(y + 1) % len(unit)], 0.9)
    kinds = [f, *(toward(f, unit[y], cosine) for cosine in (0.5, 0.8, 0.95)), hard]
    if kind != "mixed":
        return kinds[ROWS.index(kind)]
    return torch.stack(kinds)[torch.arange(len(y)) % len(kinds), torch.arange(len(y))]


def upstream_of(x, y, p):
    """d_rest and d_target of the mean cross entropy with a margin of .5 rad on the target."""
    s = x.double().norm(dim=1)
    z = x.double() @ p.unit.T
    theta = (z.gather(1, y[:, None])[:, 0] / s).clamp(-1, 1).acos()
    rest = z.scatter(1, y[:, None], -torch.inf).logsumexp(1)
    d_rest = torch.sigmoid(rest - s * (theta + 0.5).cos()) / len(x)
    slope = (theta + 0.5).sin() / theta.sin().clamp(min=1e-3)
    return d_rest.float(), (-d_rest * slope).float()


def check(p, x, y, d_rest, d_target):
    right, peer = truth(p, x, y, d_rest, d_target), plain(p, x, y, d_rest, d_target)
    forms = [modeled(p, x, y, d_rest, d_target, kept=kept) for kept in (True, False)]
    for form in forms:
        assert_as_good(form.rest, peer.rest, right.rest)
        assert_as_good(form.dx, peer.dx, right.dx)
    errors, largest = torch.zeros(3, dtype=F64), 0.0
    for first in range(0, len(p.w), 2**20 // p.w.shape[1]):
        at = slice(first, min(first + 2**20 // p.w.shape[1], len(p.w)))
        want = right.dw(at)
        largest = max(largest, want.abs().max())
        errors = torch.maximum(errors, torch.stack([(r.dw(at) - want).abs().max() for r in (peer, *forms)]))
    plainly, *ours = errors / largest
    assert max(ours) <= 2 * plainly + 8 * torch.finfo(torch.float32).eps, (ours, plainly)


@pytest.mark.parametrize(("s", "d", "C", "rows"), sorted(SETTINGS, key=lambda setting: setting[1:3]))
def test_settings(s, d, C, rows):
    p = weights(C, d)
    y = torch.randint(0, C, (B,))
    x = (s * rows_of(rows, p.unit, y)).float()
    check(p, x, y, *upstream_of(x, y, p))


def test_there_are_96_settings():
    assert len(SETTINGS) == 96


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("below", [0.0, 5.0])
@pytest.mark.parametrize("C", [2, 1_000, 100_000])
@pytest.mark.parametrize("size", [1e-9, 1.0, 6.6e6])
def test_the_largest_norms(size, C, below, rows):
    """At and below the bound of kept exponentials, with incoming gradients of any size."""
    p = weights(C, 64)
    y = torch.randint(0, C, (4 * B,))
    norm = LARGEST_NORM - math.log(C) / 2 - below
    x = (norm * rows_of(rows, p.unit, y)).float()
    d_rest = size * (0.5 + torch.rand(len(y)))
    check(p, x, y, d_rest, -d_rest)


@pytest.mark.parametrize("rows", ROWS)
def test_class_weights_of_any_norm(rows):
    w = torch.randn(1_000, 64) * 0.125 * torch.logspace(-3, 3, 1_000)[torch.randperm(1_000), None]
    p, y = weights_of(w), torch.randint(0, 1_000, (4 * B,))
    x = (64 * rows_of(rows, p.unit, y)).float()
    check(p, x, y, *upstream_of(x, y, p))


@pytest.mark.parametrize("cosine", ["cosine .5", "cosine .95"])
def test_one_class_has_all_of_the_probability(cosine):
    """Its rounding errors average over the rows, as plain PyTorch's do."""
    p, y = weights(2, 64), torch.randint(0, 2, (256,))
    x = (64 * rows_of(cosine, p.unit, y)).float()
    d_rest = 0.5 + torch.rand(len(y))
    check(p, x, y, d_rest, -d_rest)


def test_no_other_class():
    p, y = weights_of(torch.randn(1, 8)), torch.zeros(3, dtype=torch.int64)
    x, d_rest, d_target = torch.randn(3, 8), torch.zeros(3), torch.rand(3)
    for kept in (True, False):
        rest, dx, dw = modeled(p, x, y, d_rest, d_target, kept=kept)
        assert (rest == -torch.inf).all()
        torch.testing.assert_close(dx, d_target[:, None] * p.unit.float())
        torch.testing.assert_close(dw(slice(0, 1)).double() @ p.unit[0], torch.zeros(1, dtype=F64), atol=1e-6, rtol=0)
