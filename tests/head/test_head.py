"""MarginHead against a dense float64 composition in plain autograd: every margin, on every backend; edges; services."""

import copy
import functools
import math

import pytest
import torch
import torch.nn.functional as F
from check import error
from torch import nn

import fastmargin as fm
from fastmargin.head.margin_head import MarginHead

F32, F64 = torch.float32, torch.float64
INF, NAN = torch.inf, torch.nan
CLASSES = 309


@pytest.fixture(autouse=True, scope="module")
def one_thread():  # faster for tensors this small; the tests of the op cover threads
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def angle(c):  # [B], with a finite slope where the sine is 0
    return torch.atan2(((1 - c) * (1 + c)).clamp(min=torch.finfo(c.dtype).eps).sqrt(), c)


def monotone(phi):
    k = (phi.detach() / math.pi).floor()
    return torch.where(k % 2 == 0, 1.0, -1.0) * phi.cos() - 2 * k


def quality(n, h=5.0, momentum=0.5):  # AdaFace's z, after one batch of statistics
    n = n.detach()
    mu, sd = (20 + momentum * (n.mean() - 20), 100 + momentum * (n.std() - 100)) if len(n) > 1 else (20, 100)
    return (h * (n - mu) / sd).clamp(-1, 1)


def sphere(t, of, lam):
    return (monotone(of("m") * t) + lam * t.cos()) / (1 + lam)


def combined(t, of):
    return monotone(of("m1") * t + of("m2")) - of("m3")


def per_class(C, lo, hi, learned=False):
    return (nn.Parameter if learned else torch.clone)(torch.linspace(lo, hi, C))


# name: (C, **options -> margin; theta, c, norms, margin of the rows -> psi). None: a plain layer.
CASES = {
    "Softmax": (lambda C: fm.Softmax(), None),
    "L2Softmax": (lambda C: fm.L2Softmax(), None),
    "L2Softmax fixed": (lambda C: fm.L2Softmax(s=20.0, learn_scale=False), None),
    "NormFace": (lambda C, **o: fm.NormFace(**o), lambda t, c, n, of: c),
    "NormFace s": (lambda C: fm.NormFace(s=16.0, learn_scale=True), lambda t, c, n, of: c),
    "SphereFace": (lambda C, **o: fm.SphereFace(lam=0.0, **o), lambda t, c, n, of: sphere(t, of, 0)),
    "SphereFace 5": (lambda C: fm.SphereFace(lam=5.0), lambda t, c, n, of: sphere(t, of, 5)),
    "SphereFace [C]": (
        lambda C: fm.SphereFace(m=per_class(C, 1.3, 4), lam=1.0), lambda t, c, n, of: sphere(t, of, 1),
    ),
    "CosFace": (lambda C, **o: fm.CosFace(**o), lambda t, c, n, of: c - 0.35),
    "CosFace [C] learned": (lambda C: fm.CosFace(m=per_class(C, 0.1, 0.5, True)), lambda t, c, n, of: c - of("m")),
    "AMSoftmax": (lambda C, **o: fm.AMSoftmax(**o), lambda t, c, n, of: c - 0.35),
    "ArcFace": (lambda C, **o: fm.ArcFace(**o), lambda t, c, n, of: monotone(t + 0.5)),
    "ArcFace m<0": (lambda C: fm.ArcFace(m=-0.2), lambda t, c, n, of: monotone(t - 0.2)),
    "ArcFace [C]": (lambda C: fm.ArcFace(m=per_class(C, 0.2, 0.6)), lambda t, c, n, of: monotone(t + of("m"))),
    "ArcFace s, [C] learned": (
        lambda C: fm.ArcFace(s=30.0, m=per_class(C, 0.2, 0.6, True), learn_scale=True),
        lambda t, c, n, of: monotone(t + of("m")),
    ),
    "Combined": (lambda C, **o: fm.CombinedMargin(**o), lambda t, c, n, of: combined(t, of)),
    "Combined [C] learned": (
        lambda C: fm.CombinedMargin(
            m1=per_class(C, 0.9, 1.7), m2=per_class(C, -0.1, 0.4, True), m3=per_class(C, 0, 0.3, True)
        ),
        lambda t, c, n, of: combined(t, of),
    ),
    "AdaFace": (
        lambda C, **o: fm.AdaFace(h=5.0, momentum=0.5, **o),
        lambda t, c, n, of: (t - 0.4 * quality(n)).clamp(1e-3, math.pi - 1e-3).cos() - 0.4 - 0.4 * quality(n),
    ),
    "MagFace": (
        lambda C, **o: fm.MagFace(**o), lambda t, c, n, of: monotone(t + 0.45 + 0.35 * (n.clamp(10, 110) - 10) / 100),
    ),
    "ElasticFace": (lambda C, **o: fm.ElasticFace(sigma=0.1, **o), lambda t, c, n, of: monotone(t + of("m"))),
    "ElasticFace cos": (lambda C: fm.ElasticFace(form="cos"), lambda t, c, n, of: c - of("m")),
}  # fmt: skip
FREE = ("NormFace", "SphereFace", "CosFace", "AMSoftmax", "ArcFace", "Combined", "AdaFace", "MagFace", "ElasticFace")
PLAIN = ("Softmax", "L2Softmax", "L2Softmax fixed")
COSINE = [name for name in CASES if name not in PLAIN]
SMOOTH = (*PLAIN, "NormFace", "Sphere", "Cos", "AM", "ElasticFace cos")  # no kink of the angle where the cosine is 1
settings = pytest.mark.parametrize(("name", "fn"), [(n, None) for n in CASES] + [(n, n == "SphereFace") for n in FREE])
dtypes = pytest.mark.parametrize("dtype", [F32, F64], ids=["float32", "float64"])


