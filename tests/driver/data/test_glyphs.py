"""Glyph identities: the rules against brute force, their result on real fonts, and the cache."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import torch
from fontTools import subset
from fontTools.ttLib import TTCollection, TTFont

from fastmargin.driver.config import DataConfig
from fastmargin.driver.data.identities import Identities
from fastmargin.driver.data.sources import glyphs
from fastmargin.driver.data.sources.glyphs import Glyphs, cache_file, find_fonts, load_glyphs

SHIPPED = Path(matplotlib.get_data_path()) / "fonts/ttf"
FEW = ["DejaVuSans.ttf", "DejaVuSansMono.ttf", "DejaVuSerif.ttf"]


@pytest.fixture(scope="session")
def everything(tmp_path_factory: pytest.TempPathFactory) -> Identities:
    return load_glyphs(DataConfig(cache=str(tmp_path_factory.mktemp("glyphs"))))


@pytest.fixture(scope="session")
def few(tmp_path_factory: pytest.TempPathFactory) -> tuple[DataConfig, Identities, Path]:
    """A small configuration (three fonts, Latin and Greek letters), its identities and its cache file."""
    folder = tmp_path_factory.mktemp("fonts")
    for name in FEW:
        font = TTFont(SHIPPED / name)
        cut = subset.Subsetter(subset.Options(layout_features=[], hinting=False))
        cut.populate(unicodes=[*range(0x41, 0x7B), *range(0xC0, 0x180), *range(0x391, 0x3CA)])
        cut.subset(font)
        font.save(folder / name)
    config = DataConfig(fonts=str(folder), faces=3, cache=str(tmp_path_factory.mktemp("few")))
    return config, load_glyphs(config), cache_file(config, find_fonts(config.fonts))


@pytest.fixture
def cached(few: tuple[DataConfig, Identities, Path], tmp_path: Path) -> tuple[DataConfig, Path]:
    """A copy of the small configuration's cache, to be damaged."""
    config, _, file = few
    shutil.copytree(file.parent, tmp_path / "cache")
    return DataConfig(fonts=config.fonts, faces=3, cache=str(tmp_path / "cache")), tmp_path / "cache" / file.name


def equal(a: Identities, b: Identities) -> bool:
    return torch.equal(a.images, b.images) and torch.equal(a.labels, b.labels) and a.names == b.names


def home(identities: Identities, character: str) -> int:
    """The identity of a character."""
    (found,) = [label for label, name in enumerate(identities.names) if character in name]
    return found


def test_a_folder_of_fonts_that_cannot_be_read_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "closed").mkdir()
    (tmp_path / "DejaVuSans.ttf").symlink_to(SHIPPED / "DejaVuSans.ttf")
    assert find_fonts(str(tmp_path)) == [tmp_path / "DejaVuSans.ttf"]
    listed = os.scandir

    def scandir(path: str) -> object:
        if os.fspath(path) == str(tmp_path / "closed"):
            raise PermissionError(13, "Permission denied", os.fspath(path))
        return listed(path)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(PermissionError, match="closed"):
        find_fonts(str(tmp_path))


# What the rules give on the fonts matplotlib ships


def test_default_counts_and_layout(everything: Identities) -> None:
    counts = torch.bincount(everything.labels)
    assert everything.num_classes == pytest.approx(2010, rel=0.02)
    assert len(everything.images) == pytest.approx(23758, rel=0.02)
    assert everything.images.shape[1:] == (32, 32)
    assert everything.images.dtype == torch.uint8 and everything.labels.dtype == torch.int64
    assert len(counts) == everything.num_classes and counts.min() >= 6
    assert (everything.labels.diff() >= 0).all()


def test_names_list_every_character_once_smallest_first(everything: Identities) -> None:
    firsts = [name[0] for name in everything.names]
    characters = "".join(everything.names)
    assert firsts == sorted(firsts) and all(list(name) == sorted(name) for name in everything.names)
    assert len(set(characters)) == len(characters)


