"""Scalars for TensorBoard: the records, once each, also of a run that was stopped and resumed."""

import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
from small_run import SMALL, small_data, stop_at, train_loop  # noqa: F401 (a fixture, too)

from fastmargin.driver.commands import train
from fastmargin.driver.config import TermConfig
from fastmargin.driver.training import run_folder, tensorboard

pytestmark = pytest.mark.usefixtures("one_thread")

WATCHED = replace(SMALL, tensorboard=True, terms={"center": TermConfig(weight=0.01)})


class SummaryWriter:
    """Drops what TensorBoard drops: scalars at or after `purge_step`."""

    kept: dict[Path, dict[tuple[str, int], list[float]]]

    def __init__(self, folder: Path, purge_step: int) -> None:
        before = self.kept.get(folder, {})
        self.scalars = {(name, step): values for (name, step), values in before.items() if step < purge_step}
        self.kept[folder] = self.scalars

    def add_scalar(self, name: str, value: float, step: int) -> None:
        self.scalars.setdefault((name, step), []).append(value)

    def flush(self) -> None: ...


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[Path, dict[tuple[str, int], list[float]]]]:
    """What the fake TensorBoard has been given, by folder."""
    module = ModuleType("torch.utils.tensorboard")
    SummaryWriter.kept = {}
    module.SummaryWriter = SummaryWriter  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return SummaryWriter.kept


def test_a_resumed_run_writes_every_step_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, written: dict[Path, dict[tuple[str, int], list[float]]]
) -> None:
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stop_at(patch, 7)  # records of steps 2, 4 and 6; the checkpoint is of step 4
        train_loop(WATCHED, tmp_path)
    train_loop(WATCHED, tmp_path)
    expected = {
        (name, record["step"]): [value]
        for record in run_folder.read_records(tmp_path)
        for name, value in tensorboard.scalars(record).items()
    }
    assert written == {tmp_path / "tensorboard": expected}
    assert {step for _, step in expected} == {2, 4, 6, 8, 10, 12}


def test_scalars_are_the_numbers_of_a_record() -> None:
    record = {
        "step": 3,
        "loss": 1.5,
        "terms": {"center": 2.0},
        "margin": None,
        "seconds": {"head": 0.1},
        "machine": "A",
    }
    assert tensorboard.scalars(record) == {"loss": 1.5, "terms/center": 2.0, "seconds/head": 0.1}


def test_without_tensorboard_a_run_is_refused_before_it_leaves_a_trace(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ValueError, match=r"tensorboard is true, and .* pip install 'fastmargin\[tb\]'"):
        train.train(WATCHED, str(tmp_path / "run"), print)
    assert not (tmp_path / "run").exists()


def test_a_run_may_be_resumed_with_or_without(
    tmp_path: Path, written: dict[Path, dict[tuple[str, int], list[float]]]
) -> None:
    train_loop(replace(WATCHED, tensorboard=False), tmp_path)
    assert written == {}
    train_loop(WATCHED, tmp_path)


def test_tensorboard_reads_what_was_written(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    for last, step in ((0, 1), (1, 2), (1, 2), (2, 3)):
        board = tensorboard.Board(tmp_path, last)
        board.add({"step": step, "loss": 10.0 * step + last})
        board.writer.close()
    events = accumulator.EventAccumulator(str(tmp_path / tensorboard.FOLDER)).Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(1, 10.0), (2, 21.0), (3, 32.0)]
