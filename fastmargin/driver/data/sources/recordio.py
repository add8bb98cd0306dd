"""InsightFace's training sets: RecordIO, train.rec with its index train.idx.

Sources: dmlc-core, recordio.h, for the records; mxnet.recordio for the headers; all numbers little endian.

    train.idx   lines "KEY<tab>OFFSET"
    record      magic 0xced7230a uint32; word uint32, its upper 3 bits the part, its lower 29 the length; data; zeros up
                to a multiple of 4 bytes. Part 0 is a whole record. Data with the magic number in them, 4-byte aligned,
                are split there and written without it: part 1 is the first, 2 a middle one, 3 the last.
    data        flag uint32, label float32, id uint64 twice; if flag > 0, so many further float32 labels, of which the
                first is the label; then an encoded picture

InsightFace has key ranges beside the pictures: record 0 (flag 2: where the identities begin and end) and one for
each identity (flag 2: where its pictures do). They hold no picture and are skipped: the labels tell the same.
A label of 2^24 or more is refused: as a float32 it may be another's, rounded.
"""

import mmap
import os
import struct
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fastmargin.driver.config import DataConfig
from fastmargin.driver.data.identities import Identities, dense
from fastmargin.driver.data.sources.packed import pack
from fastmargin.driver.log import Log

SIZE = 112  # pixels a side, if data.size is null
MAGIC = struct.pack("<I", 0xCED7230A)
LENGTH = 2**29 - 1  # mask of the length in a word
FIRST, LAST = (0, 1), (0, 3)  # parts that begin and that end a record
HEADER = np.dtype([
    ("magic", "<u4"), ("word", "<u4"), ("flag", "<u4"), ("label", "<f4"), ("ids", "<u8", 2), ("labels", "<f4"),
])  # fmt: skip
FIXED = 24  # bytes of the header before the further labels
EXACT = 2**24  # below it a float32 holds every whole number
BLOCK = 1 << 16  # headers read at once


class RecordIO:
    """The pictures of a record file, in order of their keys. ValueError says which record is damaged."""

    def __init__(self, path: Path) -> None:
        self.path = path
        keys, offsets = read_index(path.with_suffix(".idx"))
        with path.open("rb") as file:
            self.data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        headers = self._headers(keys, offsets)
        given = np.where(headers["flag"] > 0, headers["labels"], headers["label"])
        bare = FIXED + 4 * headers["flag"].astype(np.int64)  # the length of a record without a picture
        held = (headers["flag"] == 0) | (headers["word"] != bare)
        self.keys, self.offsets = keys[held], offsets[held]
        if not held.any():
            raise ValueError(f"{path} has {len(keys)} records; want pictures in some of them")
        labels, old = dense(self._exact(given[held]))
        self.labels, self.names = labels.numpy(), [str(label) for label in old]

    def read(self, number: int) -> bytes:
        data = self._record(int(self.offsets[number]))
        (flag,) = struct.unpack_from("<I", data)
        return data[FIXED + 4 * flag :]

    def title(self, number: int) -> str:
        return f"{self.path}, record {self.keys[number]}"

    def facts(self) -> Iterable[object]:
        for path in (self.path, self.path.with_suffix(".idx")):
            status = os.stat(path)
            yield [str(path.resolve()), status.st_size, status.st_mtime_ns]

    def _headers(
        self,
        keys: NDArray[np.int64],  # [N]
        offsets: NDArray[np.int64],  # [N]
    ) -> NDArray[np.void]:  # [N] HEADER
        whole = np.frombuffer(self.data, np.uint8)
        found = np.empty(len(keys), HEADER)
        for start in range(0, len(keys), BLOCK):
            at = offsets[start : start + BLOCK, None] + np.arange(HEADER.itemsize)
            found[start : start + BLOCK] = whole.take(at, mode="clip").view(HEADER)[:, 0]
        wrong = found["magic"] != int.from_bytes(MAGIC, "little")
        wrong |= ~np.isin(found["word"] >> 29, FIRST) | (offsets < 0) | (offsets > len(whole) - 8 - FIXED)
        if wrong.any():
            first = wrong.argmax()
            raise ValueError(
                f"{self.path}: no record {keys[first]} at byte {offsets[first]}, where the index has it; "
                "the index is of another file, or the file is damaged"
            )
        return found

    def _exact(
        self,
        given: NDArray[np.float32],  # [n]
    ) -> NDArray[np.int64]:  # [n]
        wrong = ~((given >= 0) & (given < EXACT)) | (given != np.floor(given))
        if wrong.any():
            first = wrong.argmax()
            raise ValueError(
                f"{self.path}: the label of record {self.keys[first]} is {given[first]}; "
                f"want a whole number from 0 to {EXACT - 1}, which a float32 holds exactly"
            )
        return given.astype(np.int64)

    def _record(self, offset: int) -> bytes:
        """The data of a record, its parts joined. ValueError if a part is missing."""
        parts: list[bytes] = []
        part = -1
        while part not in LAST:
            if self.data[offset : offset + 4] != MAGIC:
                raise ValueError(f"{self.path}: no record at byte {offset}")
            (word,) = struct.unpack_from("<I", self.data, offset + 4)
            part, length = word >> 29, word & LENGTH
            parts.append(self.data[offset + 8 : offset + 8 + length])
            if len(parts[-1]) < length:
                raise ValueError(f"{self.path}: the record at byte {offset} is cut short")
            offset += 8 + (length + 3) // 4 * 4
        return MAGIC.join(parts)


def load_recordio(config: DataConfig, log: Log) -> Identities:
    """`data.source` is the .rec file, or the folder that holds train.rec. ValueError says what is wrong with it."""
    path = Path(config.source)
    records = RecordIO(path / "train.rec" if path.is_dir() else path)
    return pack(records, config.size or SIZE, config, log)


def read_index(path: Path) -> tuple[NDArray[np.int64], NDArray[np.int64]]:  # [N] keys, [N] offsets
    """In order of the keys. ValueError if a line is not two numbers, or there is none."""
    if not path.is_file():
        raise ValueError(f"{path} is not there; want the index beside its records")
    try:
        lines = np.array(path.read_text().split(), np.int64).reshape(-1, 2)
    except ValueError as error:
        raise ValueError(f"{path}: want two numbers a line, key and offset ({error})") from error
    if not len(lines):
        raise ValueError(f"{path} lists no records")
    keys, offsets = lines[lines[:, 0].argsort(kind="stable")].T
    return keys, offsets
