"""The published networks: shapes and sizes against their papers, blocks in their order, gradients."""

from collections.abc import Callable

import pytest
import torch
from torch import nn

from fastmargin.models import FAMILIES, build_model
from fastmargin.models.iresnet import UNITS
from fastmargin.models.layers import Residual

pytestmark = pytest.mark.usefixtures("one_thread")

NAMES = ["iresnet18", "sphereface20", "mobilefacenet", "doppelganger"]  # deeper iresnets: only on the meta device


def on_meta(name: str, dim: int, size: int | tuple[int, int], channels: int = 3, **options: object) -> nn.Module:
    """On the meta device: shapes only, quick for any size."""
    with torch.device("meta"):
        return build_model(name, dim, size, channels, **options).eval()


def count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def kinds(module: nn.Module) -> list[str]:
    """The layers without children, in order."""
    return [type(m).__name__ for m in module.modules() if not list(m.children())]


# ---- sizes of the papers and of public models ----


@pytest.mark.parametrize(
    ("depth", "millions"),
    [
        (34, 34.129),  # OpenVINO Open Model Zoo, face-recognition-resnet34-arcface: InsightFace's LResNet34E-IR
        (50, 43.576),  # the same, resnet50-arcface
        (100, 65.132),  # the same, resnet100-arcface-onnx
    ],
)
def test_weights_of_iresnets(depth: int, millions: float) -> None:
    """Within 0.1 %: that page counts the converted models, some of whose norms are folded into convolutions."""
    assert count(on_meta(f"iresnet{depth}", 512, 112)) / 1e6 == pytest.approx(millions, rel=1e-3)


@pytest.mark.parametrize(("depth", "millions"), [(18, 24.0), (50, 43.6)])
def test_weights_of_iresnets_as_insightface_builds_them(depth: int, millions: float) -> None:
    """Counted in InsightFace's arcface_torch, iresnet18 and iresnet50."""
    assert round(count(on_meta(f"iresnet{depth}", 512, 112)) / 1e6, 1) == millions


@pytest.mark.parametrize(("depth", "megabytes"), [(50, 167), (100, 250)])
def test_model_size_of_iresnets(depth: int, megabytes: int) -> None:
    """ArcFace v1, table 8: LResNet50E-IR and LResNet100E-IR, float32 with running statistics."""
    numbers = sum(t.numel() for t in on_meta(f"iresnet{depth}", 512, 112).state_dict().values())
    assert 4 * numbers / 2**20 == pytest.approx(megabytes, rel=0.01)


def test_weights_of_mobilefacenet() -> None:
    """0.99 M in its paper, table 2; 0.993 M in the Open Model Zoo, whose count has norms folded: no gammas."""
    model = on_meta("mobilefacenet", 128, 112)
    gammas = sum(m.num_features for m in model.modules() if isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d))
    assert round((count(model) - gammas) / 1e6, 3) == 0.993
    assert count(model) / 1e6 == pytest.approx(0.99, rel=0.02)


def test_weights_of_sphereface() -> None:
    """22.671 M in the Open Model Zoo (Sphereface), the biases included that the public prototxt holds at 0."""
    held_at_zero = 2 * (64 + 2 * 128 + 4 * 256 + 512)  # of the convolutions in residual units; here they have none
    assert round((count(on_meta("sphereface20", 512, (112, 96))) + held_at_zero) / 1e6, 3) == 22.671


def test_maps_of_the_doppelganger_network() -> None:
    """Doppelganger Mining, table 1, row by row."""
    features, *rest = on_meta("doppelganger", 512, 259)
    rows, x = [], torch.zeros(1, 3, 259, 259, device="meta")
    for layer in features:
        x = layer(x)
        rows.append((x.shape[1], x.shape[2]))
    assert rows == [
        *((64, 128), (64, 124), (64, 62), (128, 62), (256, 60), (256, 30)),
        *[(256, 30)] * 2, (512, 28), (512, 14), *[(512, 14)] * 5, (1024, 12), (1024, 6), *[(1024, 6)] * 3,
    ]  # fmt: skip
    assert [tuple(rest[1].weight.shape), rest[2](rest[1](rest[0](x))).shape] == [(1024, 1024 * 36), (1, 512)]
    dilations = [[b.dilation[0] for b in m.branches] for m in features.modules() if hasattr(m, "branches")]
    assert dilations == [[1, 2, 3], [1, 2]]


