"""Faults on many processes, on one rank or on all; torchrun stopped, and started again with another N."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import free_port
from small_run import MINING, SMALL, configured, load_data, small_data  # noqa: F401 (a fixture, too)
from torch import Tensor, nn

from fastmargin import checkpoint
from fastmargin.driver.commands import cli, evaluate, train
from fastmargin.driver.config import HeadConfig, OptimConfig, TrainConfig
from fastmargin.driver.training import loader, loop, processes, run, run_folder, state
from fastmargin.files import locked

pytestmark = pytest.mark.usefixtures("one_thread")


def idle_part(dim: int, size: tuple[int, int], channels: int) -> nn.Module:
    """`test_torchrun_faults:idle_part`: has a weight that its output does not depend on."""
    network = nn.Sequential(nn.Flatten(), nn.Linear(channels * size[0] * size[1], dim))
    network.spare = nn.Parameter(torch.zeros(1))
    return network


def in_group(task: Callable[[processes.Processes], Any]) -> Any:
    run.load_data = load_data  # fixtures do not reach the ranks
    with processes.process_group() as ours:
        return task(ours)


def says(message: str, task: Callable[[processes.Processes], Any]) -> None:
    """Every rank raises the same error."""

    def refused(ours: processes.Processes) -> None:
        with pytest.raises((ValueError, OSError), match=message):
            task(ours)

    in_group(refused)


# ---------------------------------------------------------------------------------------------- what is not finite


def overflow(config: TrainConfig) -> None:
    """One class's gradient is infinite, on the rank that holds it."""

    def task(ours: processes.Processes) -> None:
        current = run.build(config, print, None, ours)
        optimizers = current.optimizers
        original, before = optimizers.backward, current.head.weight.detach().clone()

        def backward(loss: Tensor) -> None:
            original(loss)
            if ours.rank == 1 and current.step == 0:
                assert current.head.weight.grad is not None
                current.head.weight.grad[0] = torch.inf

        optimizers.backward = backward  # type: ignore[method-assign]
        for batch in zip(range(2), loader.batches(current.batch_source()), strict=False):
            loop.train_step(current, *batch[1])
            assert torch.equal(current.head.weight, before) == (current.step == 1), "no rank's classes move, then all"
            assert all(p.isfinite().all() for p in (current.head.weight, *current.model.parameters()))
            assert optimizers.scaler.get_scale() == 0.5 and optimizers.failed(), "on all ranks"

    in_group(task)


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_all_ranks_leave_out_a_step_that_one_cannot_make(ranks: Callable[..., list[Any]], name: str) -> None:
    ranks(3, overflow, configured(name=name, lr=1e-3, accumulation=2))


def diverging(out: Path, where: str) -> None:
    """A weight of the last rank's classes, or its loss, is not finite."""

    def task(ours: processes.Processes) -> None:
        current = run.build(SMALL, print, None, ours)
        out.mkdir(exist_ok=True)
        if where == "class" and ours.rank == ours.count - 1:
            current.head.weight.data[0] = torch.nan
        if where == "network":
            current.model[0][0].weight.data.fill_(torch.nan)
        loop.loop(current, out, print)

    says("training diverged by step 2", task)
    assert checkpoint.store.committed(out / run_folder.CHECKPOINTS) == []


@pytest.mark.parametrize("where", ["class", "network"])
def test_all_ranks_see_a_run_diverge(ranks: Callable[..., list[Any]], tmp_path: Path, where: str) -> None:
    ranks(2, diverging, tmp_path / "run", where)


# ---------------------------------------------------------------------------------------------- few classes, no rows


def few_classes(**optim: Any) -> int:
    def task(ours: processes.Processes) -> int:
        data = load_data(SMALL.data, None)[0]
        few = data.take((data.labels < 5).nonzero()[:, 0].numpy())
        run.load_data = lambda *_: (few, few)
        current = run.build(configured(HeadConfig(topk=2), **optim), print, None, ours)
        for _, batch in zip(range(3), loader.batches(current.batch_source()), strict=False):
            loop.train_step(current, *batch)
        assert not (current.table.classes == -1).all() and not current.optimizers.failed()
        return current.head.classes.count

    return in_group(task)


@pytest.mark.parametrize("task", [few_classes, partial(few_classes, clip=0.5)], ids=["in backward", "clip"])
def test_a_rank_may_hold_no_class(ranks: Callable[..., list[Any]], task: Callable[[], int]) -> None:
    assert ranks(4, task) == [2, 2, 1, 0]


# ---------------------------------------------------------------------------------------------- mistakes


def mistakes(out: Path) -> None:
    def built(**changes: Any) -> Callable[[processes.Processes], Any]:
        factory = changes.pop("factory", None)
        return lambda ours: run.build(replace(SMALL, **changes), print, factory, ours)

    small = OptimConfig(batch_size=8, accumulation=2, warmup=1)
    says(r"optim.batch_size is 8; want at least 2 for each of 3 processes, 12 in all", built(optim=small))
    says("the network makes no use of spare: freeze", built(factory="test_torchrun_faults:idle_part"))
    says("device is 'cuda'; want cpu: there is no GPU", built(device="cuda"))
    config = replace(SMALL, seed=1)
    says(f"{out} holds a run of another configuration", lambda ours: train.train(config, str(out), print))
    says("has no checkpoint yet", lambda ours: evaluate.evaluate(out, print))


def test_a_mistake_is_one_of_all_ranks(ranks: Callable[..., list[Any]], tmp_path: Path) -> None:
    run_folder.claim(str(tmp_path), SMALL)
    ranks(3, mistakes, tmp_path)


