"""Glyph identities: a character is an identity, its images are drawn from the font faces that have it.

Rules, in order:
1. Faces: all fonts that matplotlib ships, or those of a folder. Not LastResort, STIXNonUni and STIXSiz*: they
   have no text. The TeX fonts (cmr10 and its family) have encodings of their own under Unicode code points:
   only 0-9, A-Z and a-z of the roman, bold, sans, italic and typewriter ones are what their code points say.
2. Characters: letters, numbers, mathematical, currency and other symbols, in at least `faces` faces by
   their character maps. Not Braille, punctuation or modifiers: they differ in where the ink lies, which rule
   3 does not keep.
3. Images: white on black, the ink scaled to 28/32 of the side per em (smaller if it would not fit) and
   centered.
4. Merging: two characters are one identity if their images have a cosine of TWIN or more in at least half of
   the faces that have both, and so on from one to the next. To ask it of all faces would leave A and Alpha
   apart, because of hinting and edited outlines.
5. Cleaning: an image with a cosine of COPY or more to an earlier one of its identity is dropped (Sans and
   Mono share drawings). Images of two identities that reach TWIN in one face, or are equal in any two, are
   label noise: both are dropped.
6. Identities left with at least `faces` images stay, in the order of their smallest code points.

The images are drawn once and kept in a cache. Its key is made of all that they depend on: rules, sizes, fonts,
and the versions of Pillow, FreeType and Unicode, since another FreeType draws a tenth of the glyphs one row
of pixels differently.
"""

import json
import logging
import os
import re
import time
import unicodedata
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np
import PIL
import safetensors.torch
import torch
from fontTools.ttLib import TTCollection, TTFont
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont, features
from torch import Tensor

from fastmargin.driver.config import DataConfig
from fastmargin.driver.data.identities import Identities
from fastmargin.driver.log import Log
from fastmargin.files import sha256, written
from fastmargin.require import require

SIZE = 32  # pixels a side, if data.size is null
RULES = 1  # to be increased with every change of a rule, which makes old caches invalid
CATEGORIES = frozenset("Lu Ll Lt Lo Nd Nl No Sm Sc So".split())
BRAILLE = range(0x2800, 0x2900)
NO_TEXT = re.compile(r"LastResort|STIXNonUni|STIXSiz")
TEX = re.compile(r"cm[a-z]+\d+")
TEX_TEXT = re.compile(r"cm(r|b|ss|ti|tt)10")
TWIN, COPY = 0.995, 0.999  # cosines of raw pixels
BLOCK = 1024  # rows of a similarity matrix held at once


class Face(NamedTuple):
    path: Path
    number: int  # in a font collection
    codes: frozenset[int]  # characters that rules 1 and 2 allow


class Glyphs(NamedTuple):
    """Images, sorted by face and then by code point."""

    code: NDArray[np.int64]  # [N]
    face: NDArray[np.int64]  # [N]
    pixels: NDArray[np.uint8]  # [N, size * size]


def load_glyphs(config: DataConfig, log: Log = print) -> Identities:
    """All identities of the configured fonts, from the cache or rendered into it.

    If the cache is damaged or cannot be written, the log says so and the images are rendered. ValueError if the
    folder holds no fonts or no identity is left of them, or if color is asked for; OSError if a font file cannot be
    opened.
    """
    require(config.color != "rgb", "data.color", config.color, "gray: glyphs have no color")
    fonts = find_fonts(config.fonts)
    cache = cache_file(config, fonts)
    identities = read_cache(cache, log)
    if identities is None:
        identities = render(fonts, config.faces, config.size or SIZE, log)
        write_cache(cache, identities, log)
    return identities


def first_code_point(name: str) -> int:
    """The key by which an identity is held out or not: the split stays with other fonts, rules and characters."""
    return ord(name[0])


