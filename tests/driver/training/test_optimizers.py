"""What updates the weights of a run: schedules, optimizers, loss scale, averages."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from small_run import SMALL, batches, configured, small_data  # noqa: F401 (a fixture, too)
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from fastmargin import checkpoint
from fastmargin.driver.commands import train
from fastmargin.driver.config import HeadConfig, OptimConfig, TrainConfig
from fastmargin.driver.training import backbone, loader, loop, run, run_folder, state
from fastmargin.driver.training.optimizers import learning_rate, update_average

pytestmark = pytest.mark.usefixtures("one_thread")


# ---------------------------------------------------------------------------------------------- schedules


def rates_of_torch(kind: type, base: float, steps: int, **options: Any) -> list[float]:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], base)
    scheduler = kind(optimizer, **options)
    rates = []
    for _ in range(steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates


def test_cosine_after_a_warm_up() -> None:
    config = OptimConfig(steps=110, warmup=10, lr=0.1, final_lr=0.01)
    rates = [learning_rate(config, step) for step in (0, 4, 9, 10, 60, 110)]
    assert rates == pytest.approx([0.01, 0.05, 0.1, 0.1, 0.1 * (0.01 + 0.99 / 2), 0.001], rel=1e-12)
    assert max(learning_rate(config, step) for step in range(110)) <= 0.1


@pytest.mark.parametrize("factor", [1, 2, 3])
def test_restarts_are_those_of_sgdr(factor: int) -> None:
    config = OptimConfig(steps=100, warmup=5, lr=0.1, final_lr=0.02, cycle=7, cycle_factor=factor)
    kind = torch.optim.lr_scheduler.CosineAnnealingWarmRestarts
    expected = rates_of_torch(kind, 0.1, 95, T_0=7, T_mult=factor, eta_min=0.002)
    assert [learning_rate(config, step) for step in range(5, 100)] == pytest.approx(expected, rel=1e-9)


def test_steps_and_a_constant() -> None:
    config = OptimConfig(steps=40, warmup=0, lr=0.1, schedule="steps", milestones=(10, 30), milestone_factor=0.3)
    expected = rates_of_torch(torch.optim.lr_scheduler.MultiStepLR, 0.1, 40, milestones=[10, 30], gamma=0.3)
    assert [learning_rate(config, step) for step in range(40)] == pytest.approx(expected, rel=1e-12)
    constant = OptimConfig(steps=40, warmup=4, lr=0.1, schedule="constant")
    assert [learning_rate(constant, step) for step in (0, 1, 3, 4, 39)] == [0.025, 0.05, 0.1, 0.1, 0.1]


# ---------------------------------------------------------------------------------------------- optimizers


def by_hand(config: TrainConfig, steps: int) -> dict[str, torch.Tensor]:
    """The weights after some steps of an ordinary loop: whole batches, torch's optimizer on everything."""
    current = run.build(config, print, "small_run:pixels")
    current.head.class_optimizer, optim = None, config.optim
    named = run.trainable_parameters(current.model, current.head, current.terms)
    groups = [
        {"params": [p for name, p in named.items() if name.startswith("head.") == of_head], "factor": factor}
        for of_head, factor in ((False, 1.0), (True, optim.head_lr))
    ]
    if optim.name == "adamw":
        optimizer: Any = torch.optim.AdamW(groups, betas=optim.betas, weight_decay=optim.weight_decay)
    else:
        options = dict(momentum=optim.momentum, nesterov=optim.nesterov, weight_decay=optim.weight_decay)
        optimizer = torch.optim.SGD(groups, **options)
    for images, labels in batches(current, steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(optim, current.step) * group["factor"]
        optimizer.zero_grad()
        current.head(current.model(images), labels).loss.backward()
        if optim.clip is not None:
            nn.utils.clip_grad_norm_(named.values(), optim.clip)
        optimizer.step()
        if current.schedule:
            current.schedule.step()
        current.step += 1
    return {name: p.detach() for name, p in named.items()}


@pytest.mark.parametrize(
    "optim",
    [
        {},
        {"nesterov": False},
        {"nesterov": False, "momentum": 0.0, "weight_decay": 0.0},
        {"name": "adamw", "lr": 1e-2, "betas": (0.8, 0.99)},
        {"head_lr": 10.0},
        {"clip": 0.5, "name": "adamw", "head_lr": 3.0},
        {"clip": 0.5},
        {"accumulation": 4},
        {"accumulation": 2, "clip": 0.5, "name": "adamw"},
    ],
    ids=lambda optim: " ".join(map(str, optim)) or "default",
)
@pytest.mark.parametrize("margin", ["ArcFace", "L2Softmax"])  # which learns a scale and a bias
def test_steps_are_those_of_an_ordinary_loop(optim: dict[str, Any], margin: str) -> None:
    config = configured(HeadConfig(margin), **optim)  # type: ignore[arg-type]
    current = run.build(config, print, "small_run:pixels")
    for batch in batches(current, 5):
        loop.train_step(current, *batch)
    start = run.trainable_parameters(
        *(getattr(run.build(config, print, "small_run:pixels"), n) for n in ("model", "head", "terms"))
    )
    expected = by_hand(config, 5)
    assert current.optimizers.classes.in_backward == (config.optim.clip is None and config.optim.accumulation == 1)
    for name, p in run.trainable_parameters(current.model, current.head, current.terms).items():
        moved = (expected[name] - start[name]).abs().max()
        assert moved > 0 and (p - expected[name]).abs().max() <= 1e-4 * moved, name


def test_a_long_gradient_is_clipped() -> None:
    config = configured(clip=1e-3)
    current = run.build(config, print)
    for batch in batches(current, 2):
        loop.train_step(current, *batch)
        gradients = [p.grad for p in run.trainable_parameters(current.model, current.head, current.terms).values()]
        assert nn.utils.get_total_norm([g for g in gradients if g is not None]) == pytest.approx(1e-3, rel=1e-3)
        assert len(gradients) > 3 and all(g is not None for g in gradients)


def test_fp16_searches_its_scale_and_goes_on(tmp_path: Path) -> None:
    """Steps that overflow change only the loss scale, and are no failure."""
    current = run.build(configured(precision="fp16", clip=1.0), print)
    current.optimizers.scaler.load_state_dict({**current.optimizers.scaler.state_dict(), "scale": 2.0**40})
    still, scales = [], []
    for batch in batches(current, 12):
        before = [p.detach().clone() for p in current.model.parameters()]
        loop.train_step(current, *batch)
        still.append(all(map(torch.equal, before, current.model.parameters())))
        scales.append(current.optimizers.scaler.get_scale())
    assert still[0] and scales[0] == 2.0**39 and all(p.isfinite().all() for p in current.model.parameters())
    current = run.build(configured(precision="fp16"), print)
    current.optimizers.scaler.load_state_dict({**current.optimizers.scaler.state_dict(), "scale": 2.0**24})
    loop.loop(current, run_folder.claim(str(tmp_path), current.config), print)
    assert 1 < current.optimizers.scaler.get_scale() < 2.0**24 and not current.optimizers.failed()


# ---------------------------------------------------------------------------------------------- averages


def test_average_of_the_weights_by_hand(tmp_path: Path) -> None:
    current = run.build(configured(ema=0.6), print)
    expected = {name: t.double() for name, t in current.model.state_dict().items()}
    for n, batch in enumerate(batches(current, 8), 1):
        loop.train_step(current, *batch)
        b = min(0.6, (1 + n) / (10 + n))
        for name, t in current.model.state_dict().items():
            expected[name] = b * expected[name] + (1 - b) * t if t.is_floating_point() else t
    assert current.average is not None
    for name, t in current.average.state_dict().items():
        torch.testing.assert_close(t.double(), expected[name].double(), rtol=1e-5, atol=1e-6)
    steps = [t for name, t in current.average.state_dict().items() if name.endswith("num_batches_tracked")]
    assert steps and all(step == 8 for step in steps)


def test_the_average_is_what_is_evaluated_exported_and_started_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = configured(ema=0.9)
    monkeypatch.setattr(train, "finish", lambda *_: None)
    where = train.train(config, str(tmp_path / "first"), print)
    saved = checkpoint.load_latest(where / run_folder.CHECKPOINTS)
    assert saved is not None
    network = backbone.load_backbone(where, print).network
    for name, weight in network.state_dict().items():
        assert torch.equal(weight, saved.tensors[f"average/{name}"])
    assert not torch.equal(
        saved.tensors["average/" + (key := next(iter(network.state_dict())))], saved.tensors[f"model/{key}"]
    )
    current = run.build(config, print)
    state.resume(current, where, print)
    assert current.network is current.average
    fresh = run.build(config, print)
    state.start_from(fresh, where / run_folder.CHECKPOINTS / "step-00000012", print)
    for started in (fresh.model, fresh.network):
        assert all(map(torch.equal, started.state_dict().values(), network.state_dict().values()))
    assert run.build(SMALL, print).average is None


def test_an_average_of_whole_numbers_is_the_last() -> None:
    ours, theirs = nn.BatchNorm1d(2), nn.BatchNorm1d(2)
    theirs.num_batches_tracked += 5
    theirs.running_mean.fill_(2.0)  # type: ignore[union-attr]
    update_average(ours, theirs, 0.25, 1000)
    assert ours.num_batches_tracked == 5 and torch.equal(ours.running_mean, torch.tensor([1.5, 1.5]))  # type: ignore[arg-type]


def test_an_average_skips_numbers_that_are_not_finite() -> None:
    ours, theirs = nn.BatchNorm1d(2), nn.BatchNorm1d(2)
    theirs.running_mean.copy_(torch.tensor([math.inf, 2.0]))  # type: ignore[union-attr]
    update_average(ours, theirs, 0.25, 1000)
    assert torch.equal(ours.running_mean, torch.tensor([0.0, 1.5]))  # type: ignore[arg-type]


# ---------------------------------------------------------------------------------------------- no host sync


WAITS = {
    "aten::_local_scalar_dense", "aten::nonzero", "aten::is_nonzero", "aten::equal", "aten::masked_select",
    "aten::_unique2", "aten::unique_dim", "aten::unique_consecutive", "aten::bincount",
}  # fmt: skip


class NothingIsRead(TorchDispatchMode):
    """Refuses ops that would be a host sync on a GPU."""

    def __torch_dispatch__(self, op: Any, _: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert op.name() not in WAITS, op
        picked = any(
            t is not None and t.dtype == torch.bool for t in (args[1] if op.name() == "aten::index.Tensor" else ())
        )
        assert not picked, "an index of bools has the length of what it finds"
        return op(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "config",
    [
        SMALL,
        configured(name="adamw"),
        configured(clip=1.0),
        configured(precision="fp16", clip=1.0),
        configured(ema=0.9),
    ],
    ids=["default", "adamw", "clip", "fp16", "ema"],
)
def test_no_optimizer_waits_for_a_number(config: TrainConfig) -> None:
    current = run.build(config, print)
    images, labels = next(loader.batches(current.batch_source()))
    for step in range(2):
        current.optimizers.set_rate(step)
        current.optimizers.zero_grad()
        loop.backward(current, images, labels, 1.0)
        with NothingIsRead():
            current.optimizers.step()
            if current.average is not None:
                update_average(current.average, current.model, 0.9, step)
    with pytest.raises(AssertionError), NothingIsRead():
        current.optimizers.failed()
