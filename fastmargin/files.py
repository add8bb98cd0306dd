"""Files of a run: forced onto the disk, hashed, never followed through links, and written by one run at a time."""

import fcntl
import hashlib
import os
import shutil
import stat
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

LOCK = "lock"


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """The folder is this process's alone until the end of the block, or of the process, however that comes.

    BlockingIOError if another has it, ValueError if something else has the lock's name. A file system that cannot lock
    files is warned of.
    """
    file = folder / LOCK
    with os.fdopen(opened(file), "r+") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise BlockingIOError(f"{folder} is in use by another run, process {handle.read()}: see {file}") from error
        except OSError as error:
            warnings.warn(f"{file} cannot be locked ({error}): nothing stops a second run in this folder", stacklevel=3)
        handle.truncate(0)
        handle.write(f"{os.getpid()} on {os.uname().nodename}")
        handle.flush()
        yield


def opened(file: Path) -> int:
    """A descriptor, to read and write; the file is made where there is none. ValueError for a link, pipe or device."""
    refuse_link(file)
    descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise ValueError(f"{file}: is no regular file")
    return descriptor


@contextmanager
def written(path: Path) -> Iterator[Path]:
    """A name to write a whole file under, which then takes its own, with the mode of any new file here.

    safetensors gives its files 0600, whatever the umask.
    """
    draft = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        draft.touch()
        mode = draft.stat().st_mode
        yield draft
        draft.chmod(mode)
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)


def sha256(content: Path | bytes) -> str:
    """Of a file, which is read block by block, or of bytes."""
    if isinstance(content, bytes):
        return hashlib.sha256(content).hexdigest()
    with content.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def fsync(path: Path) -> None:
    """Forces a file, or a folder's list of names, onto the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def make_folder(folder: Path) -> None:
    """With its parents; the name of each that is new is forced onto the disk."""
    if not folder.is_dir():
        make_folder(folder.parent)
        folder.mkdir(exist_ok=True)
        fsync(folder.parent)


def remove(path: Path) -> None:
    """A folder with all that is in it, or whatever else has the name: a link, and not what it leads to.

    What cannot be removed is warned of.
    """
    try:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
    except OSError as error:
        warnings.warn(f"{path} was not removed: {error}", stacklevel=2)


def refuse_link(path: Path) -> None:
    if path.is_symlink():
        raise ValueError(f"{path}: is a symbolic link")


def want_file(path: Path) -> None:
    """ValueError for a link, a folder, a pipe that would never end, and nothing at all."""
    refuse_link(path)
    if not path.is_file():
        raise ValueError(f"{path}: missing, or no regular file")