def margin_of(name, fn=None, C=CLASSES):  # fn: normalize_features, or None
    return CASES[name][0](C, **({} if fn is None else {"normalize_features": fn}))


def build(name, fn=None, C=CLASSES, dtype=F64, **options):
    """A head with weight rows of many lengths, and a bias where it may have one."""
    margin = margin_of(name, fn, C)
    head = MarginHead(33, C, margin, bias=margin.plain, **options).to(dtype)
    head.load_full_weight(torch.randn(C, 33) * (0.2 + torch.rand(C, 1)) * (0.15 if margin.plain else 1))
    if head.bias is not None:
        nn.init.normal_(head.bias)
    return head


def batch(head, B=17, cosine=None):  # -> [B, d], [B]; cosine: with the weight of the own class
    w = head.weight.detach().double()
    y = torch.randint(0, len(w), (B,))
    norms = 8 + (112 if isinstance(head.margin, fm.MagFace) else 32) * torch.rand(B, 1, dtype=F64)
    f, center = F.normalize(torch.randn(B, w.shape[1], dtype=F64)), F.normalize(w[y])
    if cosine == 1:  # to the bit
        norms, f = (norms / w[y].norm(dim=1, keepdim=True)).log2().round().exp2(), w[y]
    elif cosine is not None:
        across = F.normalize(f - (f * center).sum(1, keepdim=True) * center)
        f = cosine * center + math.sqrt(1 - cosine**2) * across
    return (norms * f).to(head.weight.dtype), y


def cross_entropy(z, y):
    return F.cross_entropy(z, y, reduction="none")


def careful_cross_entropy(z, y):  # accurate for confident rows, too, where lse - target rounds to 0
    is_target = F.one_hot(y, z.shape[1]).bool()
    rest = z.masked_fill(is_target, -INF).logsumexp(1)
    return torch.logaddexp(rest.new_zeros(()), rest - z[is_target])


def dense(head, name, f, y, upstream, dtype, entropy=cross_entropy):
    """[loss [B], df, and the gradients of the head's parameters], with a B x C array and nothing of the package."""
    margin, rows = head.margin, torch.arange(len(y))
    leaf = {n: p.detach().to(dtype).requires_grad_() for n, p in head.named_parameters()}
    torch.manual_seed(1)
    noise = torch.randn(len(f), dtype=f.dtype).to(dtype) if name.startswith("Elastic") else 0.0
    f = f.detach().to(dtype).requires_grad_()
    norms = f.norm(dim=1)
    r = leaf.get("margin.s", margin.s) * torch.ones_like(norms) if margin.normalize_features else norms

    def of(held):
        value = leaf.get(f"margin.{held}", getattr(margin, held))
        value = value[y].to(dtype) if isinstance(value, torch.Tensor) else value
        return value + (margin.sigma * noise if name.startswith("Elastic") else 0.0)

    if margin.plain:
        x = r[:, None] * F.normalize(f) if margin.normalize_features else f
        z = F.linear(x, leaf["weight"], leaf["bias"])
    else:
        cos = F.linear(F.normalize(f), F.normalize(leaf["weight"]))
        c = cos[rows, y]
        z = (r[:, None] * cos).index_put((rows, y), r * CASES[name][1](angle(c), c, norms, of))
    loss = entropy(z, y)
    if name == "MagFace":
        a = norms.clamp(10, 110)
        loss = loss + 35 * (a / 110**2 + 1 / a)
    return [loss, *torch.autograd.grad(loss @ upstream.to(dtype), (f, *leaf.values()))]


