"""Random folders, pair lists and file names: every image is found or named, every name is read back as it was."""

import csv
import json
import os
import random
import re
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from PIL import features
from samples import encoded, pictures, write_folder

from fastmargin.driver.commands import cli
from fastmargin.driver.config import DataConfig
from fastmargin.driver.data.sources.folder import load_folder
from fastmargin.evaluation import read_pairs

pytestmark = pytest.mark.usefixtures("one_thread")

# ---------------------------------------------------------------------------------------------- pair lists

PEOPLE = ("Ann", "Ann Lee", "José", "Zoë Saldaña", "Mr. 7", "A_0001", "안나", "Bob_Lee", "data")
FORMS = ("NFC", "NFD")


def listed_files(rng: random.Random) -> dict[tuple[str, int], str]:
    """{(name, number): path}, with gaps, in either form of Unicode, the files of each person named in one way."""
    files = {}
    for name in rng.sample(PEOPLE, rng.randint(2, 5)):
        way = rng.choice(["{n}", "{name}_{n:04}", "img-{n}", "{name} {n:02}", "x.{n}"])
        for n in rng.sample(range(1, 13), rng.randint(2, 12)):
            file = way.format(name=name, n=n) + rng.choice([".jpg", ".png", ".JPEG"])
            path = f"root/{name}/{rng.choice(['', 'deep/'])}{file}"
            files[name, n] = unicodedata.normalize(rng.choice(FORMS), path)
    return files


@pytest.mark.parametrize("seed", range(36))
def test_pair_lists(rng, seed, tmp_path):
    files = listed_files(rng)
    images, people = [*files], [*dict.fromkeys(name for name, _ in files)]
    each = rng.randint(1, 6)
    same = [(a, rng.choice([b for b in images if b[0] == a[0]])) for a in rng.choices(images, k=each)]
    other = [(a, rng.choice([b for b in images if b[0] != a[0]])) for a in rng.choices(images, k=each)]
    spelled = [f"{a}\t{n}\t{m}" for (a, n), (_, m) in same] + [f"{a}\t{n}\t{b}\t{m}" for (a, n), (b, m) in other]
    text = rng.choice(["", "\ufeff"]) + rng.choice(["\n", "\r\n"]).join([f"1\t{each}", *spelled, ""])
    (tmp_path / "pairs.txt").write_bytes(unicodedata.normalize(rng.choice(FORMS), text).encode())

    listed = {*sum(same + other, ())}
    gone = set(rng.sample(sorted(listed), rng.choice([0, 0, rng.randint(1, len(listed))])))
    rows = rng.sample([image for image in images if image not in gone], len(images) - len(gone))
    labels, titles = [people.index(name) for name, _ in rows], [files[image] for image in rows]
    if rows and rng.random() < 0.5:  # a file without a number is no image of any list
        labels.append(labels[0])
        titles.append(f"root/{people[labels[0]]}/cover.jpg")
    pairs, names = (
        read_pairs(tmp_path / "pairs.txt"),
        [unicodedata.normalize(rng.choice(FORMS), name) for name in people],
    )
    if gone:
        with pytest.raises(
            ValueError, match=f"no row for {len(gone)} of the pair list's {len(listed)} images"
        ) as refused:
            pairs.rows(labels, names, titles)
        named = [f"{name} {n}" in str(refused.value) for name, n in gone]
        assert sum(named) >= min(len(gone), 10)
    got = pairs.rows(labels, names, titles, skip_missing=bool(gone))
    kept = [pair for pair in same + other if not gone & {*pair}]
    assert [(rows[a], rows[b]) for a, b in zip(got.first, got.second, strict=True)] == kept
    assert got.same.tolist() == [a[0] == b[0] for a, b in kept]


# ---------------------------------------------------------------------------------------------- folders of pictures

KINDS = [(".jpg", "JPEG"), (".jpeg", "JPEG"), (".jfif", "JPEG"), (".jpe", "JPEG"), (".JPE", "JPEG"), (".png", "PNG"),
         ("", "PNG"), ("", "JPEG"), (".picture", "PNG")] + [(".avif", "AVIF")] * features.check("avif")  # fmt: skip