def test_another_run_in_the_folder_is_seen_by_all_ranks(ranks: Callable[..., list[Any]], tmp_path: Path) -> None:
    run_folder.claim(str(tmp_path), SMALL)
    with locked(tmp_path):
        ranks(2, locked_out, tmp_path)


def locked_out(out: Path) -> None:
    says("is in use by another run", lambda ours: train.train(SMALL, str(out), print))


def test_what_all_say_is_said_once(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    port = free_port()
    store = dist.TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)
    monkeypatch.setattr(processes, "ECHO", 0.2)
    for name, value in {
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RESTART_COUNT": "0",
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)

    def said(rank: int, *arguments: str) -> str:
        monkeypatch.setenv("RANK", str(rank))
        assert cli.main(arguments) == 2
        return capsys.readouterr().err

    assert said(1, "export", "run", "--out", "there").startswith(
        "fastmargin: rank 1: export runs in one process, not 2"
    )
    assert said(0, "train", "--dim", "0") == "fastmargin: dim is 0; want at least 1\n"
    assert said(1, "train", "--dim", "0") == ""
    assert said(1, "train", "--dim", "x").startswith("fastmargin: rank 1: ")
    for command in (["info"], ["doppelgangers", "run"], ["clean", "run", "--out", "there"]):
        assert "runs in one process" in said(0, *command)
    del store


# ---------------------------------------------------------------------------------------------- torchrun itself


def launch(count: int, out: Path, *more: str) -> subprocess.Popen[str]:
    options = {
        "data.source": "synthetic:30x8", "data.size": "16", "data.cache": str(out.parent / "cache"), "dim": "8",
        "optim.steps": "60", "optim.batch_size": "16", "log_every": "1", "save_every": "1000", "device": "cpu",
        "out": str(out),
    }  # fmt: skip
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
    arguments = ["train", *(part for name, value in options.items() for part in (f"--{name}", value)), *more]
    pipe, environment = subprocess.PIPE, {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [*torchrun, "-m", "fastmargin", *arguments]
    return subprocess.Popen(command, env=environment, stdout=pipe, stderr=subprocess.STDOUT, text=True)


def said_to_the_end(child: subprocess.Popen[str]) -> str:
    try:
        return child.communicate(timeout=120)[0]
    finally:
        child.terminate()


def test_torchrun_is_stopped_and_goes_on_with_another_number(tmp_path: Path) -> None:
    out = tmp_path / "run"
    child = launch(2, out)
    deadline = time.monotonic() + 60
    while child.poll() is None and not (out / run_folder.RECORDS).exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    child.send_signal(signal.SIGTERM)
    said = said_to_the_end(child)
    stopped = checkpoint.load_latest(out / run_folder.CHECKPOINTS)
    assert child.returncode == 1 and stopped is not None and 0 < stopped.step < 60, said  # torchrun's own code
    assert said.count(f"SIGTERM: stopped, with a checkpoint of step {stopped.step} of 60") == 1, said
    assert not run_folder.finished(out)
    child = launch(3, out)
    said = said_to_the_end(child)
    assert child.returncode == 0 and run_folder.finished(out), said
    assert said.count(f"checkpoint of step {stopped.step} of 60") == said.count("raw pixels") == 1, said
    machines = {record["machine"].rpartition(", ")[2] for record in run_folder.read_records(out)}
    assert machines == {"2 such processes", "3 such processes"}
    assert [record["step"] for record in run_folder.read_records(out)] == [*range(1, 61)]


def whole_run(out: Path | None) -> Path:
    config = replace(MINING, optim=replace(SMALL.optim, steps=30))
    return in_group(lambda ours: train.train(config, None if out is None else str(out), print))


def evaluated(out: Path) -> None:
    in_group(lambda ours: evaluate.evaluate(out, print))


def started_from(path: Path) -> Tensor:
    def task(ours: processes.Processes) -> Tensor:
        current = run.build(replace(SMALL, seed=5), print, None, ours)
        state.start_from(current, path, print)
        return current.head.weight.detach()

    return in_group(task)


def measured(out: Path) -> dict[str, dict[str, float]]:
    metrics = json.loads((out / run_folder.METRICS).read_bytes())
    return {of: {k: v for k, v in metrics[of].items() if v is not None} for of in ("model", "raw_pixels")}


def test_one_process_reads_what_many_have_written(
    ranks: Callable[..., list[Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And many processes what one has written."""
    out = tmp_path / "run"
    assert ranks(3, whole_run, out) == [out] * 3
    metrics = [measured(out)]
    assert {path.name for path in out.iterdir()} == {
        "checkpoints", "config.json", "lock", "metrics.json", "report", "train.jsonl"
    }  # fmt: skip
    evaluate.evaluate(out, print)
    metrics.append(measured(out))
    ranks(2, evaluated, out)
    metrics.append(measured(out))
    for other in metrics[1:]:
        assert other["model"] == pytest.approx(metrics[0]["model"], rel=1e-4)
        assert other["raw_pixels"] == metrics[0]["raw_pixels"]
    assert cli.main(["export", str(out), "--out", str(tmp_path / "exported")]) == 0
    (newest,) = checkpoint.store.committed(out / run_folder.CHECKPOINTS)[-1:]
    weights = torch.cat(ranks(2, started_from, newest))
    assert torch.equal(weights, checkpoint.load(newest).tensors["head/weight"])


def test_a_dated_folder_is_that_of_the_first(ranks: Callable[..., list[Any]], tmp_path: Path) -> None:
    one, other = ranks(2, dated, tmp_path)
    assert one == other and [path.name for path in (tmp_path / "runs").iterdir()] == [one.name]


def dated(here: Path) -> Path:
    before = Path.cwd()
    os.chdir(here)
    try:
        return whole_run(None)
    finally:
        os.chdir(before)
