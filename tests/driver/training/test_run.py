"""How a run is built: sampler, margin, initial weights, what does not fit."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from small_run import IMAGES, MINING, SMALL, configured, identities, pixels, small_data  # noqa: F401 (a fixture, too)

from fastmargin.driver.commands import train
from fastmargin.driver.config import HeadConfig, ModelConfig
from fastmargin.driver.training import backbone, run

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("drawn", [0.5, 1.0, 2, 3])
def test_the_sampler_draws_a_share_or_a_number_of_classes(drawn: float) -> None:
    config = replace(MINING, sampler=replace(MINING.sampler, random_classes=float(drawn)))
    order = run.build(config, print).order
    assert order.random_classes == drawn and type(order.random_classes) is type(drawn)


def test_lsuv_starts_the_doppelganger_network_on_images_of_the_run() -> None:
    current = run.build(replace(SMALL, model=ModelConfig("doppelganger")), print)
    scales = [buffer for name, buffer in current.model.named_buffers() if name.endswith("k")]
    assert len(scales) == 27 and all(k != 1 for k in scales)
    again = run.build(replace(SMALL, model=ModelConfig("doppelganger")), print)
    assert all(map(torch.equal, current.model.state_dict().values(), again.model.state_dict().values()))


def test_lsuv_leaves_a_network_of_ones_own_alone() -> None:
    config = replace(SMALL, model=ModelConfig("doppelganger"))
    current = run.build(config, print, "small_run:pixels")
    torch.manual_seed(config.seed)
    assert torch.equal(current.model[1].weight, pixels(8, identities().input_shape[1:], 1)[1].weight)


@pytest.mark.parametrize(
    ("head", "words"),
    [
        (HeadConfig(), "ArcFace(s=30.0, m=0.4, monotone), m from 0 within 4 steps"),
        (HeadConfig("CosFace", m=0.2, ramp=0), "CosFace(s=64.0, m=0.2, monotone)"),
        (HeadConfig("L2Softmax"), "L2Softmax(s=16.0, monotone)"),
    ],
)
def test_a_run_says_its_margin_in_numbers(head: HeadConfig, words: str) -> None:
    assert train.described(run.build(replace(SMALL, head=head), print)) == words


@pytest.mark.parametrize(("name", "field"), [("Softmax", "s"), ("NormFace", "m"), ("MagFace", "m")])
def test_a_margin_without_such_a_number_refuses_it(name: str, field: str) -> None:
    with pytest.raises(ValueError, match=rf"head.{field} is 0.25; want null: {name} has none"):
        run.build_margin(HeadConfig(name, **{field: 0.25}))  # type: ignore[arg-type]


def test_measured_defaults_belong_to_arcface_alone() -> None:
    assert HeadConfig().arguments() == {"s": 30.0, "m": 0.4}
    assert HeadConfig(m=0.5).arguments() == {"s": 30.0, "m": 0.5}
    assert HeadConfig("CosFace").arguments() == {}
    assert HeadConfig("CosFace", s=20.0).arguments() == {"s": 20.0}


def test_products_of_the_head_are_rounded_if_wanted() -> None:
    assert run.build(configured(HeadConfig(compute_dtype="bf16")), print).head.compute_dtype == torch.bfloat16
    assert run.build(SMALL, print).head.compute_dtype is None


def test_too_few_identities(monkeypatch: pytest.MonkeyPatch) -> None:
    few = identities().take(np.arange(3 * IMAGES))
    monkeypatch.setattr(run, "load_data", lambda config, log: few.split(config.holdout, config.split_seed))
    with pytest.raises(ValueError, match=r"1 identities to train on and 2 held out"):
        run.build(SMALL, print)


def test_embedding_is_in_evaluation_mode_and_the_mode_comes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    current = run.build(SMALL, print)
    images = current.test.images
    together = backbone.embed_images(current.model, images)
    monkeypatch.setattr(backbone, "EMBED", 3)
    torch.testing.assert_close(backbone.embed_images(current.model, images), together)
    assert current.model.training and not together.requires_grad