def find_fonts(folder: str | None) -> list[Path]:
    """The font files under a folder; None: those of matplotlib. ValueError if there are none."""
    if folder is None:
        import matplotlib

        folder = f"{matplotlib.get_data_path()}/fonts/ttf"
    if not Path(folder).is_dir():
        raise ValueError(f"{folder} is not a folder of fonts: there is no such folder")
    there = (Path(parent, name) for parent, _, names in os.walk(folder, onerror=refuse) for name in names)
    files = (path for path in there if path.suffix.lower() in (".ttf", ".otf", ".ttc"))
    fonts = sorted(path for path in files if path.is_file() and not NO_TEXT.match(path.name))
    if not fonts:
        raise ValueError(f"no .ttf, .otf or .ttc font in the folder {folder}")
    return fonts


def refuse(error: OSError) -> None:
    raise error  # os.walk, as rglob, would pass over a folder that cannot be read


def render(fonts: list[Path], faces: int, size: int, log: Log) -> Identities:
    """Draw, merge and clean."""
    begin = time.perf_counter()
    log(f"glyphs: rendering {len(fonts)} font files, once")
    glyphs = draw_faces(read_faces(fonts, log), faces, size, log)
    identities = clean(glyphs, faces, size)
    if not identities.names:
        raise ValueError(f"no character of the fonts in {fonts[0].parent} has {faces} different images")
    seconds = time.perf_counter() - begin
    log(f"glyphs: {identities.num_classes} identities, {len(identities.images)} images in {seconds:.1f} s")
    return identities


# Rules 1 and 2: faces and characters


def read_faces(fonts: list[Path], log: Log) -> list[Face]:
    """The faces of all files that can be read; the others are logged."""
    logging.getLogger("fontTools").setLevel(logging.CRITICAL)  # it warns about time stamps
    faces = []
    for path in fonts:
        try:
            faces += faces_of(path)
        except Exception as error:  # fontTools raises whatever its parsers run into
            log(f"glyphs: skipped {path}: {error}")
    return faces


def faces_of(path: Path) -> list[Face]:
    """Every face of a font file or collection, with its usable characters."""
    kind = TTCollection if path.suffix.lower() == ".ttc" else TTFont
    with kind(path, lazy=True) as opened:
        maps = [font.getBestCmap() or {} for font in getattr(opened, "fonts", [opened])]
    return [
        Face(path, number, frozenset(code for code in codes if usable(code, path.stem)))
        for number, codes in enumerate(maps)
    ]


def usable(code: int, font: str) -> bool:
    """Whether rules 1 and 2 allow a character of a font."""
    character = chr(code)
    if TEX.fullmatch(font):
        return TEX_TEXT.fullmatch(font) is not None and character.isascii() and character.isalnum()
    return unicodedata.category(character) in CATEGORIES and code not in BRAILLE


# Rule 3: images


def draw_faces(faces: list[Face], least: int, size: int, log: Log) -> Glyphs:
    """All images of the characters that at least `least` faces have; those without ink are left out."""
    count = Counter(code for face in faces for code in face.codes)
    rows: list[tuple[int, int, NDArray[np.uint8]]] = []
    for number, face in enumerate(faces):
        codes = sorted(code for code in face.codes if count[code] >= least)
        try:
            rows += [(code, number, pixels) for code, pixels in draw_face(face, codes, size)]
        except (OSError, Image.DecompressionBombError) as error:  # damaged, huge, or bitmaps of other sizes
            log(f"glyphs: skipped {face.path}: {error}")
    pixels = np.array([row[2] for row in rows], np.uint8).reshape(len(rows), size * size)
    return Glyphs(np.array([row[0] for row in rows], int), np.array([row[1] for row in rows], int), pixels)


