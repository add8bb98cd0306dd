"""A run on many processes: same steps as on one, equal tables, one set of files, exact resume, signals, one mistake."""

import os
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from small_run import MINING, SMALL, configured, load_data, records, small_data  # noqa: F401 (a fixture, too)
from torch import Tensor, nn

from fastmargin import checkpoint
from fastmargin.driver.config import HeadConfig, TermConfig, TrainConfig
from fastmargin.driver.training import loop, processes, run, run_folder, signals, state

pytestmark = pytest.mark.usefixtures("one_thread")


def plain(dim: int, size: tuple[int, int], channels: int) -> nn.Module:
    """`test_torchrun:plain`: without batch norm, whose statistics differ between ranks."""
    flat = channels * size[0] * size[1]
    return nn.Sequential(nn.Flatten(), nn.Linear(flat, 32), nn.PReLU(32), nn.Linear(32, dim))


def dropping(dim: int, size: tuple[int, int], channels: int) -> nn.Module:
    """`test_torchrun:dropping`: with dropout and running statistics."""
    flat = channels * size[0] * size[1]
    return nn.Sequential(nn.Flatten(), nn.Linear(flat, 32), nn.BatchNorm1d(32), nn.Dropout(0.3), nn.Linear(32, dim))


def trained(config: TrainConfig, out: Path, factory: str | None = "test_torchrun:plain", stop: int = 0) -> Any:
    """Trains in this process, or as one of the ranks; after `stop` steps one of them notes a signal.

    Returns the table, weights, and replicated buffers of this process.
    """
    run.load_data, original = load_data, loop.train_step  # fixtures do not reach the ranks

    def train_step(current: run.Run, *batch: Tensor) -> object:
        if current.step == stop - 1 and current.processes.rank == current.processes.count - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(current, *batch)

    loop.train_step = train_step  # type: ignore[assignment]
    try:
        with processes.process_group() as ours:
            current = run.build(config, print, factory, ours)
            where = ours.by_first(lambda: run_folder.claim(str(out), config))
            state.resume(current, where, print)
            loop.loop(current, where, print)
    except signals.Stopped as stopped:
        assert stopped.code == 143 and current.step == stop
    finally:
        loop.train_step = original
    moved = run.trainable_parameters(current.model, current.head, current.terms)
    shared = {name: p.detach() for name, p in moved.items() if name != "head.weight"}
    if current.average is not None:
        shared |= dict(current.average.named_parameters(prefix="average"))
    if current.terms.bank is not None:
        shared["centers"] = current.terms.bank.centers
    return {**current.table.state_dict(), **shared}, current.optimizers.scaler.state_dict(), current.head.class_range


def assert_equal_on_all_ranks(all_ranks: list[Any]) -> None:
    """Bit for bit."""
    (tensors, scaler, _), *others = all_ranks
    assert not (tensors["classes"] == -1).all()
    for theirs, scaler_there, _ in others:
        assert scaler == scaler_there
        assert tensors.keys() == theirs.keys() and all(torch.equal(theirs[name], t) for name, t in tensors.items())
    assert [lo for _, _, (lo, _) in all_ranks[1:]] == [hi for _, _, (_, hi) in all_ranks[:-1]], "parts of the classes"


def saved_tensors(where: Path, step: int = 12) -> dict[str, Tensor]:
    saved = checkpoint.load_latest(where / run_folder.CHECKPOINTS)
    assert saved is not None and saved.step == step
    return {name: t.sort()[0] if name.startswith("cosines/") else t for name, t in saved.tensors.items()}


def assert_close_runs(one: Path, other: Path) -> None:
    """Up to rounding: tables, records and trained weights."""
    expected, got = saved_tensors(one), saved_tensors(other)
    assert expected.keys() == got.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(got[name], tensor, rtol=1e-3, atol=2e-5, msg=lambda m, n=name: f"{n}: {m}")
    lines, others = records(one), records(other)
    for line, theirs in zip(lines, others, strict=True):
        assert line.keys() == theirs.keys() and line["step"] == theirs["step"]
        for name in ("loss", "target_score", "lr", "confusable_batches", "list_turnover"):
            assert theirs[name] == pytest.approx(line[name], rel=1e-4), name
        assert theirs["terms"] == pytest.approx(line["terms"], rel=1e-4)
        assert theirs.get("objective", 0) == pytest.approx(line.get("objective", 0), rel=1e-4)


