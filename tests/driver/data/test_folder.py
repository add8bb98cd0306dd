"""A folder for each identity: which files are its pictures, what is left out and named, in which color it is read."""

import os
from pathlib import Path

import numpy as np
import pytest
from PIL import features
from samples import encoded, pictures, write_folder
from test_datasets import Lines, all_images

from fastmargin.driver.config import DataConfig
from fastmargin.driver.data.sources.folder import load_folder


@pytest.fixture
def lines() -> Lines:
    return []


def test_folder(tmp_path: Path, lines: Lines) -> None:
    shown = pictures(12)
    names = write_folder(tmp_path / "data", shown, each=3)
    (tmp_path / "data/id03/0011.png").rename(tmp_path / "data/id03/zz.PNG")
    deep = tmp_path / "data/id01/video/7"
    deep.mkdir(parents=True)
    (tmp_path / "data/id01/0004.png").rename(deep / "a.png")  # now sorted after the others
    for path in ("id01/readme.txt", "id01/.hidden.png", ".git/a.png", "nobody/notes.md"):
        (tmp_path / "data" / path).parent.mkdir(exist_ok=True)
        (tmp_path / "data" / path).write_bytes(b"no picture")
    (tmp_path / "data/stray.png").write_bytes(encoded(shown[0]))
    found = load_folder(DataConfig(source=str(tmp_path / "data"), cache=str(tmp_path), size=20), lines.append)
    assert found.names == names == ["id00", "id01", "id02", "id03"]
    assert found.labels.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3]
    assert np.array_equal(all_images(found), shown[[0, 1, 2, 3, 5, 4, *range(6, 12)]])
    stray, readme, notes = (tmp_path / "data" / path for path in ("stray.png", "id01/readme.txt", "nobody/notes.md"))
    assert lines[0] == (
        f"data: left out are 3 files or folders: {stray} (in no folder of an identity), {readme} (no picture), "
        f"{notes} (no picture)"
    )
    assert "12 images of 4 identities at 20 x 20, rgb" in lines[1]


def test_a_mixed_set_is_in_color(tmp_path: Path, lines: Lines) -> None:
    """Whatever the first picture is."""
    shown = pictures(12)
    write_folder(tmp_path / "data", shown, each=3)
    for name in ("id00/0000.png", "id01/0004.png"):
        (tmp_path / "data" / name).write_bytes(encoded(pictures(1, colored=False)[0]))
    config = DataConfig(source=str(tmp_path / "data"), cache=str(tmp_path), size=20)
    found = load_folder(config, lines.append)
    assert found.images.shape == (12, 20, 20, 3) and np.array_equal(all_images(found)[1], shown[1])
    assert "data: 2 of 12 images are gray, and packed in color as the others are" in lines


def test_a_deep_gray_picture_that_is_skipped_does_not_make_a_gray_set_colored(tmp_path: Path, lines: Lines) -> None:
    write_folder(tmp_path / "data", pictures(12, colored=False), each=3)
    (tmp_path / "data/id00/0000.png").write_bytes(encoded(np.full((20, 20), 1000, np.uint16)))
    found = load_folder(DataConfig(source=str(tmp_path / "data"), cache=str(tmp_path), size=20), lines.append)
    assert found.images.shape == (11, 20, 20)


@pytest.mark.parametrize(
    ("suffix", "form"),
    [(".jfif", "JPEG"), (".jpe", "JPEG"), (".JPE", "JPEG"), ("", "PNG"), (".image", "WEBP"), (".jp2", "JPEG2000"),
     (".avif", "AVIF"), (".photo", "AVIF")],
)  # fmt: skip
def test_pictures_by_their_content(tmp_path: Path, lines: Lines, suffix: str, form: str) -> None:
    if form == "AVIF" and not features.check("avif"):
        pytest.skip("this Pillow has no AVIF")
    write_folder(tmp_path / "data", pictures(12), each=3)
    (tmp_path / f"data/id01/0003{suffix}").write_bytes(encoded(pictures(1)[0], form))
    (tmp_path / "data/id01/0003.png").unlink()
    found = load_folder(DataConfig(source=str(tmp_path / "data"), cache=str(tmp_path), size=20), lines.append)
    assert len(found.labels) == 12 and not any("left out" in line for line in lines)


def test_what_cannot_be_read_is_named(tmp_path: Path, lines: Lines, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder of an identity, one below it, a broken link, a link to a folder."""
    data = tmp_path / "data"
    write_folder(data, pictures(12), each=3)
    (data / "id02/deep").mkdir()
    (data / "id03/again").symlink_to(data / "id02")
    (data / "lost").symlink_to(tmp_path / "absent")
    listed = os.scandir

    def scandir(path: str) -> object:
        if os.fspath(path) in (str(data / "id01"), str(data / "id02/deep")):
            raise PermissionError(13, "Permission denied", os.fspath(path))
        return listed(path)

    monkeypatch.setattr(os, "scandir", scandir)
    found = load_folder(DataConfig(source=str(data), cache=str(tmp_path), size=20), lines.append)
    assert found.names == ["id00", "id02", "id03"] and len(found.labels) == 9
    assert lines[0] == (
        f"data: left out are 4 files or folders: {data}/lost (no file), {data}/id01 (Permission denied), "
        f"{data}/id02/deep (Permission denied), {data}/id03/again (a link to a folder)"
    )


def test_a_folder_of_which_nothing_can_be_read_says_why(tmp_path: Path) -> None:
    (tmp_path / "data/id01").mkdir(parents=True)
    (tmp_path / "data/id01/notes").write_text("no picture")
    with pytest.raises(ValueError, match=r"Left out are 1 files or folders: .*id01/notes \(no picture\)"):
        load_folder(DataConfig(source=str(tmp_path / "data")), print)


def test_folder_defaults_and_color(tmp_path: Path, lines: Lines) -> None:
    write_folder(tmp_path / "gray", pictures(4, colored=False), each=2)
    write_folder(tmp_path / "rgb", pictures(4), each=2, kind="JPEG")
    for color in ("gray", "rgb"):
        own = load_folder(DataConfig(source=str(tmp_path / color), cache=str(tmp_path)), lines.append)
        assert own.images.shape == ((4, 112, 112) if color == "gray" else (4, 112, 112, 3))
        assert own.input_shape[0] == (1 if color == "gray" else 3)
        other = "gray" if color == "rgb" else "rgb"
        want = DataConfig(source=str(tmp_path / color), cache=str(tmp_path), color=other)  # type: ignore[arg-type]
        assert load_folder(want, lines.append).input_shape[0] == (3 if color == "gray" else 1)


def test_a_folder_without_identities(tmp_path: Path, lines: Lines) -> None:
    (tmp_path / "flat").mkdir()
    (tmp_path / "flat/a.png").write_bytes(encoded(pictures(1)[0]))
    with pytest.raises(ValueError, match=r"flat has no folder with images in it; want one for each identity"):
        load_folder(DataConfig(source=str(tmp_path / "flat"), cache=str(tmp_path)), lines.append)
