"""Ranks that were started with other options, other images or another package: all of them raise, and say which."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

import pytest
import torch
from small_run import SMALL, configured, identities, load_data

from fastmargin.driver.commands import train
from fastmargin.driver.config import DataConfig, TermConfig, TrainConfig
from fastmargin.driver.data.identities import Identities
from fastmargin.driver.training import consistency, processes, run

pytestmark = pytest.mark.usefixtures("one_thread")

Reader = Callable[[DataConfig, object], tuple[Identities, Identities]]


def said_at_start(configs: list[TrainConfig], readers: list[Reader], hashes: list[str], outs: list[str]) -> str | None:
    """What this rank's error says, of ranks with these configurations, data, files and folders."""
    consistency.package_hash, before = (lambda: hashes[rank]), consistency.package_hash
    try:
        with processes.process_group() as ours:
            rank = ours.rank
            run.load_data = readers[rank]
            train.train(configs[rank], outs[rank], lambda _: None)
    except ValueError as error:
        return str(error)
    finally:
        consistency.package_hash = before
    return None


Start = Callable[..., set[str | None]]


@pytest.fixture
def start(ranks: Callable[..., list[Any]], tmp_path: Path) -> Start:
    """What all ranks say; only rank 1 differs, in what is given."""

    def run_ranks(config: TrainConfig = SMALL, read: Reader = load_data, files: str = "a", out: str = "run") -> Any:
        places = [str(tmp_path / name) for name in ("run", out, "run")]
        return set(
            ranks(3, said_at_start, [SMALL, config, SMALL], [load_data, read, load_data], ["a", files, "a"], places)
        )

    return run_ranks


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (configured(lr=0.06), "optim.lr is 0.05 on rank 0, 0.06 on rank 1: want one value"),
        (replace(SMALL, log_every=3), "log_every is 2 on rank 0, 3 on rank 1: want one value"),
        (replace(SMALL, data=replace(SMALL.data, holdout=0.2)), "data.holdout is 0.3 on rank 0, 0.2 on rank 1: "),
        (replace(SMALL, head=replace(SMALL.head, margin="CosFace")), "head.margin is 'ArcFace' on rank 0, 'CosFace"),
        (replace(SMALL, terms={"center": TermConfig()}), "terms is {} on rank 0, {'center': {"),
    ],
    ids=["lr", "log_every", "holdout", "margin", "terms"],
)  # fmt: skip
def test_another_configuration(start: Start, config: TrainConfig, said: str) -> None:
    (message,) = start(config)
    assert message is not None and message.startswith(said)


def test_each_machine_may_have_its_own_cache_and_workers(start: Start) -> None:
    assert start(replace(SMALL, data=replace(SMALL.data, workers=1, cache="there"))) == {None}


def test_another_package_and_another_folder(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    assert start(files="b") == {"the hash of fastmargin's files is 'a' on rank 0, 'b' on rank 1: want one value"}
    (message,) = start(out="other")
    assert message is not None and message.startswith("out is '") and "/other' on rank 1" in message


def altered(change: Callable[[Identities], Identities], config: DataConfig, _: object) -> tuple[Identities, Identities]:
    train_images, test = load_data(config, None)
    return change(train_images), test


def one_pixel(data: Identities) -> Identities:
    """Of the last image: in this small set all are compared."""
    images = data.images.clone()  # type: ignore[union-attr]
    images[-1, 0, 0] ^= 1
    return replace(data, images=images)


def swapped(data: Identities) -> Identities:
    labels = data.labels.clone()
    labels[0], labels[-1] = data.labels[-1], data.labels[0]
    return replace(data, labels=labels)


def renamed(data: Identities) -> Identities:
    return replace(data, names=[*data.names[:-1], "other"])


def fewer(data: Identities) -> Identities:
    return data.take(torch.arange(len(data.labels) - 1).numpy())


def test_other_data(start: Start) -> None:
    count = len(load_data(SMALL.data, None)[0].labels)
    for change, said in {
        one_pixel: f"image {count - 1} of those trained on is '",
        swapped: "hash of the identity numbers of the data trained on is '",
        renamed: "hash of the names of the data trained on is '",
        fewer: f"shape of the data trained on is ({count}, 16, 16) on rank 0, ({count - 1}, 16, 16) on rank 1",
    }.items():
        (message,) = start(read=partial(altered, change))
        assert message is not None and message.startswith(said)


def test_images_are_drawn_by_the_seed() -> None:
    data = identities()
    many = replace(data, images=data.images.repeat(9, 1, 1), labels=data.labels.repeat(9))  # type: ignore[union-attr]
    drawn = [[row for row, _ in consistency.probes(many, seed)] for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2] and len(set(drawn[0])) == consistency.PROBES
    assert consistency.probes(data.take(torch.arange(0).numpy()), 0) == []


def hash_of(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> str:
    """Of packages in these folders."""
    specs = {name: ModuleSpec(name, None, is_package=True) for name in folders}
    for name, spec in specs.items():
        spec.submodule_search_locations = [str(folders[name])]
    monkeypatch.setattr(consistency, "find_spec", specs.__getitem__)
    return consistency.package_hash()


def test_the_hash_is_of_every_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package, kernels = tmp_path / "fastmargin", tmp_path / "kernels"
    kernels.mkdir()
    hashes = []
    for name, text in (("a.py", ""), ("a.py", "x"), ("b/c.py", "x"), ("b/c.txt", "x"), ("../kernels/d.py", "y")):
        (package / name).parent.mkdir(parents=True, exist_ok=True)
        (package / name).write_text(text)
        hashes.append(hash_of({"fastmargin": package, "fastmargin.kernels": kernels}, monkeypatch))
    assert len(set(hashes)) == 4 and hashes[2] == hashes[3] and all(len(digits) == 8 for digits in hashes)
    kernels.rename(package / "kernels")  # as a wheel is installed
    assert hash_of({"fastmargin": package, "fastmargin.kernels": package / "kernels"}, monkeypatch) == hashes[-1]
