"""Tiny data sets, written in the formats that the driver reads."""

import gzip
import io
import json
import struct
from collections.abc import Iterable, Sequence
from pathlib import Path
from zipfile import ZipFile

import numpy as np
from PIL import Image
from safetensors.numpy import save_file

MAGIC = struct.pack("<I", 0xCED7230A)


def pictures(count: int, side: int = 20, colored: bool = True, seed: int = 0) -> np.ndarray:  # [count, side, side(, 3)]
    """Smooth pictures, each different."""
    shape = (count, 4, 4, 3) if colored else (count, 4, 4)
    coarse = np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)
    return np.stack([np.asarray(Image.fromarray(one).resize((side, side))) for one in coarse])


def encoded(pixels: np.ndarray, kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind, **options)
    return buffer.getvalue()


def write_folder(root: Path, pixels: np.ndarray, each: int, kind: str = "PNG") -> list[str]:
    """Writes `each` of the pictures to the folder of an identity; returns the names."""
    for number, picture in enumerate(pixels):
        folder = root / f"id{number // each:02}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{number:04}.{kind.lower()}").write_bytes(encoded(picture, kind))
    return sorted(path.name for path in root.iterdir())


def write_idx(path: Path, numbers: np.ndarray, zipped: bool = False) -> None:
    kind = {"u1": 0x08, "i1": 0x09, "i2": 0x0B, "i4": 0x0C, "f4": 0x0D}[numbers.dtype.str[1:]]
    head = struct.pack(f">BBBB{numbers.ndim}I", 0, 0, kind, numbers.ndim, *numbers.shape)
    data = head + numbers.astype(numbers.dtype.newbyteorder(">")).tobytes()
    path.write_bytes(gzip.compress(data) if zipped else data)


def write_omniglot(path: Path, drawings: dict[str, np.ndarray]) -> None:  # {ALPHABET/characterNN: [n, side, side] bool}
    """Ink is True; saved like the original, one bit a pixel, black on white."""
    with ZipFile(path, "w") as file:
        file.writestr("images_small/", b"")
        for number, (name, pixels) in enumerate(drawings.items()):
            for person, picture in enumerate(pixels, start=1):
                file.writestr(f"images_small/{name}/{number:04}_{person:02}.png", encoded(~picture))


def write_tensors(path: Path, images: np.ndarray, labels: np.ndarray, names: Sequence[str] | None = None) -> None:
    metadata = {"names": json.dumps(names)} if names is not None else None
    save_file({"images": images, "labels": labels}, path, metadata)


# RecordIO, as dmlc-core's writer and mxnet.recordio.pack write it


def packed(data: bytes, label: float | Sequence[float]) -> bytes:
    if isinstance(label, Sequence):
        head = struct.pack("<IfQQ", len(label), 0, 0, 0) + np.array(label, "<f4").tobytes()
    else:
        head = struct.pack("<IfQQ", 0, label, 0, 0)
    return head + data


def record(data: bytes) -> bytes:
    """Split where the data have the magic number at a multiple of four bytes; it is left out there."""
    cuts = [at for at in range(0, len(data) // 4 * 4, 4) if data[at : at + 4] == MAGIC]
    parts = [data[a:b] for a, b in zip([0, *(cut + 4 for cut in cuts)], [*cuts, len(data)], strict=True)]
    flags = [0] if len(parts) == 1 else [1, *[2] * (len(parts) - 2), 3]
    written = b"".join(
        MAGIC + struct.pack("<I", flag << 29 | len(part)) + part for flag, part in zip(flags, parts, strict=True)
    )
    return written + b"\0" * (-len(written) % 4)


def write_records(path: Path, data: Iterable[tuple[int, bytes]]) -> None:
    """Writes records (key, data) to PATH and its index."""
    offset, lines = 0, []
    with path.open("wb") as file:
        for key, one in data:
            lines.append(f"{key}\t{offset}\n")
            offset += file.write(record(one))
    path.with_suffix(".idx").write_text("".join(lines))


def write_insightface(path: Path, pixels: np.ndarray, labels: Sequence[int], kind: str = "PNG") -> None:
    """Record 0 says where the identities' records are, and those say where their pictures are; neither holds one."""
    count, identities = len(labels), sorted(set(labels))
    last = count + 1 + len(identities)
    data = [(0, packed(b"", [count + 1, last]))]
    data += [(1 + i, packed(encoded(p, kind), float(y))) for i, (p, y) in enumerate(zip(pixels, labels, strict=True))]
    data += [(count + 1 + i, packed(b"", [1.0, 2.0])) for i in range(len(identities))]
    write_records(path, data)
