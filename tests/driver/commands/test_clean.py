"""`fastmargin clean` against brute force in float64, on photographs whose embeddings are their pixels."""

import csv
import json
import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from samples import encoded, write_folder, write_tensors
from torch import nn

from fastmargin import checkpoint
from fastmargin.driver.commands import clean, cli
from fastmargin.driver.config import CleanConfig, DataConfig, TrainConfig
from fastmargin.driver.log import UNSAFE
from fastmargin.driver.training import run_folder

pytestmark = pytest.mark.usefixtures("one_thread")

SIDE, EACH, PEOPLE = 16, 4, 9
MODEL = "test_clean:pixels"


def pixels(dim: int, size: tuple[int, int], channels: int) -> nn.Module:
    return nn.Flatten()


def undefined(dim: int, size: tuple[int, int], channels: int) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Threshold(2.0, math.nan))


def people(seed: int = 0) -> np.ndarray:  # [PEOPLE * EACH, SIDE, SIDE] uint8
    """Each person is a pattern with noise. Person 5 is person 2 again; the third image of person 0 shows person 3."""
    generator = np.random.default_rng(seed)
    patterns = generator.integers(0, 200, (PEOPLE, SIDE, SIDE)) * (generator.random((PEOPLE, SIDE, SIDE)) < 0.2)
    patterns[5] = patterns[2]
    shown = patterns.repeat(EACH, axis=0)
    shown[2] = patterns[3]
    return (shown + generator.integers(0, 50, shown.shape)).astype(np.uint8)


