"""Training on files through the command line, with the path and otherwise only options that make it quick."""

import json
from pathlib import Path

import numpy as np
import pytest
from samples import pictures, write_folder, write_idx, write_insightface

from fastmargin.driver.commands import cli
from fastmargin.driver.config import OptimConfig, TrainConfig, settled
from fastmargin.driver.training import run_folder


@pytest.fixture
def photographs(tmp_path: Path) -> Path:
    """11 people with 3 photographs each, except three of them, who have one."""
    names = write_folder(tmp_path / "people", pictures(33), each=3, kind="JPEG")
    for name in names[::4]:
        for path in sorted((tmp_path / "people" / name).iterdir())[1:]:
            path.unlink()
    return tmp_path / "people"


def train(source: Path, *options: str) -> int:
    where = source.parent
    quick = ["--optim.steps", "2", "--data.cache", str(where / "cache"), "--out", str(where / "run")]
    return cli.main(["train", "--data.source", str(source), *quick, *options])


def metrics(source: Path) -> dict[str, float]:
    return json.loads((source.parent / "run" / run_folder.METRICS).read_bytes())["model"]


def test_a_folder_of_photographs(photographs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Fewer images than a batch has: they are visited more than once."""
    assert train(photographs) == 0
    said = capsys.readouterr().out
    assert "27 images of 11 identities at 112 x 112, rgb" in said
    assert "112 x 112 x 3, augmentation faces" in said
    assert metrics(photographs)["identities"] >= 2 and metrics(photographs)["genuine_pairs"] >= 2
    assert (photographs.parent / "run" / run_folder.REPORT / "doppelgangers.png").exists()


def test_workers_and_cache_may_change_when_a_run_resumes_and_nothing_else(
    photographs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(photographs, "--optim.batch_size", "8", "--data.size", "16") == 0
    assert train(photographs, "--optim.batch_size", "8", "--data.size", "16", "--data.workers", "2") == 0
    assert "finished" in capsys.readouterr().out
    assert train(photographs, "--optim.batch_size", "8", "--data.size", "18") == cli.MISTAKE
    assert "data.size 16 there, 18 here" in capsys.readouterr().err


def test_the_number_of_images_decides_how_many_steps_of_how_many(
    photographs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    optim = [settled(TrainConfig(), images).optim for images in (300, 19_157, 4_999, 5_000, 1_000_000)]
    assert [(o.steps, o.batch_size) for o in optim] == [(800, 64), (1600, 256), (1563, 64), (1600, 256), (78_125, 256)]
    given = OptimConfig(steps=7, batch_size=6)
    assert settled(TrainConfig(optim=given), 300).optim == given
    assert train(photographs, "--data.size", "16") == 0
    assert "2 steps of 64 images" in capsys.readouterr().out
    assert run_folder.read_config(photographs.parent / "run").optim.batch_size == 64
    assert train(photographs, "--data.size", "16") == 0, "what is left open agrees with what was decided"
    assert train(photographs, "--data.size", "16", "--optim.batch_size", "32") == cli.MISTAKE


def test_records_and_digits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_insightface(tmp_path / "train.rec", pictures(30, side=112), [n // 3 for n in range(30)], kind="JPEG")
    assert train(tmp_path / "train.rec", "--optim.batch_size", "8") == 0
    assert "112 x 112 x 3, augmentation faces" in capsys.readouterr().out
    (tmp_path / "mnist").mkdir()
    write_idx(tmp_path / "mnist/t-images-idx3-ubyte", pictures(50, side=28, colored=False))
    write_idx(tmp_path / "mnist/t-labels-idx1-ubyte", np.arange(50, dtype=np.uint8) % 10)
    assert train(tmp_path / "mnist/t-images-idx3-ubyte", "--optim.batch_size", "8") == 0
    assert "28 x 28, augmentation glyphs" in capsys.readouterr().out
    assert metrics(tmp_path / "mnist/t-images-idx3-ubyte")["identities"] == 2


def test_a_mistake_is_one_line_and_leaves_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train(tmp_path / "absent") == cli.MISTAKE
    (tmp_path / "data/a").mkdir(parents=True)
    assert train(tmp_path / "data") == cli.MISTAKE
    (tmp_path / "data/a/a.png").write_bytes(b"no picture")
    assert train(tmp_path / "data") == cli.MISTAKE
    said = capsys.readouterr().err.splitlines()
    assert [line.startswith("fastmargin: ") for line in said] == [True] * 3
    assert "no such file or folder" in said[0] and "no folder with images" in said[1] and "a.png" in said[2]
    assert not (tmp_path / "run").exists()
