"""The tensors of a checkpoint: each in one file, or its rows over several files, and read row by row.

An entry of the manifest is {"dtype": "float32", "shape": [C, d], "parts": [[file, start, stop], ...]}: which file has
which rows. A tensor without dimensions counts as one row.

torch.distributed.checkpoint with its safetensors storage can read single rows, too, but needed 984 MiB of extra memory
to save 488 MiB of rows (one rank of two, C = 1,000,000, d = 128, with momentum; here: none), does not fsync, and its
errors are no Exceptions.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

TENSORS = "tensors.safetensors"  # what all ranks have
ROWS = "rows-{:05d}.safetensors"  # the rows of one rank
DTYPES = {f"{dtype}".removeprefix("torch."): dtype for dtype in vars(torch).values() if isinstance(dtype, torch.dtype)}


class Sharded(NamedTuple):
    """This rank's rows [start, start + n) of a tensor with `total` rows over all ranks of the group.

    Attributes:
        tensor: [n, ...] the rows.
        start: the index of the first one.
        total: the rows of all ranks.
    """

    tensor: Tensor  # [n, ...]
    start: int
    total: int


class Part(NamedTuple):
    """What one file holds of a tensor."""

    file: str
    start: int
    stop: int


class Entry(NamedTuple):
    dtype: torch.dtype
    shape: tuple[int, ...]
    parts: tuple[Part, ...]

    @property
    def rows(self) -> int:
        return self.shape[0] if self.shape else 1


class Tensors(Mapping[str, Tensor]):
    """Tensors by name, read from disk at each access: `tensors[name]` is a whole one.

    Files stay open until `close`; if they are removed meanwhile, their disk space is not freed before. Made by `load`
    and `load_latest`.

    Args:
        folder: of the files.
        entries: by name, which file has which rows.
    """

    def __init__(self, folder: Path, entries: Mapping[str, Entry]) -> None:
        self.folder, self.entries = folder, entries
        self.opened: dict[str, Any] = {}

    def __getitem__(self, name: str) -> Tensor:
        return self.rows(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor; nothing is read.

        Args:
            name: of the tensor.

        Returns:
            Of all rows.
        """
        return self.entries[name].shape

    def rows(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:  # [stop - start, ...]
        """Rows [start, stop) of a tensor; only the files that have them are opened.

        Args:
            name: of the tensor.
            start: the first row.
            stop: the row after the last one; None: all.

        Returns:
            [stop - start, ...] on the CPU; a tensor without dimensions as it is.

        Raises:
            ValueError: as `read_into`.
        """
        entry = self.entries[name]
        shape = (entry.rows if stop is None else stop) - start, *entry.shape[1:]
        out = torch.empty(shape if entry.shape else (), dtype=entry.dtype)
        return self.read_into(out, name, start)

    def read_into(
        self,
        out: Tensor,  # [n, ...], on any device
        name: str,
        start: int = 0,
    ) -> Tensor:
        """Reads rows [start, start + n) into `out`, without another copy of them.

        Args:
            out: [n, ...] in the tensor's dtype, on any device.
            name: of the tensor.
            start: the first row.

        Returns:
            out, [n, ...].

        Raises:
            ValueError: another shape or dtype, rows that are not there, and a file that differs from the manifest.
        """
        entry = self.entries[name]
        stop = start + (len(out) if entry.shape else 1)
        if out.dtype != entry.dtype or out.shape[1:] != entry.shape[1:] or not 0 <= start <= stop <= entry.rows:
            want = f"rows {start} to {stop} as {out.dtype} {[*out.shape]}"
            raise ValueError(f"{self.folder}: {name} is {entry.dtype} {[*entry.shape]}: it has no {want}")
        for part in entry.parts:
            first, last = max(start, part.start), min(stop, part.stop)
            if first < last or not entry.rows:
                stored = self._stored(name, part, first, last)
                out.copy_(stored) if stored.dim() == 0 else out[first - start : last - start].copy_(stored)
        return out

    def _stored(self, name: str, part: Part, start: int, stop: int) -> Tensor:  # [stop - start, ...]
        """A view of rows in the mapped file, to copy from at once; never to keep or to change."""
        entry, file = self.entries[name], self.folder / part.file
        shape = [part.stop - part.start, *entry.shape[1:]] if entry.shape else []
        try:
            found = self._open(part.file).get_slice(name)
            if found.get_shape() != shape:
                raise ValueError(f"{file}: {name} is {found.get_shape()}; {shape} was written")
            if shape:
                tensor = found[start - part.start : stop - part.start]
            else:
                tensor = self._open(part.file).get_tensor(name)
        except (OSError, error_of_safetensors()) as error:
            raise ValueError(f"{file}: not readable, or without {name} ({error})") from error
        if tensor.dtype != entry.dtype:
            raise ValueError(f"{file}: {name} is {tensor.dtype}; {entry.dtype} was written")
        return tensor

    def _open(self, file: str) -> Any:
        from safetensors import safe_open

        if file not in self.opened:
            self.opened[file] = safe_open(self.folder / file, "pt")
        return self.opened[file]

    def close(self) -> None:
        """Closes the files; a later access opens them again."""
        self.opened.clear()

    def _verify(self, files: set[str]) -> None:
        """Opens these files and compares their tensors with the manifest. ValueError as `read_into`."""
        for name, entry in self.entries.items():
            for part in entry.parts:
                if part.file in files:
                    self._stored(name, part, part.start, part.start)

    def _files_of(self, rank: int, ranks: int) -> set[str]:
        """The files that a rank needs to load a head in a group of `ranks`: whole tensors, and its rows."""
        needed = set()
        for entry in self.entries.values():
            n = -(-entry.rows // ranks)
            start, stop = (0, entry.rows) if entry.parts[0].file == TENSORS else (rank * n, (rank + 1) * n)
            needed |= {part.file for part in entry.parts if (part.start < stop and start < part.stop) or not entry.rows}
        return needed


def split(
    tensors: Mapping[str, Tensor | Sharded], rank: int
) -> dict[str, dict[str, tuple[Tensor, int, list[int]]]]:  # {file: {name: (rows, start, shape of all)}}
    """What this rank writes: its rows; rank 0 also what every rank has. ValueError for a DTensor."""
    files: dict[str, dict[str, tuple[Tensor, int, list[int]]]] = {}
    for name, tensor in tensors.items():
        if hasattr(tensor, "full_tensor"):
            raise ValueError(f"{name} is a DTensor: want its full_tensor(), or a Sharded of its rows")
        if isinstance(tensor, Sharded):
            rows, start, total = tensor
            if len(rows) or (total == 0 and rank == 0):
                files.setdefault(ROWS.format(rank), {})[name] = rows, start, [total, *rows.shape[1:]]
        elif rank == 0:
            files.setdefault(TENSORS, {})[name] = tensor, 0, [*tensor.shape]
    return files


def joined(all_ranks: Sequence[Mapping[str, Sequence[Any]]], names: Iterable[str]) -> dict[str, Any]:
    """The manifest's entries, from (file, start, stop, dtype, shape) of each rank's part of each tensor.

    ValueError for parts of different kinds, a gap, an overlap, or none.
    """
    entries = {}
    for name in dict.fromkeys(names):
        parts = sorted((theirs[name] for theirs in all_ranks if name in theirs), key=lambda part: part[1])
        if not parts:
            raise ValueError(f"{name} has no rows on any rank: want all of them, each once")
        *_, dtype, shape = parts[0]
        entries[name] = {"dtype": dtype, "shape": shape, "parts": [list(part[:3]) for part in parts]}
        if any(part[3:] != parts[0][3:] for part in parts):
            raise ValueError(f"{name} is {' and '.join(f'{part[3]} {part[4]}' for part in parts)} on the ranks")
        check_parts(name, entries[name])
    return entries


def check_parts(name: str, entry: Mapping[str, Any]) -> Entry:
    """An entry of the manifest, verified. ValueError unless its parts have all rows, each exactly once."""
    dtype, shape = DTYPES.get(entry["dtype"]), tuple(entry["shape"])
    parts = tuple(Part(*part) for part in entry["parts"])
    rows = shape[0] if shape else 1
    ends = [0, *(part.stop for part in parts)]
    starts = [*(part.start for part in parts), rows]
    numbers = [*shape, *starts, *ends]
    if dtype is None:
        raise ValueError(f"{name} is {entry['dtype']!r}: no type of tensors")
    if not parts or not all(type(n) is int and n >= 0 for n in numbers) or starts != ends:
        held = [(part.start, part.stop) for part in parts]
        raise ValueError(f"{name} {[*shape]} has the rows {held}: want all of them, each once")
    return Entry(dtype, shape, parts)


def error_of_safetensors() -> type[Exception]:
    from safetensors import SafetensorError

    return SafetensorError
