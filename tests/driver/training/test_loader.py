"""Batches: the same with any number of workers, prepared ahead but never too far, and what goes wrong in a thread."""

import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import get_args, get_type_hints

import numpy as np
import pytest
import torch
from samples import pictures, write_folder

from fastmargin.driver.config import DataConfig, OptimConfig, SamplerConfig, TrainConfig
from fastmargin.driver.data.augment_faces import augment_faces
from fastmargin.driver.data.augment_glyphs import augment, to_float
from fastmargin.driver.data.identities import Identities
from fastmargin.driver.data.sources import KINDS
from fastmargin.driver.training import loader, loop
from fastmargin.driver.training.run import Run, build

SMALL = TrainConfig(
    data=DataConfig(source="synthetic:30x6", size=16, holdout=0.3, augment="faces"),
    optim=OptimConfig(steps=9, batch_size=16, warmup=3, lr=0.05),
    sampler=SamplerConfig(counts=(2, 4), lag=3),
    dim=8,
)
MINING = replace(SMALL, sampler=replace(SMALL.sampler, name="doppelganger"))


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Batches of 16 are too small to split over threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(params=[SMALL, MINING], ids=["uniform", "doppelganger"])
def config(request: pytest.FixtureRequest) -> TrainConfig:
    return request.param


def with_workers(config: TrainConfig, workers: int) -> TrainConfig:
    return replace(config, data=replace(config.data, workers=workers))


def trained_on(config: TrainConfig) -> list[loader.Batch]:
    run = build(config, print)
    seen = []
    for batch in loader.batches(run.batch_source()):
        seen.append(batch)
        loop.train_step(run, *batch)
    return seen


@pytest.mark.parametrize("workers", [1, 2, 5])
def test_workers_change_no_bit(config: TrainConfig, workers: int) -> None:
    expected, got = trained_on(config), trained_on(with_workers(config, workers))
    assert len(got) == len(expected) == 9
    for one, other in zip(expected, got, strict=True):
        assert torch.equal(one.images, other.images) and torch.equal(one.labels, other.labels)


def test_a_batch_is_what_its_numbers_say(config: TrainConfig) -> None:
    run = build(config, print)
    (index, epoch), batch = (
        next(loader.indices_and_epochs(run.batch_source())),
        next(loader.batches(run.batch_source())),
    )
    assert torch.equal(batch.labels, run.train.labels[index])
    assert torch.equal(batch.images, augment_faces(run.train.images[index], index, epoch, config.seed))


def test_repeated_images_are_augmented_anew() -> None:
    run = build(MINING, print)
    drawn = set()
    for _ in range(5):
        index, epoch = next(loader.indices_and_epochs(run.batch_source()))
        loop.train_step(run, *next(loader.batches(run.batch_source())))
        drawn |= set(zip(index.tolist(), epoch.tolist(), strict=True))
    assert len(drawn) == 5 * MINING.optim.batch_size


def test_fewer_images_than_a_batch_are_visited_more_than_once() -> None:
    few = replace(SMALL, data=replace(SMALL.data, source="synthetic:8x2", holdout=0.4))
    run = build(few, print)
    assert len(run.train.images) < few.optim.batch_size
    index, epoch = next(loader.indices_and_epochs(run.batch_source()))
    assert len(set(zip(index.tolist(), epoch.tolist(), strict=True))) == 16 > len(set(index.tolist()))
    assert next(loader.batches(run.batch_source())).images.shape == (16, 3, 16, 16)


class Watched:
    """Images that count how many batches were asked for, and hold back those from `stop` on."""

    def __init__(self, stop: int) -> None:
        self.shape, self.stop, self.asked, self.threads = (200, 16, 16), stop, 0, set()
        self.reached, self.go_on, self.lock = threading.Event(), threading.Event(), threading.Lock()

    def __len__(self) -> int:
        return 200

    def __getitem__(self, index: np.ndarray) -> torch.Tensor:
        with self.lock:
            self.asked += 1
            self.threads.add(threading.current_thread())
            if self.asked == self.stop:
                self.reached.set()
        if self.asked >= self.stop:
            assert self.go_on.wait(30)
        return torch.zeros(len(index), 16, 16, dtype=torch.uint8)

    def checksums(self) -> np.ndarray:
        return np.zeros(200, np.uint32)


