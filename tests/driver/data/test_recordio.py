"""InsightFace's RecordIO: read back from files written as dmlc-core and mxnet do; what is refused."""

import struct
from pathlib import Path

import numpy as np
import pytest
from samples import MAGIC, encoded, packed, pictures, write_insightface, write_records

from fastmargin.driver.config import DataConfig
from fastmargin.driver.data.sources import recordio
from fastmargin.driver.data.sources.recordio import RecordIO, load_recordio


def image(number: int = 0) -> bytes:
    return encoded(pictures(number + 1)[number])


def load(path: Path, lines: list[str], **options: object) -> tuple[np.ndarray, list[int], list[str]]:
    config = DataConfig(source=str(path), cache=str(path.parent / "cache"), size=20, **options)  # type: ignore[arg-type]
    found = load_recordio(config, lines.append)
    return found.images[np.arange(len(found.images))].numpy(), found.labels.tolist(), found.names


@pytest.mark.parametrize("given", ["file", "folder"])
def test_images_and_labels_without_the_header_records(tmp_path: Path, given: str) -> None:
    shown, labels = pictures(7), [4, 4, 0, 9, 9, 9, 4]
    write_insightface(tmp_path / "train.rec", shown, labels)
    images, dense, names = load(tmp_path / "train.rec" if given == "file" else tmp_path, [])
    assert np.array_equal(images, shown) and dense == [1, 1, 0, 2, 2, 2, 1] and names == ["0", "4", "9"]


def test_jpegs_default_size_and_gray(tmp_path: Path) -> None:
    write_insightface(tmp_path / "train.rec", pictures(3, side=112), [0, 1, 1], kind="JPEG")
    config = DataConfig(source=str(tmp_path), cache=str(tmp_path))
    assert load_recordio(config, print).images.shape == (3, 112, 112, 3)
    assert load(tmp_path / "train.rec", [], color="gray")[0].shape == (3, 20, 20)