def test_look_alike_characters_are_one_identity_and_distinct_ones_are_not(everything: Identities) -> None:
    assert home(everything, "A") == home(everything, "Α") == home(everything, "А")  # Latin, Greek, Cyrillic
    assert home(everything, "O") == home(everything, "Ο") == home(everything, "О")
    labels = {home(everything, character) for character in "IlOoCcbdpq0"}
    assert len(labels) == 11


def test_unwanted_characters_are_absent(everything: Identities) -> None:
    characters = set("".join(everything.names))
    assert not characters & set(".,!'-_()\u0301ʰ") and not any("\u2800" <= c <= "\u28ff" for c in characters)
    assert set("AZaz09+∑€") <= characters


def test_ink_is_white_centered_and_scaled_per_em(everything: Identities) -> None:
    ink = everything.images > 0
    for side in (ink.any(1), ink.any(2)):  # [N, 32] columns, rows
        first, last = side.int().argmax(1), 31 - side.flip(1).int().argmax(1)
        assert (last - first + 1).max() == 28
        assert (first + last - 31).abs().max() <= 1
    assert everything.images.amax((1, 2)).min() > 100

    def height(character: str) -> float:
        return ink[everything.labels == home(everything, character)].any(2).sum(1).float().mean().item()

    assert 0.6 < height("o") / height("O") < 0.85  # the x-height of these fonts; 1 if ink filled the box


def test_no_copies_inside_and_no_equal_images_across_identities(everything: Identities) -> None:
    counts = torch.bincount(everything.labels).tolist()
    for images in everything.images.split(counts)[::10]:
        x = torch.nn.functional.normalize(images.flatten(1).double())
        assert (x @ x.T).fill_diagonal_(0).max() < 0.999 + 1e-6
    assert len({image.numpy().tobytes() for image in everything.images}) == len(everything.images)


# The rules against brute force