# ---- any size, any number of channels ----


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("size", [16, 17, 45, 112, (112, 96), (16, 300), 260])
def test_output_shape_at_any_size(name: str, size: int | tuple[int, int]) -> None:
    height, width = (size, size) if isinstance(size, int) else size
    images = torch.zeros(2, 2, height, width, device="meta")
    assert on_meta(name, 24, size, channels=2)(images).shape == (2, 24)


@pytest.mark.parametrize(("size", "last"), [(16, 1), (22, 4), (23, 1), (90, 8), (91, 3), (181, 9), (182, 3)])
def test_a_halving_of_the_doppelganger_network_goes_where_rounding_says_so(size: int, last: int) -> None:
    """By hand, for example 90: 86, 82, 80, pool 40, 38, pool 19, 17, pool 8."""
    features = on_meta("doppelganger", 4, size)[0]
    assert features(torch.zeros(1, 3, size, size, device="meta")).shape[2:] == (last, last)


@pytest.mark.parametrize("name", NAMES)
def test_gradients_are_finite_and_reach_every_layer(name: str) -> None:
    model = build_model(name, 8, 32, channels=1)
    images = torch.rand(4, 1, 32, 32)
    (model(images) * torch.randn(4, 8)).sum().backward()
    trained = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert all(grad is not None and grad.isfinite().all() and grad.abs().max() > 0 for grad in trained.values())


@pytest.mark.parametrize("name", NAMES)
def test_a_batch_is_its_images_one_by_one(name: str) -> None:
    model = build_model(name, 8, 32, channels=1).eval()
    images = torch.rand(3, 1, 32, 32)
    alone = torch.cat([model(image) for image in images.split(1)])
    torch.testing.assert_close(model(images), alone, rtol=1e-3, atol=1e-5)


def test_small_images_are_refused() -> None:
    with pytest.raises(ValueError, match=r"16 pixels a side or more, got \(64, 15\)"):
        build_model("doppelganger", 8, (64, 15))


# ---- IResNet ----


def test_units_of_an_iresnet() -> None:
    """IR: BN - conv - BN - PReLU - conv - BN; the stride is on the second convolution and on the shortcut."""
    for depth, stages in UNITS.items():
        stem, *units, _ = on_meta(f"iresnet{depth}", 8, 32)
        assert kinds(stem) == ["Conv2d", "BatchNorm2d", "PReLU"] and stem[0].stride == (1, 1)
        assert len(units) == sum(stages)
        firsts = {sum(stages[:n]) for n in range(4)}
        for number, unit in enumerate(units):
            assert isinstance(unit, Residual)
            assert kinds(unit.body) == ["BatchNorm2d", "Conv2d", "BatchNorm2d", "PReLU", "Conv2d", "BatchNorm2d"]
            strides = [m.stride[0] for m in unit.modules() if isinstance(m, nn.Conv2d)]
            assert strides == ([1, 2, 2] if number in firsts else [1, 1])
            assert kinds(unit.shortcut) == (["Conv2d", "BatchNorm2d"] if number in firsts else ["Identity"])


LAYERS = {
    "A": ["AdaptiveAvgPool2d", "Flatten"],
    "B": ["AdaptiveAvgPool2d", "Flatten", "Linear"],
    "C": ["AdaptiveAvgPool2d", "Flatten", "Linear", "BatchNorm1d"],
    "D": ["AdaptiveAvgPool2d", "Flatten", "Linear", "BatchNorm1d", "PReLU"],
    "E": ["BatchNorm2d", "Dropout", "Flatten", "Linear", "BatchNorm1d"],
}


