"""What moves the weights of a run: optimisers, schedules, precision, averages, what is not finite, and signals."""

import copy
import math
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from small_run import SMALL, batches, configured, records, small_data, stop_at, train_loop  # noqa: F401 (a fixture, too)
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from fastmargin import checkpoint
from fastmargin.driver.commands import train
from fastmargin.driver.config import HeadConfig, OptimConfig, TermConfig, TrainConfig
from fastmargin.driver.training import backbone, loader, loop, run, run_folder, state
from fastmargin.driver.training.optimizers import learning_rate, update_average

pytestmark = pytest.mark.usefixtures("one_thread")


def linear(dim: int, size: tuple[int, int], channels: int) -> nn.Module:
    """`test_training:linear`: nothing drawn, and rows do not meet."""
    return nn.Sequential(nn.Flatten(), nn.Linear(channels * size[0] * size[1], dim))


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


# ---------------------------------------------------------------------------------------------- optimisers


def by_hand(config: TrainConfig, steps: int) -> dict[str, torch.Tensor]:
    """The weights after some steps of an ordinary loop: whole batches, torch's optimiser on everything."""
    current = run.build(config, print, "test_training:linear")
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
    current = run.build(config, print, "test_training:linear")
    for batch in batches(current, 5):
        loop.train_step(current, *batch)
    start = run.trainable_parameters(
        *(getattr(run.build(config, print, "test_training:linear"), n) for n in ("model", "head", "terms"))
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


def test_parts_of_a_step_are_recorded_as_one() -> None:
    """Without batch norm a step in parts has the loss, the term and the mined classes of the whole batch."""
    outs = []
    for parts in (1, 4):
        config = replace(configured(accumulation=parts), terms={"center": TermConfig(0.1)})
        current = run.build(config, print, "test_training:linear")
        batch = next(loader.batches(current.batch_source()))
        out = loop.train_step(current, *batch)
        outs.append((out, current.terms.last["center"], current.table.scores))
    (whole, term, scores), (joined, of_parts, again) = outs
    assert torch.allclose(joined.loss, whole.loss) and joined.hard_classes.equal(whole.hard_classes)
    assert joined.target_score.shape == whole.target_score.shape == (16,) and torch.allclose(scores, again)
    assert torch.allclose(term, of_parts) and term > 0


def test_a_frozen_network_trains_a_head_alone(tmp_path: Path) -> None:
    current = train_loop(configured(), tmp_path)
    fresh = run.build(configured(), print)
    for p in fresh.model.parameters():
        p.requires_grad_(False)
    before = copy.deepcopy(fresh.head.weight)
    fresh.optimizers = type(fresh.optimizers)(fresh.config.optim, fresh.head, fresh.model, fresh.terms)
    loop.train_step(fresh, *next(loader.batches(fresh.batch_source())))
    assert not torch.equal(fresh.head.weight, before) and current.step == 12


def test_sampled_classes_hold_the_mined_ones() -> None:
    current = run.build(configured(HeadConfig(sample_rate=0.1)), print)
    current.table.classes[:, 0] = torch.arange(len(current.table.classes)).roll(1)
    images, labels = next(loader.batches(current.batch_source()))
    loop.train_step(current, images, labels)
    sampled = current.head.sampled
    assert sampled is not None and len(sampled) < current.head.num_classes
    assert {*labels.tolist(), *(labels - 1).remainder(current.head.num_classes).tolist()} <= {*sampled.tolist()}


# ---------------------------------------------------------------------------------------------- precision, averages


@pytest.mark.parametrize(("precision", "dtype"), [(None, "float32"), ("bf16", "bfloat16"), ("fp16", "float16")])
def test_autocast_is_for_the_network_alone(precision: Any, dtype: str) -> None:
    current = run.build(configured(precision=precision), print)
    seen: list[torch.dtype] = []
    convolution = next(m for m in current.model.modules() if isinstance(m, nn.Conv2d))
    convolution.register_forward_hook(lambda _, __, x: seen.append(x.dtype))
    current.head.register_forward_pre_hook(lambda _, x: seen.append(x[0].dtype))
    out = loop.train_step(current, *next(loader.batches(current.batch_source())))
    assert seen == [getattr(torch, dtype), torch.float32] and out.loss.dtype == torch.float32
    learnt = run.trainable_parameters(current.model, current.head, current.terms)
    assert {p.dtype for p in learnt.values()} == {torch.float32}
    assert (current.optimizers.scaler.get_scale() > 1) == (precision == "fp16") and not current.optimizers.failed()


def test_products_of_the_head_are_rounded_if_wanted() -> None:
    assert run.build(configured(HeadConfig(compute_dtype="bf16")), print).head.compute_dtype == torch.bfloat16
    assert run.build(SMALL, print).head.compute_dtype is None


def test_fp16_searches_its_scale_and_goes_on(tmp_path: Path) -> None:
    """Steps that overflow change nothing but the scale, and are no failure."""
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


# ---------------------------------------------------------------------------------------------- what is not finite


@pytest.mark.parametrize("optim", [{}, {"name": "adamw", "lr": 1e-3}, {"clip": 1.0}, {"accumulation": 2}])
@pytest.mark.parametrize("sample_rate", [1.0, 0.3])
def test_a_step_that_is_not_finite_moves_nothing_and_ends_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, optim: dict[str, Any], sample_rate: float
) -> None:
    config = configured(HeadConfig(sample_rate=sample_rate), **optim)
    original, moved = loop.train_step, []

    def train_step(current: run.Run, images: torch.Tensor, labels: torch.Tensor) -> object:
        named = run.trainable_parameters(current.model, current.head, current.terms)
        current.head.class_optimizer.apply_lazy_updates()  # type: ignore[union-attr]
        held = [p.detach().clone() for p in named.values()]
        if current.step == 6:
            images = images.clone()
            images[3] = math.nan
        out = original(current, images, labels)
        if current.step == 7:
            sampled = slice(None) if current.head.sampled is None else current.head.sampled
            for (name, p), before in zip(named.items(), held, strict=True):
                rows = sampled if name == "head.weight" else slice(None)
                if not torch.equal(p[rows], before[rows]) or not p.isfinite().all():
                    moved.append(name)
        return out

    monkeypatch.setattr(loop, "train_step", train_step)
    with pytest.raises(ValueError, match="diverged by step 8"):
        train_loop(config, tmp_path)
    assert moved == []
    saved = checkpoint.load_latest(tmp_path / run_folder.CHECKPOINTS)
    assert saved is not None and saved.step == 4
    assert all(t.isfinite().all() for name, t in saved.tensors.items() if name.startswith(("model", "head", "opt")))


