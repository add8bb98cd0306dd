"""Checkpoints that a kill cannot tear and a flipped bit cannot pass.

    step-00000400.tmp/   written afresh: tensors.safetensors, then manifest.json; both and the folder fsynced
    step-00000400/       one rename commits it; its parent is fsynced; only the two newest are kept

The manifest holds the schema version, the step, the torch version, the state that is not tensors, and size
and SHA-256 of every file; it carries the SHA-256 of itself. Loading takes the newest folder whose files all
verify, and says which it passed over and why. Nothing is unpickled. Links, and names that leave the folder,
are refused: a checkpoint is read as if a stranger had sent it.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

SCHEMA = 1
KEEP = 2
TENSORS = "tensors.safetensors"
MANIFEST = "manifest.json"


class Checkpoint(NamedTuple):
    step: int
    tensors: dict[str, Tensor]
    state: dict[str, Any]
    warnings: list[str]  # one line for every newer checkpoint that was refused


def save(folder: Path, step: int, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> Path:
    """Writes and commits `folder/step-XXXXXXXX`; returns it.

    `state` is plain JSON. Killed at any moment, this leaves the checkpoints that were there, and at most a
    `.tmp` folder that the next call removes. Raises OSError if the disk refuses.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for stale in folder.glob("step-*.tmp"):
        shutil.rmtree(stale)
    final = folder / f"step-{step:08d}"
    fresh = final.with_suffix(".tmp")
    fresh.mkdir()
    write_files(fresh, step, tensors, state)
    if final.exists():  # a damaged one that a resumed run has reached again
        shutil.rmtree(final)
    fresh.rename(final)
    fsync(folder)
    forget(folder, step)
    return final


def write_files(fresh: Path, step: int, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, fresh / TENSORS)
    fsync(fresh / TENSORS)
    body = {
        "schema": SCHEMA,
        "step": step,
        "torch": torch.__version__,
        "state": state,
        "files": {TENSORS: {"size": (fresh / TENSORS).stat().st_size, "sha256": sha256(fresh / TENSORS)}},
    }
    (fresh / MANIFEST).write_bytes(seal(body))
    fsync(fresh / MANIFEST)
    fsync(fresh)


def load_latest(folder: Path) -> Checkpoint | None:
    """The newest checkpoint that verifies; None where there is none. ValueError if every one is refused."""
    warnings: list[str] = []
    for path in reversed(committed(folder)):
        try:
            step, tensors, state = load(path)
        except ValueError as refusal:
            warnings.append(str(refusal))
        else:
            return Checkpoint(step, tensors, state, warnings)
    if warnings:
        raise ValueError(f"no checkpoint in {folder} can be used: {'; '.join(warnings)}")
    return None


def load(path: Path) -> tuple[int, dict[str, Tensor], dict[str, Any]]:
    """Step, tensors and state of one checkpoint folder. ValueError names the file that is not what it was."""
    try:
        manifest = read_manifest(path)
        for name, entry in manifest["files"].items():
            verify(path, name, entry["size"], entry["sha256"])
        return manifest["step"], load_file(path / TENSORS), manifest["state"]
    except (OSError, KeyError, TypeError, AttributeError, RecursionError, SafetensorError) as error:
        raise ValueError(f"{path}: no checkpoint of this format ({error!r})") from error


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest's body, once it is proved to be, byte for byte, what `save` wrote for this folder."""
    file = path / MANIFEST
    refuse_link(path)
    refuse_link(file)
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
    if TENSORS not in body["files"]:
        raise ValueError(f"{file}: does not list {TENSORS}")
    return body


def verify(folder: Path, name: str, size: int, digest: str) -> None:
    file = folder / name
    if Path(name).name != name or name == "..":
        raise ValueError(f"{folder / MANIFEST}: {name!r} leaves the folder")
    refuse_link(file)
    if not file.is_file():
        raise ValueError(f"{file}: missing")
    if file.stat().st_size != size:
        raise ValueError(f"{file}: {file.stat().st_size} bytes; {size} were written")
    if sha256(file) != digest:
        raise ValueError(f"{file}: its SHA-256 does not match; the file has changed since it was written")


def refuse_link(path: Path) -> None:
    if path.is_symlink():
        raise ValueError(f"{path}: is a symbolic link")


def step_of(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def committed(folder: Path) -> list[Path]:
    """Checkpoint folders, oldest first."""
    return sorted((p for p in folder.glob("step-*") if re.fullmatch(r"step-\d{8,}", p.name)), key=step_of)


def forget(folder: Path, step: int) -> None:
    """Removes all but the newest two up to `step`. Newer ones were refused at loading and are left alone."""
    for path in [path for path in committed(folder) if step_of(path) <= step][:-KEEP]:
        shutil.rmtree(path)


def seal(body: Mapping[str, Any]) -> bytes:
    """The manifest as bytes: the body and the SHA-256 of its text. NaN is no JSON and raises ValueError."""
    text = json.dumps(body, indent=1, allow_nan=False)
    digest = hashlib.sha256(text.encode()).hexdigest()
    return f'{{"sha256": "{digest}",\n"body": {text}}}\n'.encode()


def sha256(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def fsync(path: Path) -> None:
    """Forces a file, or a folder's list of names, onto the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def part_of(
    tensors: Mapping[str, Tensor],  # of a checkpoint, named "part/name"
    name: str,
) -> dict[str, Tensor]:
    """The tensors of one part, by their own names."""
    return {key.removeprefix(f"{name}/"): t for key, t in tensors.items() if key.startswith(f"{name}/")}
