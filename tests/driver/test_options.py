"""Options of a run that do not fit together: the message names each."""

import math
import re
from dataclasses import replace
from typing import Any

import pytest
import torch
from small_run import MINING, SMALL, configured, small_data  # noqa: F401 (a fixture, too)

from fastmargin.driver.config import HeadConfig, OptimConfig, TermConfig, TrainConfig, settled
from fastmargin.driver.training import run
from fastmargin.driver.training.optimizers import learning_rate

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"accumulation": 3}, "optim.accumulation is 3; want a divisor of the 16 images"),
        ({"accumulation": 16}, "optim.accumulation is 16"),
        ({"accumulation": 0}, "optim.accumulation is 0"),
        ({"head_lr": -1.0}, "optim.head_lr is -1.0"),
        ({"warmup": -1}, "optim.warmup is -1"),
        ({"warmup": 12}, "optim.warmup is 12; want less than the 12 steps"),
        ({"cycle": 0}, "optim.cycle is 0; want at least 1 step"),
        ({"cycle": 5, "schedule": "constant"}, "optim.cycle is 5; want null"),
        ({"cycle_factor": 0}, "optim.cycle_factor is 0"),
        ({"schedule": "steps"}, r"optim.milestones is \(\); want one or more"),
        ({"milestones": (3,)}, r"optim.milestones is \(3,\); want none"),
        ({"schedule": "steps", "milestones": (5, 3)}, "in rising order"),
        ({"schedule": "steps", "milestones": (0, 3)}, "from 1"),
        ({"schedule": "steps", "milestones": (3,), "milestone_factor": 0.0}, "optim.milestone_factor is 0.0"),
        ({"momentum": 1.0}, "optim.momentum is 1.0"),
        ({"momentum": 0.0}, "optim.nesterov is True; want false"),
        ({"betas": (0.9, 1.0)}, "optim.betas"),
        ({"clip": 0.0}, "optim.clip is 0.0"),
        ({"clip": math.inf}, "optim.clip is inf"),
        ({"ema": 1.0}, "optim.ema is 1.0"),
    ],
)
def test_mistakes_in_options(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        configured(**options)


def test_too_few_classes_for_the_batches_name_the_options() -> None:
    config = replace(MINING, optim=replace(MINING.optim, batch_size=64))
    with pytest.raises(
        ValueError, match=r"optim.batch_size 64, sampler.counts \[2, 4\] .*may need 32 classes; .* has 22"
    ):
        run.build(config, print)


@pytest.mark.parametrize(
    ("steps", "images", "warm"), [(0, 4000, 100), (0, 20_000, 100), (800, 100, 100), (60, 100, 15), (3, 100, 0)]
)
def test_a_short_run_has_a_short_warm_up(steps: int, images: int, warm: int) -> None:
    optim = settled(TrainConfig(optim=OptimConfig(steps=steps)), images).optim
    assert optim.warm_up() == warm and optim.warmup is None
    assert max(learning_rate(optim, step) for step in range(optim.steps)) == pytest.approx(optim.lr)
    assert warm == 0 or learning_rate(optim, 0) == pytest.approx(optim.lr / warm)


def test_a_warm_up_is_held_against_the_steps_that_the_images_decide() -> None:
    with pytest.raises(ValueError, match=r"optim.warmup is 800; want less than the 800 steps"):
        settled(TrainConfig(optim=OptimConfig(warmup=800)), 100)


@pytest.mark.parametrize("rate", [0.0, 1.5, math.nan])
def test_a_share_of_the_classes(rate: float) -> None:
    with pytest.raises(ValueError, match=f"head.sample_rate is {rate}"):
        HeadConfig(sample_rate=rate)


@pytest.mark.parametrize("optim", [{"precision": "fp16"}, {"accumulation": 2}])
def test_centers_that_step_by_themselves_take_no_scaled_gradient(optim: dict[str, Any]) -> None:
    centers = {"minimum_margin": TermConfig(options={"route": "centers"})}
    with pytest.raises(ValueError, match=r"terms.minimum_margin.options.route is 'centers'; want another"):
        replace(configured(**optim), terms=centers)


def test_parts_of_a_step_hold_other_pairs() -> None:
    with pytest.raises(ValueError, match=re.escape("optim.accumulation is 2; want 1 beside the term range")):
        replace(configured(accumulation=2), terms={"range": TermConfig()})
    with pytest.raises(ValueError, match="want 1 beside the term center"):
        replace(configured(accumulation=2), terms={"center": TermConfig(options={"reduction": "sum"})})


@pytest.mark.parametrize("name", ["gpu", "cpu:1", "cuda:99", "cuda:-1", "cuda:", "meta"])
def test_a_device_that_is_not_there(name: str) -> None:
    if name == "cuda:" and torch.cuda.is_available():
        pytest.skip("read as the first GPU")
    with pytest.raises(ValueError, match=f"device is '{name}'; want cpu"):
        run.build(replace(SMALL, device=name), print)


def test_the_device_is_cpu_by_name_and_where_there_is_no_gpu() -> None:
    assert run.pick_device("cpu") == torch.device("cpu")
    assert run.pick_device(None).type == ("cuda" if torch.cuda.is_available() else "cpu")
