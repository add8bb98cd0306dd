"""Saving and loading: one folder a step, committed by one rename.

    step-00000400.RANDOM.tmp/   of this save alone: tensors.safetensors, what all ranks have, by the first;
                                rows-00003.safetensors, rank 3's rows; then manifest.json, by the first. All, and the
                                folder, are fsynced
    step-00000400/              one rename commits it; its parent is fsynced; the two newest that are whole are kept
    step-00000400.old/          one that is saved again, until the new one is committed; as good as any till then

The manifest holds the schema version, the step, the torch version, the state that is not tensors, which file has which
rows of each tensor, and size and SHA-256 of every file; it carries the SHA-256 of itself. Loading takes the newest
folder that every rank finds in order, and says which it passed over and why. Nothing is unpickled. Links, and names
that leave the folder, are refused: a checkpoint is read as if a stranger had sent it.

In a group the folder is on a file system that all ranks share, and all calls are made by all ranks together: what fails
on one is an error on all, that names rank and file; if one dies, the others fail at once or at the group's timeout.
"""

import hashlib
import json
import os
import re
import secrets
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor

from fastmargin.checkpoint.tensors import Entry, Sharded, Tensors, check_parts, error_of_safetensors, joined, split
from fastmargin.distributed.agreement import gather_objects, run_on_all_ranks
from fastmargin.distributed.layout import Group
from fastmargin.files import fsync, locked, make_folder, refuse_link, remove, sha256, want_file

SCHEMA = 2
KEEP = 2
MANIFEST = "manifest.json"
OLD = ".old"

Verify: TypeAlias = Literal["size", "own", "all"]


class Checkpoint(NamedTuple):
    """What `load_latest` found. `tensors` are read when asked for, whole or some rows: see `Tensors`."""

    path: Path
    step: int
    tensors: Tensors
    state: dict[str, Any]
    warnings: list[str]  # one line for every newer checkpoint that was refused


def save(
    folder: str | Path,
    step: int,
    tensors: Mapping[str, Tensor | Sharded],
    state: Mapping[str, Any],
    *,
    group: Group | None = None,
) -> Path:
    """Writes and commits `folder/step-XXXXXXXX`; returns it.

    tensors: by name. A `Sharded` one is written by every rank, its own rows; any other by the first rank alone, as are
        `state`, which is plain JSON, and `step`. What differs by rank, such as a random state, is a row of a Sharded.
    group: the ranks that save together; None: this process alone.

    Killed at any moment, on any rank, this leaves the checkpoints that were there, and at most a folder that the next
    call removes. What stands in the way of removing old ones is warned of. Ranks wait for the slowest one's writing,
    within the group's timeout. Tensors on a GPU are copied to the host first. Raises OSError if the disk refuses or
    another process is saving there, ValueError for NaN in `state`, a DTensor, and rows that are not the whole of a
    tensor, each once.
    """
    folder = Path(folder)
    final = folder / f"step-{step:08d}"
    rank = 0 if group is None else group.rank()
    with ExitStack() as held:
        name, *_ = run_on_all_ranks(partial(prepare, final, held) if rank == 0 else idle, group)
        fresh = folder / f"{name}"
        try:
            written = run_on_all_ranks(partial(write_files, fresh, tensors, rank), group)
            run_on_all_ranks(partial(commit, fresh, final, step, state, written) if rank == 0 else idle, group)
        except Exception:
            if rank == 0 and fresh.exists():
                remove(fresh)  # on a full disk it would be in the way
            raise
    return final


def idle() -> None:
    """What the other ranks do while the first works."""


def prepare(final: Path, held: ExitStack) -> str:
    """Makes the folder that all ranks write into; returns its name, which no other save has."""
    folder = final.parent
    make_folder(folder)
    held.enter_context(locked(folder))
    for stale in folder.glob("step-*.tmp"):
        remove(stale)
    for old in folder.glob(f"step-*{OLD}"):
        if os.path.lexists(old.with_suffix("")):
            remove(old)
        else:
            old.rename(old.with_suffix(""))
    fresh = final.with_name(f"{final.name}.{secrets.token_hex(4)}.tmp")
    fresh.mkdir()
    return fresh.name