@pytest.mark.parametrize("output", LAYERS)
def test_output_options(output: str) -> None:
    model = on_meta("iresnet18", 512, 32, output=output)
    last = model[-1]
    assert kinds(last) == LAYERS[output]
    norms = [m for m in last.modules() if isinstance(m, nn.BatchNorm1d)]
    assert all(norm.bias.requires_grad and not norm.weight.requires_grad for norm in norms)
    assert model(torch.zeros(2, 3, 32, 32, device="meta")).shape == (2, 512)
    inputs = [m.in_features for m in last.modules() if isinstance(m, nn.Linear)]
    assert inputs == {"A": [], "E": [512 * 2 * 2]}.get(output, [512])


def test_output_a_is_the_mean_of_the_last_map() -> None:
    model = build_model("iresnet18", 512, 32, channels=1, output="A").eval()
    images = torch.rand(2, 1, 32, 32)
    torch.testing.assert_close(model(images), model[:-1](images).mean((2, 3)))


def test_dropout_is_the_papers_unless_given() -> None:
    def rate(**options: object) -> float:
        return next(m.p for m in on_meta("iresnet18", 8, 32, **options).modules() if isinstance(m, nn.Dropout))

    assert (rate(), rate(dropout=0.0), rate(output="E", dropout=0.1)) == (0.4, 0.0, 0.1)
    names = [list(on_meta("iresnet18", 8, 32, dropout=rate).state_dict()) for rate in (0.0, 0.4)]
    assert names[0] == names[1], "a checkpoint fits whatever the rate"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"output": "F"}, "model.output is 'F'; want one of A, B, C, D, E"),
        ({"output": "A"}, "dim is 8; want 512: output A has no layer of its own"),
        ({"output": "C", "dropout": 0.4}, "model.dropout is 0.4; want none: output C has no dropout"),
        ({"dropout": 1.0}, "model.dropout is 1.0; want a share from 0 to below 1"),
        ({"dropout": -0.1}, "model.dropout is -0.1"),
    ],
)
def test_outputs_that_do_not_exist(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_model("iresnet18", 8, 16, **options)


# ---- the others' units ----


def test_a_residual_unit_of_sphereface_starts_as_next_to_nothing() -> None:
    model = build_model("sphereface20", 8, 32)
    units = [m for m in model if isinstance(m, Residual)]
    assert len(units) == 1 + 2 + 4 + 1
    for unit in units:
        assert kinds(unit.body) == ["Conv2d", "PReLU"] * 2
        x = torch.randn(2, unit.body[0].in_channels, 6, 6)
        assert 0 < (unit(x) - x).std() < 0.3 * x.std()


def test_bottlenecks_of_mobilefacenet() -> None:
    """A depthwise convolution of its own width between two of 1 x 1; a shortcut wherever the shape stays."""
    bottlenecks = on_meta("mobilefacenet", 8, 112)[2:-3]
    assert len(bottlenecks) == 5 + 1 + 6 + 1 + 2
    assert [n for n, m in enumerate(bottlenecks) if not isinstance(m, Residual)] == [0, 5, 12]
    for bottleneck in bottlenecks:
        one, two, three = (m for m in bottleneck.modules() if isinstance(m, nn.Conv2d))
        assert (one.kernel_size, two.kernel_size, three.kernel_size) == ((1, 1), (3, 3), (1, 1))
        assert two.groups == two.in_channels == one.out_channels == three.in_channels


@pytest.mark.parametrize("make", [lambda: build_model("doppelganger", 8, 32), lambda: on_meta("doppelganger", 8, 259)])
def test_arfa_follows_every_convolution_of_the_doppelganger_network(make: Callable[[], nn.Module]) -> None:
    layers = kinds(make())
    shortcut, parallel = 1, 1 + 2  # convolutions that share an activation with another, or have none
    assert layers.count("Conv2d") - shortcut - parallel == layers.count("ARFA") == 2 + 2 + 1 + 4 + 1 + 10 + 1 + 6
    assert layers[-2:] == ["Linear", "Maxout"]