def run(head, f, y, upstream=None, **given):
    """[loss, df, and the gradients of the head's parameters] of a copy, as AdaFace's statistics change."""
    torch.manual_seed(1)
    head = copy.deepcopy(head)
    f = f.detach().clone().requires_grad_()
    loss = head(f, y, **given).loss
    (loss if upstream is None else loss @ upstream.to(loss.dtype)).backward()
    return [loss.detach(), f.grad, *(p.grad for p in head.parameters())]


@functools.cache
def problem(name, fn, cosine, dtype, B=17, C=CLASSES, seed=0):
    """A head, a batch, and the results of the dense composition in float64 and in `dtype`."""
    torch.manual_seed(seed)
    head = build(name, fn, C, dtype, reduction="none")
    f, y = batch(head, B, cosine)
    loss = dense(head, name, f, y, torch.ones(B), F64, careful_cross_entropy)[0].detach()
    upstream = 1 / loss.clamp(1e-30, 1)  # a confident row, with its tiny loss, counts as much as any other
    truth = dense(head, name, f, y, upstream, F64, careful_cross_entropy if cosine or C < 9 else cross_entropy)
    plain = dense(head, name, f, y, upstream, dtype)
    return head, (f, y, upstream), truth, plain


def on(head, backend):
    head.backend = backend
    return head


# ---------------------------------------------------------------------------------------------- loss and gradients


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("cosine", [None, -0.95, 0.5, 0.9, 1.0])
@settings
def test_float64_equals_the_dense_composition(backend, name, fn, cosine):
    head, given, truth, _ = problem(name, fn, cosine, F64)
    for got, want in zip(run(on(head, backend), *given), truth, strict=True):
        assert error(got, want) < (1e-10 if cosine != 1 or name.startswith(SMOOTH) else 1e-5)


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize(("B", "C"), [(1, CLASSES), (17, 2), (17, 1), (1, 1), (0, 5)])
@pytest.mark.parametrize("name", CASES)
def test_small_batches_and_few_classes(backend, name, B, C):
    head, given, truth, _ = problem(name, None, None, F64, B, C)
    for got, want in zip(run(on(head, backend), *given), truth, strict=True):
        assert error(got, want) < 1e-10 if B else not got.any()
    out = on(build(name, C=C, topk=3), backend)(*given[:2])
    assert out.target_score.shape == (B,) and out.hard_scores.shape == (B, 3)
    assert torch.equal((out.hard_classes >= 0).sum(1), torch.full((B,), min(C - 1, 3)))
    assert torch.equal(out.hard_classes < 0, out.hard_scores == -INF)
    if B == 0 or (C == 1 and name != "MagFace"):
        assert out.loss == 0


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("cosine", [None, 0.5, 0.9, 1.0])
@settings
def test_float32_errs_at_most_twice_as_much_as_plain_pytorch(backend, name, fn, cosine):
    draws = []
    for seed in (0, 1):  # the worse of two batches depends less on single rows
        head, given, truth, plain = problem(name, fn, cosine, F32, B=257, seed=seed)
        draws.append(zip(run(on(head, backend), *given), plain, truth, strict=True))
    for pair in zip(*draws, strict=True):
        ours, theirs = (max(error(results[i], results[2]) for results in pair) for i in (0, 1))
        assert ours <= 2 * theirs + 8 * torch.finfo(F32).eps
        assert ours < (1e-4 if cosine != 1 else 0.05)  # at 1, an ulp of the cosine is 3e-4 of the angle


# ---------------------------------------------------------------------------------------------- what margins mean here


