"""Runs that start from the weights of another: init_from."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from small_run import SMALL, load_data, records, small_data, stop_at, train_loop  # noqa: F401 (a fixture, too)
from test_terms import MML, with_terms

from fastmargin.driver.commands import evaluate, train
from fastmargin.driver.config import HeadConfig, TrainConfig
from fastmargin.driver.training import run, run_folder, state

pytestmark = pytest.mark.usefixtures("one_thread")

D = SMALL.dim
SCHEME_2 = with_terms(center={"weight": 0.01})
SCHEME_3 = with_terms(center={"weight": 0.01}, minimum_margin=MML)


def first_run(tmp_path: Path, config: TrainConfig = SCHEME_2) -> tuple[run.Run, str]:
    return train_loop(config, tmp_path / "first"), str(tmp_path / "first" / "checkpoints" / "step-00000012")


def started(config: TrainConfig, out: Path, monkeypatch: pytest.MonkeyPatch, log: Callable[[str], None]) -> run.Run:
    """A run of that configuration just before its first step."""
    held: list[run.Run] = []
    with monkeypatch.context() as patch:
        patch.setattr(train, "loop", lambda current, *_: held.append(current))
        patch.setattr(train, "finish", lambda *_: None)
        train.train(config, str(out), log)
    return held[0]


def test_scheme_3_starts_from_the_weights_of_scheme_2(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, path = first_run(tmp_path)
    said: list[str] = []
    fresh = started(replace(SCHEME_3, init_from=path), tmp_path / "second", monkeypatch, said.append)
    for part in ("model", "head", "terms"):
        ours, theirs = getattr(fresh, part).state_dict(), getattr(first, part).state_dict()
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours), part
    moved = run.trainable_parameters(fresh.model, fresh.head, fresh.terms)
    assert not any(moment.any() for moment in fresh.optimizers.tensors(moved).values())
    assert fresh.step == 0 and (fresh.table.classes == -1).all()
    assert any(f"weights of step 12 of {path}" in line for line in said)


def test_a_folder_of_a_run_stands_for_its_newest_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, path = first_run(tmp_path)
    said: list[str] = []
    fresh = started(replace(SMALL, init_from=str(tmp_path / "first")), tmp_path / "second", monkeypatch, said.append)
    assert torch.equal(fresh.head.weight, first.head.weight) and any(path in line for line in said)
    run_folder.claim(str(tmp_path / "new"), SMALL)
    with pytest.raises(ValueError, match=f"{tmp_path / 'new'} has no checkpoint yet"):
        state.start_from(fresh, tmp_path / "new", print)


def test_another_margin_takes_the_class_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """But not a plain layer's bias and scale, which it does not have."""
    plain = replace(SCHEME_2, head=HeadConfig("L2Softmax"))
    for one, other in ((plain, SCHEME_2), (SCHEME_2, plain)):
        shutil.rmtree(tmp_path / "first", ignore_errors=True)
        first, path = first_run(tmp_path, one)
        fresh = started(replace(other, init_from=path), tmp_path / one.head.margin, monkeypatch, print)
        assert torch.equal(fresh.head.weight, first.head.weight)


def test_other_images_take_the_network_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, path = first_run(tmp_path)
    monkeypatch.setattr(run, "load_data", lambda config, log: load_data(config, log, seed=1))
    said: list[str] = []
    fresh = started(replace(SCHEME_3, init_from=path), tmp_path / "second", monkeypatch, said.append)
    assert torch.equal(next(fresh.model.parameters()), next(first.model.parameters()))
    assert not torch.equal(fresh.head.weight, first.head.weight)
    assert fresh.terms.bank is not None and (fresh.terms.bank.centers == 0).all()
    assert any("head and terms start afresh" in line for line in said)


def test_a_run_that_began_goes_on_without_the_checkpoint_it_started_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, path = first_run(tmp_path)
    config = replace(SCHEME_3, init_from=path)
    whole = train.train(config, str(tmp_path / "whole"), print)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stop_at(patch, 6)
        train.train(config, str(tmp_path / "parts"), print)
    shutil.rmtree(tmp_path / "first")
    parts = train.train(config, str(tmp_path / "parts"), print)
    assert records(parts) == records(whole)
    evaluate.evaluate(parts, print)


def test_checkpoints_that_do_not_fit(tmp_path: Path) -> None:
    _, path = first_run(tmp_path)
    out = tmp_path / "second"
    with pytest.raises(ValueError, match="weights of another network, head or term"):
        train.train(replace(SCHEME_3, init_from=path, dim=2 * D), str(out), print)
    with pytest.raises(ValueError, match="absent"):
        train.train(replace(SCHEME_3, init_from=str(tmp_path / "absent")), str(out), print)
    assert not out.exists(), "a mistake leaves no folder behind"
