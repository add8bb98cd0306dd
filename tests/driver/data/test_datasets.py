"""Sources of identities: each format read back from files written here, its errors, and how a source is recognized."""

import io
import os
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from samples import (
    encoded,
    pictures,
    write_folder,
    write_idx,
    write_insightface,
    write_omniglot,
    write_tensors,
)

from fastmargin.driver.config import DataConfig
from fastmargin.driver.data import sources
from fastmargin.driver.data.identities import Identities
from fastmargin.driver.data.sources import load_data, pixels, recognize
from fastmargin.driver.data.sources.idx import load_idx
from fastmargin.driver.data.sources.omniglot import load_omniglot
from fastmargin.driver.data.sources.synthetic import load_synthetic
from fastmargin.driver.data.sources.tensors import load_tensors

Lines = list[str]


def all_images(identities: Identities) -> np.ndarray:
    return identities.images[np.arange(len(identities.images))].numpy()


@pytest.fixture
def lines() -> Lines:
    return []


# Pixels


def test_a_picture_of_the_right_size_keeps_its_pixels() -> None:
    (colored,), (gray,) = pictures(1), pictures(1, colored=False)
    assert np.array_equal(pixels.decode(encoded(colored), 20, "rgb"), colored)
    assert np.array_equal(pixels.decode(encoded(gray), 20, "gray"), gray)
    assert np.array_equal(pixels.decode(encoded(gray), 20, "rgb"), np.repeat(gray[..., None], 3, 2))
    luma = (colored @ np.array([0.299, 0.587, 0.114])).round()
    assert np.abs(pixels.decode(encoded(colored), 20, "gray") - luma).max() <= 1


def test_the_middle_square_is_taken_and_all_pixels_count() -> None:
    wide = np.zeros((10, 30, 3), np.uint8)
    wide[:, 10:20] = np.arange(10)[:, None, None] * 20
    assert np.array_equal(pixels.decode(encoded(wide), 10, "rgb"), wide[:, 10:20])
    board = np.indices((64, 64)).sum(0).astype(np.uint8) % 2 * 255
    assert np.abs(pixels.decode(encoded(board), 16, "gray")[2:-2, 2:-2].astype(int) - 127).max() <= 2


def test_a_photograph_is_turned_upright() -> None:
    (picture,) = pictures(1)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 270 degrees
    turned = pixels.decode(encoded(picture, exif=exif), 20, "rgb")
    assert np.array_equal(turned, np.rot90(picture, -1))


def test_modes() -> None:
    deep = np.full((20, 20), 1000, np.uint16)
    with pytest.raises(ValueError, match=r"mode I;16; want 8 bits"):
        pixels.decode(encoded(deep), 20, "gray")
    (picture,) = pictures(1)
    with_alpha = np.dstack([picture, np.full((20, 20), 7, np.uint8)])
    assert np.array_equal(pixels.decode(encoded(with_alpha), 20, "rgb"), picture)
    for mode, color in {"1": "gray", "L": "gray", "LA": "gray", "P": "rgb", "RGB": "rgb", "RGBA": "rgb"}.items():
        buffer = io.BytesIO()
        Image.fromarray(picture).convert(mode).save(buffer, "PNG")
        assert pixels.own_color(buffer.getvalue()) == color


def test_large_jpegs_are_decoded_at_a_fraction() -> None:
    picture = pictures(1, side=1000)[0]
    small = pixels.decode(encoded(picture, "JPEG", quality=95), 50, "rgb")
    exact = np.asarray(Image.fromarray(picture).resize((50, 50)))
    assert np.abs(small.astype(int) - exact).max() <= 6


# IDX


@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize("kind", ["u1", "i4"])
def test_idx(tmp_path: Path, lines: Lines, zipped: bool, kind: str) -> None:
    shown, labels = pictures(6, colored=False), np.array([7, 3, 3, 0, 7, 3], kind)
    write_idx(tmp_path / "t-images-idx3-ubyte", shown, zipped)
    write_idx(tmp_path / "t-labels-idx1-ubyte.gz", labels, zipped=True)  # compressed or not, whatever the images are
    found = load_idx(DataConfig(source=str(tmp_path / "t-images-idx3-ubyte")), lines.append)
    assert found.names == ["0", "3", "7"] and found.labels.tolist() == [2, 1, 1, 0, 2, 1]
    assert np.array_equal(all_images(found), shown)
    small = load_idx(DataConfig(source=str(tmp_path / "t-images-idx3-ubyte"), size=16, color="rgb"), lines.append)
    expected = [pixels.decode(encoded(one), 16, "rgb") for one in shown]
    assert np.array_equal(all_images(small), expected)


