from functools import partial

import pairwise
import pytest
import torch
from check import error
from dense import F32, F64

from fastmargin.ops import pairwise_potential_portable as portable
from fastmargin.ops.pairwise_potential import IMPLS, pairwise_potential

KINDS = [("inverse", None), ("hinge", 9.0)]
LIMIT = {F32: 3e-6, F64: 1e-13}  # max|error| / max|truth|


@pytest.fixture(params=["native", "stream", "reference"])
def backend(request):
    if request.param not in IMPLS:
        pytest.skip("native kernels not built")
    return request.param


points = partial(pairwise.clouds, apart=1e-4)


def run(a, b, a_ids, b_ids, g=None, dtype=F64, b_weight=None, **options):
    return pairwise.run(pairwise_potential, a, b, a_ids, b_ids, b_weight, g, dtype=dtype, **options)


def assert_close(got, truth):
    for x, t in zip(got, truth, strict=True):
        assert error(x, t) < LIMIT[x.dtype]


SHAPES = [(1, 1, 1), (37, 53, 7), (300, 700, 33), (1100, 20, 16), (16, 513, 5)]


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("weighted", [False, True], ids=["", "weighted"])
@pytest.mark.parametrize(("kind", "margin"), KINDS)
@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
def test_values_and_gradients(backend, shape, weighted, kind, margin, dtype, threads):
    a, b, a_ids, b_ids = points(*shape)
    w, g = (torch.rand(shape[1]) if weighted else None), torch.randn(shape[0])
    options = dict(kind=kind, margin=margin)
    truth = run(a, b, a_ids, b_ids, g, b_weight=w, backend="reference", **options)
    got = run(a, b, a_ids, b_ids, g, dtype, b_weight=w, backend=backend, **options)
    assert_close(got, truth)


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("n", [2, 17, 130, 1300])
@pytest.mark.parametrize("uneven", [False, True], ids=["sum", "rows weighed"])
@pytest.mark.parametrize(("kind", "margin"), KINDS)
@pytest.mark.parametrize("workers", [1, 5])
def test_points_among_themselves(backend, n, uneven, kind, margin, workers):
    """Strips of points are paired as in a round-robin tournament: odd and even numbers, every number of threads."""
    a, _, ids, _ = points(n, 0, 12)
    a[n // 2 : n // 2 + n // 4] = a[: n // 4] + 1e-3 * torch.randn(n // 4, 12)
    g = torch.randn(n) if uneven else None
    options = dict(kind=kind, margin=margin)
    truth = run(a, None, ids, None, g, backend="reference", **options)
    before = torch.get_num_threads()
    torch.set_num_threads(workers)
    try:
        got = run(a, None, ids, None, g, F32, backend=backend, **options)
    finally:
        torch.set_num_threads(before)
    assert_close(got, truth)


@pytest.mark.parametrize(("kind", "margin"), KINDS)
@pytest.mark.parametrize("one_side", [False, True], ids=["two sides", "one side"])
def test_gradcheck(backend, kind, margin, one_side):
    a, b, a_ids, b_ids = points(6, 8, 3, ids=4)
    a, b = (t.double().requires_grad_() for t in (a, b))
    w = None if one_side else torch.rand(8, dtype=F64)

    def op(a, b):
        other = (a, a_ids) if one_side else (b, b_ids)
        return pairwise_potential(a, other[0], a_ids, other[1], b_weight=w, kind=kind, margin=margin, backend=backend)

    assert torch.autograd.gradcheck(op, (a, b))


@pytest.mark.parametrize("distance", [10.0**e for e in range(-3, 3)])
@pytest.mark.parametrize("norm", [0.1, 1.0, 100.0])
def test_small_distances_of_long_vectors(backend, distance, norm):
    """A hinge of margin 2 u shows u: |u - u64| <= 1e-4 u + 1e-9, also where products would have lost it.

    A far point of the row's own id, which does not count, keeps the mean away from the near one.
    """
    a = torch.nn.functional.normalize(torch.randn(40, 64)) * norm
    b = a + torch.nn.functional.normalize(torch.randn(40, 64)) * distance
    own, ids = torch.tensor([0]), torch.tensor([1, 0])
    for p, q in zip(a[:, None], b[:, None], strict=True):
        u = float((p.double() - q.double()).square().sum())
        both = torch.cat((q, -q))
        got = 2 * u - pairwise_potential(p, both, own, ids, kind="hinge", margin=2 * u, backend=backend).double()
        assert abs(float(got) - u) <= 1e-4 * u + 1e-9


def test_without_the_near_path_small_distances_are_lost(monkeypatch):
    """The test above detects errors of matrix products alone."""
    monkeypatch.setattr(portable, "NEAR", 0.0)
    a = 100 * torch.nn.functional.normalize(torch.ones(1, 64))
    b = torch.cat((a + 1e-3, -a))
    u = float((a.double() - b[:1].double()).square().sum())
    ids = torch.tensor([1, 0])
    got = pairwise_potential(a, b, ids[1:], ids, kind="hinge", margin=2 * u, backend="stream").double()
    assert abs(float(2 * u - got) - u) > 1e-2 * u


def test_a_hinge_that_no_pair_reaches_has_no_slope(backend):
    """Far apart, in every tile but one."""
    a = torch.arange(600.0)[:, None] * torch.tensor([[100.0, 0.0]])
    a[1, 0] = 1.0
    ids = torch.arange(600)
    out, slope = run(a, None, ids, None, dtype=F32, kind="hinge", margin=9.0, backend=backend)
    assert torch.equal(out[:2], torch.tensor([8.0, 8.0])) and not out[2:].any()
    assert torch.allclose(slope[:2], torch.tensor([[4.0, 0.0], [-4.0, 0.0]])) and not slope[2:].any()


def test_a_slope_between_near_points_far_from_the_others(backend):
    """Two points 1e-3 apart, 100 from the rest: the slope between them is as exact as their difference."""
    a = torch.zeros(2, 32)
    a[:, 0] = 100.0
    a[1, 1] = 1e-3
    far = -a[:1].expand(30, 32)
    x, ids = torch.cat((a, far)), torch.cat((torch.arange(2), torch.full((30,), 7)))
    _, slope = run(x, None, ids, None, dtype=F32, kind="hinge", margin=1e-2, backend=backend)
    assert torch.allclose(slope[0, 1], torch.tensor(4e-3), rtol=1e-6)
    assert torch.equal(slope[0], -slope[1]) and not slope[2:].any()


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize(("kind", "margin"), KINDS)
def test_nothing_to_sum(backend, kind, margin):
    for N, M, ids in ((0, 5, 9), (5, 0, 9), (5, 7, 1)):
        out, da, db = run(*points(N, M, 4, ids), kind=kind, margin=margin, backend=backend)
        assert out.shape == (N,) and not out.any() and not da.any() and not db.any()
    out, da = run(torch.randn(5, 4), None, torch.zeros(5, dtype=torch.int64), None, kind=kind, margin=margin)
    assert not out.any() and not da.any()


def test_coincident_points_have_the_largest_potential_and_no_slope(backend):
    a = torch.full((3, 5), 2.5)
    for kind, margin, top in (("inverse", None, 1.0), ("hinge", 9.0, 9.0)):
        out, da = run(a, None, torch.tensor([0, 1, 2]), None, kind=kind, margin=margin, backend=backend)
        assert torch.equal(out, torch.full_like(out, 2 * top)) and not da.any()


@pytest.mark.parametrize(("kind", "margin"), KINDS)
def test_what_is_not_a_number_stays_one(backend, kind, margin):
    a, b, _, _ = points(20, 30, 6)
    a[3, 2] = torch.nan
    out, da, _ = run(
        a, b, torch.arange(20), -1 - torch.arange(30), dtype=F32, kind=kind, margin=margin, backend=backend
    )
    assert out[3].isnan() and da[3].isnan().any()
    rest = torch.arange(20) != 3
    assert out[rest].isfinite().all() and da[rest].isfinite().all()
    b[0, 0] = torch.nan
    out, *_ = run(a, b, torch.arange(20), -1 - torch.arange(30), dtype=F32, kind=kind, margin=margin, backend=backend)
    assert out.isnan().all()


def test_ids_are_compared_in_full(backend):
    a, b = torch.zeros(2, 3), torch.zeros(2, 3)
    a_ids, b_ids = torch.tensor([1, -(2**62)]), torch.tensor([1 + 2**32, -(2**62)])
    out, *_ = run(a, b, a_ids, b_ids, kind="inverse", backend=backend)
    assert out.tolist() == [2.0, 1.0]


def test_any_strides_and_autocast(backend):
    a, b, a_ids, b_ids = points(20, 30, 8)
    want = run(a, b, a_ids, b_ids, dtype=F32, kind="inverse", backend=backend)
    spread = [torch.stack((t, t + 1), -1).flatten(-2)[..., ::2] for t in (a, b, a_ids, b_ids)]
    assert not any(t.is_contiguous() for t in spread)
    with torch.autocast("cpu", torch.bfloat16):
        got = run(spread[0].T.contiguous().T, *spread[1:], dtype=F32, kind="inverse", backend=backend)
    for x, y in zip(got, want, strict=True):
        assert x.dtype == F32 and error(x, y) < 1e-6


def test_only_the_gradients_that_are_needed(backend):
    a, b, a_ids, b_ids = points(6, 7, 4)
    for needs in ((True, False), (False, True)):
        one, two = (t.clone().requires_grad_(need) for t, need in zip((a, b), needs, strict=True))
        pairwise_potential(one, two, a_ids, b_ids, kind="inverse", backend=backend).sum().backward()
        assert (one.grad is not None, two.grad is not None) == needs
    assert not pairwise_potential(a, b, a_ids, b_ids, kind="inverse", backend=backend).requires_grad


def test_two_runs_agree_to_the_bit(backend):
    a, b, a_ids, b_ids = points(700, 500, 24)
    for other in (b, None):
        first, second = (run(a, other, a_ids, b_ids, dtype=F32, kind="inverse", backend=backend) for _ in range(2))
        assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))