def truth(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:  # [C, d] centers, [N] cosines, float64
    rows = images.reshape(len(images), -1) / 255
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    centers = rows.reshape(-1, EACH, rows.shape[1]).sum(1)
    centers /= np.linalg.norm(centers, axis=1, keepdims=True)
    return centers, (rows * centers.repeat(EACH, axis=0)).sum(1)


def run_of(where: Path, source: Path, factory: str = MODEL, shape: tuple[int, int, int] = (1, SIDE, SIDE)) -> Path:
    data = DataConfig(source=str(source), size=None if shape[1] != shape[2] else SIDE, cache=str(where / "cache"))
    run_folder.claim(str(where / "run"), TrainConfig(data=data, dim=shape[1] * shape[2]))
    state = {"factory": factory, "input": [*shape]}
    checkpoint.save(where / "run" / run_folder.CHECKPOINTS, 7, {"head/weight": torch.ones(1)}, state)
    return where / "run"


@pytest.fixture
def run(tmp_path: Path) -> Path:
    write_folder(tmp_path / "people", people(), EACH)
    return run_of(tmp_path, tmp_path / "people")


def read(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def all_pairs(rows: np.ndarray, centers: np.ndarray, above: float) -> set[tuple[int, int]]:
    return set(zip(*(part.tolist() for part in np.nonzero(rows @ centers.T >= above)), strict=True))


@pytest.mark.parametrize("block", [5, 4096])
def test_images_are_ranked_in_their_identity_worst_first(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], block: int
) -> None:
    """Also those of identities that the run held out."""
    monkeypatch.setattr(clean, "BLOCK", block)
    out = run.parent / "out"
    clean.clean(run, out, CleanConfig(below=0.75, limit=2), print, MODEL)
    images = people()
    _, cosines = truth(images)
    files = [str(run.parent / f"people/id{n // EACH:02}/{n:04}.png") for n in range(len(images))]
    order = sorted(range(len(images)), key=lambda n: (n // EACH, cosines[n]))
    rows = read(out / "images.csv")
    assert [row["image"] for row in rows] == [files[n] for n in order]
    assert [float(row["cosine"]) for row in rows] == pytest.approx([cosines[n] for n in order], abs=2e-6)
    assert [row["rank"] for row in rows] == ["1", "2", "3", "4"] * PEOPLE
    assert {(row["name"], row["images"]) for row in rows} == {(f"id{c:02}", str(EACH)) for c in range(PEOPLE)}
    removed = [files[n] for n in cosines.argsort() if cosines[n] < 0.75]
    assert removed == [files[2]], "the one that is of somebody else"
    assert (out / "remove.txt").read_text().splitlines() == removed
    said = capsys.readouterr().out
    assert f"{cosines[2]:8.3f}  id00  {files[2]}" in said and "below 0.75: 1 images of 1 identities, 0 of which" in said
    assert said.count(".png") == 2
    one, twentieth, half = np.quantile(cosines, [0.01, 0.05, 0.5])
    assert f"below {one:.3f} for 1%, {twentieth:.3f} for 5%, {half:.3f} for 50%; the worst:" in said


def test_a_file_name_that_is_not_utf8_comes_out_byte_for_byte(run: Path) -> None:
    strange = os.fsencode(run.parent / "people/id00") + b"/\xff, 2.png"
    os.rename(run.parent / "people/id00/0002.png", strange)
    clean.clean(run, run.parent / "out", CleanConfig(below=0.75), cli.log, MODEL)
    assert (run.parent / "out/remove.txt").read_bytes() == strange + b"\n"
    assert b'"' + strange + b'"' in (run.parent / "out/images.csv").read_bytes()


def test_file_names_are_escaped_for_each_reader(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Line breaks and bidirectional controls in lines and on the terminal, formulas in spreadsheets."""
    data = run.parent / "people"
    strange = ["evil\nother", "a\rb", "\u202egnp.exe", "\x1b[2J"]
    for number, name in enumerate(strange):
        (data / f"id00/{number:04}.png").rename(data / f"id00/{name}.png")
    for number, name in enumerate(("=cmd|calc", "+1 2", "-x", "@sum", "-12", "'=x", "two\nlines")):
        (data / f"id{number + 1:02}").rename(data / name)
    out = run.parent / "out"
    clean.clean(run, out, CleanConfig(below=1.0, above=-1.0, limit=PEOPLE * EACH), cli.log, MODEL)
    paths = {str(path) for path in data.rglob("*.png")}
    removed = (out / "remove.txt").read_bytes().decode().removesuffix("\n").split("\n")
    assert {json.loads(line) if line.startswith('"') else line for line in removed} == paths
    assert not any(UNSAFE.search(line) for line in removed)
    rows = read(out / "images.csv")
    assert {row["image"] for row in rows} == paths
    given = {row["name"] for row in rows}
    assert given == {"id00", "'=cmd|calc", "'+1 2", "'-x", "'@sum", "-12", "''=x", "two\nlines", "id08"}
    assert {row["other"] for row in read(out / "pairs.csv")} <= given
    assert run_folder.inert("-0.250000") == "-0.250000", "numbers stay numbers"
    said = capsys.readouterr().out
    assert not any(UNSAFE.search(line) for line in said.split("\n"))
    assert r"evil\nother" in said and r"\u202egnp.exe" in said and r" two\nlines" in said


def test_pairs_and_overlap(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    others = np.concatenate([people(1)[:8], people()[16:20]])
    write_folder(run.parent / "test", others, EACH)
    out = run.parent / "out"
    clean.clean(run, out, CleanConfig(above=0.9, against=str(run.parent / "test")), print, MODEL)
    ours, theirs = truth(people())[0], truth(others)[0]
    pairs, overlap = read(out / "pairs.csv"), read(out / "overlap.csv")
    assert [(row["name"], row["other"]) for row in pairs] == [("id02", "id05")]
    assert float(pairs[0]["cosine"]) == pytest.approx(ours[2] @ ours[5], abs=2e-6)
    assert [(row["name"], row["other"], row["other_images"]) for row in overlap] == [("id04", "id02", str(EACH))]
    assert float(overlap[0]["cosine"]) == pytest.approx(ours[4] @ theirs[2], abs=2e-6)
    assert not (out / "remove.txt").exists(), "without a threshold nothing is listed for removal"
    assert "id02 / id05  (4 and 4 images)" in (said := capsys.readouterr().out) and "id04 / id02  (4 and" in said


def test_another_source_is_read_as_the_network_wants_it(run: Path) -> None:
    colored = np.stack([people()] * 3, axis=-1)
    write_folder(run.parent / "colored", colored, EACH)
    write_folder(run.parent / "large", colored.repeat(2, axis=1).repeat(2, axis=2), EACH)
    for name in ("colored", "large"):
        clean.clean(run, run.parent / f"{name}-out", CleanConfig(source=str(run.parent / name)), print, MODEL)
    found = [float(row["cosine"]) for row in read(run.parent / "colored-out/images.csv")]
    expected = [cosine for own in truth(people())[1].reshape(-1, EACH) for cosine in sorted(own)]
    assert found == pytest.approx(expected, abs=2e-6)
    resized = read(run.parent / "large-out/images.csv")
    assert len(resized) == len(expected) and resized[0]["image"] == str(run.parent / "large/id00/0002.png")


@pytest.mark.parametrize("nearest", [1, 2, 8])
@pytest.mark.parametrize("block", [7, 4096])
@pytest.mark.parametrize("above", [-1.0, 0.0, 0.3, 0.6, 1.0])
def test_close_finds_every_pair(monkeypatch: pytest.MonkeyPatch, nearest: int, block: int, above: float) -> None:
    """Also where more centers are close to one than the first search looks for."""
    monkeypatch.setattr(clean, "NEAREST", nearest)
    monkeypatch.setattr(clean, "BLOCK", block)
    x = torch.randn(41, 8, dtype=torch.float64)
    x[10:25] = x[3] + 0.3 * torch.randn(15, 8, dtype=torch.float64)
    unit = torch.nn.functional.normalize(x)
    rows, centers = unit[:20], unit
    for itself, own in ((torch.arange(20), True), (torch.full((20,), -1), False)):
        found = clean.close(rows.float(), centers.float(), itself, above + 1e-7 * (above < 0))
        expected = all_pairs(rows.numpy(), centers.numpy(), above)
        expected = {(i, j) for i, j in expected if not (own and i == j)}
        got = list(zip(found.row.tolist(), found.center.tolist(), strict=True))
        if above < 1:  # at 1 it depends on rounding
            assert set(got) == expected and len(got) == len(expected)
        assert own or above == 1 or {(i, i) for i in range(20)} <= set(got)
        assert (found.cosine.diff() <= 0).all()
        exact = (rows[found.row] * centers[found.center]).sum(1)
        torch.testing.assert_close(found.cosine.double(), exact, rtol=0, atol=1e-6)


def test_too_many_pairs_are_refused_while_they_are_few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clean, "MOST", 1000)
    alike = torch.ones(100, 4) / 2
    with pytest.raises(ValueError, match=r"above is 0\.5, .* more than 500 pairs"):
        clean.close(alike, alike, torch.arange(100), 0.5)


def test_identities_with_one_image_and_with_none_left(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two images have the same cosine, a single one is its own center; images without a file are named by number."""
    images = np.zeros((3, 16, 16), np.uint8)
    images[0, 0, 0] = images[1, 0, 1] = images[2, 0, 2] = 255
    write_tensors(tmp_path / "data.safetensors", images, np.array([0, 0, 1]))
    run = run_of(tmp_path, tmp_path / "data.safetensors")
    clean.clean(run, tmp_path / "out", CleanConfig(below=0.8), print, MODEL)
    rows = [(row["name"], row["cosine"], row["image"]) for row in read(tmp_path / "out/images.csv")]
    assert rows == [("0", "0.707107", "image 0"), ("0", "0.707107", "image 1"), ("1", "1.000000", "image 2")]
    assert "below 0.8: 2 images of 1 identities, 1 of which have no others" in capsys.readouterr().out


def test_mistakes_leave_nothing_behind(run: Path, tmp_path: Path) -> None:
    def refused(match: str, where: Path = run, model: str | None = MODEL, **options: object) -> None:
        with pytest.raises(ValueError, match=match):
            clean.clean(where, tmp_path / "out", CleanConfig(**options), print, model)  # type: ignore[arg-type]

    refused("the run's network is test_clean:pixels; here it is cnn", model=None)
    refused("'absent'.*no such file or folder", source="absent")
    refused("'absent'.*no such file or folder", against="absent")
    refused(
        "not finite", run_of(tmp_path / "other", tmp_path / "people", "test_clean:undefined"), "test_clean:undefined"
    )
    write_tensors(tmp_path / "wide", np.zeros((4, 16, 20), np.uint8), np.arange(4))
    refused(
        "people: images are 1 x 16 x 16; want 1 x 16 x 20",
        run_of(tmp_path / "wide-run", tmp_path / "wide", shape=(1, 16, 20)),
        source=str(tmp_path / "people"),
    )
    assert not (tmp_path / "out").exists()
    (tmp_path / "out").mkdir()
    (tmp_path / "out/thesis.tex").write_text("precious")
    refused("out is not empty")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["thesis.tex"]


def test_a_picture_that_cannot_be_read_does_not_shift_the_others(run: Path, tmp_path: Path) -> None:
    (tmp_path / "people/id00/0001.png").write_bytes(b"no picture")
    (tmp_path / "people/id08/9999.png").write_bytes(encoded(people()[2]))
    clean.clean(run, tmp_path / "out", CleanConfig(below=0.75), print, MODEL)
    removed = (tmp_path / "out/remove.txt").read_text().split()
    assert sorted(Path(file).name for file in removed) == ["0002.png", "9999.png"]
    assert "0001.png" not in (tmp_path / "out/images.csv").read_text()