def test_mistakes_in_idx_files(tmp_path: Path, lines: Lines) -> None:
    images, labels = tmp_path / "images.idx3", tmp_path / "labels.idx1"

    def refused(reason: str) -> None:
        with pytest.raises(ValueError, match=reason):
            load_idx(DataConfig(source=str(images)), lines.append)

    write_idx(images, pictures(3, colored=False))
    refused("labels.idx1 is not there, nor with .gz")
    write_idx(labels, np.zeros(4, np.uint8))
    refused(r"uint8 \[3, 20, 20\] with labels \[4\]")
    write_idx(labels, np.zeros(3, np.float32))
    refused("no IDX file of integers: it begins with 00 00 0d 01")
    write_idx(labels, np.zeros(3, np.uint8))
    images.write_bytes(images.read_bytes()[:-1])
    refused(r"has 1199 bytes of numbers; want \[3, 20, 20\]")
    write_idx(images, pictures(3, colored=False), zipped=True)
    images.write_bytes(images.read_bytes()[:-30])
    refused("images.idx3 is damaged")
    write_idx(tmp_path / "a", pictures(3, colored=False))
    with pytest.raises(ValueError, match="want the labels of a"):
        load_idx(DataConfig(source=str(tmp_path / "a")), lines.append)


# Omniglot


def test_omniglot(tmp_path: Path, lines: Lines) -> None:
    ink = np.random.default_rng(0).random((5, 3, 32, 32)) < 0.2
    one = {"Latin/character01": ink[0], "Greek/character01": ink[1], "Greek/character02": ink[2]}
    two = {"Tagalog/character01": ink[3], "Greek/character02": ink[2]}  # both have one of them
    write_omniglot(tmp_path / "one.zip", one)
    write_omniglot(tmp_path / "two.zip", {"Tagalog/character01": ink[3]})
    source = f"{tmp_path}/one.zip,{tmp_path}/two.zip"
    found = load_omniglot(DataConfig(source=source), lines.append)
    assert found.names == ["Greek/character01", "Greek/character02", "Latin/character01", "Tagalog/character01"]
    assert found.labels.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3]
    assert np.array_equal(all_images(found), 255 * ink[[1, 2, 0, 3]].reshape(-1, 32, 32).astype(np.uint8))
    write_omniglot(tmp_path / "two.zip", two)
    os.rename(tmp_path / "two.zip", tmp_path / "twice.zip")
    again = load_omniglot(DataConfig(source=f"{tmp_path}/one.zip,{tmp_path}/one.zip"), lines.append)
    assert (
        len(again.images) == 9
        and load_omniglot(DataConfig(source=source.split(",")[0]), lines.append).names == again.names
    )


def test_mistakes_in_zips(tmp_path: Path, lines: Lines) -> None:
    path = tmp_path / "a.zip"
    write_omniglot(path, {"Latin/page01": np.ones((1, 8, 8), bool)})
    with pytest.raises(ValueError, match="holds no drawing of Omniglot"):
        load_omniglot(DataConfig(source=str(path)), lines.append)
    write_omniglot(path, {"Latin/character01": np.random.default_rng(0).random((2, 64, 64)) < 0.5})
    data = bytearray(path.read_bytes())
    data[300] ^= 1
    path.write_bytes(bytes(data))
    with pytest.raises(ValueError, match=r"a.zip is damaged: .*CRC"):
        load_omniglot(DataConfig(source=str(path)), lines.append)


# Tensors