def test_a_gradient_alone_that_is_not_finite_is_found(tmp_path: Path) -> None:
    """At the very first step, too, where there are no moments yet."""
    current = run.build(replace(SMALL, log_every=1), print)
    p = next(current.model.parameters())
    handle = p.register_hook(lambda gradient: gradient * math.inf)
    before, loader_ = p.detach().clone(), loader.batches(current.batch_source())
    out = loop.train_step(current, *next(loader_))
    handle.remove()
    assert torch.equal(p, before) and current.optimizers.failed() and out.loss.isfinite()
    with pytest.raises(ValueError, match="a gradient"):
        loop.measure(current, out)
    loop.train_step(current, *next(loader_))
    assert p.isfinite().all() and not torch.equal(p, before)


def test_statistics_that_are_not_finite_are_found(tmp_path: Path) -> None:
    """An overflow of fp16 in the forward pass leaves the loss and the weights finite."""
    current = run.build(configured(precision="fp16"), print)
    images, labels = next(loader.batches(current.batch_source()))
    out = loop.train_step(current, images, labels)
    loop.measure(current, out)
    next(b for b in current.model.buffers() if b.is_floating_point()).fill_(math.nan)
    with pytest.raises(ValueError, match="a statistic not finite"):
        loop.measure(current, out)


def test_speed_counts_whatever_a_step_takes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = loop.measure
    monkeypatch.setattr(loop, "measure", lambda *given: (time.sleep(0.05), original(*given))[1])
    current = train_loop(replace(SMALL, log_every=1), tmp_path)
    assert current.seconds >= 12 * 0.05
    assert all(line["images_per_second"] <= 16 / 0.05 for line in run_folder.read_records(tmp_path))


WAITS = {
    "aten::_local_scalar_dense", "aten::nonzero", "aten::is_nonzero", "aten::equal", "aten::masked_select",
    "aten::_unique2", "aten::unique_dim", "aten::unique_consecutive", "aten::bincount",
}  # fmt: skip


class NothingIsRead(TorchDispatchMode):
    """Refuses what would make the host wait for a GPU."""

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
def test_no_optimiser_waits_for_a_number(config: TrainConfig) -> None:
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
