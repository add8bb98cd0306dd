"""The default backbone: shapes, size, output option E, gradients."""

import pytest
import torch
from torch import nn

from fastmargin.driver.models import build_model


def last_norm(model: nn.Module) -> nn.BatchNorm1d:
    (norm,) = [module for module in model.modules() if isinstance(module, nn.BatchNorm1d)]
    return norm


@pytest.mark.parametrize(("dim", "size"), [(128, 32), (2, 28), (64, 17), (32, 1), (96, 48)])
def test_output_shape(dim: int, size: int) -> None:
    assert build_model(dim, size).eval()(torch.rand(3, 1, size, size)).shape == (3, dim)


def test_colour() -> None:
    grey, colored = build_model(16, 32), build_model(16, 32, channels=3)
    assert colored.eval()(torch.rand(2, 3, 32, 32)).shape == (2, 16)
    counts = [sum(p.numel() for p in model.parameters()) for model in (grey, colored)]
    assert counts[1] - counts[0] == 25 * 2 * 32  # two more input channels of the first convolution alone


def test_parameter_count() -> None:
    convolutions = 25 * 1 * 32 + 9 * (32 * 64 + 64 * 128 + 128 * 128)
    slopes_and_norms = 3 * (32 + 64 + 128 + 128)  # PReLU, gamma, beta per channel
    output = 2 * 128 + 4 * 128 * 128 + 2 * 128  # BN, linear on a map of 2 x 2, BN
    model = build_model(128, 32)
    assert sum(p.numel() for p in model.parameters()) == convolutions + slopes_and_norms + output
    assert round((convolutions + slopes_and_norms + output) / 1e6, 2) == 0.31


def test_last_gamma_is_one_and_stays() -> None:
    model = build_model(16, 32)
    optimiser = torch.optim.SGD(model.parameters(), lr=1.0, weight_decay=0.1)
    model(torch.rand(8, 1, 32, 32)).square().sum().backward()
    optimiser.step()
    assert torch.equal(last_norm(model).weight, torch.ones(16))
    assert last_norm(model).bias.abs().max() > 0


def test_features_start_with_mean_zero_and_variance_one() -> None:
    torch.manual_seed(0)
    features = build_model(64, 32)(torch.rand(256, 1, 32, 32))
    assert features.mean(0).abs().max() < 1e-5
    assert features.var(0, unbiased=False).sub(1).abs().max() < 1e-2


def test_gradients_are_finite_and_reach_every_layer() -> None:
    torch.manual_seed(0)
    model = build_model(128, 32)
    images = torch.rand(16, 1, 32, 32)
    (model(images) * torch.randn(16, 128)).sum().backward()
    trained = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert len(trained) == len(list(model.parameters())) - 1
    assert all(grad is not None and grad.isfinite().all() and grad.abs().max() > 0 for grad in trained.values())


def test_black_images_give_finite_gradients() -> None:
    model = build_model(8, 32)
    model(torch.zeros(4, 1, 32, 32)).square().sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


def test_weights_follow_the_seed_and_are_channels_last() -> None:
    def build() -> nn.Module:
        torch.manual_seed(3)
        return build_model(16, 32)

    first, second = build(), build()
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    convolutions = [module for module in first.modules() if isinstance(module, nn.Conv2d)]
    assert len(convolutions) == 4
    assert all(conv.weight.is_contiguous(memory_format=torch.channels_last) for conv in convolutions)
    assert all(conv.stride == (2, 2) and conv.bias is None for conv in convolutions)


@pytest.mark.parametrize(("dim", "size"), [(0, 32), (128, 0)])
def test_sizes_below_one_are_refused(dim: int, size: int) -> None:
    with pytest.raises(ValueError, match=f"dim = {dim}, size = {size}"):
        build_model(dim, size)
