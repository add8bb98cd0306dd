"""Saving and loading: one folder a step, committed by one rename.

    step-00000400.RANDOM.tmp/   while a save is writing: rank 0 writes tensors.safetensors, what all ranks have; rank 3
                                its rows into rows-00003.safetensors; then rank 0 manifest.json. Files and folder are
                                fsynced
    step-00000400/              the same after one rename, the commit; its parent is fsynced. The two newest that are
                                complete are kept
    step-00000400.old/          the former checkpoint of a step that is saved again, until the new one is committed; it
                                can be loaded like any other

The manifest holds the schema version, the step, the torch version, the state that is not tensors, which file has which
rows of each tensor, and size and SHA-256 of every file, and the SHA-256 of all this. Loading takes the newest
folder that verifies on every rank, and reports which ones it passed over and why. Nothing is unpickled. Links, and
names that lead out of the folder, are refused: files of a checkpoint are untrusted input.

In a group the folder is on a file system that all ranks share, and all ranks make each call together. An error on one
rank is raised on all, and names rank and file; if a rank dies, the others fail at once or at the group's timeout.
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
from fastmargin.distributed.agreement import check_equal, gather_objects, run_on_all_ranks
from fastmargin.distributed.layout import Group
from fastmargin.files import fsync, locked, make_folder, refuse_link, remove, sha256, want_file

SCHEMA = 2
KEEP = 2
MANIFEST = "manifest.json"
OLD = ".old"

Verify: TypeAlias = Literal["size", "own", "all"]


class Checkpoint(NamedTuple):
    """A checkpoint that has been verified.

    Attributes:
        path: its folder.
        step: that it was saved at.
        tensors: read on access, whole or some rows: see `Tensors`.
        state: what was not a tensor.
        warnings: one line for every newer checkpoint that did not verify.
    """

    path: Path
    step: int
    tensors: Tensors
    state: dict[str, Any]
    warnings: list[str]  # one line for every newer checkpoint that did not verify


def save(
    folder: str | Path,
    step: int,
    tensors: Mapping[str, Tensor | Sharded],
    state: Mapping[str, Any],
    *,
    group: Group | None = None,
) -> Path:
    """Writes and commits `folder/step-XXXXXXXX`.

    A kill at any moment, on any rank, leaves the earlier checkpoints intact, and at most a temporary folder that the
    next call removes. An old checkpoint that cannot be removed is a warning. Ranks wait for the slowest writer, within
    the group's timeout. Tensors on a GPU are copied to the host first.

    Args:
        folder: of all checkpoints of a run; on a file system that all ranks share.
        step: the number in the name, the same on all ranks.
        tensors: by name, of any shapes [...]. Of a `Sharded` one every rank writes its own rows; any other is written
            by rank 0 alone.
        state: plain JSON, written by rank 0.
        group: the ranks that save together; None: this process alone.

    Returns:
        The folder of this step.

    Raises:
        OSError: writing fails, or another process is saving there.
        ValueError: NaN in `state`, a DTensor, ranks that give different steps, and rows of a Sharded that over all
            ranks do not make up the tensor exactly once.
    """
    folder = Path(folder)
    final = folder / f"step-{step:08d}"
    rank = 0 if group is None else group.rank()
    check_equal({"step": step}, group)
    with ExitStack() as held:
        name, *_ = run_on_all_ranks(partial(prepare, final, held) if rank == 0 else idle, group)
        fresh = folder / f"{name}"
        try:
            written = run_on_all_ranks(partial(write_files, fresh, tensors, rank), group)
            run_on_all_ranks(partial(commit, fresh, final, step, state, written) if rank == 0 else idle, group)
        except Exception:
            if rank == 0 and fresh.exists():
                remove(fresh)  # it takes space on a disk that may be full
            raise
    return final


def idle() -> None:
    """For the ranks that wait while rank 0 works."""


def prepare(final: Path, held: ExitStack) -> str:
    """Makes the folder that all ranks write into; returns its name, which is unique."""
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
    names: list[str]  # of all tensors, including those without rows on this rank


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
    """On the CPU, contiguous, each in memory of its own: safetensors refuses shared memory, as of tied weights."""
    out, seen = {}, set()
    for name, tensor in tensors.items():
        tensor = tensor.detach().cpu().contiguous()
        memory = tensor.untyped_storage().data_ptr()
        out[name] = tensor.clone() if memory in seen else tensor
        seen.add(memory)
    return out


@contextmanager
def naming(file: Path) -> Iterator[None]:
    """Errors of writing in its body name the file."""
    try:
        yield
    except (OSError, error_of_safetensors()) as error:
        raise OSError(f"{file} was not written: {error}") from error


def commit(fresh: Path, final: Path, step: int, state: Mapping[str, Any], written: Sequence[Written]) -> None:
    write_manifest(fresh, step, state, written)
    fsync(fresh)
    old = final.with_suffix(OLD)
    if os.path.lexists(final):  # perhaps damaged: a resumed run has reached its step again
        final.rename(old)
    rename(fresh, final)
    if os.path.lexists(old):
        remove(old)
    prune(final.parent, step)


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
    """The newest checkpoint that verifies on every rank.

    Args:
        folder: of all checkpoints of a run.
        group: the ranks that load together; None: this process alone.
        verify: what is checked by SHA-256, beside the manifest and the size of every file. "own": the files that this
            rank needs to load a head in `group` (without a group: all files); "all": every file on every rank; "size":
            nothing more.

    Returns:
        The checkpoint, to be read or given to `unpack`; None where there is none.

    Raises:
        ValueError: none of those that are there verifies; an unknown `verify`.
    """
    rank, ranks = (0, 1) if group is None else (group.rank(), group.size())
    (paths, *_) = run_on_all_ranks(lambda: committed(Path(folder))[::-1] if rank == 0 else [], group)
    warnings: list[str] = []
    for path in paths:
        found = refusal = None
        try:
            found = load(path, verify=verify, rank=rank, ranks=ranks)
        except Exception as error:  # of any kind: no rank may leave the others waiting
            refusal = f"{error}" if group is None else f"rank {rank}: {error}"
        refusals = [text for text in gather_objects(refusal, group) if text]
        if found and not refusals:
            return found._replace(warnings=warnings)
        warnings.append("; ".join(refusals))
    if warnings:
        raise ValueError(f"no checkpoint in {folder} can be used: {'; '.join(warnings)}")
    return None


def load(path: str | Path, *, verify: Verify = "own", rank: int = 0, ranks: int = 1) -> Checkpoint:
    """One checkpoint folder, as one of several ranks verifies it.

    Args:
        path: of the folder of one step.
        verify: as in `load_latest`.
        rank: of `ranks`: "own" then means the files that it needs.
        ranks: of the group that loads.

    Returns:
        The checkpoint, to be read or given to `unpack`.

    Raises:
        ValueError: a file that is missing or has changed, which it names; an unknown `verify`.
    """
    path = Path(path)
    if verify not in ("size", "own", "all"):
        raise ValueError(f"verify = {verify!r}: want 'size', 'own' or 'all'")
    try:
        manifest = read_manifest(path)
        files = manifest["files"]
        tensors = Tensors(path, entries_of(path, manifest["tensors"]))
        own = set(files) if verify == "all" else tensors._files_of(rank, ranks)
        if absent := {part.file for entry in tensors.entries.values() for part in entry.parts} - set(files):
            raise ValueError(f"{path / MANIFEST}: does not list {', '.join(sorted(absent))}")
        for name, entry in files.items():
            check_file(path, name, entry["size"], entry["sha256"] if name in own and verify != "size" else None)
        tensors._verify(own)
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
    """The manifest's body, verified to be, byte for byte, what `save` wrote for this folder."""
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
    """Compares size and SHA-256 of a file. digest: None compares the size alone."""
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


