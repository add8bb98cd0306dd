"""A run that was stopped, by an error or a signal, goes on bit for bit, whatever moves its weights."""

import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from small_run import SMALL, batches, configured, records, small_data, stop_at, train_loop  # noqa: F401 (a fixture, too)
from torch import nn

from fastmargin import checkpoint
from fastmargin.driver.commands import cli, train
from fastmargin.driver.config import HeadConfig, TrainConfig
from fastmargin.driver.data.sources import load_data
from fastmargin.driver.training import loader, loop, run, run_folder, signals, state
from fastmargin.driver.training.table_feed import TableFeed

pytestmark = pytest.mark.usefixtures("one_thread")


def dropping(dim: int, size: tuple[int, int], channels: int) -> nn.Module:
    """A network that draws, without batch norm: `test_resume:dropping`."""
    flat = channels * size[0] * size[1]
    return nn.Sequential(nn.Flatten(), nn.Linear(flat, 32), nn.ReLU(), nn.Dropout(0.3), nn.Linear(32, dim))


# ---------------------------------------------------------------------------------------------- exact resume

EVERYTHING = configured(
    HeadConfig(sample_rate=0.3), name="adamw", lr=1e-3, accumulation=2, clip=1.0, precision="fp16", ema=0.9
)


@pytest.mark.parametrize(
    ("config", "factory"),
    [
        (configured(HeadConfig("L2Softmax"), name="adamw", lr=1e-3), None),
        (configured(clip=1.0), None),
        (configured(precision="bf16", schedule="steps", milestones=(5, 9)), None),
        (configured(precision="fp16", cycle=3), None),
        pytest.param(
            configured(HeadConfig(compute_dtype="bf16"), ema=0.9),
            None,
            marks=pytest.mark.filterwarnings("ignore:fastmargin. no torch.bfloat16:UserWarning"),  # not on every CPU
        ),
        (configured(accumulation=2, schedule="constant"), None),
        (configured(), "test_resume:dropping"),
        (EVERYTHING, "test_resume:dropping"),
    ],
    ids=["adamw", "clip", "bf16", "fp16", "ema", "accumulation", "dropout", "everything"],
)
def test_a_stopped_run_resumes_bit_for_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, config: TrainConfig, factory: str | None
) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    trained(config, whole, factory)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stop_at(patch, 7)
        trained(config, parts, factory)
    torch.manual_seed(7)  # a new process has another random state
    trained(replace(config, data=replace(config.data, workers=2)), parts, factory)
    assert_same_end(whole, parts)
    assert records(parts) == records(whole)


def trained(config: TrainConfig, out: Path, factory: str | None) -> None:
    current = run.build(config, print, factory)
    where = run_folder.claim(str(out), config)
    state.resume(current, where, print)
    loop.loop(current, where, print)


def assert_same_end(one: Path, other: Path, step: int = 12) -> None:
    first, second = (checkpoint.load_latest(where / run_folder.CHECKPOINTS) for where in (one, other))
    assert first is not None and second is not None and first.step == second.step == step
    assert first.tensors.keys() == second.tensors.keys()
    for name, tensor in first.tensors.items():
        assert torch.equal(second.tensors[name], tensor), name
    assert first.state["scaler"] == second.state["scaler"]


def test_sampled_sgd_resumes_bit_for_bit_from_the_checkpoints_of_the_whole_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = configured(HeadConfig(sample_rate=0.1))
    train_loop(config, tmp_path / "whole")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stop_at(patch, 6)
        train_loop(config, tmp_path / "parts")
    train_loop(config, tmp_path / "parts")
    assert_same_end(tmp_path / "whole", tmp_path / "parts")


def test_what_is_mined_late_is_a_step_late_and_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = replace(configured(HeadConfig(sample_rate=0.5), name="adamw"), sampler=replace(SMALL.sampler, lag=2))
    config = replace(config, sampler=replace(config.sampler, name="doppelganger"), save_every=3)
    monkeypatch.setattr(run, "TableFeed", lambda table, rows, late: TableFeed(table, rows, late=True))
    current = run.build(config, print)
    tables = []
    for batch in batches(current, 3):
        loop.train_step(current, *batch)
        tables.append(current.table.classes.clone())
    assert (tables[0] == -1).all() and not (tables[1] == -1).all() and not torch.equal(tables[2], tables[1])
    current.table_feed.flush()
    assert not torch.equal(current.table.classes, tables[2])
    train_loop(config, tmp_path / "whole")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stop_at(patch, 7)
        train_loop(config, tmp_path / "parts")
    train_loop(config, tmp_path / "parts")
    assert_same_end(tmp_path / "whole", tmp_path / "parts")


# ---------------------------------------------------------------------------------------------- signals


