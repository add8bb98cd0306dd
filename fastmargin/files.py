"""Files of a run: forced onto the disk, hashed, never followed through links, and written by one run at a time."""

import fcntl
import hashlib
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

LOCK = "lock"


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """The folder is this process's alone until the end of the block, or of the process, however that comes.

    BlockingIOError if another has it. A file system that cannot lock files is warned of.
    """
    file = folder / LOCK
    with file.open("a+") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            handle.seek(0)
            raise BlockingIOError(f"{folder} is in use by another run, process {handle.read()}: see {file}") from error
        except OSError as error:
            warnings.warn(f"{file} cannot be locked ({error}): nothing stops a second run in this folder", stacklevel=3)
        handle.truncate(0)
        handle.write(str(os.getpid()))
        handle.flush()
        yield


def sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def fsync(path: Path) -> None:
    """Forces a file, or a folder's list of names, onto the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def refuse_link(path: Path) -> None:
    if path.is_symlink():
        raise ValueError(f"{path}: is a symbolic link")