def toy_glyphs(seed: int, characters: int = 24, faces: int = 5) -> Glyphs:
    """Nine-pixel drawings near a few prototypes, so that there are many twins, copies and equal images."""
    rng = np.random.default_rng(seed)
    prototypes = rng.integers(0, 200, (characters // 3, 9))
    drawn = [(c, f) for f in range(faces) for c in range(characters) if rng.random() < 0.8]
    pixels = [prototypes[c // 3] + f % 2 * rng.integers(0, 12, 9) + (f > 1) * rng.integers(0, 40, 9) for c, f in drawn]
    pixels[-1] = pixels[0]  # the last character in one face, the first one in another
    code, face = np.array(drawn).T
    return Glyphs(100 + 2 * code, face, np.array(pixels, np.uint8))


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    a, b = a.astype(float), b.astype(float)
    return float(a @ b / np.sqrt((a @ a) * (b @ b)))


def naive_roots(g: Glyphs) -> dict[int, int]:
    """Smallest code point of each character's identity, pair by pair."""
    image = {(int(c), int(f)): p for c, f, p in zip(*g, strict=True)}
    root = {c: c for c in sorted({c for c, _ in image})}
    for a in root:
        for b in root:
            shared = [f for f in range(5) if (a, f) in image and (b, f) in image]
            agree = sum(cosine(image[a, f], image[b, f]) >= 0.995 for f in shared)
            if a < b and agree and 2 * agree >= len(shared):
                low, high = sorted((root[a], root[b]))
                root = {c: low if r == high else r for c, r in root.items()}
    return root


def noise(one: int, face: int, image: np.ndarray, rows: list[tuple[int, int, np.ndarray]]) -> bool:
    """Whether another identity has the image, too."""
    others = [row for row in rows if row[0] != one]
    return any(np.array_equal(image, q) or (face == f and cosine(image, q) >= 0.995) for _, f, q in others)


def naive_clean(g: Glyphs, least: int) -> list[tuple[str, list[bytes]]]:
    """(name, images) of each identity, image by image."""
    root = naive_roots(g)
    rows = [(root[int(c)], int(f), p) for c, f, p in zip(*g, strict=True)]
    result = []
    for one in sorted(set(root.values())):
        first: list[np.ndarray] = []
        clear: list[bytes] = []
        for _, f, p in (row for row in rows if row[0] == one):
            if any(cosine(p, q) >= 0.999 for q in first):
                continue
            first.append(p)
            if not noise(one, f, p, rows):
                clear.append(p.tobytes())
        if len(clear) >= least:
            result.append(("".join(chr(c) for c in root if root[c] == one), clear))
    return result


@pytest.mark.parametrize("seed", range(8))
def test_merging_and_cleaning_equal_brute_force(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(glyphs, "BLOCK", 7)
    toy = toy_glyphs(seed)
    want = naive_clean(toy, 2)
    got = glyphs.clean(toy, 2, 3)
    assert 1 < len(want) < 24 and max(len(name) for name, _ in want) > 1
    assert got.names == [name for name, _ in want]
    assert [p.numpy().tobytes() for p in got.images] == [p for _, images in want for p in images]
    assert got.labels.tolist() == [label for label, (_, images) in enumerate(want) for _ in images]


@pytest.mark.parametrize(("shared", "agree", "merged"), [(4, 2, True), (4, 1, False), (5, 2, False), (5, 3, True)])
def test_half_of_the_shared_faces_merges(shared: int, agree: int, merged: bool) -> None:
    character = np.array([0, 1] * shared + [0] * 3)  # three more faces that only the first has
    face = np.array([*np.repeat(np.arange(shared), 2), 10, 11, 12])
    pairs = np.array([[2 * f, 2 * f + 1] for f in range(agree)]).T
    assert glyphs.merge(character, face, pairs, 2).tolist() == [0, 0 if merged else 1]


def test_fonts_that_draw_no_text_are_left_out() -> None:
    stems = {path.stem for path in find_fonts(None)}
    assert {"DejaVuSans", "STIXGeneral", "cmr10"} <= stems
    assert not any(stem.startswith(("STIXNonUni", "STIXSiz", "LastResort")) for stem in stems)
    assert glyphs.usable(ord("A"), "cmr10") and glyphs.usable(ord("é"), "cmunrm")
    assert not glyphs.usable(0xA1, "cmr10") and not glyphs.usable(ord("{"), "cmr10")
    assert [code for code in range(0x27F0, 0x2910) if not glyphs.usable(code, "a")] == [*range(0x2800, 0x2900)]
    assert not glyphs.usable(ord("A"), "cmsy10") and not glyphs.usable(ord("A"), "cmmi10")


# Font files


def test_collections_give_every_face(few: tuple[DataConfig, Identities, Path], tmp_path: Path) -> None:
    config, identities, _ = few
    collection = TTCollection()
    collection.fonts = [TTFont(Path(str(config.fonts)) / name) for name in FEW]
    (tmp_path / "nested").mkdir()
    collection.save(tmp_path / "nested" / "all.TTC")
    again = load_glyphs(DataConfig(fonts=str(tmp_path), faces=3, cache=str(tmp_path / "cache")))
    assert equal(identities, again)


def test_a_file_that_is_no_font_is_logged_and_skipped(few: tuple[DataConfig, Identities, Path], tmp_path: Path) -> None:
    config, identities, _ = few
    shutil.copytree(str(config.fonts), tmp_path / "fonts")
    (tmp_path / "fonts" / "Broken.ttf").write_bytes(b"no font at all")
    (tmp_path / "fonts" / "Cut.otf").write_bytes((SHIPPED / FEW[0]).read_bytes()[:5000])
    lines: list[str] = []
    again = load_glyphs(DataConfig(fonts=str(tmp_path / "fonts"), faces=3, cache=str(tmp_path)), lines.append)
    assert equal(identities, again)
    assert {name for line in lines for name in ("Broken.ttf", "Cut.otf") if name in line} == {
        "Broken.ttf",
        "Cut.otf",
    }


@pytest.mark.parametrize("exists", [True, False])
def test_a_folder_without_fonts_is_named(tmp_path: Path, exists: bool) -> None:
    folder = tmp_path / "fontless"
    if exists:
        folder.mkdir()
        (folder / "readme.txt").write_text("nothing here")
    with pytest.raises(ValueError, match="fontless"):
        load_glyphs(DataConfig(fonts=str(folder), cache=str(tmp_path)))


def test_too_few_faces_for_any_identity(tmp_path: Path) -> None:
    shutil.copy(SHIPPED / FEW[0], tmp_path)
    with pytest.raises(ValueError, match="has 3 different images"):
        load_glyphs(DataConfig(fonts=str(tmp_path), faces=3, cache=str(tmp_path / "cache")))


# The cache


def test_cache_hit_is_bit_equal_and_silent(few: tuple[DataConfig, Identities, Path]) -> None:
    config, identities, file = few
    lines: list[str] = []
    assert equal(identities, load_glyphs(config, lines.append))
    assert lines == []
    assert sorted(path.suffix for path in file.parent.iterdir()) == [".json", ".safetensors"]
    assert json.loads(file.with_suffix(".json").read_text())["identities"] == identities.num_classes


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(bytes(data))


@pytest.mark.parametrize(
    "damage",
    [
        flip,
        lambda file: file.write_bytes(file.read_bytes()[:-100]),
        lambda file: file.write_bytes(b""),
        lambda file: file.with_suffix(".json").unlink(),
        lambda file: file.with_suffix(".json").write_text("[1]"),
        lambda file: file.with_suffix(".json").write_bytes(b"\xff{"),
    ],
    ids=["flipped bit", "truncated", "empty", "no manifest", "other manifest", "garbage manifest"],
)
def test_damaged_cache_is_rendered_anew_and_repaired(
    cached: tuple[DataConfig, Path], few: tuple[DataConfig, Identities, Path], damage: Callable[[Path], None]
) -> None:
    config, file = cached
    damage(file)
    lines: list[str] = []
    assert equal(few[1], load_glyphs(config, lines.append))
    assert "damaged" in lines[0] and str(file) in lines[0]
    lines.clear()
    assert equal(few[1], load_glyphs(config, lines.append)) and lines == []


def test_no_cache_can_be_written(few: tuple[DataConfig, Identities, Path], tmp_path: Path) -> None:
    config, identities, _ = few
    (tmp_path / "file").write_text("in the way")
    lines: list[str] = []
    blocked = DataConfig(fonts=config.fonts, faces=3, cache=str(tmp_path / "file" / "cache"))
    assert equal(identities, load_glyphs(blocked, lines.append))
    assert "no cache kept" in lines[-1]


def test_cache_key_holds_what_the_images_depend_on(
    few: tuple[DataConfig, Identities, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = few[0].fonts
    fonts = find_fonts(folder)
    base = cache_file(DataConfig(fonts=folder), fonts)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    moved = cache_file(DataConfig(fonts=folder), fonts)
    assert moved == tmp_path / "fastmargin" / base.name
    assert cache_file(DataConfig(fonts=folder, holdout=0.5, split_seed=1, augment="none"), fonts) == moved
    shutil.copytree(str(folder), tmp_path / "fonts")
    flip(tmp_path / "fonts" / FEW[0])
    others = [
        cache_file(DataConfig(fonts=folder, faces=7), fonts),
        cache_file(DataConfig(fonts=folder, size=48), fonts),
        cache_file(DataConfig(fonts=folder), fonts[:-1]),
        cache_file(DataConfig(fonts=folder), find_fonts(str(tmp_path / "fonts"))),
    ]
    assert len({moved, *others}) == 5
