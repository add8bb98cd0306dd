"""A folder that holds a folder for each identity: ROOT/NAME/.../PICTURE.

All pictures below ROOT/NAME, at any depth, are of the identity NAME. A picture is a file with one of the SUFFIXES;
hidden files and folders (.DS_Store, .git) and other files are ignored. Pictures in ROOT itself belong to no identity:
they are left out, and the log says how many.
"""

import os
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from fastmargin.driver.config import DataConfig
from fastmargin.driver.data.identities import Identities
from fastmargin.driver.data.sources.packed import pack
from fastmargin.driver.log import Log

SIZE = 112  # pixels a side, if data.size is null
SUFFIXES = frozenset(".jpg .jpeg .png .webp .bmp .gif .tif .tiff .ppm .pgm".split())


class Folder:
    """The pictures, ordered by identity and then by path. ValueError if there are none."""

    def __init__(self, root: Path) -> None:
        self.root = root
        found = {name: pictures(root / name) for name in folders(root)}
        self.names = [name for name, files in found.items() if files]
        self.files = [file for name in self.names for file in found[name]]
        self.labels = np.repeat(np.arange(len(self.names)), [len(found[name]) for name in self.names])
        if not self.files:
            raise ValueError(f"{root} has no folder with images in it; want one for each identity, with its images")

    def read(self, number: int) -> bytes:
        return Path(self.files[number]).read_bytes()

    def title(self, number: int) -> str:
        return self.files[number]

    def facts(self) -> Iterable[object]:
        yield str(self.root.resolve())
        for file in self.files:
            status = os.stat(file)
            yield [os.path.relpath(file, self.root), status.st_size, status.st_mtime_ns]


def load_folder(config: DataConfig, log: Log) -> Identities:
    """ValueError if there are no pictures, or if too many cannot be read."""
    root = Path(config.source)
    folder = Folder(root)
    if stray := sum(entry.is_file() and is_picture(entry.name) for entry in os.scandir(root)):
        log(f"data: {stray} images that lie in {root} itself, in no identity's folder, are left out")
    return pack(folder, config.size or SIZE, config, log)


def folders(root: Path) -> list[str]:
    return sorted(entry.name for entry in os.scandir(root) if entry.is_dir() and not entry.name.startswith("."))


def pictures(folder: Path) -> list[str]:
    """The paths of all pictures in a folder and below it, sorted."""
    files = []
    for parent, below, names in os.walk(folder):
        below[:] = [name for name in below if not name.startswith(".")]
        files += [os.path.join(parent, name) for name in names if is_picture(name)]
    return sorted(files)


def is_picture(name: str) -> bool:
    return not name.startswith(".") and os.path.splitext(name)[1].lower() in SUFFIXES
