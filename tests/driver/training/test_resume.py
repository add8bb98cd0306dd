"""A run that was stopped, by an error or a signal, resumes bit for bit, whatever its configuration."""

import json
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
from small_run import (  # noqa: F401 (a fixture, too)
    MINING,
    SMALL,
    batches,
    configured,
    load_data,
    records,
    small_data,
    stop_at,
    train_loop,
)
from torch import nn

from fastmargin import checkpoint
from fastmargin.driver.commands import cli, train
from fastmargin.driver.config import HeadConfig, ModelConfig, TrainConfig
from fastmargin.driver.data import sources
from fastmargin.driver.training import loader, loop, run, run_folder, signals
from fastmargin.driver.training.table_feed import TableFeed

pytestmark = pytest.mark.usefixtures("one_thread")


def dropping(dim: int, size: tuple[int, int], channels: int) -> nn.Module:
    """`test_resume:dropping`: a network with dropout, without batch norm."""
    flat = channels * size[0] * size[1]
    return nn.Sequential(nn.Flatten(), nn.Linear(flat, 32), nn.ReLU(), nn.Dropout(0.3), nn.Linear(32, dim))


# ---------------------------------------------------------------------------------------------- exact resume

CONFIGS = {
    "uniform": SMALL,
    "doppelganger": MINING,
    "elastic": replace(MINING, head=HeadConfig("ElasticFace", topk=3)),  # draws random numbers; three classes a list
    "ada": replace(SMALL, head=HeadConfig("AdaFace")),  # running statistics of the norms
    "sphere": replace(SMALL, head=HeadConfig("SphereFace"), data=replace(SMALL.data, augment="none")),  # anneals lambda
    "l2": replace(SMALL, head=HeadConfig("L2Softmax")),  # learns its scale, and a bias
    "lsuv": replace(SMALL, model=ModelConfig("doppelganger")),  # `lsuv` sets its k, which are buffers
}
WITH_WORKERS = {
    "adamw": configured(HeadConfig("L2Softmax"), name="adamw", lr=1e-3),
    "clip": configured(clip=1.0),
    "bf16": configured(precision="bf16", schedule="steps", milestones=(5, 9)),
    "fp16": configured(precision="fp16", cycle=3),
    "accumulation": configured(accumulation=2, schedule="constant"),
}
ROUNDED = configured(HeadConfig(compute_dtype="bf16"), ema=0.9)
ROUNDED_MAY_WARN = pytest.mark.filterwarnings("ignore:fastmargin. no torch.bfloat16:UserWarning")  # on some CPUs
EVERYTHING = configured(
    HeadConfig(sample_rate=0.3), name="adamw", lr=1e-3, accumulation=2, clip=1.0, precision="fp16", ema=0.9
)


@pytest.mark.parametrize(
    ("config", "factory", "stop", "workers"),
    [
        *(pytest.param(c, None, stop, 0, id=f"{name}-{stop}") for name, c in CONFIGS.items() for stop in (4, 7, 11)),
        *(pytest.param(config, None, 7, 2, id=name) for name, config in WITH_WORKERS.items()),
        pytest.param(ROUNDED, None, 7, 2, id="ema", marks=ROUNDED_MAY_WARN),
        pytest.param(configured(), "test_resume:dropping", 7, 2, id="dropout"),
        pytest.param(EVERYTHING, "test_resume:dropping", 7, 2, id="everything"),
    ],
)
def test_a_stopped_run_resumes_bit_for_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, config: TrainConfig, factory: str | None, stop: int, workers: int
) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train_loop(config, whole, factory)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stop_at(patch, stop)
        train_loop(config, parts, factory)
    torch.manual_seed(stop)  # a new process has another random state
    train_loop(replace(config, data=replace(config.data, workers=workers)), parts, factory)
    assert_same_end(whole, parts)
    assert records(parts) == records(whole)


def assert_same_end(one: Path, other: Path, step: int = 12) -> None:
    first, second = (checkpoint.load_latest(where / run_folder.CHECKPOINTS) for where in (one, other))
    assert first is not None and second is not None and first.step == second.step == step
    assert first.tensors.keys() == second.tensors.keys()
    for name, tensor in first.tensors.items():
        assert torch.equal(second.tensors[name], tensor), name
    assert first.state["scaler"] == second.state["scaler"]


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
    assert_same_end(whole, parts)
    assert records(parts) == records(whole)


def test_checkpoints_hold_whatever_a_step_changes(tmp_path: Path) -> None:
    """If a tensor were left out of the checkpoint, an exact resume would be luck: this test lists them."""
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
    newest = tmp_path / "parts" / "checkpoints" / "step-00000012" / checkpoint.tensors.TENSORS
    newest.write_bytes(newest.read_bytes()[:-1])
    train_loop(SMALL, tmp_path / "parts")
    assert "passed over a damaged checkpoint" in (said := capsys.readouterr().out) and str(newest) in said
    manifests = [tmp_path / r / "checkpoints/step-00000012" / checkpoint.store.MANIFEST for r in ("whole", "parts")]
    hashes = [json.loads(m.read_bytes())["body"]["files"] for m in manifests]
    assert hashes[0] == hashes[1]


def test_other_images_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train_loop(SMALL, tmp_path)
    monkeypatch.setattr(run, "load_data", lambda config, log: load_data(config, log, seed=1))
    with pytest.raises(ValueError, match="other images"):
        train_loop(SMALL, tmp_path)


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
    monkeypatch.setattr(run, "load_data", sources.load_data)  # as the child reads them
    monkeypatch.setattr(train, "finish", lambda *_: None)
    for where in (parts, whole):
        assert cli.main([*arguments, "--out", str(where)]) == 0
    assert_same_end(whole, parts, 100)
    assert records(parts) == records(whole)


def interrupted(arguments: list[str], records: Path, number: signal.Signals) -> tuple[str, int]:
    """Output and exit code of a process that gets the signal while it trains."""
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