def test_records_in_any_order_with_and_without_further_labels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys out of order, no record 0, labels as number and as array (the first counts), headers block by block."""
    monkeypatch.setattr(recordio, "BLOCK", 2)
    shown = pictures(5)
    data = [
        (9, packed(encoded(shown[4]), 3.0)),
        (2, packed(encoded(shown[0]), [1.0, 77.0, 5.5])),
        (3, packed(encoded(shown[1]), 3.0)),
        (4, packed(encoded(shown[2]), [3.0])),
        (7, packed(encoded(shown[3]), 1.0)),
    ]
    write_records(tmp_path / "a.rec", data)
    images, labels, names = load(tmp_path / "a.rec", [])
    assert np.array_equal(images, shown) and labels == [0, 1, 1, 0, 1] and names == ["1", "3"]


@pytest.mark.parametrize("at", [[0], [24], [0, 4], [8, 24], [3], [28], [0, 4, 8, 12, 16, 20, 24]])
def test_records_cut_at_the_magic_number_are_joined(tmp_path: Path, at: list[int]) -> None:
    data = bytearray(packed(bytes(range(1, 10)), 1.0))
    for offset in at:  # 3 is at no multiple of four and not cut; 28 is the last that fits
        data[offset : offset + 4] = MAGIC
    whole = packed(image(), 0.0)
    write_records(tmp_path / "a.rec", [(1, whole), (2, bytes(data)), (3, whole)])
    records = RecordIO.__new__(RecordIO)
    records.path, records.data = tmp_path / "a.rec", (tmp_path / "a.rec").read_bytes()
    offsets = [int(line.split()[1]) for line in (tmp_path / "a.idx").read_text().splitlines()]
    assert [records._record(offset) for offset in offsets] == [whole, bytes(data), whole]


def test_a_picture_with_the_magic_number_in_it(tmp_path: Path) -> None:
    """Pillow ignores what follows the end of a PNG."""
    tail = MAGIC * 3 + b"xyz"
    pad = b"\0" * (-len(image()) % 4)
    write_records(tmp_path / "a.rec", [(1, packed(image() + pad + tail, 0.0)), (2, packed(image(1), 1.0))])
    parts = (tmp_path / "a.rec").read_bytes().count(MAGIC)
    assert parts == 2 + 3
    assert np.array_equal(load(tmp_path / "a.rec", [])[0], pictures(2))


@pytest.mark.parametrize("label", [2.0**24, 2.0**24 + 2, -1.0, 0.5, float("nan"), float("inf")])
def test_labels_that_are_no_exact_number(tmp_path: Path, label: float) -> None:
    write_records(tmp_path / "a.rec", [(1, packed(image(), 5.0)), (6, packed(image(1), label))])
    with pytest.raises(ValueError, match=rf"label of record 6 is {label}; want a whole number from 0 to 16777215"):
        load(tmp_path / "a.rec", [])
    write_records(tmp_path / "a.rec", [(1, packed(image(), 5.0)), (6, packed(image(1), [2.0**24 - 1, label]))])
    assert load(tmp_path / "a.rec", [])[2] == ["5", "16777215"]


def test_a_damaged_picture_is_passed_over_and_named(tmp_path: Path) -> None:
    data = [(n, packed(image(n), float(n // 3))) for n in range(6)]
    data[4] = (4, packed(image(4)[:40], 1.0))
    write_records(tmp_path / "a.rec", data)
    lines: list[str] = []
    images, labels, _ = load(tmp_path / "a.rec", lines)
    assert np.array_equal(images, pictures(6)[[0, 1, 2, 3, 5]]) and labels == [0, 0, 0, 1, 1]
    assert any("skipped" in line and "a.rec, record 4" in line for line in lines)


def test_an_index_that_does_not_fit(tmp_path: Path) -> None:
    path, index = tmp_path / "a.rec", tmp_path / "a.idx"
    write_records(path, [(1, packed(image(), 0.0)), (2, packed(image(1), 1.0))])
    good = index.read_text()
    for text, reason in [
        (good.replace("2\t", "2\t1"), "no record 2 at byte"),
        ("1\t-8\n", "no record 1 at byte -8"),
        (f"1\t{path.stat().st_size - 16}\n", "no record 1"),
        ("", "lists no records"),
        ("1\tx\n", "want two numbers a line"),
        ("1\t2\t3\n", "want two numbers a line"),
    ]:
        index.write_text(text)
        with pytest.raises(ValueError, match=reason):
            load(path, [])
    index.unlink()
    with pytest.raises(ValueError, match=r"a.idx is not there; want the index beside its records"):
        load(path, [])


def test_a_file_cut_short_and_parts_that_are_missing(tmp_path: Path) -> None:
    path = tmp_path / "a.rec"
    write_records(path, [(1, packed(image(), 0.0)), (2, packed(image(1), 1.0))])
    path.write_bytes(path.read_bytes()[:-60])
    with pytest.raises(ValueError, match="cut short"):
        RecordIO(path).read(1)
    data = packed(MAGIC * 2 + image(), 0.0)
    write_records(path, [(1, data)])
    spoiled = bytearray(path.read_bytes())
    second = spoiled.index(MAGIC, 4)
    spoiled[second] ^= 1
    path.write_bytes(bytes(spoiled))
    with pytest.raises(ValueError, match=f"no record at byte {second}"):
        RecordIO(path).read(0)
    (word,) = struct.unpack_from("<I", spoiled, 4)
    struct.pack_into("<I", spoiled, 4, word & (2**29 - 1) | 2 << 29)  # a record cannot begin with a middle part
    path.write_bytes(bytes(spoiled))
    with pytest.raises(ValueError, match="no record 1 at byte 0"):
        RecordIO(path)


@pytest.mark.parametrize("labels", [[1.0], [1.0, 2.0]])
def test_headers_alone_are_no_pictures(tmp_path: Path, labels: list[float]) -> None:
    write_records(tmp_path / "a.rec", [(0, packed(b"", labels))])
    with pytest.raises(ValueError, match="has 1 records; want pictures"):
        load(tmp_path / "a.rec", [])
