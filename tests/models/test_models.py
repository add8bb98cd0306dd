"""`build_model` and the default backbone: shapes, size, output option E, gradients."""

from dataclasses import fields
from pathlib import Path
from typing import get_type_hints

import pytest
import torch
from torch import nn

from fastmargin.driver.config import ModelConfig, choices
from fastmargin.models import FAMILIES, build_model


def last_norm(model: nn.Module) -> nn.BatchNorm1d:
    (norm,) = [module for module in model.modules() if isinstance(module, nn.BatchNorm1d)]
    return norm


@pytest.mark.parametrize(("dim", "size"), [(128, 32), (2, 28), (64, 17), (32, 1), (96, 48)])
def test_output_shape(dim: int, size: int) -> None:
    assert build_model("cnn", dim, size, channels=1).eval()(torch.rand(3, 1, size, size)).shape == (3, dim)


def test_color() -> None:
    gray, colored = build_model("cnn", 16, 32, channels=1), build_model("cnn", 16, 32)
    assert colored.eval()(torch.rand(2, 3, 32, 32)).shape == (2, 16)
    counts = [sum(p.numel() for p in model.parameters()) for model in (gray, colored)]
    assert counts[1] - counts[0] == 25 * 2 * 32  # two more input channels of the first convolution alone


def test_parameter_count() -> None:
    convolutions = 25 * 1 * 32 + 9 * (32 * 64 + 64 * 128 + 128 * 128)
    slopes_and_norms = 3 * (32 + 64 + 128 + 128)  # PReLU, gamma, beta per channel
    output = 2 * 128 + 4 * 128 * 128 + 2 * 128  # BN, linear on a map of 2 x 2, BN
    model = build_model("cnn", 128, 32, channels=1)
    assert sum(p.numel() for p in model.parameters()) == convolutions + slopes_and_norms + output
    assert round((convolutions + slopes_and_norms + output) / 1e6, 2) == 0.31


def test_last_gamma_is_one_and_stays() -> None:
    model = build_model("cnn", 16, 32, channels=1)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0, weight_decay=0.1)
    model(torch.rand(8, 1, 32, 32)).square().sum().backward()
    optimizer.step()
    assert torch.equal(last_norm(model).weight, torch.ones(16))
    assert last_norm(model).bias.abs().max() > 0


def test_features_start_with_mean_zero_and_variance_one() -> None:
    torch.manual_seed(0)
    features = build_model("cnn", 64, 32, channels=1)(torch.rand(256, 1, 32, 32))
    assert features.mean(0).abs().max() < 1e-5
    assert features.var(0, unbiased=False).sub(1).abs().max() < 1e-2


def test_gradients_are_finite_and_reach_every_layer() -> None:
    torch.manual_seed(0)
    model = build_model("cnn", 128, 32, channels=1)
    images = torch.rand(16, 1, 32, 32)
    (model(images) * torch.randn(16, 128)).sum().backward()
    trained = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert len(trained) == len(list(model.parameters())) - 1
    assert all(grad is not None and grad.isfinite().all() and grad.abs().max() > 0 for grad in trained.values())


def test_black_images_give_finite_gradients() -> None:
    model = build_model("cnn", 8, 32, channels=1)
    model(torch.zeros(4, 1, 32, 32)).square().sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


def test_weights_follow_the_seed_and_are_channels_last() -> None:
    def build() -> nn.Module:
        torch.manual_seed(3)
        return build_model("cnn", 16, 32, channels=1)

    first, second = build(), build()
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    convolutions = [module for module in first.modules() if isinstance(module, nn.Conv2d)]
    assert len(convolutions) == 4
    assert all(conv.weight.is_contiguous(memory_format=torch.channels_last) for conv in convolutions)
    assert all(conv.stride == (2, 2) and conv.bias is None for conv in convolutions)


