"""The packed file: it is read back as written, damage is reported, few pictures may be unreadable, keys change."""

import os
import struct
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from samples import encoded, pictures, write_folder

from fastmargin.driver.config import DataConfig
from fastmargin.driver.data.identities import Identities
from fastmargin.driver.data.sources import packed as module
from fastmargin.driver.data.sources.folder import Folder, load_folder
from fastmargin.driver.data.sources.packed import Packed

COUNT, EACH, SIDE = 12, 3, 20


@pytest.fixture
def root(tmp_path: Path) -> Path:
    write_folder(tmp_path / "data", pictures(COUNT), EACH)
    return tmp_path / "data"


def load(root: Path, lines: list[str] | None = None, **options: object) -> Identities:
    given = {"cache": str(root.parent / "cache"), "size": SIDE, **options}
    return load_folder(DataConfig(source=str(root), **given), (lines if lines is not None else []).append)  # type: ignore[arg-type]


def file_of(root: Path) -> Path:
    (found,) = (root.parent / "cache").glob("packed-*.fmpk")
    return found


def all_images(identities: Identities) -> np.ndarray:
    return identities.images[np.arange(len(identities.images))].numpy()


@pytest.mark.parametrize("colored", [True, False])
@pytest.mark.parametrize("block", [5, 1024])
def test_what_is_packed_is_read_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, colored: bool, block: int
) -> None:
    monkeypatch.setattr(module, "BLOCK", block)
    shown = pictures(COUNT, colored=colored)
    write_folder(tmp_path / "data", shown, EACH)
    found = load(tmp_path / "data")
    assert found.images.shape == shown.shape and np.array_equal(all_images(found), shown)
    assert found.labels.tolist() == [n // EACH for n in range(COUNT)]
    index = np.array([7, 0, 7, 11])
    assert np.array_equal(found.images[index].numpy(), shown[index])
    assert found.images[np.array([], np.int64)].shape == (0, *shown.shape[1:])
    assert found.images.checksums().tolist() == [zlib.crc32(picture.tobytes()) for picture in shown]


def test_images_are_called_by_their_files(root: Path) -> None:
    """Titles are right although pictures before them were skipped, and the files are packed."""
    (root / "id01/0004.png").write_bytes(b"no picture")
    files = sorted(str(path) for path in root.rglob("*.png"))
    del files[4]
    for _ in range(2):
        found = load(root)
        assert [found.title(n) for n in range(COUNT - 1)] == files
        some = found.take(np.array([9, 2]))
        assert [some.title(n) for n in range(2)] == [files[9], files[2]]


def test_the_second_time_nothing_is_decoded(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = load(root)
    monkeypatch.setattr(module, "decode", lambda *_: pytest.fail("decoded again"))
    lines: list[str] = []
    again = load(root, lines)
    assert lines == [] and again.fingerprint == first.fingerprint
    assert np.array_equal(all_images(again), pictures(COUNT))
    assert [path.name for path in (root.parent / "cache").iterdir()] == [file_of(root).name]


def test_the_key_follows_the_files_and_the_options(root: Path) -> None:
    def files() -> int:
        return len(list((root.parent / "cache").iterdir()))

    load(root)
    load(root, size=16)
    load(root, color="gray")
    assert files() == 3
    os.utime(root / "id00/0000.png", ns=(1, 1))
    load(root)
    assert files() == 4
    (root / "id00/0000.png").rename(root / "id00/moved.png")
    assert np.array_equal(all_images(load(root))[:3], pictures(3)[[1, 2, 0]])
    assert files() == 5
    load(root, holdout=0.4, split_seed=1, augment="none", workers=2)
    assert files() == 5


def test_a_damaged_record_is_named_and_refused(root: Path) -> None:
    found = load(root)
    data = bytearray(file_of(root).read_bytes())
    data[7 * SIDE * SIDE * 3 + 100] ^= 1
    file_of(root).write_bytes(bytes(data))
    images = load(root).images
    assert len(images[np.array([6, 8])]) == 2
    with pytest.raises(ValueError, match=rf"{file_of(root).name}: image 7, of id02, is damaged.*Remove the file"):
        images[np.array([6, 7])]
    train = found.take(np.array([3, 7, 8]))
    with pytest.raises(ValueError, match="image 7, of id02"):
        train.images[np.array([1])]


def flip_index(data: bytes) -> bytes:
    return data[:-60] + bytes([data[-60] ^ 1]) + data[-59:]


def other_version(data: bytes) -> bytes:
    return data[:-16] + struct.pack("<I", 99) + data[-12:]


@pytest.mark.parametrize(
    "damage",
    [
        flip_index,
        other_version,
        lambda data: data[:-1],
        lambda data: data[1000:],
        lambda data: data[-15:],
        lambda data: b"",
        lambda data: data + b"\0",
    ],
    ids=["flipped bit", "other version", "end cut", "beginning cut", "end alone", "empty", "a byte more"],
)
def test_a_file_that_is_not_whole_is_packed_anew(root: Path, damage: Callable[[bytes], bytes]) -> None:
    load(root)
    file_of(root).write_bytes(damage(file_of(root).read_bytes()))
    with pytest.raises(ValueError, match="is damaged"):
        Packed(file_of(root), Folder(root))
    lines: list[str] = []
    assert np.array_equal(all_images(load(root, lines)), pictures(COUNT))
    assert "packing anew" in lines[0] and file_of(root).name in lines[0]
    assert np.array_equal(all_images(load(root)), pictures(COUNT))


def test_nothing_is_left_of_a_packing_that_was_stopped(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "decode", interrupted)
    with pytest.raises(KeyboardInterrupt):
        load(root)
    assert list((root.parent / "cache").iterdir()) == []


def test_unreadable_pictures_are_skipped_and_logged(root: Path) -> None:
    (root / "id01/0004.png").write_bytes(b"no picture")
    lines: list[str] = []
    found = load(root, lines)
    assert np.array_equal(all_images(found), np.delete(pictures(COUNT), 4, axis=0))
    assert found.labels.tolist() == [0, 0, 0, 1, 1, 2, 2, 2, 3, 3, 3]
    (skipped,) = (line for line in lines if "skipped" in line)
    assert "id01/0004.png (its 10 bytes are no picture of JPEG, PNG" in skipped and "BytesIO" not in skipped


def test_what_was_skipped_is_said_again(root: Path) -> None:
    """Also when nothing has to be packed; the pictures are named only once."""
    (root / "id01/0004.png").write_bytes(b"no picture")
    load(root)
    lines: list[str] = []
    load(root, lines)
    assert lines == [f"data: 1 unreadable images were left out when {file_of(root)} was packed"]


def test_an_identity_without_a_readable_picture_goes(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "UNREADABLE", 0.25)
    for number in range(3):
        (root / f"id00/{number:04}.png").write_bytes(encoded(pictures(1)[0])[:100])  # it can be opened
    found = load(root)
    assert found.names == ["id01", "id02", "id03"] and found.labels.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]


def test_more_than_the_budget_is_an_error_that_lists_them(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in (4, 5):
        (root / f"id01/{number:04}.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"2 of 12 images cannot be read, more than 1%: .*0004.png .*; .*0005.png"):
        load(root)
    assert list((root.parent / "cache").iterdir()) == []
    monkeypatch.setattr(module, "SHOWN", 1)
    with pytest.raises(ValueError, match=r"0004.png \([^;]*, and 1 more$"):
        load(root)


def test_no_picture_can_be_read_at_all(tmp_path: Path) -> None:
    (tmp_path / "data/a").mkdir(parents=True)
    (tmp_path / "data/a/a.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"none of 1 images can be read, from .*a.png on"):
        load(tmp_path / "data")
    with pytest.raises(ValueError, match=r"1 of 1 images cannot be read"):
        load(tmp_path / "data", color="rgb")


def test_threads_read_the_same(root: Path) -> None:
    images = load(root).images
    order = [np.random.default_rng(seed).integers(0, COUNT, 50) for seed in range(40)]
    with ThreadPoolExecutor(4) as pool:
        for index, got in zip(order, pool.map(images.__getitem__, order), strict=True):
            assert np.array_equal(got.numpy(), pictures(COUNT)[index])
