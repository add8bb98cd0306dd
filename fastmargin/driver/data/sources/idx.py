"""IDX, the format of MNIST and similar sets (LeCun, Cortes and Burges): images in one file, labels in another.

    0, 0, type, dimensions     a byte each; type 8 is uint8, the others are in TYPES
    the size of each dimension, uint32 big endian; then the numbers, big endian, the last dimension fastest

Images are [N, H, W] uint8. The file of the labels lies beside that of the images; its name has "labels" for "images"
and "idx1" for "idx3". Either may be compressed by gzip. The name of an identity is its label.
"""

import gzip
import math
import struct
import zlib
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from fastmargin.driver.config import DataConfig
from fastmargin.driver.data.identities import Identities, dense
from fastmargin.driver.data.sources.pixels import fit_all
from fastmargin.driver.log import Log

TYPES = {0x08: ">u1", 0x09: ">i1", 0x0B: ">i2", 0x0C: ">i4"}
GZIP = b"\x1f\x8b"


def load_idx(config: DataConfig, log: Log) -> Identities:
    """ValueError if either file has another format, or their lengths differ."""
    path = Path(config.source)
    images, labels = read_idx(path), read_idx(labels_of(path))
    if images.ndim != 3 or images.dtype != np.uint8 or labels.shape != images.shape[:1]:
        raise ValueError(
            f"{path}: images {images.dtype} {list(images.shape)} with labels {list(labels.shape)}; "
            "want uint8 [N, H, W] and [N]"
        )
    order, values = dense(labels)
    pixels = fit_all(torch.from_numpy(images), config.size, config.color)
    return Identities(pixels, order, [str(value) for value in values])


def labels_of(images: Path) -> Path:
    """The file of the labels, compressed or not. ValueError if there is none."""
    name = images.name.removesuffix(".gz").replace("images", "labels").replace("idx3", "idx1")
    for path in (images.with_name(name), images.with_name(f"{name}.gz")):
        if path.name != images.name and path.is_file():
            return path
    raise ValueError(f"{images.with_name(name)} is not there, nor with .gz; want the labels of {images.name}")


def read_idx(path: Path) -> NDArray:
    """The numbers of a file. ValueError if it is of another format or length."""
    data = unzipped(path)
    if len(data) < 4 or data[:2] != b"\0\0" or data[2] not in TYPES or len(data) < 4 + 4 * data[3]:
        raise ValueError(f"{path} is no IDX file of integers: it begins with {data[:4].hex(' ')}")
    shape = struct.unpack_from(f">{data[3]}I", data, 4)
    kind, start = np.dtype(TYPES[data[2]]), 4 + 4 * len(shape)
    if len(data) - start != math.prod(shape) * kind.itemsize:
        raise ValueError(f"{path} has {len(data) - start} bytes of numbers; want {list(shape)} of {kind.itemsize}")
    return np.frombuffer(bytearray(data), kind, offset=start).reshape(shape)


def unzipped(path: Path) -> bytes:
    """The bytes of a file, decompressed if need be. ValueError if they are damaged."""
    data = path.read_bytes()
    try:
        return gzip.decompress(data) if data.startswith(GZIP) else data
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path} is damaged: {error}") from error
