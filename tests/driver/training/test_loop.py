"""The training loop: single steps, records, what is mined and kept on the way, what is not finite."""

import copy
import math
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from small_run import MINING, SMALL, configured, records, small_data, train_loop  # noqa: F401 (a fixture, too)
from torch import nn

from fastmargin import checkpoint
from fastmargin.driver.config import HeadConfig, TermConfig, TrainConfig
from fastmargin.driver.training import loader, loop, run, run_folder
from fastmargin.driver.training.optimizers import learning_rate

pytestmark = pytest.mark.usefixtures("one_thread")


# ---------------------------------------------------------------------------------------------- steps


def test_first_step_is_nesterov_sgd_by_hand(tmp_path: Path) -> None:
    """v = g + wd w; w <- w - lr (v + momentum v) on the first step, for class weights as for convolutions."""
    current, twin = run.build(SMALL, print), run.build(SMALL, print)
    images, labels = next(loader.batches(current.batch_source()))
    twin.head.class_optimizer = None  # so that the gradient of the class weights is kept
    twin.head(twin.model(images), labels).loss.backward()
    gradients = run.trainable_parameters(twin.model, twin.head, twin.terms)
    before = {
        name: p.detach().clone()
        for name, p in run.trainable_parameters(current.model, current.head, current.terms).items()
    }
    loop.train_step(current, images, labels)
    optim, rate = SMALL.optim, SMALL.optim.lr / SMALL.optim.warmup
    for name, p in run.trainable_parameters(current.model, current.head, current.terms).items():
        gradient = gradients[name].grad
        assert gradient is not None
        v = gradient + optim.weight_decay * before[name]
        torch.testing.assert_close(p.detach(), before[name] - rate * (v + optim.momentum * v))
    assert "head.weight" in before and all("head.margin" not in name for name in before)


def test_parts_of_a_step_are_recorded_as_one() -> None:
    """Without batch norm a step in parts has the loss, the term and the mined classes of the whole batch."""
    outs = []
    for parts in (1, 4):
        config = replace(configured(accumulation=parts), terms={"center": TermConfig(0.1)})
        current = run.build(config, print, "small_run:pixels")
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
    fresh.head.class_optimizer.detach()  # type: ignore[union-attr]
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


@pytest.mark.parametrize(("precision", "dtype"), [(None, "float32"), ("bf16", "bfloat16"), ("fp16", "float16")])
def test_autocast_is_for_the_network_alone(precision: Any, dtype: str) -> None:
    current = run.build(configured(precision=precision), print)
    seen: list[torch.dtype] = []
    convolution = next(m for m in current.model.modules() if isinstance(m, nn.Conv2d))
    convolution.register_forward_hook(lambda _, __, x: seen.append(x.dtype))
    current.head.register_forward_pre_hook(lambda _, x: seen.append(x[0].dtype))
    out = loop.train_step(current, *next(loader.batches(current.batch_source())))
    assert seen == [getattr(torch, dtype), torch.float32] and out.loss.dtype == torch.float32
    learned = run.trainable_parameters(current.model, current.head, current.terms)
    assert {p.dtype for p in learned.values()} == {torch.float32}
    assert (current.optimizers.scaler.get_scale() > 1) == (precision == "fp16") and not current.optimizers.failed()


@pytest.mark.parametrize("config", [SMALL, MINING], ids=["uniform", "doppelganger"])
def test_the_table_is_mined_with_either_sampler(tmp_path: Path, config: TrainConfig) -> None:
    """After each step the visited classes hold this step's nearest wrong classes."""
    current = run.build(config, print)
    batches = loader.batches(current.batch_source())
    for _ in range(4):
        images, labels = next(batches)
        out = loop.train_step(current, images, labels)
        for label in labels.unique().tolist():
            rows = labels == label
            best = out.hard_scores[rows, 0].max()
            assert current.table.scores[label, 0] == best
            assert int(current.table.classes[label, 0]) in out.hard_classes[rows, 0].tolist()
            assert int(current.table.classes[label, 0]) != label


def test_seeds_differ_and_repeat(tmp_path: Path) -> None:
    losses = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        train_loop(replace(SMALL, seed=seed), tmp_path / name)
        losses.append([line["loss"] for line in records(tmp_path / name)])
    assert losses[0] == losses[1] != losses[2]