@pytest.mark.parametrize("one_side", [False, True], ids=["two sides", "one side"])
def test_compiled(one_side):
    a, b, a_ids, b_ids = points(40, 30, 8)

    def loss(a, b):
        other = (a, a_ids) if one_side else (b, b_ids)
        return pairwise_potential(a, other[0], a_ids, other[1], kind="hinge", margin=9.0).sum() * 3

    def gradients(f):
        one, two = (t.clone().requires_grad_() for t in (a, b))
        f(one, two).backward()
        return [one.grad] if one_side else [one.grad, two.grad]

    torch._dynamo.reset()
    for x, y in zip(gradients(torch.compile(loss, fullgraph=True)), gradients(loss), strict=True):
        assert error(x, y) < 1e-6


@pytest.mark.skipif("native" not in IMPLS, reason="native kernels not built")
@pytest.mark.parametrize("one_side", [False, True], ids=["two sides", "one side"])
def test_opcheck(one_side):
    a, b, a_ids, b_ids = points(5, 6, 3)
    b, b_ids, w = (None, None, None) if one_side else (b, b_ids, torch.rand(6))
    op = torch.ops.fastmargin.pairwise_potential_fwd.default
    torch.library.opcheck(op, (a, b, a_ids, b_ids, w, "hinge", 9.0, True))


