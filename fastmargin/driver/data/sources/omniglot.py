"""Omniglot's zips: characters that 20 people drew each (Lake, Salakhutdinov and Tenenbaum, Science 350, 2015).

    SET/ALPHABET/characterNN/NNNN_NN.png    105 x 105 pixels, black ink on white

A character is an identity, named ALPHABET/characterNN; ink becomes white on black, as in all sources here. Several
zips are given with commas between them; a drawing that is in more than one of them counts once.
"""

import re
from io import BytesIO
from pathlib import Path
from zipfile import BadZipFile, ZipFile

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps

from fastmargin.driver.config import DataConfig
from fastmargin.driver.data.identities import Identities
from fastmargin.driver.data.sources.pixels import Color, fit
from fastmargin.driver.log import Log

SIZE = 32  # pixels a side, if data.size is null
DRAWING = re.compile(r"[^/]+/([^/]+/character\d+)/(\d+_\d+)\.png")


def load_omniglot(config: DataConfig, log: Log) -> Identities:
    """ValueError for a zip that is damaged or holds no drawings."""
    drawings: dict[tuple[str, str], NDArray[np.uint8]] = {}
    for path in config.source.split(","):
        drawings |= read_zip(Path(path), config.size or SIZE, config.color or "gray")
    characters = sorted(drawings)
    names = sorted({name for name, _ in characters})
    labels = np.searchsorted(names, [name for name, _ in characters])
    images = torch.from_numpy(np.stack([drawings[character] for character in characters]))
    return Identities(images, torch.from_numpy(labels), names)


def read_zip(path: Path, size: int, color: Color) -> dict[tuple[str, str], NDArray[np.uint8]]:
    """{(character, drawing): pixels}."""
    try:
        with ZipFile(path) as file:
            found = [match for name in file.namelist() if (match := DRAWING.fullmatch(name))]
            drawings = {(match[1], match[2]): draw(file.read(match[0]), size, color) for match in found}
    except (BadZipFile, OSError, SyntaxError) as error:  # Pillow raises the last two as well
        raise ValueError(f"{path} is damaged: {error}") from error
    if not drawings:
        raise ValueError(f"{path} holds no drawing of Omniglot: SET/ALPHABET/characterNN/NNNN_NN.png")
    return drawings


def draw(data: bytes, size: int, color: Color) -> NDArray[np.uint8]:  # [size, size] or [size, size, 3]
    with Image.open(BytesIO(data), formats=["PNG"]) as image:
        return fit(ImageOps.invert(image.convert("L")), size, color)