def test_the_first_interrupt_is_noted_the_second_stops_at_once_and_handlers_return() -> None:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with pytest.raises(KeyboardInterrupt), signals.noted() as noted:
        assert noted.number == 0
        os.kill(os.getpid(), signal.SIGTERM)
        assert noted.number == signal.SIGTERM
        os.kill(os.getpid(), signal.SIGINT)
        assert noted.number == signal.SIGINT
        os.kill(os.getpid(), signal.SIGINT)
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_a_thread_leaves_signals_alone() -> None:
    before, seen = signal.getsignal(signal.SIGTERM), []

    def body() -> None:
        with signals.noted() as noted:
            seen.append((noted.number, signal.getsignal(signal.SIGTERM)))

    thread = threading.Thread(target=body)
    thread.start()
    thread.join()
    assert seen == [(0, before)]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_within_a_step_saves_after_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals, code: int
) -> None:
    whole, parts, original = tmp_path / "whole", tmp_path / "parts", loop.train_step

    def train_step(current: run.Run, *batch: torch.Tensor) -> object:
        if current.step == 5:
            os.kill(os.getpid(), number)
        return original(current, *batch)

    with monkeypatch.context() as patch, pytest.raises(signals.Stopped) as stopped:
        patch.setattr(loop, "train_step", train_step)
        train_loop(SMALL, parts)
    saved = checkpoint.load_latest(parts / run_folder.CHECKPOINTS)
    assert stopped.value.code == code and saved is not None and saved.step == 6
    for where in (parts, whole):
        train_loop(SMALL, where)
    assert_same_end(whole, parts)


def test_a_process_ends_with_the_code_of_its_signal_and_its_run_resumes_bit_for_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {
        "data.source": "synthetic:30x8", "data.size": "16", "data.cache": str(tmp_path / "cache"), "dim": "8",
        "optim.steps": "100", "optim.batch_size": "16", "optim.name": "adamw", "optim.lr": "1e-3", "log_every": "1",
        "save_every": "1000", "device": "cpu",
    }  # fmt: skip
    arguments = ["train", *(part for name, value in options.items() for part in (f"--{name}", value))]
    parts, whole = tmp_path / "parts", tmp_path / "whole"
    said, code = interrupted([*arguments, "--out", str(parts)], parts / run_folder.RECORDS, signal.SIGTERM)
    stopped = checkpoint.load_latest(parts / run_folder.CHECKPOINTS)
    assert code == 143 and stopped is not None and 0 < stopped.step < 100, said
    assert f"SIGTERM: stopped, with a checkpoint of step {stopped.step} of 100. To go on: fastmargin train" in said
    assert run_folder.resuming(parts) in said
    monkeypatch.setattr(run, "load_data", load_data)  # as the child reads them
    monkeypatch.setattr(train, "finish", lambda *_: None)
    for where in (parts, whole):
        assert cli.main([*arguments, "--out", str(where)]) == 0
    assert_same_end(whole, parts, 100)
    assert records(parts) == records(whole)


def interrupted(arguments: list[str], records: Path, number: signal.Signals) -> tuple[str, int]:
    """A process that gets the signal once it trains: what it says, and its exit code."""
    command = [sys.executable, "-m", "fastmargin", *arguments]
    environment, pipe = {**os.environ, "OMP_NUM_THREADS": "1"}, subprocess.PIPE
    child = subprocess.Popen(command, env=environment, stdout=pipe, stderr=subprocess.STDOUT, text=True)
    deadline = time.monotonic() + 60
    while child.poll() is None and time.monotonic() < deadline:
        if records.exists():
            child.send_signal(number)
            break
        time.sleep(0.01)
    said, _ = child.communicate(timeout=60)
    return said, child.returncode


def test_a_signal_while_the_last_checkpoint_is_written_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save = checkpoint.save

    def interrupted(where: Path, step: int, *given: Any, **group: Any) -> Path:
        if step == SMALL.optim.steps:
            os.kill(os.getpid(), signal.SIGTERM)
        return save(where, step, *given, **group)

    monkeypatch.setattr(checkpoint, "save", interrupted)
    with pytest.raises(signals.Stopped) as stopped:
        train_loop(SMALL, tmp_path)
    assert stopped.value.code == 143


def test_rows_under_way_on_a_gpu_enter_the_table_of_a_run_on_a_cpu() -> None:
    current = run.build(SMALL, print)
    images, labels = next(loader.batches(current.batch_source()))
    current.table_feed.late = True
    loop.train_step(current, images, labels)
    held = {name: t.clone() for name, t in current.table_feed.state_dict().items()}
    assert (current.table.classes == -1).all()
    resumed = run.build(SMALL, print)
    resumed.table_feed.load_state_dict(held)
    other = labels[:1].new_full((len(labels),), -100)  # a step that mines nothing of its own
    resumed.table_feed.add(other, loop.backward(current, images, labels, 1.0)[0])
    assert (resumed.table.classes[labels] >= 0).all()
