"""The training run: exact resume, the schedule, mining, divergence, evaluation. Data are small and synthetic."""

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from small_run import (  # noqa: F401 (fixtures, too)
    IMAGES,
    MINING,
    SMALL,
    identities,
    load_data,
    records,
    small_data,
    stop_at,
    train_loop,
)

from fastmargin import checkpoint
from fastmargin.driver.commands import evaluate, train
from fastmargin.driver.config import HeadConfig, ModelConfig, TrainConfig
from fastmargin.driver.training import backbone, loader, loop, run, run_folder
from fastmargin.driver.training.optimizers import learning_rate
from fastmargin.files import locked

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("stop", [4, 7, 11])
@pytest.mark.parametrize(
    "config",
    [
        SMALL,
        MINING,
        replace(MINING, head=HeadConfig("ElasticFace", topk=3)),  # draws from torch's generator; deeper table
        replace(SMALL, head=HeadConfig("AdaFace")),  # running statistics of the norms
        replace(SMALL, head=HeadConfig("SphereFace"), data=replace(SMALL.data, augment="none")),  # anneals lambda
        replace(SMALL, head=HeadConfig("L2Softmax")),  # learns its scale, and a bias
        replace(SMALL, model=ModelConfig("doppelganger")),  # started by LSUV, whose k are buffers
    ],
    ids=["uniform", "doppelganger", "elastic", "ada", "sphere", "l2", "lsuv"],
)
def test_a_stopped_run_resumes_bit_for_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, config: TrainConfig, stop: int
) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train_loop(config, whole)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stop_at(patch, stop)
        train_loop(config, parts)
    torch.manual_seed(stop)  # a new process has another random state
    train_loop(config, parts)
    expected, got = (checkpoint.load_latest(where / "checkpoints") for where in (whole, parts))
    assert expected is not None and got is not None and got.step == expected.step == 12
    assert got.tensors.keys() == expected.tensors.keys()
    for name, tensor in expected.tensors.items():
        assert torch.equal(got.tensors[name], tensor), name
    assert records(parts) == records(whole)


@pytest.mark.parametrize("config", [SMALL, MINING], ids=["uniform", "doppelganger"])
def test_a_run_resumes_bit_for_bit_with_other_workers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, config: TrainConfig
) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train_loop(config, whole)
    for workers, stop in ((2, 7), (1, 11)):
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            stop_at(patch, stop)
            train_loop(replace(config, data=replace(config.data, workers=workers)), parts)
    train_loop(replace(config, data=replace(config.data, workers=3)), parts)
    expected, got = (checkpoint.load_latest(where / "checkpoints") for where in (whole, parts))
    assert expected is not None and got is not None and got.step == 12
    assert all(torch.equal(got.tensors[name], tensor) for name, tensor in expected.tensors.items())
    assert records(parts) == records(whole)


def test_checkpoints_hold_whatever_a_step_changes(tmp_path: Path) -> None:
    """If a tensor were left out of the checkpoint, the test above would pass only by luck: this one lists them."""
    current = train_loop(MINING, tmp_path)
    saved = checkpoint.load_latest(tmp_path / "checkpoints")
    assert saved is not None
    parts = {name.split("/")[0] for name in saved.tensors}
    assert parts == {"model", "head", "optimizer", "table", "order", "cosines"}
    moments = {name for name in saved.tensors if name.startswith("optimizer/") and name.endswith(".momentum_buffer")}
    assert len(moments) == sum(p.requires_grad for m in (current.model, current.head) for p in m.parameters())
    assert saved.state["config"]["sampler"]["name"] == "doppelganger"


def test_damaged_checkpoint_falls_back_and_still_ends_equal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train_loop(SMALL, tmp_path / "whole")
    train_loop(SMALL, tmp_path / "parts")
    newest = tmp_path / "parts" / "checkpoints" / "step-00000012" / checkpoint.TENSORS
    newest.write_bytes(newest.read_bytes()[:-1])
    train_loop(SMALL, tmp_path / "parts")
    assert "passed over a damaged checkpoint" in (said := capsys.readouterr().out) and str(newest) in said
    manifests = [tmp_path / r / "checkpoints/step-00000012" / checkpoint.MANIFEST for r in ("whole", "parts")]
    hashes = [json.loads(m.read_bytes())["body"]["files"] for m in manifests]
    assert hashes[0] == hashes[1]


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


def test_records_and_ramp(tmp_path: Path) -> None:
    train_loop(replace(SMALL, head=HeadConfig(ramp=0.5), log_every=1), tmp_path)
    lines = records(tmp_path)
    assert [line["step"] for line in lines] == list(range(1, 13))
    assert [line["margin"] for line in lines] == pytest.approx([0.4 * min(1, n / 6) for n in range(1, 13)])
    assert [line["lr"] for line in lines] == [learning_rate(SMALL.optim, n) for n in range(12)]
    assert all(-1 <= line["target_score"] <= 1 for line in lines)
    assert lines[0]["list_turnover"] == 1, "every list is new"
    assert all(0 <= line[share] <= 1 for line in lines for share in ("list_turnover", "confusable_batches"))


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