BANKED = {
    "center": TermConfig(0.01, {"reduction": "sum", "update": "ema"}),
    "minimum_margin": TermConfig(0.1, {"margin": 3.0}),
}
ALIKE = {
    "uniform": SMALL,
    "doppelganger": MINING,
    "adamw": configured(HeadConfig("L2Softmax", topk=3), name="adamw", lr=1e-3),
    "accumulation": configured(accumulation=2),
    "clip": configured(clip=0.5, ema=0.9),
    "sampled": configured(HeadConfig("AdaFace", sample_rate=0.3)),
    "terms": replace(configured(lr=1e-3), terms=BANKED),
    "everything": replace(
        MINING,
        optim=configured(name="adamw", lr=1e-3, accumulation=2, clip=1.0, batch_size=26).optim,
        terms={"center": TermConfig(0.1)},
    ),
}


@pytest.mark.parametrize("name", ALIKE)
@pytest.mark.parametrize("count", [2, 3])
def test_ranks_take_the_steps_of_one_process(
    ranks: Callable[..., list[Any]], tmp_path: Path, name: str, count: int
) -> None:
    """Three ranks have batches of 6, 5 and 5 rows."""
    trained(ALIKE[name], tmp_path / "one")
    assert_equal_on_all_ranks(ranks(count, trained, ALIKE[name], tmp_path / "many"))
    assert_close_runs(tmp_path / "one", tmp_path / "many")


# ---------------------------------------------------------------------------------------------- 2n = n + n

DRAWING = replace(
    configured(HeadConfig("ElasticFace"), ema=0.9),
    sampler=MINING.sampler,
    terms={
        "margin_based": TermConfig(0.1),
        "minimum_margin": TermConfig(0.1, {"route": "centers", "margin": 0.1}),
        "git": TermConfig(0.01),
    },
)
EXACT = {
    "uniform": SMALL,
    "drawing": DRAWING,
    "parts": configured(HeadConfig(sample_rate=0.3), name="adamw", lr=1e-3, accumulation=2, clip=1.0, precision="fp16"),
}


@pytest.mark.parametrize("name", EXACT)
@pytest.mark.parametrize("count", [2, 3])
def test_a_stop_changes_no_bit_on_as_many_ranks(
    ranks: Callable[..., list[Any]], tmp_path: Path, name: str, count: int
) -> None:
    """A signal to one rank stops all, between two checkpoints."""
    factory = None if name == "uniform" else "test_torchrun:dropping"
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert_equal_on_all_ranks(ranks(count, trained, EXACT[name], whole, factory))
    ranks(count, trained, EXACT[name], parts, factory, 6)
    saved_tensors(parts, step=6)
    assert_equal_on_all_ranks(ranks(count, trained, EXACT[name], parts, factory))
    expected, got = (checkpoint.load_latest(where / run_folder.CHECKPOINTS) for where in (whole, parts))
    assert expected is not None and got is not None and got.step == expected.step == 12
    assert expected.tensors.keys() == got.tensors.keys() and expected.state["scaler"] == got.state["scaler"]
    for name, tensor in expected.tensors.items():
        assert torch.equal(got.tensors[name], tensor), name
    assert records(parts) == records(whole)


def test_any_number_of_ranks_goes_on(ranks: Callable[..., list[Any]], tmp_path: Path) -> None:
    for name in ("everything", "sampled"):
        whole, parts = tmp_path / f"{name} whole", tmp_path / f"{name} parts"
        ranks(2, trained, ALIKE[name], whole)
        ranks(2, trained, ALIKE[name], parts, "test_torchrun:plain", 2)
        trained(ALIKE[name], parts, stop=6)
        ranks(3, trained, ALIKE[name], parts, "test_torchrun:plain", 10)
        ranks(2, trained, ALIKE[name], parts)
        assert_close_runs(whole, parts)
