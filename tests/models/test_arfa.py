"""ARFA and LSUV (Doppelganger Mining, 4.2.2): values, slopes, limits; the scale of every layer."""

import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from fastmargin.models import build_model, lsuv
from fastmargin.models.arfa import ARFA, arfa

pytestmark = pytest.mark.usefixtures("one_thread")

F64 = torch.float64


def test_values_by_hand() -> None:
    x = torch.tensor([[-math.inf, -1e30, -6.0, -2.0, 0.0, 3.0]], dtype=F64).T.expand(6, 2)
    a, k = torch.tensor([2.0, 0.5], dtype=F64), 1.5
    got = arfa(x[1:], a, k)
    expected = [[-1.5, -1.5], [-9 / 8, -9 / 6.5], [-3 / 4, -3 / 2.5], [0, 0], [4.5, 4.5]]
    torch.testing.assert_close(got, torch.tensor(expected, dtype=F64), rtol=1e-12, atol=0)


@pytest.mark.parametrize("shape", [(5, 3), (2, 3, 4), (2, 3, 2, 2)])
def test_gradcheck_for_x_and_a(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, dtype=F64).requires_grad_()
    a = (0.1 + torch.rand(3, dtype=F64)).requires_grad_()
    assert torch.autograd.gradcheck(lambda x, a: arfa(x, a, 1.7), (x, a))
    module = ARFA(3).double()
    assert torch.autograd.gradcheck(lambda x, raw: arfa(x, softplus(raw), module.k), (x, module.raw))


def test_slopes_are_those_of_the_formula() -> None:
    """k a / (a - x)^2 below 0, k above; -k x / (a - x)^2 in a. At 0 itself the slope is the left one, k / a."""
    x = torch.tensor([-30.0, -1.0, -1e-9, 0.0, 1e-9, 2.0], dtype=F64)[:, None].requires_grad_()
    a = torch.tensor([0.7], dtype=F64).requires_grad_()
    got = arfa(x, a, 1.3)
    (slope,) = torch.autograd.grad(got.sum(), x, retain_graph=True)
    left = 1.3 * 0.7 / (0.7 - x.detach()) ** 2
    torch.testing.assert_close(slope, torch.where(x > 0, 1.3, left))
    assert slope[3].item() == pytest.approx(1.3 / 0.7)
    (in_a,) = torch.autograd.grad(got[1], a)
    assert in_a.item() == pytest.approx(1.3 / 1.7**2)


def test_monotone_with_left_limit_minus_k() -> None:
    x = torch.linspace(-50, 50, 10_001, dtype=F64)[:, None]
    for a in (0.05, 1.0, 9.0):
        y = arfa(x, torch.tensor([a], dtype=F64), 2.0)
        assert (y.diff(dim=0) > 0).all() and y.min() > -2
    far = arfa(torch.tensor([[-1e12]], dtype=F64), torch.ones(1, dtype=F64), 2.0)
    assert far.item() == pytest.approx(-2, rel=1e-11)


def test_the_module_starts_with_a_continuous_slope_and_keeps_a_positive() -> None:
    module = ARFA(4)
    torch.testing.assert_close(softplus(module.raw), torch.ones(4))
    assert module.k == 1 and [name for name, _ in module.named_parameters()] == ["raw"]
    with torch.no_grad():
        module.raw.fill_(-40)  # training may lead anywhere
    x = torch.randn(8, 4, requires_grad=True)
    module(x).sum().backward()
    assert x.grad is not None and x.grad.isfinite().all() and module.raw.grad.isfinite().all()  # type: ignore[union-attr]


# ---- LSUV ----


def deviations(model: nn.Module, images: Tensor) -> list[float]:
    """Standard deviation of the outputs of every layer that LSUV scales."""
    found: list[float] = []
    for layer in model.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear | ARFA):
            layer.register_forward_hook(lambda layer, inputs, outputs: found.append(outputs.std().item()))
    model(images)
    return found


@pytest.mark.parametrize(("size", "channels"), [(32, 1), (23, 3)])
def test_lsuv_brings_every_layer_to_unit_deviation(size: int, channels: int) -> None:
    model = build_model("doppelganger", 16, size, channels)
    images = torch.rand(24, channels, size, size) ** 4
    before = deviations(build_model("doppelganger", 16, size, channels), images)
    lsuv(model, images)
    after = deviations(model, images)
    layers = sum(isinstance(m, nn.Conv2d | nn.Linear | ARFA) for m in model.modules())
    assert len(after) == layers and all(0.9 < std < 1.1 for std in after)
    assert not all(0.9 < std < 1.1 for std in before)
    assert all(m.k > 0 and not m.k.requires_grad for m in model.modules() if isinstance(m, ARFA))


def test_lsuv_scales_and_does_nothing_else() -> None:
    torch.manual_seed(0)
    model = build_model("doppelganger", 8, 32, channels=1)
    old = {name: p.clone() for name, p in model.named_parameters()}
    lsuv(model, torch.rand(16, 1, 32, 32))
    for name, p in model.named_parameters():
        factor = (p * old[name]).sum() / old[name].square().sum() if old[name].any() else 1.0
        torch.testing.assert_close(p, factor * old[name])
        assert name.endswith("weight") or factor == 1.0 or torch.equal(p, old[name])
    assert not any(m._forward_hooks for m in model.modules()), "its hooks are gone"


def test_lsuv_leaves_what_is_within_the_tolerance() -> None:
    layer = nn.Linear(64, 64, bias=False)
    nn.init.orthogonal_(layer.weight)
    x = torch.randn(4096, 64)
    before = layer.weight.clone()
    lsuv(layer, 1.05 * x / x.std())
    assert torch.equal(layer.weight, before)
    lsuv(layer, 3 * x / x.std())
    torch.testing.assert_close(layer.weight, before / 3, rtol=1e-3, atol=1e-6)


def test_lsuv_with_a_bias_takes_several_tries() -> None:
    layer = nn.Linear(8, 2)
    nn.init.constant_(layer.weight[0].detach(), 0.0)
    with torch.no_grad():
        layer.weight.copy_(torch.eye(2, 8) * 0.01)
        layer.bias.copy_(torch.tensor([0.5, -0.5]))
    x = torch.randn(1000, 8)
    lsuv(layer, x, tolerance=0.01, tries=50)
    assert layer(x).std().item() == pytest.approx(1, abs=0.011)


def test_lsuv_refuses_what_cannot_be_scaled() -> None:
    with pytest.raises(ValueError, match=r"Linear\(.*outputs of standard deviation 0"):
        lsuv(nn.Linear(4, 4, bias=False), torch.zeros(8, 4))
    model = nn.Sequential(nn.Linear(4, 4))
    with pytest.raises(ValueError, match="standard deviation nan"):
        lsuv(model, torch.full((8, 4), torch.inf))
    assert not model[0]._forward_hooks