@pytest.mark.parametrize("drawn", [0.5, 1.0, 2, 3])
def test_the_sampler_draws_a_share_or_a_number_of_classes(drawn: float) -> None:
    config = replace(MINING, sampler=replace(MINING.sampler, random_classes=float(drawn)))
    order = run.build(config, print).order
    assert order.random_classes == drawn and type(order.random_classes) is type(drawn)


def test_three_stages_of_the_run_are_kept_for_the_histograms(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "EDGE", 3)
    seen: list[torch.Tensor] = []
    original = loop.train_step
    monkeypatch.setattr(loop, "train_step", lambda *a: (out := original(*a), seen.append(out.target_score))[0])
    current = train_loop(SMALL, tmp_path)
    assert torch.equal(current.cosines["start"], torch.cat(seen[:3]))
    assert torch.equal(current.cosines["middle"], torch.cat(seen[4:7]))
    assert torch.equal(current.cosines["end"], torch.cat(seen[-3:]))


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


def test_other_images_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train_loop(SMALL, tmp_path)
    monkeypatch.setattr(run, "load_data", lambda config, log: load_data(config, log, seed=1))
    with pytest.raises(ValueError, match="other images"):
        train_loop(SMALL, tmp_path)


def test_two_runs_in_one_folder(tmp_path: Path) -> None:
    where = run_folder.claim(str(tmp_path), SMALL)
    with locked(where), pytest.raises(BlockingIOError, match="is in use by another run, process"):
        train.train(SMALL, str(tmp_path), print)
    assert not (tmp_path / "checkpoints").exists()


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


def pixels(dim: int, size: tuple[int, int], channels: int) -> torch.nn.Module:
    """A network of a user's own: `test_driver:pixels`."""
    height, width = size
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(channels * height * width, dim))


def test_a_network_of_ones_own_trains_and_resumes_from_python_alone(tmp_path: Path) -> None:
    config = replace(SMALL, optim=replace(SMALL.optim, steps=4))
    where = train.train(config, str(tmp_path), print, model="test_driver:pixels")
    saved = checkpoint.load_latest(where / run_folder.CHECKPOINTS)
    assert saved is not None and saved.state["factory"] == "test_driver:pixels"
    assert {name for name in saved.tensors if name.startswith("model/")} == {"model/1.weight", "model/1.bias"}
    evaluate.evaluate(where, print, model="test_driver:pixels")
    assert run_folder.read_config(where) == config, "no configuration file names it"
    with pytest.raises(ValueError, match="the run's network is test_driver:pixels; here it is cnn"):
        evaluate.evaluate(where, print)


def test_lsuv_leaves_a_network_of_ones_own_alone() -> None:
    config = replace(SMALL, model=ModelConfig("doppelganger"))
    current = run.build(config, print, "test_driver:pixels")
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


def test_lsuv_starts_the_doppelganger_network_on_images_of_the_run() -> None:
    current = run.build(replace(SMALL, model=ModelConfig("doppelganger")), print)
    scales = [buffer for name, buffer in current.model.named_buffers() if name.endswith("k")]
    assert len(scales) == 27 and all(k != 1 for k in scales)
    again = run.build(replace(SMALL, model=ModelConfig("doppelganger")), print)
    assert all(map(torch.equal, current.model.state_dict().values(), again.model.state_dict().values()))


@pytest.mark.parametrize(("name", "field"), [("Softmax", "s"), ("NormFace", "m"), ("MagFace", "m")])
def test_a_margin_without_such_a_number_refuses_it(name: str, field: str) -> None:
    with pytest.raises(ValueError, match=rf"head.{field} is 0.25; want null: {name} has none"):
        run.build_margin(HeadConfig(name, **{field: 0.25}))  # type: ignore[arg-type]


def test_measured_defaults_belong_to_arcface_alone() -> None:
    assert HeadConfig().arguments() == {"s": 30.0, "m": 0.4}
    assert HeadConfig(m=0.5).arguments() == {"s": 30.0, "m": 0.5}
    assert HeadConfig("CosFace").arguments() == {}
    assert HeadConfig("CosFace", s=20.0).arguments() == {"s": 20.0}


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


def test_raw_pixels_are_averaged_over_tiles() -> None:
    small, large = torch.rand(3, 1, 32, 32), torch.rand(3, 3, 96, 96)
    assert torch.equal(evaluate.RawPixels()(small), small.flatten(1))
    tiles = large.double().unfold(2, 3, 3).unfold(3, 3, 3).mean((-1, -2))
    assert (evaluate.RawPixels()(large) - tiles.flatten(1)).abs().max() < 1e-6
    assert torch.equal(evaluate.RawPixels()(torch.zeros(1, 1, 8, 8)), torch.ones(1, 64)), "black has no direction"
