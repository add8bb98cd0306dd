"""`fastmargin embed`: rows that can be traced to their images, and what `evaluate` makes of the file."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from samples import pictures, write_folder, write_tensors
from test_clean import run_of

from fastmargin.driver.commands import cli, embed
from fastmargin.driver.data.sources import load_data
from fastmargin.driver.training import backbone, run_folder

pytestmark = pytest.mark.usefixtures("one_thread")

COUNT, EACH, SIDE = 12, 3, 16
MODEL = "test_clean:pixels"


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run whose network returns the pixels of an image."""
    write_folder(tmp_path / "people", pictures(COUNT, SIDE, colored=False), EACH)
    return run_of(tmp_path, tmp_path / "people")


def read(path: Path) -> tuple[torch.Tensor, torch.Tensor, list[str], list[str]]:
    """Embeddings, labels, titles and names."""
    with safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in ("embeddings", "labels", "titles")}
        names = json.loads(file.metadata()["names"])
    return tensors["embeddings"], tensors["labels"], json.loads(bytes(tensors["titles"].tolist())), names


@pytest.mark.parametrize("block", [5, 512])
@pytest.mark.parametrize("given", [None, "others"])
def test_every_image_by_its_title(run: Path, monkeypatch: pytest.MonkeyPatch, block: int, given: str | None) -> None:
    """Also of identities held out; another source is read in the size and color of the run's."""
    monkeypatch.setattr(backbone, "EMBED", block)
    root, out = run.parent / (given or "people"), run.parent / "x.safetensors"
    shown = pictures(COUNT, SIDE, colored=False, seed=int(given is not None))
    if given is not None:
        write_folder(root, np.stack([shown] * 3, axis=-1), EACH)
    embed.embed(run, None if given is None else str(root), out, print, MODEL)
    embeddings, labels, titles, names = read(out)
    torch.testing.assert_close(embeddings, torch.from_numpy(shown).flatten(1) / 255)
    assert labels.tolist() == [n // EACH for n in range(COUNT)] and names == [f"id{n:02}" for n in range(COUNT // EACH)]
    assert titles == [str(root / f"id{n // EACH:02}/{n:04}.png") for n in range(COUNT)]
    assert [path.name for path in run.parent.glob("x.*")] == [out.name], "no draft is left"


def test_evaluate_takes_it_with_a_list_of_pairs(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, pairs = run.parent / "x.safetensors", run.parent / "pairs.txt"
    embed.embed(run, None, out, print, MODEL)
    pairs.write_text("2 1\nid00 0 2\nid00 1 id01 4\nid03 10 9\nid02 6 id03 9\n")
    every = ["--identities", "all"]
    assert cli.main(["evaluate", str(out), *every]) == 0
    assert cli.main(["evaluate", str(out), *every, "--pairs", str(pairs)]) == 0
    said = capsys.readouterr().out
    assert "12 images of 4 identities, 256 numbers each" in said and "4 identities, 12 images" in said
    assert "4 pairs of" in said


@pytest.mark.parametrize("given", ["null", "the same", "others"])
def test_the_identities_held_out_are_marked(run: Path, given: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Only of the run's own data is it known what was trained on."""
    root, out = run.parent / "people", run.parent / "x.safetensors"
    write_folder(run.parent / "others", pictures(COUNT, SIDE, colored=False), EACH)
    source = {"null": None, "the same": f"{root}/../people", "others": str(run.parent / "others")}[given]
    embed.embed(run, source, out, print, MODEL)
    with safe_open(out, "pt") as file:
        marks = file.get_tensor("held_out") if "held_out" in file.keys() else None
        names = [json.loads(file.metadata()["names"])[label] for label in file.get_tensor("labels")]
    if given == "others":
        assert marks is None
        return
    train, test = load_data(run_folder.read_config(run).data, print)
    assert marks is not None and marks.dtype == torch.int8
    assert {name for name, mark in zip(names, marks, strict=True) if mark} == set(test.names)
    assert {name for name, mark in zip(names, marks, strict=True) if not mark} == set(train.names)
    capsys.readouterr()
    assert cli.main(["evaluate", str(out)]) == 0
    assert f"{test.num_classes} identities, {len(test.labels)} images" in capsys.readouterr().out


def test_a_file_has_the_mode_of_any_new_file(run: Path) -> None:
    before = os.umask(0o027)
    try:
        embed.embed(run, None, run.parent / "x.safetensors", print, MODEL)
    finally:
        os.umask(before)
    assert (run.parent / "x.safetensors").stat().st_mode & 0o777 == 0o640


def test_a_file_name_that_is_not_utf8_comes_back(run: Path) -> None:
    strange = os.fsencode(run.parent / "people/id00") + b"/\xff.png"
    os.rename(run.parent / "people/id00/0002.png", strange)
    embed.embed(run, None, run.parent / "x.safetensors", print, MODEL)
    assert strange in map(os.fsencode, read(run.parent / "x.safetensors")[2])


def test_mistakes_leave_the_file_as_it_was(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "x.safetensors"
    out.write_text("precious")

    def refused(match: str, where: Path = run, source: str | None = None, out: Path = out, model: str = MODEL) -> None:
        with pytest.raises(ValueError, match=match):
            embed.embed(where, source, out, print, model)

    refused("'absent'.*no such file or folder", source="absent")
    refused("the run's network is test_clean:pixels; here it is cnn", model="cnn")
    refused("want the name of a file, in a folder that is there", out=tmp_path)
    refused("want the name of a file, in a folder that is there", out=tmp_path / "none/x.safetensors")
    undefined = run_of(tmp_path / "other", tmp_path / "people", "test_clean:undefined")
    refused(r"not finite, the first of .*id00/0000\.png", undefined, model="test_clean:undefined")
    write_tensors(tmp_path / "wide", np.zeros((4, 16, 20), np.uint8), np.arange(4))
    wide = run_of(tmp_path / "wide-run", tmp_path / "wide", shape=(1, 16, 20))
    refused("people: images are 1 x 16 x 16; want 1 x 16 x 20", wide, str(tmp_path / "people"))
    assert out.read_text() == "precious" and not list(tmp_path.glob("*.tmp"))