def draw_face(face: Face, codes: list[int], size: int) -> list[tuple[int, NDArray[np.uint8]]]:
    """(code point, pixels [size * size]) of each character with ink. OSError if FreeType refuses."""
    em = max(64, 2 * size)  # hinting rounds to pixels of this size, at most half as large as those of the image
    font = ImageFont.truetype(str(face.path), em, index=face.number, layout_engine=ImageFont.Layout.BASIC)
    drawn = [(code, draw(font, chr(code), size)) for code in codes]
    return [(code, pixels) for code, pixels in drawn if pixels.any()]


def draw(font: ImageFont.FreeTypeFont, character: str, size: int) -> NDArray[np.uint8]:  # [size * size]
    """Placed by the bounding box of its ink, not by font metrics, which differ wildly between fonts."""
    left, top, right, bottom = (int(edge) for edge in font.getbbox(character))
    glyph = Image.new("L", (right - left, bottom - top))
    ImageDraw.Draw(glyph).text((-left, -top), character, fill=255, font=font)
    glyph = glyph.crop(glyph.getbbox())
    room = size * 28 / 32
    scale = min(room / font.size, room / max(1, *glyph.size))
    width, height = (max(1, round(side * scale)) for side in glyph.size)
    image = Image.new("L", (size, size))
    if all(glyph.size):
        small = glyph.resize((width, height), Image.Resampling.BOX)
        image.paste(small, ((size - width) // 2, (size - height) // 2))
    return np.asarray(image).reshape(-1)


# Rules 4 to 6: identities


def clean(glyphs: Glyphs, least: int, size: int) -> Identities:
    """Characters to identities: merged, without copies and label noise, with at least `least` images each."""
    codes, character = np.unique(glyphs.code, return_inverse=True)
    pairs = twins(glyphs)
    root = merge(character, glyphs.face, pairs, len(codes))  # [characters]
    identity = root[character]  # [N]
    kept = first_copies(glyphs.pixels, identity) & ~ambiguous(glyphs.pixels, identity, pairs)
    enough = np.bincount(identity[kept], minlength=len(codes)) >= least
    rows = np.flatnonzero(kept & enough[identity])
    rows = rows[np.argsort(identity[rows], kind="stable")]
    roots, labels = np.unique(identity[rows], return_inverse=True)
    names = ["".join(chr(code) for code in codes[root == one]) for one in roots]
    images = torch.from_numpy(glyphs.pixels[rows].reshape(-1, size, size))
    return Identities(images, torch.from_numpy(labels.astype(np.int64)), names)


def unit(
    pixels: NDArray[np.uint8],  # [n, p]
) -> Tensor:  # [n, p] float32 rows of norm 1
    return torch.nn.functional.normalize(torch.from_numpy(pixels).float())


def twins(glyphs: Glyphs) -> NDArray[np.int64]:  # [2, pairs] rows of glyphs, first < second
    """All pairs of characters whose images in one face reach cosine TWIN."""
    pairs = [np.empty((2, 0), int)]
    for face in np.unique(glyphs.face):
        rows = np.flatnonzero(glyphs.face == face)
        x = unit(glyphs.pixels[rows])
        for start in range(0, len(rows), BLOCK):
            near = x[start : start + BLOCK] @ x[start:].T >= TWIN
            pairs.append(rows[start + near.triu(1).nonzero().T.numpy()])
    return np.concatenate(pairs, axis=1)


def merge(
    character: NDArray[np.int64],  # [N] in 0..characters-1
    face: NDArray[np.int64],  # [N]
    pairs: NDArray[np.int64],  # [2, pairs]
    characters: int,
) -> NDArray[np.int64]:  # [characters] the smallest character of the identity
    """Union-find over all pairs of characters that are twins in at least half of the faces that have both."""
    present = np.zeros((characters, face.max(initial=0) + 1), bool)
    present[character, face] = True
    first, second = character[pairs]
    keys, agree = np.unique(first * characters + second, return_counts=True)
    first, second = np.divmod(keys, max(characters, 1))
    half = 2 * agree >= (present[first] & present[second]).sum(1)
    parent = list(range(characters))
    for a, b in zip(first[half].tolist(), second[half].tolist(), strict=True):
        a, b = find(parent, a), find(parent, b)
        parent[max(a, b)] = min(a, b)
    return np.array([find(parent, one) for one in range(characters)], int)


def find(parent: list[int], one: int) -> int:
    """The root of the tree that `one` is in; halves the path on the way."""
    while parent[one] != one:
        parent[one] = one = parent[parent[one]]
    return one


def first_copies(
    pixels: NDArray[np.uint8],  # [N, p]
    identity: NDArray[np.int64],  # [N]
) -> NDArray[np.bool_]:  # [N]
    """Whether an image stays: it is below COPY to all earlier images of its identity that stay."""
    kept = np.ones(len(identity), bool)
    order = np.argsort(identity, kind="stable")
    for rows in np.split(order, np.flatnonzero(np.diff(identity[order])) + 1):
        x = unit(pixels[rows])
        near = (x @ x.T >= COPY).numpy()
        for i in range(1, len(rows)):
            kept[rows[i]] = not (near[i, :i] & kept[rows[:i]]).any()
    return kept


def ambiguous(
    pixels: NDArray[np.uint8],  # [N, p]
    identity: NDArray[np.int64],  # [N]
    pairs: NDArray[np.int64],  # [2, pairs]
) -> NDArray[np.bool_]:  # [N]
    """Whether another identity has the image, too: a twin in the same face, or the same pixels in any face."""
    found = np.zeros(len(identity), bool)
    first, second = identity[pairs]
    found[pairs[:, first != second]] = True
    seen: dict[bytes, int] = {}
    drawing = np.array([seen.setdefault(row.tobytes(), len(seen)) for row in pixels], int)
    low, high = np.full(len(seen), len(identity)), np.full(len(seen), -1)
    np.minimum.at(low, drawing, identity)
    np.maximum.at(high, drawing, identity)
    return found | (low != high)[drawing]


# The cache: <key>.safetensors holds the data, <key>.json its SHA-256


def cache_file(config: DataConfig, fonts: list[Path]) -> Path:
    """Where the images of this configuration are kept."""
    facts = {
        "rules": RULES,
        "faces": config.faces,
        "size": config.size or SIZE,
        "fonts": [[path.name, sha256(path)] for path in fonts],
        "versions": [PIL.__version__, features.version("freetype2"), unicodedata.unidata_version],
    }
    return config.cache_folder() / f"glyphs-{sha256(json.dumps(facts).encode())[:16]}.safetensors"


def read_cache(path: Path, log: Log) -> Identities | None:
    """What `write_cache` wrote there; None if there is no such file or it has changed since."""
    if not path.exists():
        return None
    try:
        data = path.read_bytes()
        if sha256(data) != json.loads(path.with_suffix(".json").read_text())["sha256"]:
            raise ValueError("its SHA-256 is not the manifest's")
        tensors = safetensors.torch.load(data)
    except (OSError, ValueError, LookupError, TypeError) as error:
        log(f"glyphs: the cache {path} is damaged, rendering again: {error}")
        return None
    names = tensors["names"].numpy().tobytes().decode().split("\n")
    return Identities(tensors["images"], tensors["labels"], names)


def write_cache(path: Path, identities: Identities, log: Log) -> None:
    """Keeps the identities; if the folder cannot be written, the log says so."""
    images, labels = identities.images, identities.labels
    assert isinstance(images, Tensor)
    names = torch.frombuffer(bytearray("\n".join(identities.names), "utf-8"), dtype=torch.uint8)
    data = safetensors.torch.save({"images": images, "labels": labels, "names": names})
    manifest = {"sha256": sha256(data), "identities": identities.num_classes, "images": len(images)}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        for file, content in (path, data), (path.with_suffix(".json"), json.dumps(manifest, indent=2).encode()):
            with written(file) as draft:
                draft.write_bytes(content)
    except OSError as error:
        log(f"glyphs: no cache kept: {error}")
