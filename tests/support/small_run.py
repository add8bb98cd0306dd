"""A small run on synthetic data, for the tests of the driver; importing its fixtures puts them to use."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from fastmargin.driver.config import DataConfig, HeadConfig, OptimConfig, SamplerConfig, TrainConfig
from fastmargin.driver.data.identities import Identities
from fastmargin.driver.data.sources.glyphs import first_code_point
from fastmargin.driver.training import loader, loop, run, run_folder, state

CLASSES, IMAGES, SIDE = 30, 8, 16
OPTIM = dict(steps=12, batch_size=16, warmup=3, lr=0.05)
SMALL = TrainConfig(
    data=DataConfig(size=SIDE, holdout=0.3),
    optim=OptimConfig(**OPTIM),
    sampler=SamplerConfig(counts=(2, 4), lag=3),
    dim=8,
    log_every=2,
    save_every=4,
)
MINING = replace(SMALL, sampler=replace(SMALL.sampler, name="doppelganger"))


def configured(head: HeadConfig = SMALL.head, **optim: Any) -> TrainConfig:
    return replace(SMALL, head=head, optim=OptimConfig(**{**OPTIM, **optim}))


def identities(seed: int = 0) -> Identities:
    """Each identity is a pattern of its own; its images are noisy copies."""
    generator = torch.Generator().manual_seed(seed)
    pattern = torch.randint(0, 200, (CLASSES, 1, SIDE, SIDE), generator=generator)
    noise = torch.randint(0, 56, (CLASSES, IMAGES, SIDE, SIDE), generator=generator)
    labels = torch.arange(CLASSES).repeat_interleave(IMAGES)
    return Identities((pattern + noise).flatten(0, 1).byte(), labels, [chr(0x391 + i) for i in range(CLASSES)])


def load_data(config: DataConfig, _: object, seed: int = 0) -> tuple[Identities, Identities]:
    return identities(seed).split(config.holdout, config.split_seed, first_code_point)


@pytest.fixture(autouse=True)
def small_data(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "load_data", load_data)


def train_loop(config: TrainConfig, out: Path, factory: str | None = None) -> run.Run:
    """Training alone, without evaluation and report."""
    current = run.build(config, print, factory)
    where = run_folder.claim(str(out), config)
    state.resume(current, where, print)
    loop.loop(current, where, print)
    return current


def pixels(dim: int, size: tuple[int, int], channels: int) -> nn.Module:
    """A network of a user's own, "small_run:pixels": no random numbers in a pass, and rows do not interact."""
    height, width = size
    return nn.Sequential(nn.Flatten(), nn.Linear(channels * height * width, dim))


def batches(current: run.Run, steps: int) -> Iterator[loader.Batch]:
    return (batch for batch, _ in zip(loader.batches(current.batch_source()), range(steps), strict=False))


def stop_at(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    original = loop.train_step

    def train_step(current: run.Run, *batch: object) -> object:
        if current.step == step:
            raise KeyboardInterrupt
        return original(current, *batch)  # type: ignore[arg-type]

    monkeypatch.setattr(loop, "train_step", train_step)


def records(where: Path) -> list[dict[str, float]]:
    """Without what the clock says."""
    clock = ("images_per_second", "seconds")
    return [{k: v for k, v in r.items() if k not in clock} for r in run_folder.read_records(where)]