@pytest.mark.parametrize("layout", ["gray", "last", "first"])
def test_tensors(tmp_path: Path, lines: Lines, layout: str) -> None:
    shown = pictures(5, colored=layout != "gray")
    stored = np.ascontiguousarray(shown.transpose(0, 3, 1, 2)) if layout == "first" else shown
    write_tensors(tmp_path / "a", stored, np.array([5, 2, 5, 0, 2]))
    found = load_tensors(DataConfig(source=str(tmp_path / "a")), lines.append)
    assert found.names == ["0", "2", "5"] and found.labels.tolist() == [2, 1, 2, 0, 1]
    assert np.array_equal(all_images(found), shown)
    write_tensors(tmp_path / "a", stored, np.array([5, 2, 5, 0, 2]), names=["a", "b", "c", "d", "e", "f"])
    assert load_tensors(DataConfig(source=str(tmp_path / "a")), lines.append).names == ["a", "c", "f"]


def test_mistakes_in_tensors(tmp_path: Path, lines: Lines) -> None:
    gray, labels = pictures(2, colored=False), np.array([0, 1])
    for arguments, reason in [
        ((gray.astype(np.float32), labels), r"images are torch.float32 \[2, 20, 20\]; want uint8"),
        ((gray[..., None], labels), r"\[2, 20, 20, 1\]; want"),
        ((gray[:0], labels[:0]), r"\[0, 20, 20\]; want"),
        ((gray, np.array([0, 1, 2])), r"labels are torch.int64 \[3\]; want int64 \[2\]"),
        ((gray, np.array([0.0, 1.0])), r"labels are torch.float64"),
        ((gray, np.array([0, -1])), r"label 1 is -1; want 0 or more"),
        ((gray, labels, ["a"]), r"no name for each label up to 1"),
        ((gray, labels, ["a", "a"]), r"two labels have one name"),
        ((np.ascontiguousarray(gray[:, :16]), labels), r"16 x 20; want squares, or data.size"),
    ]:
        write_tensors(tmp_path / "a", *arguments)
        with pytest.raises(ValueError, match=reason):
            load_tensors(DataConfig(source=str(tmp_path / "a")), lines.append)
    assert load_tensors(DataConfig(source=str(tmp_path / "a"), size=16), lines.append).images.shape == (2, 16, 16)
    (tmp_path / "a").write_bytes(b"\x10" + bytes(7) + b"{no json        ")
    with pytest.raises(ValueError, match="want a safetensors file with images and labels"):
        load_tensors(DataConfig(source=str(tmp_path / "a")), lines.append)


# Synthetic


def test_synthetic_images_are_functions_of_their_number(lines: Lines) -> None:
    config = DataConfig(source="synthetic:1000000x3", size=24)
    made = load_synthetic(config, lines.append)
    assert made.images.shape == (3_000_000, 24, 24, 3) and made.labels[[0, 2, 3, -1]].tolist() == [0, 0, 1, 999_999]
    index = np.array([0, 1, 2, 3, 2_999_999, 1])
    images = made.images[index]
    assert images.dtype == torch.uint8 and images.shape == (6, 24, 24, 3) and torch.equal(images[1], images[5])
    assert torch.equal(made.images[index[::-1]].flip(0), images)
    apart = torch.cdist(images.flatten(1).float(), images.flatten(1).float())
    within, between = apart[[0, 0, 1], [1, 2, 2]], apart[:3, 3:5]
    assert 0 < within.min() and within.max() < between.min()
    assert (images[:, 0, 0] == images[:, 2, 2]).all() and (images[:, 0, 0] != images[:, 0, 3]).any()
    gray = load_synthetic(DataConfig(source="synthetic:3x2", color="gray"), lines.append)
    assert gray.images.shape == (6, 112, 112) and len(set(gray.images.checksums().tolist())) == 6


@pytest.mark.parametrize("source", ["synthetic:", "synthetic:3", "synthetic:0x2", "synthetic:3x0", "synthetic:3x2x1"])
def test_synthetic_wants_two_numbers(lines: Lines, source: str) -> None:
    with pytest.raises(ValueError, match="want synthetic:CLASSESxIMAGES"):
        load_synthetic(DataConfig(source=source), lines.append)


# Which is which