@pytest.mark.parametrize(
    "name",
    "Softmax NormFace L2Softmax SphereFace CosFace AMSoftmax ArcFace AdaFace MagFace ElasticFace".split(),
)
def test_every_margin_trains(tmp_path: Path, name: str) -> None:
    config = replace(SMALL, head=HeadConfig(name), optim=replace(SMALL.optim, steps=3, warmup=1))  # type: ignore[arg-type]
    current = train_loop(config, tmp_path)
    assert all(math.isfinite(line["loss"]) for line in records(tmp_path))
    plain = name in ("Softmax", "L2Softmax")
    assert len(current.cosines["start"]) == (0 if plain else 16), "of one step in three"
    assert (current.head.bias is not None) == plain


# ---------------------------------------------------------------------------------------------- records


def test_records_and_ramp(tmp_path: Path) -> None:
    train_loop(replace(SMALL, head=HeadConfig(ramp=0.5), log_every=1), tmp_path)
    lines = records(tmp_path)
    assert [line["step"] for line in lines] == list(range(1, 13))
    assert [line["margin"] for line in lines] == pytest.approx([0.4 * min(1, n / 6) for n in range(1, 13)])
    assert [line["lr"] for line in lines] == [learning_rate(SMALL.optim, n) for n in range(12)]
    assert all(-1 <= line["target_score"] <= 1 for line in lines)
    assert lines[0]["list_turnover"] == 1, "every list is new"
    assert all(0 <= line[share] <= 1 for line in lines for share in ("list_turnover", "confusable_batches"))


def test_three_stages_of_the_run_are_kept_for_the_histograms(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "EDGE", 3)
    seen: list[torch.Tensor] = []
    original = loop.train_step
    monkeypatch.setattr(loop, "train_step", lambda *a: (out := original(*a), seen.append(out.target_score))[0])
    current = train_loop(SMALL, tmp_path)
    assert torch.equal(current.cosines["start"], torch.cat(seen[:3]))
    assert torch.equal(current.cosines["middle"], torch.cat(seen[4:7]))
    assert torch.equal(current.cosines["end"], torch.cat(seen[-3:]))


def test_speed_counts_whatever_a_step_takes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = loop.measure
    monkeypatch.setattr(loop, "measure", lambda *given: (time.sleep(0.05), original(*given))[1])
    current = train_loop(replace(SMALL, log_every=1), tmp_path)
    assert current.seconds >= 12 * 0.05
    assert all(line["images_per_second"] <= 16 / 0.05 for line in run_folder.read_records(tmp_path))


def test_records_change_nothing(tmp_path: Path) -> None:
    """Also not how late updates of sampled classes are rounded: log_every may change when a run is resumed."""
    config = replace(configured(HeadConfig(sample_rate=0.2)), save_every=100)
    ends = [train_loop(replace(config, log_every=n), tmp_path / str(n)).head.weight for n in (1, 100)]
    assert torch.equal(*ends)


def test_progress_lines_show_life_where_there_is_no_terminal(tmp_path: Path) -> None:
    said: list[str] = []
    say: Callable[[str], None] = said.append
    current = run.build(replace(SMALL, log_every=1, optim=replace(SMALL.optim, steps=30)), say)
    loop.loop(current, run_folder.claim(str(tmp_path), current.config), say)
    assert [int(line.split()[1]) for line in said] == list(range(3, 31, 3))


# ---------------------------------------------------------------------------------------------- what is not finite


def test_divergence_names_the_step_and_keeps_the_last_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = loop.train_step

    def train_step(current: run.Run, *batch: object) -> object:
        out = original(current, *batch)  # type: ignore[arg-type]
        if current.step == 7:
            with torch.no_grad():
                current.head.weight[0, 0] = math.inf
        return out

    monkeypatch.setattr(loop, "train_step", train_step)
    with pytest.raises(ValueError, match="diverged by step 8"):
        train_loop(SMALL, tmp_path)
    saved = checkpoint.load_latest(tmp_path / "checkpoints")
    assert saved is not None and saved.step == 4
    assert all(t.isfinite().all() for n, t in saved.tensors.items() if n.startswith(("model/", "head/", "optimizer/")))


def test_a_huge_learning_rate_is_a_value_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="diverged"):
        train_loop(replace(SMALL, optim=replace(SMALL.optim, lr=1e38)), tmp_path)


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
