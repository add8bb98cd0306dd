"""psi against closed forms: values, slopes, monotony, the papers' landmarks, the ends |cos| = 1, detached slopes."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fastmargin import margins as fm
from fastmargin.margins.base import Values

BEYOND = ("monotone", "none", "linear", "easy", "clip")
SETTINGS = [  # m1, m2, m3, lam
    (1.0, 0.0, 0.0, 0.0),
    (1.0, 0.0, 0.35, 0.0),
    (1.0, 0.5, 0.0, 0.0),
    (1.0, 0.3, 0.2, 0.0),
    (1.0, -0.2, 0.4, 0.0),
    (0.9, 0.4, 0.0, 10.0),
    (1.5, 0.0, 0.0, 0.0),
    (1.7, 0.2, 0.1, 2.0),
    (2.0, 0.0, 0.0, 0.0),
    (4.0, 0.0, 0.0, 5.0),
    (4.0, -0.2, 0.0, 0.0),
]
COSINE_MARGINS: dict[str, Callable[..., fm.Margin]] = {
    "NormFace": fm.NormFace,
    "SphereFace": fm.SphereFace,
    "SphereFace lam=0": lambda **options: fm.SphereFace(lam=0.0, **options),
    "CosFace": fm.CosFace,
    "AMSoftmax": fm.AMSoftmax,
    "ArcFace": fm.ArcFace,
    "ArcFace m<0": lambda **options: fm.ArcFace(m=-0.2, **options),
    "Combined": fm.CombinedMargin,
    "Combined m1=1.7": lambda **options: fm.CombinedMargin(m1=1.7, **options),
    "AdaFace": fm.AdaFace,
    "MagFace": fm.MagFace,
    "ElasticFace": fm.ElasticFace,
    "ElasticFace cos": lambda **options: fm.ElasticFace(form="cos", plus=True, **options),
}


EACH_SETTING = [
    (setting, beyond)
    for setting in SETTINGS
    for beyond in BEYOND
    if beyond != "linear" or (setting[0] == 1 and setting[1] > 0)
]


def combined(setting: tuple[float, ...], **options: str) -> fm.CombinedMargin:
    m1, m2, m3, lam = setting
    return fm.CombinedMargin(m1=m1, m2=m2, m3=m3, lam=lam, **options)


def psi(margin: fm.Margin, cos: Tensor, norms: Tensor | None = None, labels: Tensor | None = None) -> Tensor:
    norms = torch.full_like(cos, 30.0).detach() if norms is None else norms
    labels = torch.zeros(len(cos), dtype=torch.long) if labels is None else labels
    return margin(cos, norms, labels)


def slope(margin: fm.Margin, cos: Tensor) -> Tensor:
    cos = cos.clone().requires_grad_()
    return torch.autograd.grad(psi(margin, cos).sum(), cos)[0]


def folded(phi: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Monotone P and -dP/dphi without a formula for k: P(phi + pi) = P(phi) - 2."""
    turns = np.zeros_like(phi)
    while (phi > np.pi).any() or (phi < 0).any():
        step = (phi > np.pi).astype(float) - (phi < 0)
        phi, turns = phi - step * np.pi, turns + step
    return np.cos(phi) - 2 * turns, np.sin(phi)


def closed_form(x: np.ndarray, setting: tuple[float, ...], beyond: str) -> tuple[np.ndarray, np.ndarray]:
    """psi and dpsi/dx."""
    m1, m2, m3, lam = setting
    theta = np.arccos(x)
    phi = m1 * theta + m2
    p, sine = np.cos(phi), np.sin(phi)
    d = m1 * sine / np.sin(theta)
    if beyond == "monotone":
        p, sine = folded(phi)
        d = m1 * sine / np.sin(theta)
    elif beyond == "linear":
        p, d = np.where(phi > np.pi, x - m2 * math.sin(m2), p), np.where(phi > np.pi, 1.0, d)
    elif beyond == "easy":
        p, d = np.where(x > 0, p, x), np.where(x > 0, d, 1.0)
    elif beyond == "clip" and (m1, m2) != (1, 0):
        clipped = np.clip(phi, 1e-3, np.pi - 1e-3)
        p, d = np.cos(clipped), np.where(phi == clipped, d, 0.0)
    return (p + lam * x) / (1 + lam) - m3, (d + lam) / (1 + lam)


