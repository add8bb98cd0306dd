"""A whole run, its evaluation and its folder. Data are small and synthetic."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from small_run import (  # noqa: F401 (fixtures, too)
    IMAGES,
    SMALL,
    load_data,
    records,
    small_data,
    stop_at,
    train_loop,
)

from fastmargin import checkpoint
from fastmargin.driver.commands import evaluate, train
from fastmargin.driver.training import loop, run, run_folder

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole run, long enough to learn its patterns."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "load_data", load_data)
        config = replace(SMALL, optim=replace(SMALL.optim, steps=40), save_every=20, log_every=10)
        return train.train(config, str(tmp_path_factory.mktemp("trained") / "run"), print)


def test_a_whole_run(trained: Path) -> None:
    metrics = json.loads((trained / run_folder.METRICS).read_bytes())
    held_out = load_data(SMALL.data, None)[1].num_classes
    for block in ("model", "raw_pixels"):
        assert metrics[block]["identities"] == held_out
        assert metrics[block]["images"] == held_out * IMAGES
        assert metrics[block]["genuine_pairs"] == held_out * math.comb(IMAGES, 2)
    assert metrics["model"]["rank1"] > 0.5 > 1 / held_out
    assert metrics["raw_pixels"]["rank1"] == 1.0  # unaugmented patterns: nearest pixels cannot fail
    assert metrics["step"] == 40 and metrics["config"]["dim"] == 8 and metrics["seconds"]["training"] > 0
    names = {path.name for path in (trained / run_folder.REPORT).iterdir()}
    pictures = ("loss", "schedule", "mining", "roc", "theta", "psi", "doppelgangers", "timing")
    assert names == {"index.html", *(f"{picture}.png" for picture in pictures)}
    assert run_folder.finished(trained)


def test_loss_falls(trained: Path) -> None:
    lines = records(trained)
    assert lines[-1]["target_score"] > lines[0]["target_score"] + 0.2


def test_evaluating_again_gives_the_same_numbers(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = json.loads((trained / run_folder.METRICS).read_bytes())
    (trained / run_folder.METRICS).unlink()
    (page := trained / run_folder.REPORT / "index.html").unlink()
    assert not run_folder.finished(trained)
    evaluate.evaluate(trained, print)
    after = json.loads((trained / run_folder.METRICS).read_bytes())
    assert {**after, "seconds": 0} == {**before, "seconds": 0}
    assert page.exists()
    assert "TAR at FAR 1e-3" in (said := capsys.readouterr().out) and "raw pixels" in said


def test_a_run_under_way_can_be_evaluated_and_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(KeyboardInterrupt), monkeypatch.context() as patch:
        stop_at(patch, 3)
        train_loop(SMALL, tmp_path)
    with pytest.raises(ValueError, match="no checkpoint yet"):
        evaluate.evaluate(tmp_path, print)
    with pytest.raises(KeyboardInterrupt), monkeypatch.context() as patch:
        stop_at(patch, 5)
        train_loop(SMALL, tmp_path)
    monkeypatch.setattr(loop, "EDGE", 3)
    evaluate.evaluate(tmp_path, print)
    assert json.loads((tmp_path / run_folder.METRICS).read_bytes())["step"] == 4
    assert (tmp_path / run_folder.REPORT / "theta.png").exists() and not run_folder.finished(tmp_path)
    train.train(SMALL, str(tmp_path), print)
    assert run_folder.finished(tmp_path)


def test_a_network_of_ones_own_trains_and_resumes_from_python_alone(tmp_path: Path) -> None:
    config = replace(SMALL, optim=replace(SMALL.optim, steps=4))
    where = train.train(config, str(tmp_path), print, model="small_run:pixels")
    saved = checkpoint.load_latest(where / run_folder.CHECKPOINTS)
    assert saved is not None and saved.state["factory"] == "small_run:pixels"
    assert {name for name in saved.tensors if name.startswith("model/")} == {"model/1.weight", "model/1.bias"}
    evaluate.evaluate(where, print, model="small_run:pixels")
    assert run_folder.read_config(where) == config, "no configuration file names it"
    with pytest.raises(ValueError, match="the run's network is small_run:pixels; here it is cnn"):
        evaluate.evaluate(where, print)


def test_raw_pixels_are_averaged_over_tiles() -> None:
    small, large = torch.rand(3, 1, 32, 32), torch.rand(3, 3, 96, 96)
    assert torch.equal(evaluate.RawPixels()(small), small.flatten(1))
    tiles = large.double().unfold(2, 3, 3).unfold(3, 3, 3).mean((-1, -2))
    assert (evaluate.RawPixels()(large) - tiles.flatten(1)).abs().max() < 1e-6
    assert torch.equal(evaluate.RawPixels()(torch.zeros(1, 1, 8, 8)), torch.ones(1, 64)), "black has no direction"