@dtypes
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_without_a_margin_it_is_cross_entropy_of_the_logits(backend, dtype, reduction):
    weight = torch.rand(CLASSES, dtype=dtype) + 0.1
    options = dict(dtype=dtype, backend=backend, reduction=reduction, class_weight=weight, ignore_index=7)
    for name in ("NormFace", "Softmax", "L2Softmax"):
        head = build(name, **options)
        f, y = batch(head)
        y[3:6] = 7
        want = F.cross_entropy(head.get_logits(f), y, weight=weight, reduction=reduction, ignore_index=7)
        torch.testing.assert_close(head(f, y).loss, want)
        torch.testing.assert_close(build(name, **options)(f, torch.full_like(y, 7)).loss, torch.zeros_like(want))
    head, given = build("NormFace", **options), (f, y, torch.ones(17) if reduction == "none" else None)
    want = run(head, *given)
    sphere, combined = fm.SphereFace(m=1.0, normalize_features=True), fm.CombinedMargin(m2=0.0, m3=0.0)
    for margin in (fm.ArcFace(m=0.0), fm.CosFace(m=0.0), sphere, combined, fm.ElasticFace(m=0.0, sigma=0.0)):
        head.margin = margin
        for a, b in zip(run(head, *given), want, strict=True):
            assert error(a, b) < 64 * torch.finfo(dtype).eps


@dtypes
def test_detached_slope_has_the_same_value_and_the_gradient_of_softmax(backend, dtype):
    for make in (fm.ArcFace, fm.AMSoftmax, fm.CombinedMargin, lambda **o: fm.SphereFace(lam=0.0, **o)):
        head = build("ArcFace", dtype=dtype, backend=backend, reduction="none")
        f, y = batch(head)
        head.margin = make(normalize_features=True)
        exact = run(head, f, y, torch.ones(len(y)))
        head.margin = make(normalize_features=True, slope="detached")
        loss, df, dw = run(head, f, y, torch.ones(len(y)))
        assert torch.equal(loss, exact[0])
        f, w = f.double().requires_grad_(), head.weight.detach().double().requires_grad_()
        cos = F.linear(F.normalize(f), F.normalize(w))
        is_target = F.one_hot(y, CLASSES).bool()
        z = torch.where(is_target, head.margin(cos[is_target], f.norm(dim=1), y)[:, None], cos).detach() * head.margin.s
        upstream = head.margin.s * (z.softmax(1) - is_target.double())
        for got, want in zip((df, dw), torch.autograd.grad(cos, (f, w), upstream), strict=True):
            assert error(got, want) < (1e-10 if dtype == F64 else 2e-5)


def test_gradient_falls_as_the_norm_rises(backend):
    for name in ("NormFace", "CosFace", "ArcFace", "ArcFace s, [C] learned", "L2Softmax"):
        for dtype, limit in ((F64, 1e-10), (F32, 2e-5)):
            head = build(name, dtype=dtype, backend=backend)
            f, y = batch(head)
            f = F.normalize(f)
            products = [a * run(head, a * f, y)[1].norm(dim=1) for a in (1e-3, 1e-2, 0.1, 1.0, 7.0, 100.0, 1e3)]
            assert error(torch.stack(products), products[3].expand(7, -1)) < limit


def test_hard_classes_are_the_nearest_wrong_classes_for_every_margin(backend):
    head = build("NormFace", backend=backend)
    f, y = batch(head, cosine=0.4)
    cos = F.linear(F.normalize(f), F.normalize(head.weight)).detach()
    want = cos.scatter(1, y[:, None], -INF).topk(5)
    for name in COSINE:
        for fn in (True, False) if name in FREE else (None,):
            head.margin, head.topk = margin_of(name, fn).double(), 5
            out = head(f, y)
            assert torch.equal(out.hard_classes, want.indices) and not (out.hard_classes == y[:, None]).any()
            assert error(out.hard_scores, want.values) < 1e-12 and error(out.target_score, cos[range(17), y]) < 1e-12
            assert not (out.hard_scores.requires_grad or out.target_score.requires_grad)
    for name in PLAIN:
        head = build(name, backend=backend, topk=5)
        want = head.get_logits(f).scatter(1, y[:, None], -INF).topk(5)
        assert torch.equal(head(f, y).hard_classes, want.indices)
        assert error(head(f, y).hard_scores, want.values) < 1e-12