class Written(NamedTuple):
    """What a rank has written."""

    files: dict[str, dict[str, Any]]  # {name: {size, sha256}}
    parts: dict[str, tuple[str, int, int, str, list[int]]]  # {tensor: (file, start, stop, dtype, shape of all)}
    names: list[str]  # of all tensors, also of those of whose rows it has none


def write_files(fresh: Path, tensors: Mapping[str, Tensor | Sharded], rank: int) -> Written:
    written = Written({}, {}, [*tensors])
    for name, held in split(tensors, rank).items():
        file = fresh / name
        write_tensors(file, {tensor: rows for tensor, (rows, _, _) in held.items()})
        written.files[name] = {"size": file.stat().st_size, "sha256": sha256(file)}
        for tensor, (rows, start, shape) in held.items():
            stop = start + (len(rows) if shape else 1)
            written.parts[tensor] = name, start, stop, str(rows.dtype).removeprefix("torch."), shape
    return written


def write_tensors(file: Path, tensors: Mapping[str, Tensor]) -> None:
    from safetensors.torch import save_file

    with naming(file):
        save_file(unshared(tensors), file)
        fsync(file)


def unshared(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """As they go to the disk: safetensors takes no two in one memory, such as tied weights, so the second is a copy."""
    out, seen = {}, set()
    for name, tensor in tensors.items():
        tensor = tensor.detach().cpu().contiguous()
        memory = tensor.untyped_storage().data_ptr()
        out[name] = tensor.clone() if memory in seen else tensor
        seen.add(memory)
    return out


@contextmanager
def naming(file: Path) -> Iterator[None]:
    """What the disk refuses here is an error that says for which file."""
    try:
        yield
    except (OSError, error_of_safetensors()) as error:
        raise OSError(f"{file} was not written: {error}") from error


def commit(fresh: Path, final: Path, step: int, state: Mapping[str, Any], written: Sequence[Written]) -> None:
    write_manifest(fresh, step, state, written)
    fsync(fresh)
    old = final.with_suffix(OLD)
    if os.path.lexists(final):  # a damaged one, it may be, that a resumed run has reached again
        final.rename(old)
    rename(fresh, final)
    if os.path.lexists(old):
        remove(old)
    forget(final.parent, step)


def write_manifest(fresh: Path, step: int, state: Mapping[str, Any], written: Sequence[Written]) -> None:
    body = {
        "schema": SCHEMA,
        "step": step,
        "torch": torch.__version__,
        "ranks": len(written),
        "state": state,
        "tensors": joined([theirs.parts for theirs in written], [name for theirs in written for name in theirs.names]),
        "files": {name: entry for theirs in written for name, entry in theirs.files.items()},
    }
    with naming(fresh / MANIFEST):
        (fresh / MANIFEST).write_bytes(seal(body))
        fsync(fresh / MANIFEST)


def rename(fresh: Path, final: Path) -> None:
    fresh.rename(final)
    fsync(final.parent)


def load_latest(folder: str | Path, *, group: Group | None = None, verify: Verify = "own") -> Checkpoint | None:
    """The newest checkpoint that is in order on every rank; None where there is none. ValueError if all are refused.

    verify: what is proved by SHA-256, beside the manifest and the size of every file: "own", the files that this rank
        reads if it holds the rows that a head in `group` holds (without a group: all files); "all", every file on every
        rank; "size", nothing more.
    """
    rank, ranks = (0, 1) if group is None else (group.rank(), group.size())
    (paths, *_) = run_on_all_ranks(lambda: committed(Path(folder))[::-1] if rank == 0 else [], group)
    warnings: list[str] = []
    for path in paths:
        found = refusal = None
        try:
            found = load(path, verify=verify, rank=rank, ranks=ranks)
        except Exception as error:  # of any kind: the ranks go on together
            refusal = f"{error}" if group is None else f"rank {rank}: {error}"
        refusals = [said for said in gather_objects(refusal, group) if said]
        if found and not refusals:
            return found._replace(warnings=warnings)
        warnings.append("; ".join(refusals))
    if warnings:
        raise ValueError(f"no checkpoint in {folder} can be used: {'; '.join(warnings)}")
    return None


def load(path: str | Path, *, verify: Verify = "own", rank: int = 0, ranks: int = 1) -> Checkpoint:
    """One checkpoint folder, as one of `ranks` ranks sees it. ValueError names the file that is not what it was."""
    path = Path(path)
    if verify not in ("size", "own", "all"):
        raise ValueError(f"verify = {verify!r}: want 'size', 'own' or 'all'")
    try:
        manifest = read_manifest(path)
        files = manifest["files"]
        tensors = Tensors(path, entries_of(path, manifest["tensors"]))
        own = set(files) if verify == "all" else tensors.files_of(rank, ranks)
        if absent := {part.file for entry in tensors.entries.values() for part in entry.parts} - set(files):
            raise ValueError(f"{path / MANIFEST}: does not list {', '.join(sorted(absent))}")
        for name, entry in files.items():
            check_file(path, name, entry["size"], entry["sha256"] if name in own and verify != "size" else None)
        tensors.check(own)
        tensors.close()
        return Checkpoint(path, manifest["step"], tensors, manifest["state"], [])
    except (OSError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path}: no checkpoint of this format ({error!r})") from error


def entries_of(path: Path, listed: Mapping[str, Any]) -> dict[str, Entry]:
    try:
        return {name: check_parts(name, entry) for name, entry in listed.items()}
    except ValueError as error:
        raise ValueError(f"{path / MANIFEST}: {error}") from error


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest's body, once it is proved to be, byte for byte, what `save` wrote for this folder."""
    file = path / MANIFEST
    refuse_link(path)
    want_file(file)
    try:
        raw = file.read_bytes()
        body = json.loads(raw)["body"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file}: not a readable manifest ({error})") from error
    if raw != seal(body):
        raise ValueError(f"{file}: its SHA-256 does not match; the file has changed since it was written")
    if body["schema"] != SCHEMA:
        raise ValueError(f"{file}: schema {body['schema']}; this version reads {SCHEMA}")
    if step_of(path) != body["step"]:
        raise ValueError(f"{file}: written for step {body['step']}, found in {path.name}")
    return body


def check_file(folder: Path, name: str, size: int, digest: str | None) -> None:
    """digest: None leaves it at the size."""
    file = folder / name
    if Path(name).name != name or name == "..":
        raise ValueError(f"{folder / MANIFEST}: {name!r} leaves the folder")
    want_file(file)
    if file.stat().st_size != size:
        raise ValueError(f"{file}: {file.stat().st_size} bytes; {size} were written")
    if digest is not None and sha256(file) != digest:
        raise ValueError(f"{file}: its SHA-256 does not match; the file has changed since it was written")


def step_of(path: Path) -> int:
    return int(path.name.removeprefix("step-").removesuffix(OLD))


def committed(folder: Path) -> list[Path]:
    """Checkpoint folders, oldest first."""
    found = [path for path in folder.glob("step-*") if re.fullmatch(rf"step-\d{{8,}}({OLD})?", path.name)]
    return sorted(found, key=lambda path: (step_of(path), path.suffix != OLD))


def forget(folder: Path, step: int) -> None:
    """Removes what is older than the newest two up to `step` that are whole. Newer ones, refused at loading, stay."""
    whole = 0
    for path in reversed(committed(folder)):
        if whole == KEEP:
            remove(path)
        elif step_of(path) <= step:
            whole += is_whole(path)


def is_whole(path: Path) -> bool:
    """All files are there, as long as they were written."""
    try:
        load(path, verify="size")
    except Exception:  # of any kind: what is saved is saved
        return False
    return True


def seal(body: Mapping[str, Any]) -> bytes:
    """The manifest as bytes: the body and the SHA-256 of its text. NaN is no JSON and raises ValueError."""
    text = json.dumps(body, indent=1, allow_nan=False)
    digest = hashlib.sha256(text.encode()).hexdigest()
    return f'{{"sha256": "{digest}",\n"body": {text}}}\n'.encode()


def part_of(
    tensors: Mapping[str, Tensor],  # of a checkpoint, named "part/name"
    name: str,
) -> dict[str, Tensor]:
    """The tensors of one part, by their own names."""
    return {key.removeprefix(f"{name}/"): tensors[key] for key in tensors if key.startswith(f"{name}/")}
