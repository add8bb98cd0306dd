"""A whole run, its evaluation and its folder. Data are small and synthetic."""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from small_run import (  # noqa: F401 (fixtures, too)
    IMAGES,
    SMALL,
    identities,
    load_data,
    records,
    small_data,
    stop_at,
    train_loop,
)

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


def test_progress_lines_show_life_where_there_is_no_terminal(tmp_path: Path) -> None:
    said: list[str] = []
    say: Callable[[str], None] = said.append
    current = run.build(replace(SMALL, log_every=1, optim=replace(SMALL.optim, steps=30)), say)
    loop.loop(current, run_folder.claim(str(tmp_path), current.config), say)
    assert [int(line.split()[1]) for line in said] == list(range(3, 31, 3))


def test_a_record_torn_by_a_kill_is_passed_over(tmp_path: Path) -> None:
    for step in (1, 2):
        run_folder.append_record(tmp_path, {"step": step, "loss": 1.0})
    with (tmp_path / run_folder.RECORDS).open("a") as file:
        file.write('{"step": 3, "lo')
    for step in (2, 3):
        run_folder.append_record(tmp_path, {"step": step, "loss": 2.0})
    assert run_folder.read_records(tmp_path) == [
        {"step": 1, "loss": 1.0},
        {"step": 2, "loss": 2.0},
        {"step": 3, "loss": 2.0},
    ]


def test_dated_folders_never_collide(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folders = [run_folder.claim(None, SMALL) for _ in range(4)]
    assert len(set(folders)) == 4 and all(path.parent.name == "runs" for path in folders)
    assert all(run_folder.read_config(path) == SMALL for path in folders)