def prune(folder: Path, step: int) -> None:
    """Keeps the KEEP newest complete checkpoints up to `step` and removes older ones. Any of later steps stay: when
    this run was resumed, they did not verify."""
    whole = 0
    for path in reversed(committed(folder)):
        if whole == KEEP:
            remove(path)
        elif step_of(path) <= step:
            whole += is_whole(path)


def is_whole(path: Path) -> bool:
    """Whether all files are there, in their size."""
    try:
        load(path, verify="size")
    except Exception:  # of any kind: it must not fail a save that is committed
        return False
    return True


def seal(body: Mapping[str, Any]) -> bytes:
    """The manifest as bytes: the body and the SHA-256 of its text. ValueError for NaN, which JSON does not have."""
    text = json.dumps(body, indent=1, allow_nan=False)
    digest = hashlib.sha256(text.encode()).hexdigest()
    return f'{{"sha256": "{digest}",\n"body": {text}}}\n'.encode()


def part_of(
    tensors: Mapping[str, Tensor],  # of a checkpoint, named "part/name"
    name: str,
) -> dict[str, Tensor]:
    """The tensors of one part, whole, without the prefix in their names."""
    return {key.removeprefix(f"{name}/"): tensors[key] for key in tensors if key.startswith(f"{name}/")}