def watched(config: TrainConfig, stop: int) -> tuple[Run, Watched]:
    run, images = build(replace(config, data=replace(config.data, color="gray")), print), Watched(stop)
    run.train = Identities(images, run.train.labels, run.train.names)
    return run, images


@pytest.mark.parametrize(("config", "ahead"), [(SMALL, 4), (MINING, 2)], ids=["uniform", "doppelganger"])
def test_batches_are_prepared_ahead_but_not_too_far(config: TrainConfig, ahead: int) -> None:
    """Two workers prepare two batches each, and no more than the lag of 3 allows: one is being trained on."""
    run, images = watched(with_workers(config, 2), stop=1 + ahead)
    prepared = loader.batches(run.batch_source())
    next(prepared)
    assert images.reached.wait(30), "nothing is prepared while the first batch is trained on"
    images.go_on.set()
    prepared.close()
    assert images.asked == 1 + ahead and threading.current_thread() not in images.threads


def test_without_workers_nothing_is_prepared() -> None:
    run, images = watched(SMALL, stop=100)
    next(loader.batches(run.batch_source()))
    assert images.asked == 1 and images.threads == {threading.current_thread()}


def test_a_lag_of_one_leaves_nothing_to_prepare() -> None:
    one = replace(MINING, sampler=replace(MINING.sampler, lag=1))
    assert len(trained_on(with_workers(one, 2))) == 9


@pytest.mark.parametrize("workers", [0, 2])
def test_damage_is_raised_where_it_is_met(tmp_path: Path, workers: int) -> None:
    write_folder(tmp_path / "data", pictures(90), each=3)
    data = DataConfig(source=str(tmp_path / "data"), cache=str(tmp_path), size=20, workers=workers)
    config = replace(SMALL, data=data)
    build(config, print)
    (file,) = tmp_path.glob("packed-*")
    run = build(config, print)
    third = [index for index, _ in loader.indices_and_epochs(run.batch_source())][2]
    row = run.train.images.rows[third[0]]  # type: ignore[union-attr]
    content = bytearray(file.read_bytes())
    content[row * 20 * 20 * 3] ^= 1
    file.write_bytes(bytes(content))
    prepared = loader.batches(build(config, print).batch_source())
    before = threading.active_count()
    assert len(next(prepared).labels) == len(next(prepared).labels) == 16
    with pytest.raises(ValueError, match=f"image {row}, of .* is damaged"):
        next(prepared)
    assert threading.active_count() <= before


def test_workers_leave_the_number_of_threads_alone() -> None:
    torch.set_num_threads(before := 3)
    seen: list[int] = []
    trained_on(with_workers(SMALL, 2))
    fresh = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
    fresh.start()
    fresh.join()
    assert torch.get_num_threads() == before and seen == [before]


# Which augmentation


def test_every_set_that_can_be_asked_for_is_there() -> None:
    (names, _) = get_args(get_type_hints(DataConfig)["augment"])
    assert set(get_args(names)) == set(loader.AUGMENTS) >= {kind.augment for kind in KINDS.values()}
    images = torch.randint(0, 256, (2, 16, 16), dtype=torch.uint8)
    wanted = {"none": to_float(images)}
    wanted |= {"glyphs": augment(images, [0, 1], [0, 0], 5), "faces": augment_faces(images, [0, 1], [0, 0], 5)}
    for name, transform in loader.AUGMENTS.items():
        assert torch.equal(transform(images, np.array([0, 1]), np.array([0, 0]), 5), wanted[name])


def test_the_source_decides_unless_one_is_asked_for(tmp_path: Path) -> None:
    write_folder(tmp_path / "data", pictures(2), each=1)
    assert loader.augmentation(DataConfig()) == "glyphs"
    assert loader.augmentation(DataConfig(source="synthetic:3x2")) == "none"
    assert loader.augmentation(DataConfig(source=str(tmp_path / "data"))) == "faces"
    assert loader.augmentation(DataConfig(source=str(tmp_path / "data"), augment="none")) == "none"
