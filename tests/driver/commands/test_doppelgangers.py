"""`fastmargin doppelgangers`: what it prints and writes for a table written by hand."""

import csv
from pathlib import Path

import pytest
import torch
from PIL import Image
from samples import encoded, pictures, write_folder

from fastmargin import checkpoint
from fastmargin.driver.commands import cli, doppelgangers
from fastmargin.driver.config import DataConfig, HeadConfig, TrainConfig
from fastmargin.driver.data.identities import Identities
from fastmargin.driver.data.sources import load_data
from fastmargin.driver.log import UNSAFE
from fastmargin.driver.reports import contact_sheet
from fastmargin.driver.training import run_folder
from fastmargin.mining import DoppelgangerTable

K = 2
LISTS = [  # label, its list, the scores; class 1 has none
    (0, [2, 3], [0.9, 0.4]),
    (2, [0, 3], [0.7, 0.65]),
    (3, [2, -1], [0.8, -torch.inf]),
]


def save(where: Path, train: Identities, config: TrainConfig) -> Path:
    table = DoppelgangerTable(train.num_classes, K)
    for label, classes, scores in LISTS:
        table.update(torch.tensor([label]), torch.tensor([scores]), torch.tensor([classes]))
    run_folder.claim(str(where), config)
    tensors = {f"table/{name}": tensor for name, tensor in table.state_dict().items()}
    checkpoint.save(where / run_folder.CHECKPOINTS, 7, tensors, {"data": train.fingerprint})
    return where


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run on photographs of about 5 people; about one more is held out."""
    write_folder(tmp_path / "people", pictures(21), each=3)
    data = DataConfig(source=str(tmp_path / "people"), size=16, cache=str(tmp_path / "cache"))
    config = TrainConfig(data=data, head=HeadConfig(topk=K))
    return save(tmp_path / "run", load_data(data, print)[0], config)


def names_of(run: Path) -> list[str]:
    return load_data(run_folder.read_config(run).data, print)[0].names


def test_names_are_escaped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Those that would print further lines or turn the text, and those that a spreadsheet would compute."""
    names = ["=1+x", "a\nb", "\u202ea", "@x", "\rb", "-y", "+z"]
    for number, name in enumerate(names):
        (tmp_path / "people" / name).mkdir(parents=True)
        for image, picture in enumerate(pictures(3 * len(names))[3 * number : 3 * number + 3]):
            (tmp_path / "people" / name / f"{image}.png").write_bytes(encoded(picture))
    data = DataConfig(source=str(tmp_path / "people"), size=16, cache=str(tmp_path / "cache"), holdout=0.01)
    run = save(tmp_path / "run", load_data(data, print)[0], TrainConfig(data=data, head=HeadConfig(topk=K)))
    capsys.readouterr()
    assert cli.main(["doppelgangers", str(run)]) == 0
    said = capsys.readouterr().out
    assert not any(UNSAFE.search(line) for line in said.split("\n"))
    with (run / "report/doppelgangers.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    listed = {row[column] for row in rows for column in ("name", "other_name")}
    assert listed <= {"'=1+x", "a\nb", "\u202ea", "'@x", "'\rb", "'-y", "'+z"}


def test_what_is_printed(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = names_of(run)
    capsys.readouterr()
    assert cli.main(["doppelgangers", str(run)]) == 0
    said = capsys.readouterr().out.splitlines()
    pairs, classes = (
        said.index("most similar pairs, the larger score of the two:"),
        said.index("most confusable classes, the number of lists they are on:"),
    )
    assert said[pairs + 1 : classes] == [
        f"   0.900  mutual  {names[0]} / {names[2]}",
        f"   0.800  mutual  {names[3]} / {names[2]}",
        f"   0.400          {names[0]} / {names[3]}",
    ]
    counts = [(2, 2), (2, 3), (1, 0)]
    assert said[classes + 1 : -1] == [f"{lists:8}  {names[label]}" for lists, label in counts]
    capsys.readouterr()
    assert cli.main(["doppelgangers", str(run), "--limit", "1"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == len(said) - 4


def test_what_is_written(run: Path, tmp_path: Path) -> None:
    """Into the report folder or elsewhere; a second time over the same files."""
    for out in (None, tmp_path / "elsewhere", None):
        doppelgangers.doppelgangers(run, out, 1, print)
    names = names_of(run)
    for where in (run / run_folder.REPORT, tmp_path / "elsewhere"):
        assert {path.name for path in where.iterdir()} == {"doppelgangers.csv", "doppelgangers.png"}
        Image.open(where / "doppelgangers.png").load()
        with (where / "doppelgangers.csv").open(encoding="utf-8", newline="") as file:
            rows = list(csv.reader(file))
        assert rows[0] == ["class", "name", "rank", "other", "other_name", "score"]
        assert rows[1:] == [
            [str(label), names[label], str(rank), str(other), names[other], f"{score:.6f}"]
            for label, classes, scores in LISTS
            for rank, (other, score) in enumerate(zip(classes, scores, strict=True), start=1)
            if other >= 0
        ]


def test_glyphs_are_called_as_in_the_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    images = torch.arange(8, dtype=torch.uint8)[:, None, None].expand(8, 16, 16)
    glyphs = Identities(images, torch.arange(8) // 2, ["l", '"', "Iι", ","])
    monkeypatch.setattr(doppelgangers, "load_data", lambda *_: (glyphs, glyphs))
    run = save(tmp_path / "run", glyphs, TrainConfig(head=HeadConfig(topk=K)))
    doppelgangers.doppelgangers(run, None, 1, print)
    assert f"{contact_sheet.caption('l')} / {contact_sheet.caption('Iι')}" in capsys.readouterr().out
    with (run / run_folder.REPORT / "doppelgangers.csv").open(encoding="utf-8", newline="") as file:
        assert {row["name"] for row in csv.DictReader(file)} == {"l", "Iι", ","}


def test_an_empty_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("test_doppelgangers.LISTS", [])
    write_folder(tmp_path / "people", pictures(21), each=3)
    data = DataConfig(source=str(tmp_path / "people"), size=16, cache=str(tmp_path / "cache"))
    run = save(tmp_path / "run", load_data(data, print)[0], TrainConfig(data=data, head=HeadConfig(topk=K)))
    doppelgangers.doppelgangers(run, None, 1, print)
    assert len((run / run_folder.REPORT / "doppelgangers.csv").read_text().splitlines()) == 1


def test_mistakes(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "people/id00/0000.png").unlink()
    run_folder.claim(str(tmp_path / "fresh"), run_folder.read_config(run))
    capsys.readouterr()
    for where, words in ((run, "trained on other images"), (tmp_path / "fresh", "no checkpoint yet")):
        assert cli.main(["doppelgangers", str(where)]) == cli.MISTAKE
        assert words in (said := capsys.readouterr().err) and said.count("\n") == 1
        assert not (where / run_folder.REPORT).exists()