@pytest.mark.parametrize("seed", range(30))
def test_folders_of_pictures(rng, seed, tmp_path, monkeypatch):
    """Each picture is of one color, so that it is known again."""
    data, lines, shown, left_out, closed = tmp_path / "data", [], [], [], set()
    grays = rng.choice([0.0, 0.5, 1.0])
    for person in range(rng.randint(1, 5)):
        folder = data / f"p{person}"
        folder.mkdir(parents=True)
        shut = person > 0 and rng.random() < 0.2
        closed |= {str(folder)} if shut else set()
        left_out += [str(folder)] if shut else []
        for number in range(rng.randint(1, 6)):
            suffix, kind = rng.choice(KINDS)
            gray = rng.random() < grays and kind != "AVIF"  # which has no gray
            color = [rng.randrange(256)] * 3 if gray else [rng.randrange(256) for _ in range(3)]
            pixels = np.full((16, 16, 3), color, np.uint8)
            (folder / f"{number:02}{suffix}").write_bytes(encoded(pixels[..., 0] if gray else pixels, kind))
            shown += [] if shut else [(person, gray, color)]
        if not shut and rng.random() < 0.4:
            (folder / "notes.txt").write_text("no picture")
            (folder / "lost.png").symlink_to(tmp_path / "absent")
            left_out += [str(folder / "notes.txt"), str(folder / "lost.png")]
    listed = os.scandir

    def scandir(path):
        if os.fspath(path) in closed:
            raise PermissionError(13, "Permission denied", os.fspath(path))
        return listed(path)

    monkeypatch.setattr(os, "scandir", scandir)
    found = load_folder(DataConfig(source=str(data), cache=str(tmp_path), size=16), lines.append)
    gray = all(gray for _, gray, _ in shown)
    assert found.images.shape == (len(shown), 16, 16) + (() if gray else (3,))
    assert [found.names[label] for label in found.labels] == [f"p{person}" for person, _, _ in shown]
    images = np.asarray(found.images[np.arange(len(shown))]).reshape(len(shown), 256, -1).mean(1)
    np.testing.assert_allclose(images, [color[: images.shape[1]] for _, _, color in shown], atol=8)
    said = [line for line in lines if "left out" in line]
    assert len(said) == bool(left_out) and all(f"{path} (" in said[0] for path in left_out)
    assert not left_out or f"left out are {len(left_out)} files or folders" in said[0]


# ---------------------------------------------------------------------------------------------- names in lists

PARTS = (
    "\n",
    "\r",
    "\r\n",
    "\u202e",
    "\u2028",
    "\x1b",
    "\t",
    '"',
    "'",
    ",",
    ";",
    "a",
    "B 2",
    "é",
    "-",
    "=",
    "+",
    "@",
    "7",
)
LEADING = ("", "=", "+", "-", "@", '"', "'=", "\t", "\r", "'")
CELL = re.compile(r"[=+\-@\t\r]")


def strange(rng: random.Random) -> str:
    return rng.choice(LEADING) + "".join(rng.choices(PARTS, k=rng.randint(1, 5))) + str(rng.randrange(10**6))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of one step."""
    where = tmp_path_factory.mktemp("run")
    options = [
        "--data.source",
        "synthetic:40x2",
        "--data.size",
        "16",
        "--optim.steps",
        "1",
        "--dim",
        "4",
        "--data.cache",
        str(where),
    ]
    assert cli.main(["train", *options, "--out", str(where / "run")]) == 0
    return where / "run"


def is_number(cell: str) -> bool:
    return re.fullmatch(r"[-+]?[0-9]+(\.[0-9]+)?", cell) is not None


@pytest.mark.parametrize("seed", range(20))
def test_names_in_lists(rng, seed, run, tmp_path, monkeypatch):
    write_folder(tmp_path / "data", pictures(6, 16, seed=seed), each=2)
    monkeypatch.chdir(tmp_path)  # so that a path may begin as a name does
    people = sorted({strange(rng) for _ in range(3)} - {"."})
    for old, new in zip(sorted(Path("data").iterdir()), people, strict=True):
        old.rename(f"data/{new}")
    for file in [*Path("data").rglob("*.png")]:
        file.rename(file.with_name(f"{strange(rng)}.png"))
    paths = {str(path) for path in Path("data").rglob("*.png")}
    assert cli.main(["clean", str(run), "--source", "data", "--below", "1", "--above", "-1", "--out", "out"]) == 0
    removed = Path("out/remove.txt").read_bytes().decode().removesuffix("\n").split("\n")
    assert removed == [line for text in removed for line in text.splitlines()], "every reader sees the same lines"
    assert sorted(json.loads(line) if line.startswith('"') else line for line in removed) == sorted(paths)
    for stem, columns in (("images", 5), ("pairs", 5)):
        with Path(f"out/{stem}.csv").open(encoding="utf-8", newline="") as file:
            _, *rows = csv.reader(file)
        cells = [cell for row in rows for cell in row]
        assert all(len(row) == columns for row in rows) and not [c for c in cells if CELL.match(c) and not is_number(c)]
        if stem == "images":
            assert sorted(row[-1] for row in rows) == sorted(paths)