GOOD = dict(a=torch.zeros(3, 2), b=torch.zeros(4, 2), a_ids=torch.arange(3), b_ids=torch.arange(4), kind="inverse")


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (dict(a=torch.zeros(3)), r"want a \[N, d\] and b \[M, d\]"),
        (dict(b=torch.zeros(4, 5)), r"got \[3, 2\], \[4, 5\]"),
        (dict(a=torch.zeros(3, 0), b=torch.zeros(4, 0)), "d above 0"),
        (dict(a=[1.0]), "a is a list: want a tensor"),
        (dict(b=torch.zeros(4, 2, dtype=F64)), "both float32 or both float64"),
        (dict(a_ids=torch.arange(4)), r"want int64 a_ids \[3\]; got torch.int64 \[4\]"),
        (dict(b_ids=torch.zeros(4)), r"want int64 b_ids \[4\]; got torch.float32 \[4\]"),
        (dict(b_weight=torch.ones(3)), r"want b_weight torch.float32 \[4\]; got torch.float32 \[3\]"),
        (dict(b_weight=torch.ones(4, requires_grad=True)), "detach it"),
        (dict(kind="cosine"), "kind = 'cosine': want one of inverse, hinge"),
        (dict(kind="hinge"), "margin = None with kind = 'hinge'"),
        (dict(margin=1.0), "the inverse has none"),
        (dict(kind="hinge", margin=0.0), "margin = 0.0: want a squared distance above 0"),
        (dict(kind="hinge", margin=float("nan")), "margin = nan"),
        (dict(backend="cuda"), "unknown backend 'cuda'"),
        (dict(b=torch.zeros(4, 2, device="meta")), "a is on cpu, other arguments on meta"),
    ],
)
def test_mistakes(wrong, message):
    with pytest.raises(ValueError, match=message):
        pairwise_potential(**{**GOOD, **wrong})


@pytest.mark.skipif("native" not in IMPLS, reason="native kernels not built")
def test_the_op_itself_checks_what_it_reads():
    a, ids, op = torch.zeros(3, 2), torch.arange(3), torch.ops.fastmargin.pairwise_potential_fwd
    with pytest.raises(ValueError, match="want a_ids"):
        op(a, a, ids[:2], ids, None, "inverse", 0.0, False)
    with pytest.raises(ValueError, match="want b with its ids, or neither"):
        op(a, None, ids, None, torch.ones(3), "inverse", 0.0, False)
    with pytest.raises(ValueError, match="want b "):
        op(a, a.double(), ids, ids, None, "inverse", 0.0, False)
    with pytest.raises(ValueError, match="kind = cosine"):
        op(a, a, ids, ids, None, "cosine", 0.0, False)


def test_a_second_derivative_raises():
    """Also through a plain sum, whose gradient does not itself require one."""
    a, b = torch.randn(5, 3, requires_grad=True), torch.randn(4, 3)
    potential = pairwise_potential(a, b, torch.arange(5), torch.arange(4), kind="inverse")
    first = torch.autograd.grad(potential.sum(), a, create_graph=True)[0]
    with pytest.raises(RuntimeError, match="differentiate twice"):
        (first.square().sum() + a.square().sum()).backward()
