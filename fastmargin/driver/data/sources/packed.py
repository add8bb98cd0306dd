"""Packed images: decoded once, at the size of training, then read through a memory map.

One file, appended to and then never changed:

    records   N images [H, W] or [H, W, 3] uint8, back to back
    index     in safetensors: shape of a record; labels [N] int64; checksums [N] uint32, the CRC32 of each record;
              numbers [N] int64, the number of its picture in the source; names, a JSON list in UTF-8
    trailer   20 bytes, little endian: b"FMPK", version uint32, length of the index uint64, its CRC32 uint32

It is written under another name and renamed when complete. Opening it checks the index, reading an image checks its
record. Its name has a hash of all that the pixels depend on: the files, by name, size and time of modification, the
size and color of the configuration, and the version of Pillow.
"""

import hashlib
import json
import math
import struct
import sys
import zlib
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Protocol

import numpy as np
import PIL
import safetensors.numpy
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from torch import Tensor
from tqdm import tqdm

from fastmargin.driver.config import DataConfig
from fastmargin.driver.data.identities import Identities, dense
from fastmargin.driver.data.sources.pixels import Color, decode, own_color
from fastmargin.driver.log import Log, on_one_line
from fastmargin.files import written

VERSION = 3
TRAILER = struct.Struct("<4sIQI")
MAGIC = b"FMPK"
BLOCK = 1024  # images decoded together
UNREADABLE = 0.01  # share of the images that may be skipped
SHOWN = 10  # skipped images that an error names


class Encoded(Protocol):
    """N pictures as they are in their files."""

    labels: NDArray[np.int64]  # [N] 0..C-1
    names: list[str]  # [C]

    def read(self, number: int) -> bytes:
        """The bytes of an encoded picture. Raises OSError or ValueError."""

    def title(self, number: int) -> str:
        """A name of the picture for messages."""

    def facts(self) -> Iterable[object]:
        """Values for JSON that change whenever the pictures do."""


class Packed:
    """The images of a packed file. ValueError says what is damaged: the index, or a record when it is read."""

    def __init__(self, path: Path, encoded: Encoded) -> None:
        self.path, self._encoded = path, encoded
        index = read_index(path)
        self.shape = (len(index["labels"]), *index["shape"].tolist())
        self.labels, self.names = index["labels"], json.loads(index["names"].tobytes())
        self._checksums, self._numbers = index["checksums"], index["numbers"]
        self._pixels = np.asarray(np.memmap(path, np.uint8, "r", shape=self.shape))

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(
        self,
        index: NDArray[np.int64],  # [m]
    ) -> Tensor:  # [m, H, W] or [m, H, W, 3] uint8
        pixels = self._pixels[index]
        for number, record in zip(index.tolist(), pixels, strict=True):
            if zlib.crc32(record) != self._checksums[number]:
                name = self.names[self.labels[number]]
                raise ValueError(
                    f"{self.path}: image {number}, of {name}, is damaged: its CRC32 is not what was written. "
                    "Remove the file to have it made anew"
                )
        return torch.from_numpy(pixels)

    def checksums(self) -> NDArray[np.uint32]:  # [N]
        return self._checksums

    def title(self, number: int) -> str:
        return self._encoded.title(int(self._numbers[number]))


def pack(encoded: Encoded, size: int, config: DataConfig, log: Log) -> Identities:
    """The pictures as identities, from the packed file for their key, which is written if there is none.

    An identity without a readable picture is left out. ValueError if more than the share UNREADABLE of the pictures
    cannot be read; OSError if the file cannot be written.
    """
    path = config.cache_folder() / f"packed-{key(encoded, size, config.color)}.fmpk"
    if path.exists():
        try:
            packed = Packed(path, encoded)
        except ValueError as damage:
            log(f"data: packing anew: {damage}")
        else:
            if missing := len(encoded.labels) - len(packed):
                log(f"data: {missing} unreadable images were left out when {path} was packed")
            return identities(packed)
    path.parent.mkdir(parents=True, exist_ok=True)
    with written(path) as draft:
        write(draft, encoded, size, config.color or shared_color(encoded), log)
    log(f"data: packed {path}, {path.stat().st_size / 1e6:.1f} MB")
    return identities(Packed(path, encoded))


def identities(packed: Packed) -> Identities:
    return Identities(packed, torch.from_numpy(packed.labels), packed.names)


def key(encoded: Encoded, size: int, color: Color | None) -> str:
    digest = hashlib.sha256()
    for fact in ([VERSION, size, color, PIL.__version__], *encoded.facts()):
        digest.update(json.dumps(fact).encode() + b"\n")
    return digest.hexdigest()[:16]