# Values and slopes


@pytest.mark.parametrize(("setting", "beyond"), EACH_SETTING)
def test_value_is_the_closed_form(setting: tuple[float, ...], beyond: str) -> None:
    x = np.linspace(-1, 1, 100_000)  # even: no point at 0, where "easy" jumps
    with np.errstate(invalid="ignore", divide="ignore"):
        want = closed_form(x, setting, beyond)[0]
    got = psi(combined(setting, beyond=beyond), torch.tensor(x)).numpy()
    np.testing.assert_allclose(got, want, rtol=0, atol=2e-12)


@pytest.mark.parametrize(("setting", "beyond"), EACH_SETTING)
def test_slope_is_the_closed_form(setting: tuple[float, ...], beyond: str) -> None:
    x = np.cos(np.linspace(0.05, math.pi - 0.05, 10_000))
    got = slope(combined(setting, beyond=beyond), torch.tensor(x)).numpy()
    want = closed_form(x, setting, beyond)[1]
    np.testing.assert_allclose(got, want, rtol=1e-9, atol=1e-9 * np.abs(want).max())


@pytest.mark.parametrize(
    ("m1", "m2", "turns"),
    [
        (1, 0.5, [1]),
        (1, -0.2, [0]),
        (1.5, 0, [1]),
        (2, 0.2, [1, 2]),
        (4, 0, [1, 2, 3]),
        (4, -0.2, [0, 1, 2, 3]),
    ],
)
def test_monotone_is_continuous_with_its_slope_at_every_turn(m1: float, m2: float, turns: list[int]) -> None:
    margin, h = fm.CombinedMargin(m1=m1, m2=m2, m3=0.0), 1e-6
    for k in turns:
        theta = (k * math.pi - m2) / m1
        both = torch.tensor([theta - h, theta + h], dtype=torch.float64).cos()
        assert psi(margin, both).tolist() == pytest.approx([1 - 2 * k] * 2, abs=1e-10)
        assert slope(margin, both).abs().max() < 2 * m1**2 * h / math.sin(theta)


@pytest.mark.parametrize("beyond", ["monotone", "clip"])
def test_monotone_and_clip_never_rise_with_theta(beyond: str) -> None:
    random = np.random.default_rng(0)
    cos = torch.linspace(0, math.pi, 5_001, dtype=torch.float64).cos()
    for m1, m2, lam in random.uniform((0.5, -0.5, 0), (5, 1, 1000), (60, 3)):
        for setting in ((m1, m2, 0.2, lam), (m1, m2, 0.2, 0.0), (1.0, m2, 0.0, 0.0)):
            assert psi(combined(setting, beyond=beyond), cos).diff().max() <= 1e-12


@pytest.mark.parametrize(
    ("name", "jump"), [("none", 0.0), ("linear", -0.1173), ("easy", 0.4794), ("monotone", 0.0), ("clip", 0.0)]
)
def test_jumps_of_arcface_are_those_documented(name: str, jump: float) -> None:
    where = math.pi / 2 if name == "easy" else math.pi - 0.5
    around = torch.tensor([where - 1e-8, where + 1e-8], dtype=torch.float64)
    before, after = psi(fm.ArcFace(beyond=name), around.cos()).tolist()
    assert after - before == pytest.approx(jump, abs=1e-4)