def test_sum_of_the_default_weights() -> None:
    """The default network has the initial weights it always had: numbers of version 0.1.0, when it was the only one."""
    torch.manual_seed(0)
    model = build_model("cnn", 128, 32, channels=1)
    sums = [p.double().abs().sum().item() for p in model.parameters() if p.ndim > 1]
    expected = [31.624604084830935, 842.6019758652033, 2375.202048484982, 4768.207158021388, 2919.532634935743]
    assert sums == pytest.approx(expected, rel=1e-6)
    assert [name for name, _ in model.named_parameters()][-3:] == ["4.2.weight", "4.3.weight", "4.3.bias"]


@pytest.mark.parametrize(
    ("dim", "size", "channels", "given"),
    [
        (0, 32, 1, "dim = 0, size = 32, channels = 1"),
        (128, 0, 1, "dim = 128, size = 0, channels = 1"),
        (128, (32, 0), 1, r"dim = 128, size = \(32, 0\), channels = 1"),
        (128, 32, 0, "dim = 128, size = 32, channels = 0"),
    ],
)
def test_sizes_below_one_are_refused(dim: int, size: int | tuple[int, int], channels: int, given: str) -> None:
    with pytest.raises(ValueError, match=f"got {given}"):
        build_model("cnn", dim, size, channels)


# ---- which networks there are ----


def test_unknown_names_list_what_there_is() -> None:
    with pytest.raises(ValueError, match=r"unknown model 'resnet'; want one of cnn, iresnet18, .*, doppelganger, or"):
        build_model("resnet", 8, 32)


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("r18", "iresnet18"),
        ("r34", "iresnet34"),
        ("R50", "iresnet50"),
        ("r100", "iresnet100"),
        ("mbf", "mobilefacenet"),
    ],
)
def test_insightface_s_names_lead_to_ours(theirs: str, ours: str) -> None:
    with pytest.raises(ValueError, match=f"unknown model '{theirs}'; want '{ours}'"):
        build_model(theirs, 512, 112)


@pytest.mark.parametrize("name", ["cnn", "sphereface20", "mobilefacenet", "doppelganger"])
def test_options_of_another_network_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"model.output is 'A'; want none: {name} has no such option"):
        build_model(name, 8, 32, output="A")


def test_the_configuration_names_every_network_and_every_option() -> None:
    assert choices(get_type_hints(ModelConfig)["name"]) == tuple(FAMILIES)
    assert {entry.name for entry in fields(ModelConfig)} == {"name", "output", "dropout"}
    assert ModelConfig().arguments() == {}
    assert ModelConfig("iresnet18", "E", 0.0).arguments() == {"output": "E", "dropout": 0.0}


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A package outside of fastmargin, with a network in it."""
    folder = tmp_path / "their_package"
    folder.mkdir()
    (folder / "__init__.py").write_text("")
    (folder / "nets.py").write_text(
        "from torch import nn\n"
        "def flat(dim, size, channels, bias=True):\n"
        "    return nn.Sequential(nn.Flatten(), nn.Linear(channels * size[0] * size[1], dim, bias=bias))\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))


@pytest.mark.usefixtures("package")
def test_a_factory_by_import_path() -> None:
    model = build_model("their_package.nets:flat", 6, (4, 5), 3, bias=False)
    assert model(torch.rand(2, 3, 4, 5)).shape == (2, 6) and len(list(model.parameters())) == 1
    with pytest.raises(ValueError, match=r"model.output is 'A'; want none: their_package.nets:flat"):
        build_model("their_package.nets:flat", 6, 4, output="A")


@pytest.mark.usefixtures("package")
@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("their_package.nets:none", "cannot be imported: .* has no attribute 'none'"),
        ("absent:flat", "cannot be imported: No module named 'absent'"),
        (":flat", "unknown model ':flat'"),
        ("their_package.nets:", "unknown model"),
    ],
)
def test_import_paths_that_lead_nowhere(path: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        build_model(path, 6, 4)