@pytest.mark.parametrize("name", CASES)
def test_permuting_rows_permutes_outputs(backend, name):
    head = build(name, topk=3, reduction="none", backend=backend)
    head.train(not name.startswith("Elastic"))  # its random margins depend on the row's position in the batch
    f, y = batch(head)
    order = torch.randperm(len(y))
    here, there = copy.deepcopy(head)(f, y), copy.deepcopy(head)(f[order], y[order])
    for a, b in zip(here, there, strict=True):
        assert error(b, a[order]) < 1e-12
    here, there = run(head, f, y, torch.ones(17)), run(head, f[order], y[order], torch.ones(17))
    assert error(there[1], here[1][order]) < 1e-11
    for a, b in zip(here[2:], there[2:], strict=True):
        assert error(b, a) < 1e-11


# ---------------------------------------------------------------------------------------------- edges


@pytest.mark.usefixtures("poison")
@dtypes
@settings
def test_edges_are_finite(backend, dtype, name, fn):
    head = build(name, fn, dtype=dtype, backend=backend, topk=2, reduction="none")
    with torch.no_grad():
        head.weight[3] = 0
        w = head.weight.clone()
    f = torch.stack((w[5], 64 * w[5], -w[6], 0 * w[7], w[8], torch.ones_like(w[0]), 1e-20 * w[9], 1e15 * w[9]))
    y = torch.tensor([5, 5, 6, 7, 3, 3, 9, 9])  # equal to its class, its opposite, no row, no class, tiny, huge
    loss, df, dw, *others = run(head, f, y, torch.ones(len(y)))
    assert all(t.isfinite().all() for t in (loss, df, dw, *others))
    out = head(f, y)
    if not head.margin.plain:
        assert (out.target_score[:6] - torch.tensor([1, 1, -1, 0, 0, 0])).abs().max() < 1e-6
        assert not dw[3].any()
    if head.margin.normalize_features:
        assert not df[3].any()


@pytest.mark.parametrize("bad", [0.0, NAN, INF])
@pytest.mark.parametrize("name", CASES)
def test_ignored_rows_leave_no_trace(backend, name, bad):
    head = build(name, backend=backend, topk=2, ignore_index=-1)
    head.train(not name.startswith("Elastic"))
    f, y = batch(head)
    padded, labels = torch.cat((f[:4], f[:2] * 0 + bad, f[4:])), torch.cat((y[:4], torch.tensor([-1, -1]), y[4:]))
    want, got = run(head, f, y), run(head, padded, labels)
    assert not got[1][4:6].any()
    got[1] = torch.cat((got[1][:4], got[1][6:]))
    for a, b in zip(got, want, strict=True):
        assert error(a, b) < 1e-11
    out = copy.deepcopy(head)(padded, labels)
    assert out.target_score[4:6].isnan().all() and (out.hard_classes[4:6] == -1).all()
    assert (out.hard_scores[4:6] == -INF).all() and out.hard_classes[:4].min() >= 0
    for reduction in ("mean", "sum"):
        head.reduction = reduction
        assert all(not t.any() for t in run(head, padded, torch.full_like(labels, -1)))


def test_weights_of_samples_and_classes(backend):
    weight, by_class = torch.rand(17, dtype=F64), torch.rand(CLASSES, dtype=F64)
    for class_weight in (None, by_class):
        head = build("ArcFace", backend=backend, class_weight=class_weight, reduction="none")
        f, y = batch(head)
        y[2], y[3] = -100, 0
        factor = (torch.ones(17, dtype=F64) if class_weight is None else by_class[y]) * (y >= 0)
        rows = build("ArcFace", backend=backend, reduction="none")
        rows.load_full_weight(head.weight)
        loss = rows(f, y).loss * factor * weight
        for reduction, want in (("none", loss), ("sum", loss.sum()), ("mean", loss.sum() / factor.sum())):
            head.reduction = reduction
            torch.testing.assert_close(head(f, y, sample_weight=weight).loss, want)


@pytest.mark.parametrize("label", [CLASSES, -1, -2, 2**40])
def test_labels_out_of_range(backend, label):
    head = build("ArcFace", backend=backend)
    f, y = batch(head)
    bad = y.clone()
    bad[4] = bad[9] = label
    with pytest.raises(ValueError, match=rf"label {label} of row 4 is outside \[0, {CLASSES}\).*2 such rows"):
        head(f, bad)
    head(f, y)
    head.check()