@pytest.mark.parametrize("beyond", ["monotone", "none", "easy", "clip"])
@pytest.mark.parametrize("m1", [1.0, 1.7])
def test_gradients_of_margins_and_scale(beyond: str, m1: float) -> None:
    cos = torch.tensor([-0.97, -0.9, -0.3, 0.2, 0.6, 0.93], dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([0, 1, 2, 2, 1, 0])
    held = [torch.full((3,), value, dtype=torch.float64).requires_grad_() for value in (m1, 0.4, 0.1, 30.0)]

    def logit(cos: Tensor, a: Tensor, b: Tensor, c: Tensor, s: Tensor) -> Tensor:
        class Given(fm.Margin):
            def row_margins(self, cos: Tensor, norms: Tensor, labels: Tensor) -> Values:
                return (1.0 if m1 == 1 else a[labels]), b[labels], c[labels]

        margin = Given(beyond=beyond, lam=0.5)
        return s[labels] * psi(margin, cos, labels=labels)

    assert torch.autograd.gradcheck(logit, (cos, *held))


def test_trainable_margins_get_the_derivative_of_the_formula() -> None:
    theta = torch.tensor([0.7, 1.9, 2.9], dtype=torch.float64)  # the last beyond pi: k = 1
    labels = torch.tensor([0, 3, 3])
    margin = fm.CombinedMargin(
        m1=nn.Parameter(torch.ones(4, dtype=torch.float64)),
        m2=nn.Parameter(torch.full((4,), 0.5, dtype=torch.float64)),
        m3=nn.Parameter(torch.zeros(4, dtype=torch.float64)),
        lam=3.0,
    )
    psi(margin, theta.cos(), labels=labels).sum().backward()
    d = torch.tensor([-1.0, -1.0, 1.0]) * torch.sin(theta + 0.5) / 4
    assert margin.m2.grad.tolist() == pytest.approx([d[0].item(), 0, 0, (d[1] + d[2]).item()])
    by_m1 = d * theta
    assert margin.m1.grad.tolist() == pytest.approx([by_m1[0].item(), 0, 0, (by_m1[1] + by_m1[2]).item()])
    assert margin.m3.grad.tolist() == [-1.0, 0.0, 0.0, -2.0]


# Which margin is which


@pytest.mark.parametrize("beyond", ["monotone", "none", "easy", "clip"])
def test_no_margin_is_normface(beyond: str) -> None:
    cos = torch.linspace(-1, 1, 1_001)
    for margin in (combined((1, 0, 0, 0), beyond=beyond), fm.CosFace(m=0), fm.ArcFace(m=0, beyond=beyond)):
        assert torch.equal(psi(margin, cos), psi(fm.NormFace(), cos)) and torch.equal(psi(margin, cos), cos)
        assert torch.equal(slope(margin, cos), torch.ones_like(cos))


@pytest.mark.parametrize("beyond", ["monotone", "none", "easy"])
def test_no_margin_per_class_is_normface_up_to_the_ends(beyond: str) -> None:
    margin, cos = fm.ArcFace(m=torch.zeros(1), beyond=beyond), torch.linspace(-1, 1, 1_001)
    assert torch.equal(psi(margin, cos), cos) and torch.equal(slope(margin, cos), torch.ones_like(cos))


def test_much_lambda_is_the_unmargined_head_of_the_same_scale() -> None:
    cos = torch.linspace(-1, 1, 1_001, dtype=torch.float64)
    norms = 25 + 20 * cos
    sphere, w_norm = fm.SphereFace(lam=1e12), fm.NormFace(normalize_features=False)
    assert torch.equal(sphere.scale(norms), norms) and torch.equal(w_norm.scale(norms), norms)
    torch.testing.assert_close(psi(sphere, cos, norms), psi(w_norm, cos, norms), rtol=0, atol=2e-11)


def test_sphereface_of_4_is_the_polynomial_with_its_sign_tables() -> None:
    signs, offsets = (1, -1, 1, -1), (0, -2, -4, -6)
    for quarter in range(4):
        theta = torch.linspace(0.001, math.pi / 4 - 0.001, 500, dtype=torch.float64) + quarter * math.pi / 4
        x = theta.cos()
        want = signs[quarter] * (8 * x**4 - 8 * x**2 + 1) + offsets[quarter]
        torch.testing.assert_close(psi(fm.SphereFace(lam=0), x), want, rtol=0, atol=1e-12)


# |cos| near 1


def make(name: str, beyond: str, slope_mode: str) -> fm.Margin | None:
    try:
        return COSINE_MARGINS[name](beyond=beyond, slope=slope_mode)
    except ValueError:
        assert beyond == "linear"
        return None


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", COSINE_MARGINS)
def test_ends_are_finite_and_bounded(name: str, dtype: torch.dtype) -> None:
    ends = torch.tensor([1, -1, 1 + 2e-7, -1 - 2e-7, 0, 1 - 1e-7, -1 + 1e-7], dtype=dtype)
    floor = 1e-7 if dtype == torch.float64 else 1e-3
    for beyond in BEYOND:
        for mode in ("exact", "detached"):
            margin = make(name, beyond, mode)
            if margin is None:
                continue
            cos, norms = ends.clone().requires_grad_(), torch.full_like(ends, 30.0).requires_grad_()
            value = psi(margin, cos, norms, torch.full((len(ends),), -1))
            d_cos, d_norms = torch.autograd.grad(value.sum(), (cos, norms), allow_unused=True)
            assert value.dtype == dtype and value.isfinite().all() and d_cos.isfinite().all()
            assert d_norms is None or d_norms.isfinite().all()
            assert d_cos.abs().max() <= 4 / floor


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_clamp_bounds_the_value_and_keeps_the_slope(dtype: torch.dtype) -> None:
    floor = 1e-7 if dtype == torch.float64 else 1e-3
    ends = torch.tensor([1, 1 + 1e-7, 1.5, -1, -1 - 1e-7, -1.5], dtype=dtype)
    for margin in (fm.ArcFace(beyond="none"), fm.CombinedMargin(m1=1.5, m2=0.3, m3=0.0, beyond="none")):
        value, d = psi(margin, ends), slope(margin, ends)
        assert torch.equal(value[:3], value[:1].expand(3)) and torch.equal(value[3:], value[3:4].expand(3))
        assert torch.equal(d[:3], d[:1].expand(3)) and torch.equal(d[3:], d[3:4].expand(3))
        assert (d != 0).all()
    want = math.cos(0.5) + math.sin(0.5) / floor
    assert slope(fm.ArcFace(), ends)[0].item() == pytest.approx(want, rel=1e-6)
    assert torch.equal(slope(fm.CosFace(), ends), torch.ones_like(ends))


def features_at(theta: float, rows: int = 256, d: int = 128) -> tuple[Tensor, Tensor]:
    """float32 features [rows, d] of length 7 at the angle theta from their unit class weights [rows, d]."""
    generator = torch.Generator().manual_seed(0)
    w, t = (torch.randn(rows, d, generator=generator, dtype=torch.float64) for _ in range(2))
    w = nn.functional.normalize(w)
    t = nn.functional.normalize(t - (t * w).sum(1, keepdim=True) * w)
    return (7 * (math.cos(theta) * w + math.sin(theta) * t)).float(), w.float()


def feature_gradient(f: Tensor, psi_of: Callable[[Tensor, Tensor], Tensor]) -> Tensor:  # [rows, d]
    f = f.clone().requires_grad_()
    return torch.autograd.grad(psi_of(f, f.norm(dim=1)).sum(), f)[0]


@pytest.mark.parametrize("m1", [1.0, 1.5])
@pytest.mark.parametrize(
    ("theta", "median", "worst"),
    [
        (0.1, 1e-5, 5e-5),
        (0.03, 1e-4, 4e-4),
        (0.003, 1e-2, 5e-2),
        (1e-3, 1e-2, 0.2),
        (3e-4, 0.71, 0.75),
        (1e-4, 0.91, 0.95),
        (1e-6, 1.01, 1.05),
        (0.0, 1.01, 1.05),
    ],
)
def test_gradient_of_the_raw_feature(theta: float, median: float, worst: float, m1: float) -> None:
    """Against the truth (float64, atan2) the float32 gradient is right down to the floor of 1e-3, then too small."""
    f, w = features_at(theta)
    w64 = nn.functional.normalize(w.double())
    margin = fm.CombinedMargin(m1=m1, m2=0.5, m3=0.0)

    def ours(f: Tensor, norms: Tensor) -> Tensor:
        return psi(margin, ((f / norms[:, None]) * nn.functional.normalize(w)).sum(1), norms)

    def truth(f: Tensor, norms: Tensor) -> Tensor:
        unit = f / norms[:, None]
        cos = (unit * w64).sum(1)
        return torch.cos(m1 * torch.atan2((unit - cos[:, None] * w64).norm(dim=1), cos) + 0.5)

    got, want = feature_gradient(f, ours).double(), feature_gradient(f.double(), truth)
    assert got.isfinite().all() and want.isfinite().all()
    error = (got - want).norm(dim=1) / want.norm(dim=1)
    assert error.median() <= median and error.max() <= worst
    assert 7 * got.norm(dim=1).max() <= 1.2 * m1  # the tangent form D (w - cos f) is at most m1 long
    assert (got != 0).any(dim=1).all()
    cos = (f / f.norm(dim=1, keepdim=True) * w).sum(1)
    assert slope(margin, cos).abs().max() <= m1 / 1e-3


@pytest.mark.parametrize("name", COSINE_MARGINS)
def test_empty_and_single_batches(name: str) -> None:
    margin = COSINE_MARGINS[name]()
    assert psi(margin, torch.empty(0)).shape == (0,)
    assert psi(margin, torch.tensor([0.3])).shape == (1,)
    margin.observe(torch.empty(0), torch.empty(0))
    margin.observe(torch.tensor([12.0]), torch.tensor([0.3]))
    assert psi(margin, torch.tensor([0.3])).isfinite().all()


# Slope="detached"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", COSINE_MARGINS)
def test_detached_has_the_value_to_the_bit_and_slope_one(name: str, dtype: torch.dtype) -> None:
    ends = torch.tensor([0.0, -0.0, 1.0, -1.0], dtype=dtype)
    cos = torch.cat([torch.linspace(-1.01, 1.01, 2_001, dtype=dtype), ends])
    bits = torch.int32 if dtype == torch.float32 else torch.int64
    for beyond in BEYOND:
        exact, detached = make(name, beyond, "exact"), make(name, beyond, "detached")
        if exact is None or detached is None:
            continue
        torch.manual_seed(0)
        want = psi(exact, cos)
        torch.manual_seed(0)
        assert torch.equal(psi(detached, cos).view(bits), want.view(bits))
        assert torch.equal(slope(detached, cos), torch.ones_like(cos))


def test_detached_trains_cosines_with_s_times_p_minus_y() -> None:
    generator = torch.Generator().manual_seed(0)
    cos = torch.rand(6, 9, generator=generator, dtype=torch.float64).mul(2).sub(1).requires_grad_()
    labels = torch.tensor([0, 3, 3, 8, 1, 5])
    is_target = nn.functional.one_hot(labels, 9)
    value = psi(fm.ArcFace(slope="detached"), cos[range(6), labels], labels=labels)
    z = 64.0 * torch.where(is_target.bool(), value[:, None], cos)
    nn.functional.cross_entropy(z, labels, reduction="sum").backward()
    torch.testing.assert_close(cos.grad, 64.0 * (z.softmax(1) - is_target).detach(), rtol=1e-12, atol=1e-12)


def test_detached_still_trains_margins_and_norms() -> None:
    cos, norms = torch.tensor([0.2, 0.7]), torch.tensor([20.0, 90.0], requires_grad=True)
    for mode in ("exact", "detached"):
        margin = fm.ArcFace(m=nn.Parameter(torch.full((1,), 0.5)), slope=mode)
        psi(margin, cos.requires_grad_()).sum().backward()
        want = -torch.sin(cos.detach().acos() + 0.5).sum()
        torch.testing.assert_close(margin.m.grad[0], want)
        assert torch.autograd.grad(psi(fm.MagFace(slope=mode), cos, norms).sum(), norms)[0].lt(0).all()
