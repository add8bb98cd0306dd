"""A folder that holds a folder for each identity: ROOT/NAME/.../PICTURE.

All pictures below ROOT/NAME, at any depth, are of the identity NAME. A picture is a file with one of the SUFFIXES, or
with another name and the content of a picture. Hidden files and folders (.DS_Store, .git) are ignored. The log counts
and names what else is left out: pictures in ROOT itself, which belong to no identity, other files, links to folders
below ROOT/NAME, and files and folders that cannot be read.
"""

import os
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from PIL import Image

from fastmargin.driver.config import DataConfig
from fastmargin.driver.data.identities import Identities
from fastmargin.driver.data.sources.packed import SHOWN, pack
from fastmargin.driver.data.sources.pixels import FORMATS
from fastmargin.driver.log import Log, on_one_line

SIZE = 112  # pixels a side, if data.size is null
SUFFIXES = frozenset(  # of files that are not opened to see whether they are pictures
    ".jpg .jpeg .jpe .jfif .png .apng .webp .avif .bmp .gif .tif .tiff .ppm .pgm .pbm .pnm .jp2".split()
)


class Folder:
    """The pictures, ordered by identity and then by path. ValueError if there are none.

    left_out: what else lies below the root and is not hidden, as "path (why)".
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.left_out: list[str] = []
        found = {name: pictures(root / name, self.left_out) for name in folders(root, self.left_out)}
        self.names = [name for name, files in found.items() if files]
        self.files = [file for name in self.names for file in found[name]]
        self.labels = np.repeat(np.arange(len(self.names)), [len(found[name]) for name in self.names])
        if not self.files:
            raise ValueError(
                f"{root} has no folder with images in it; want one for each identity, with its images"
                + (f". Left out are {some(self.left_out)}" if self.left_out else "")
            )

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
    folder = Folder(Path(config.source))
    if folder.left_out:
        log(f"data: left out are {some(folder.left_out)}")
    return pack(folder, config.size or SIZE, config, log)


def some(left_out: list[str]) -> str:
    more = f", and {len(left_out) - SHOWN} more" if len(left_out) > SHOWN else ""
    return f"{len(left_out)} files or folders: {', '.join(map(on_one_line, left_out[:SHOWN]))}{more}"


def folders(root: Path, left_out: list[str]) -> list[str]:
    names = []
    for entry in sorted(os.scandir(root), key=lambda entry: entry.name):
        if entry.name.startswith("."):
            continue
        if os.path.isdir(entry.path):
            names.append(entry.name)
        else:
            left_out.append(f"{entry.path} ({no_picture(entry.path) or 'in no folder of an identity'})")
    return names


def pictures(folder: Path, left_out: list[str]) -> list[str]:
    """The paths of all pictures in a folder and below it, sorted."""
    files = []

    def refuse(error: OSError) -> None:
        left_out.append(f"{error.filename} ({error.strerror})")

    for parent, below, names in os.walk(folder, onerror=refuse):
        below[:] = sorted(name for name in below if not name.startswith("."))
        for path in (os.path.join(parent, name) for name in below):
            if os.path.islink(path):  # not followed: it may lead in a circle
                left_out.append(f"{path} (a link to a folder)")
        for path in sorted(os.path.join(parent, name) for name in names if not name.startswith(".")):
            if why := no_picture(path):
                left_out.append(f"{path} ({why})")
            else:
                files.append(path)
    return sorted(files)


def no_picture(path: str) -> str | None:
    """Why a file is left out; None for a picture."""
    if not os.path.isfile(path):
        return "no file"
    if os.path.splitext(path)[1].lower() in SUFFIXES:
        return None
    try:
        with Image.open(path, formats=FORMATS):
            return None
    except Exception as error:  # Pillow raises whatever its parsers run into
        return (isinstance(error, OSError) and error.strerror) or "no picture"
