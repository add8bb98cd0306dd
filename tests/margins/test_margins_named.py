"""The named margins: the papers' landmarks, per-class margins, the statistics of AdaFace, the norms of MagFace, the
draws of ElasticFace, scales, defaults, mistakes. Angles are radians unless a name says degrees."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fastmargin import margins as fm
from fastmargin.margins.base import Values


def psi(margin: fm.Margin, cos: Tensor, norms: Tensor | None = None, labels: Tensor | None = None) -> Tensor:
    norms = torch.full_like(cos, 30.0) if norms is None else norms
    labels = torch.zeros(len(cos), dtype=torch.long) if labels is None else labels
    return margin(cos, norms, labels)


def at_degrees(margin: fm.Margin, *degrees: float) -> list[float]:
    return psi(margin, torch.tensor(np.cos(np.radians(degrees)))).tolist()


# Known points

DEGREES = (10, 20, 30, 40, 60, 90, 105, 151.352, 170)
TABLE = {
    "softmax": (0.984808, 0.939693, 0.866025, 0.766044, 0.5, 0.0, -0.258819, -0.877582, -0.984808),
    "A(2,0)": (0.939693, 0.766044, 0.5, 0.173648, -0.5, -1.0, -1.133975, -2.540299, -2.939693),
    "A(4,5)": (0.948347, 0.812019, 0.638355, 0.481755, 0.166667, -0.5, -0.799016, -1.661959, -1.948347),
    "A(1.5,0)": (0.965926, 0.866025, 0.707107, 0.5, 0.0, -0.707107, -0.92388, -1.318359, -1.741181),
    "Cos .35": (0.634808, 0.589693, 0.516025, 0.416044, 0.15, -0.35, -0.608819, -1.227582, -1.334808),
    "Arc .5": (0.780999, 0.660685, 0.520296, 0.364098, 0.023597, -0.479426, -0.690225, -1.0, -0.947501),
}


def in_table(name: str) -> fm.Margin:
    return {
        "softmax": fm.NormFace(),
        "A(2,0)": fm.SphereFace(m=2, lam=0),
        "A(4,5)": fm.SphereFace(m=4, lam=5),
        "A(1.5,0)": fm.SphereFace(m=1.5, lam=0),
        "Cos .35": fm.CosFace(),
        "Arc .5": fm.ArcFace(beyond="none"),
    }[name]


@pytest.mark.parametrize("name", TABLE)
def test_table_of_the_papers(name: str) -> None:
    assert at_degrees(in_table(name), *DEGREES) == pytest.approx(TABLE[name], abs=1e-6)


def test_landmarks_of_the_papers() -> None:
    crossing = math.degrees(math.asin(0.35 / (2 * math.sin(0.25))) - 0.25)  # 30.6954
    around = (crossing - 1e-3, crossing, crossing + 1e-3, 90.0)
    gap = np.subtract(at_degrees(fm.ArcFace(), *around), at_degrees(fm.CosFace(), *around))
    assert gap[0] > 0 > gap[2] > gap[3] and abs(gap[1]) < 1e-12
    below, turn, above = at_degrees(fm.ArcFace(beyond="none"), 151.34, 151.352, 151.364)
    assert turn < below and turn < above
    grid = np.linspace(0, 90, 9_001)
    apart = np.subtract(at_degrees(in_table("A(4,5)"), *grid), at_degrees(in_table("A(1.5,0)"), *grid))
    assert np.abs(apart).max() == pytest.approx(0.2071, abs=1e-4)
    assert np.sqrt((apart**2).mean()) == pytest.approx(0.1214, abs=1e-4)
    ends = [at_degrees(fm.SphereFace(m=m, lam=lam), 180.0)[0] for m, lam in ((4, 0), (2, 0), (4, 5))]
    assert ends == pytest.approx([-7, -3, -2], abs=1e-12)


# Per class and per row


@pytest.mark.parametrize("form", [fm.SphereFace, fm.CosFace, fm.ArcFace, fm.AdaFace, fm.ElasticFace])
def test_per_class_margins(form: Callable[..., fm.Margin]) -> None:
    generator = torch.Generator().manual_seed(0)
    m = torch.rand(7, generator=generator) + 0.1
    cos, norms = 1.8 * torch.rand(40, generator=generator) - 0.9, 60 * torch.rand(40, generator=generator)
    labels = torch.randint(7, (40,), generator=generator)
    value = psi(form(m=m).eval(), cos, norms, labels)
    for c in range(7):
        rows = labels == c
        alone = psi(form(m=m[c].item()).eval(), cos[rows], norms[rows], labels[rows])
        torch.testing.assert_close(value[rows], alone, rtol=1e-5, atol=1e-6)
    order = torch.randperm(40, generator=generator)
    assert torch.equal(psi(form(m=m).eval(), cos[order], norms[order], labels[order]), value[order])
    same = psi(form(m=torch.full((7,), 0.5)).eval(), cos, norms, labels)
    torch.testing.assert_close(same, psi(form(m=0.5).eval(), cos, norms, labels), rtol=1e-5, atol=1e-6)


def test_per_class_margins_are_buffers_or_parameters_of_the_module() -> None:
    given = torch.tensor([0.1, 0.2])
    buffer, learned, number = fm.CosFace(m=given), fm.CosFace(m=nn.Parameter(given)), fm.CosFace(m=0.3)
    assert list(buffer.state_dict()) == ["m"] and not list(buffer.parameters())
    assert [name for name, _ in learned.named_parameters()] == ["m"]
    assert not number.state_dict() and number.m == 0.3
    given.zero_()
    assert buffer.m.tolist() == pytest.approx([0.1, 0.2])  # a copy, not the user's tensor
    assert psi(buffer.double(), torch.tensor([0.5])).dtype == torch.float32


def test_ignored_labels_are_gathered_safely() -> None:
    margin = fm.ArcFace(m=nn.Parameter(torch.tensor([0.1, 0.2, 0.3])))
    labels = torch.tensor([-100, -1, 1, 2_000_000])
    value = psi(margin, torch.full((4,), 0.5), labels=labels)
    assert value.isfinite().all()
    assert value[2].item() == pytest.approx(math.cos(math.pi / 3 + 0.2), abs=1e-6)


def test_classes_are_checked_against_the_head() -> None:
    fm.ArcFace(m=torch.ones(5)).check_classes(5)
    fm.ArcFace(m=0.5).check_classes(5)
    with pytest.raises(ValueError, match="length of m2 is 5; want 6"):
        fm.CombinedMargin(m2=torch.ones(5)).check_classes(6)


def test_a_subclass_gives_margins_of_the_row() -> None:
    class ByAngle(fm.ArcFace):
        def row_margins(self, cos: Tensor, norms: Tensor, labels: Tensor) -> Values:
            return 1.0, self.m * norms, 0.0

    theta, norms = (
        torch.tensor([0.4, 1.0], dtype=torch.float64),
        torch.tensor([1.0, 0.5], dtype=torch.float64),
    )
    value = psi(ByAngle(m=0.2), theta.cos(), norms)
    assert value.tolist() == pytest.approx([math.cos(0.6), math.cos(1.1)], abs=1e-12)


# AdaFace, MagFace, ElasticFace


def test_adaface_by_hand() -> None:
    margin = fm.AdaFace(momentum=0.5).double()
    margin.observe(torch.tensor([10.0, 20.0, 30.0, 40.0]), torch.zeros(4))
    sd = (100 + math.sqrt(500 / 3)) / 2  # of the batch: mean 25, unbiased variance 500 / 3
    assert margin.mu.item() == pytest.approx((20 + 25) / 2)
    assert margin.sd.item() == pytest.approx(sd)
    norms = torch.tensor([30.0, 1.0, 1e4], dtype=torch.float64, requires_grad=True)  # 1e4 counts as 100
    cos = torch.full((3,), math.cos(1.2), dtype=torch.float64, requires_grad=True)
    value = psi(margin, cos, norms)
    z = [0.333 * (n - 22.5) / sd for n in (30, 1, 100)]
    assert value.tolist() == pytest.approx([math.cos(1.2 - 0.4 * v) - 0.4 - 0.4 * v for v in z], rel=1e-6)
    assert torch.autograd.grad(value.sum(), (cos, norms), allow_unused=True)[1] is None
    assert sorted(margin.state_dict()) == ["mu", "sd"]


def test_adaface_clips_and_one_row_teaches_nothing() -> None:
    margin = fm.AdaFace()
    margin.observe(torch.tensor([5.0]), torch.zeros(1))
    assert (margin.mu.item(), margin.sd.item(), margin.beyond) == (20.0, 100.0, "clip")
    margin.sd.fill_(20.0)
    long = torch.full((1,), 1e4)  # m2 = -0.4, m3 = 0.8: psi is constant below an angle of 0.4
    assert psi(margin, torch.tensor([math.cos(0.2)]), long).item() == pytest.approx(1 - 0.8, abs=1e-6)


def test_adaface_clips_norms_as_the_public_code() -> None:
    margin = fm.AdaFace(momentum=1.0)
    margin.observe(torch.tensor([10.0, 12.0, 14.0, 16.0, 18.0, 5000.0]), torch.zeros(6))
    assert (margin.mu.item(), margin.sd.item()) == pytest.approx((28.3333, 35.2231), rel=1e-4)


@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_adaface_skips_rows_that_are_not_finite(bad: float) -> None:
    margin = fm.AdaFace(momentum=1.0)
    margin.observe(torch.tensor([10.0, 12.0, bad, 14.0, 50.0]), torch.tensor([0.0, 0.0, 0.0, 0.0, bad]))
    assert (margin.mu.item(), margin.sd.item()) == pytest.approx((12.0, 2.0))


def test_magface_by_hand_and_by_finite_differences() -> None:
    norms = torch.tensor([2.0, 10.0, 35.0, 60.0, 110.0, 300.0], dtype=torch.float64)
    m = [0.45, 0.45, 0.5375, 0.625, 0.8, 0.8]
    cos = torch.full((6,), math.cos(1.0), dtype=torch.float64)
    assert psi(fm.MagFace(), cos, norms).tolist() == pytest.approx([math.cos(1 + v) for v in m], abs=1e-12)
    inside = norms[2:4].clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda n: psi(fm.MagFace(), cos[:2], n), (inside,))
    assert torch.autograd.gradcheck(fm.MagFace().penalty, (inside,))
    got = torch.autograd.grad(psi(fm.MagFace(), cos[:2], inside).sum(), inside)[0]
    assert got.tolist() == pytest.approx([-math.sin(1 + v) * 0.35 / 100 for v in m[2:4]], abs=1e-12)


def test_penalty() -> None:
    norms = torch.tensor([2.0, 55.0, 110.0, 300.0], requires_grad=True)
    penalty = fm.MagFace().penalty(norms)
    assert not fm.MagFace(lambda_g=0).penalty(norms).any()
    want = [35 * (a / 12_100 + 1 / a) for a in (10, 55, 110, 110)]
    assert penalty.tolist() == pytest.approx(want, rel=1e-6)
    slopes = torch.autograd.grad(penalty.sum(), norms)[0].tolist()
    assert slopes == pytest.approx([0, 35 * (1 / 12_100 - 1 / 3_025), 0, 0], abs=1e-7)
    assert fm.ArcFace().penalty(norms) is None


@pytest.mark.parametrize(("form", "mean"), [("arc", 0.5), ("cos", 0.35)])
def test_elasticface_draws_in_training_only(form: str, mean: float) -> None:
    cos = torch.full((20_000,), math.cos(1.0), dtype=torch.float64)
    margin = fm.ElasticFace(form=form)
    torch.manual_seed(0)
    value = psi(margin, cos)
    drawn = value.acos() - 1.0 if form == "arc" else cos - value
    assert drawn.mean().item() == pytest.approx(mean, abs=4 * 0.0125 / math.sqrt(20_000))
    assert drawn.std().item() == pytest.approx(0.0125, rel=0.02)
    assert not torch.equal(psi(margin, cos), value)
    torch.manual_seed(0)
    assert torch.equal(psi(margin, cos), value)
    fixed = fm.ArcFace() if form == "arc" else fm.CosFace()
    assert torch.equal(psi(margin.eval(), cos), psi(fixed, cos))


def test_elasticface_plus_gives_the_larger_margin_to_the_smaller_cosine() -> None:
    cos = torch.rand(500, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    torch.manual_seed(1)
    drawn = cos - psi(fm.ElasticFace(form="cos", plus=True), cos)
    assert drawn[cos.argsort()].diff().max() <= 0
    torch.manual_seed(1)
    plain = cos - psi(fm.ElasticFace(form="cos"), cos)
    torch.testing.assert_close(drawn.sort().values, plain.sort().values, rtol=0, atol=1e-15)


# Scale, defaults, plain layers


def test_scale() -> None:
    norms = torch.tensor([0.0, 1e-9, 3.0], requires_grad=True)
    assert fm.ArcFace(s=30).scale(norms).tolist() == [30.0] * 3
    free = fm.CosFace(normalize_features=False).scale(norms)
    assert free.tolist() == pytest.approx([1e-6, 1e-6, 3.0])
    assert torch.autograd.grad(free.sum(), norms)[0].tolist() == [0.0, 0.0, 1.0]
    learned = fm.NormFace(s=20.0, learn_scale=True)
    assert [name for name, _ in learned.named_parameters()] == ["s"]
    (learned.scale(norms) * torch.tensor([1.0, 2.0, 4.0])).sum().backward()
    assert learned.s.item() == 20.0 and learned.s.grad.item() == 7.0
    assert learned.double().scale(norms.double()).dtype == torch.float64


def test_defaults_are_the_papers() -> None:
    arc, cos, am, sphere, l2 = fm.ArcFace(), fm.CosFace(), fm.AMSoftmax(), fm.SphereFace(), fm.L2Softmax()
    assert (arc.s, arc.m, cos.s, cos.m, am.s, am.m) == (64.0, 0.5, 64.0, 0.35, 30.0, 0.35)
    assert (sphere.m, sphere.lam, sphere.normalize_features) == (4.0, 1000.0, False)
    assert isinstance(l2.s, nn.Parameter) and l2.s.item() == 16.0 and l2.normalize_features
    ada, mag = fm.AdaFace(), fm.MagFace()
    assert (ada.m, ada.h, mag.l_m, mag.u_m, mag.l_a, mag.u_a) == (0.4, 0.333, 0.45, 0.8, 10.0, 110.0)
    assert all(m.beyond == "monotone" and m.slope == "exact" for m in (arc, cos, am, sphere, mag))


@pytest.mark.parametrize("form", [fm.Softmax, fm.L2Softmax])
def test_plain_layers_have_no_psi(form: type[fm.Margin]) -> None:
    margin = form()
    assert margin.plain and not margin.normalize_weight
    with pytest.raises(ValueError, match=f"margin is '{form.__name__}'.*no psi"):
        psi(margin, torch.zeros(2))


# Mistakes


@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        (lambda: fm.ArcFace(beyond="mono"), r"beyond is 'mono'; want one of \('monotone'"),
        (lambda: fm.ArcFace(slope="one"), "slope is 'one'; want one of"),
        (lambda: fm.ArcFace(s=0), "s is 0; want a finite number > 0"),
        (lambda: fm.CosFace(s=-1.0), "s is -1.0; want"),
        (lambda: fm.NormFace(s=math.nan), "s is nan; want"),
        (lambda: fm.L2Softmax(s=math.inf), "s is inf; want"),
        (lambda: fm.SphereFace(lam=-1), "lam is -1; want a finite number >= 0"),
        (lambda: fm.SphereFace(learn_scale=True), "learn_scale is True; want normalize_features=True"),
        (
            lambda: fm.SphereFace(beyond="linear"),
            "beyond is 'linear'; want a margin with m1 = 1 and m2 > 0",
        ),
        (lambda: fm.CosFace(beyond="linear"), "beyond is 'linear'"),
        (lambda: fm.AdaFace(beyond="linear"), "beyond is 'linear'"),
        (lambda: fm.ArcFace(m=-0.1, beyond="linear"), "beyond is 'linear'"),
        (lambda: fm.ArcFace(m=torch.tensor([0.5, 0.0]), beyond="linear"), "beyond is 'linear'"),
        (lambda: fm.CombinedMargin(m1=1.1, beyond="linear"), "beyond is 'linear'"),
        (lambda: fm.CombinedMargin(m1=torch.ones(3), beyond="linear"), "beyond is 'linear'"),
        (lambda: fm.ElasticFace(form="cos", beyond="linear"), "beyond is 'linear'"),
        (lambda: fm.ArcFace(m="half"), "m is 'half'; want a finite number or a tensor"),
        (lambda: fm.CosFace(m=math.inf), "m is inf; want"),
        (lambda: fm.CosFace(m=torch.ones(2, 3)), r"m is 'a torch.float32 tensor of shape \(2, 3\)'; want"),
        (lambda: fm.CosFace(m=torch.tensor(0.3)), r"of shape \(\)"),
        (lambda: fm.CosFace(m=torch.empty(0)), r"of shape \(0,\)"),
        (lambda: fm.CosFace(m=torch.ones(3, dtype=torch.long)), "torch.int64 tensor"),
        (lambda: fm.CombinedMargin(m3=torch.tensor([0.1, math.nan])), "m3 is .* want finite"),
        (lambda: fm.ArcFace(m=28.6), "m is 28.6; want an angle in radians"),
        (lambda: fm.ArcFace(m=-40), "m is -40; want an angle in radians"),
        (lambda: fm.ArcFace(m=torch.tensor([0.5, 30.0])), "m is 30.0; want an angle in radians"),
        (lambda: fm.AdaFace(m=23), "m is 23; want an angle in radians"),
        (lambda: fm.ElasticFace(m=28.6), "m is .*; want an angle in radians"),
        (lambda: fm.ElasticFace(m=20, form="cos"), "m is 20; want a difference of cosines"),
        (lambda: fm.CombinedMargin(m2=17), "m2 is 17; want an angle in radians"),
        (lambda: fm.CombinedMargin(m3=2.1), "m3 is .*; want a difference of cosines"),
        (lambda: fm.MagFace(l_m=25, u_m=45), "l_m is 25; want an angle in radians"),
        (lambda: fm.MagFace(u_m=45), "u_m is 45; want an angle in radians"),
        (lambda: fm.AMSoftmax(m=20), "m is 20; want a difference of cosines, from -2 to 2"),
        (lambda: fm.AdaFace(h=0), "h is 0; want"),
        (lambda: fm.AdaFace(momentum=1.5), "momentum is 1.5; want"),
        (lambda: fm.MagFace(l_a=110.0, u_a=10.0), r"\(l_a, u_a\) is \(110.0, 10.0\); want"),
        (lambda: fm.MagFace(l_m=0.9), r"\(l_m, u_m\) is"),
        (lambda: fm.MagFace(lambda_g=-1), "lambda_g is -1; want"),
        (lambda: fm.ElasticFace(form="sphere"), "form is 'sphere'; want 'arc' or 'cos'"),
        (lambda: fm.ElasticFace(sigma=-0.1), "sigma is -0.1; want"),
    ],
)
def test_mistakes_say_what_was_given_and_what_is_wanted(mistake: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        mistake()


def test_row_margins_that_are_not_three():
    class Wrong(fm.Margin):
        def row_margins(self, cos, norms, labels):
            return cos

    with pytest.raises(ValueError, match=r"row_margins is .*want \(m1, m2, m3\)"):
        Wrong()(torch.zeros(4), torch.ones(4), torch.zeros(4, dtype=torch.int64))


def test_a_margin_shows_its_values():
    assert repr(fm.ArcFace(s=30.0, m=0.4)) == "ArcFace(s=30.0, m=0.4, monotone)"
    assert "m1=[7]" in repr(fm.CombinedMargin(m1=torch.ones(7))) and "s=16.0" in repr(fm.L2Softmax())


@pytest.mark.parametrize("name", [name for name in fm.__all__ if issubclass(getattr(fm, name), fm.Margin)])
def test_arguments_go_by_name(name):
    """A margin alone would else have been taken for the scale."""
    with pytest.raises(TypeError, match="positional argument"):
        getattr(fm, name)(0.5)