def shared_color(encoded: Encoded) -> Color:
    """Gray if all pictures that can be opened are. ValueError if none can."""
    colors = own_colors(encoded)
    first = next(colors, None)
    if first is None:
        raise ValueError(f"none of {len(encoded.labels)} images can be read, from {encoded.title(0)} on")
    return "rgb" if first == "rgb" or "rgb" in colors else "gray"


def own_colors(encoded: Encoded) -> Iterator[Color]:
    for number in range(len(encoded.labels)):
        try:
            yield own_color(encoded.read(number))
        except Exception:  # `write` counts them
            continue


def write(path: Path, encoded: Encoded, size: int, color: Color, log: Log) -> None:
    """Writes all pictures, decoded and in order, then index and trailer."""
    count = len(encoded.labels)
    log(f"data: packing {count} images of {len(encoded.names)} identities at {size} x {size}, {color}, once")
    kept: list[int] = []
    checksums: list[int] = []
    skipped: list[str] = []
    grays = 0
    with path.open("wb") as file, tqdm(total=count, unit="image", disable=not sys.stderr.isatty()) as bar:
        for number, found in decoded(encoded, size, color):
            bar.update()
            if isinstance(found, Exception):
                skipped.append(on_one_line(f"{encoded.title(number)} ({found})"))
                log(f"data: skipped {skipped[-1]}")
                check_budget(skipped, count)
                continue
            pixels, own = found
            grays += own == "gray"
            file.write(record := pixels.tobytes())
            kept.append(number)
            checksums.append(zlib.crc32(record))
        labels, old = dense(encoded.labels[kept])
        shape = (size, size, 3) if color == "rgb" else (size, size)
        index = index_of(shape, labels.numpy(), checksums, kept, [encoded.names[label] for label in old])
        file.write(index + TRAILER.pack(MAGIC, VERSION, len(index), zlib.crc32(index)))
    if color == "rgb" and grays:
        log(f"data: {grays} of {count} images are gray, and packed in color as the others are")


def index_of(
    shape: tuple[int, ...],  # of a record
    labels: NDArray[np.int64],  # [N]
    checksums: list[int],  # [N]
    numbers: list[int],  # [N]
    names: list[str],  # [C]
) -> bytes:
    tensors = {
        "shape": np.array(shape),
        "labels": labels,
        "checksums": np.array(checksums, np.uint32),
        "numbers": np.array(numbers),
        "names": np.frombuffer(json.dumps(names).encode(), np.uint8),
    }
    return safetensors.numpy.save(tensors)


def decoded(
    encoded: Encoded, size: int, color: Color
) -> Iterator[tuple[int, tuple[NDArray[np.uint8], Color] | Exception]]:
    """(number, (pixels, the picture's own color)) in order, decoded by a pool of threads; an exception stands in place
    of both."""

    def attempt(number: int) -> tuple[NDArray[np.uint8], Color] | Exception:
        try:
            data = encoded.read(number)
            return decode(data, size, color), own_color(data)
        except Exception as error:  # Pillow raises whatever its parsers run into
            return error

    with ThreadPoolExecutor() as pool:
        for start in range(0, len(encoded.labels), BLOCK):
            block = range(start, min(start + BLOCK, len(encoded.labels)))
            yield from zip(block, pool.map(attempt, block), strict=True)


def check_budget(skipped: list[str], count: int) -> None:
    """ValueError once more than the share UNREADABLE of `count` images is skipped; one always may be."""
    if len(skipped) > math.ceil(UNREADABLE * count) or len(skipped) == count:
        more = f", and {len(skipped) - SHOWN} more" if len(skipped) > SHOWN else ""
        raise ValueError(
            f"{len(skipped)} of {count} images cannot be read, more than {UNREADABLE:.0%}: "
            f"{'; '.join(skipped[:SHOWN])}{more}"
        )


def read_index(path: Path) -> dict[str, NDArray]:
    """The tensors of `index_of`. ValueError unless length and index of the file are as `write` wrote them."""
    whole = path.stat().st_size
    with path.open("rb") as file:
        file.seek(max(0, whole - TRAILER.size))
        trailer = file.read()
        if len(trailer) < TRAILER.size or not trailer.startswith(MAGIC):
            raise ValueError(f"{path} is damaged: it has no trailer")
        _, version, length, checksum = TRAILER.unpack(trailer)
        start = whole - TRAILER.size - length
        file.seek(max(0, start))
        data = file.read(length)
    if version != VERSION or start < 0 or zlib.crc32(data) != checksum:
        raise ValueError(f"{path} is damaged: its index is not what was written")
    try:
        index = safetensors.numpy.load(data)
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    if start != len(index["labels"]) * index["shape"].prod():
        raise ValueError(f"{path} is damaged: {start} bytes of records for {len(index['labels'])} images")
    return index