def test_sources_are_recognized_by_what_they_are(tmp_path: Path) -> None:
    write_folder(tmp_path / "folder", pictures(2), each=1)
    (tmp_path / "faces").mkdir()
    write_insightface(tmp_path / "faces/train.rec", pictures(2), [0, 1])
    write_omniglot(tmp_path / "zip", {"Latin/character01": np.ones((1, 8, 8), bool)})
    write_tensors(tmp_path / "tensors", pictures(2), np.array([0, 1]))
    write_idx(tmp_path / "idx", pictures(2, colored=False))
    write_idx(tmp_path / "gz", pictures(2, colored=False), zipped=True)
    kinds = {
        "glyphs": "glyphs",
        "synthetic:3x2": "synthetic",
        "folder": "folder",
        "faces": "recordio",
        "faces/train.rec": "recordio",
        "zip": "omniglot",
        f"zip,{tmp_path}/zip": "omniglot",
        "tensors": "tensors",
        "idx": "idx",
        "gz": "idx",
    }
    found = {name: recognize(name if name in ("glyphs", "synthetic:3x2") else f"{tmp_path}/{name}") for name in kinds}
    assert found == kinds and set(kinds.values()) == set(sources.KINDS)


def test_what_is_no_source(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("once upon a time")
    write_tensors(tmp_path / "tensors", pictures(2), np.array([0, 1]))
    for source, reason in [
        ("absent", "there is no such file or folder"),
        (str(tmp_path / "text"), "begins with 6f 6e 63 65; want a train.rec"),
        (f"{tmp_path}/tensors,{tmp_path}/tensors", "want Omniglot's zips alone"),
    ]:
        with pytest.raises(ValueError, match=reason):
            recognize(source)


# All together


def test_whole_names_decide_the_split_but_for_glyphs(tmp_path: Path, lines: Lines) -> None:
    write_tensors(tmp_path / "a", pictures(80), np.arange(80) // 2, names=[f"a{i}" for i in range(40)])
    train, test = load_data(DataConfig(source=str(tmp_path / "a"), holdout=0.3), lines.append)
    assert 4 < test.num_classes < 20 and train.num_classes + test.num_classes == 40  # 12 expected
    more, _ = load_data(DataConfig(source=str(tmp_path / "a"), holdout=0.1), lines.append)
    assert set(train.names) < set(more.names)
    assert sources.KINDS["glyphs"].key("ab") == sources.KINDS["glyphs"].key("ac") != sources.KINDS["glyphs"].key("b")


def test_identities_of_one_image_are_not_evaluated_and_the_log_says_so(tmp_path: Path, lines: Lines) -> None:
    labels = np.concatenate([np.arange(40), np.arange(20)])  # the second half has one image each
    write_tensors(tmp_path / "a", pictures(60), labels)
    _, test = load_data(DataConfig(source=str(tmp_path / "a"), holdout=0.5), lines.append)
    assert (torch.bincount(test.labels) == 2).all() and set(test.names) < {str(i) for i in range(20)}
    held_out = int(lines[-1].split()[5])
    assert held_out > test.num_classes and f"evaluated are {test.num_classes} of {held_out}" in lines[-1]


# Real samples, where there are any


def sample(pattern: str) -> str:
    """Files of the folder FASTMARGIN_DATA, with commas between them."""
    folder = os.environ.get("FASTMARGIN_DATA")
    found = sorted(str(path) for path in Path(folder).glob(pattern)) if folder else []
    if not found:
        warnings.warn(f"no {pattern} in FASTMARGIN_DATA={folder}: the reader is NOT tested on real files", stacklevel=2)
        pytest.skip(f"FASTMARGIN_DATA={folder} has no {pattern}")
    return ",".join(found)


def test_mnist(lines: Lines) -> None:
    found = load_idx(DataConfig(source=sample("*t10k-images-idx3-ubyte*")), lines.append)
    assert found.images.shape == (10_000, 28, 28) and found.names == [str(digit) for digit in range(10)]
    assert torch.bincount(found.labels).tolist() == [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]
    assert found.images[found.labels == 1].float().mean() < found.images[found.labels == 0].float().mean() < 50


def test_omniglot_small(lines: Lines) -> None:
    found = load_omniglot(DataConfig(source=sample("omniglot_background_small*.zip")), lines.append)
    assert (torch.bincount(found.labels) == 20).all() and "Greek/character01" in found.names
    assert found.images.shape[1:] == (32, 32) and found.images.float().mean() < 40  # little ink, on black
