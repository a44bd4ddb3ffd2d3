"""Whole files: bounded reads, atomic writes, and locks on directories."""

import contextlib
import errno
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from sarm_jax.io.errors import InputError
from sarm_jax.io.signals import cleaning_up

MAX_BYTES = 1 << 32  # of a file that is read as a whole


def read_bytes(path: str | Path, name: str = "", max_bytes: int = MAX_BYTES) -> bytes:
    """Reads the content of a file.

    Args:
        path: the file.
        name: what messages call the file; its path by default.
        max_bytes: a larger file is refused.

    Raises:
        InputError: the file cannot be read, is not a regular file, or is too large.
    """
    path, name = Path(path), name or str(path)
    try:
        size = path.stat().st_size
        if not path.is_file():  # a pipe or a device may never end
            raise InputError(f"{name}: is not a file")
        if size > max_bytes:
            raise InputError(f"{name}: has {size:,} bytes, at most {max_bytes:,} are read")
        return path.read_bytes()
    except OSError as error:
        raise InputError(f"{name}: cannot be read ({error.strerror})") from error


@contextlib.contextmanager
def replacing(path: str | Path, mode: str = "w") -> Iterator[IO]:
    """Opens a temporary file beside `path`; on success flushes it and renames it over `path`.

    Whatever interrupts the block, `path` holds the old content or the whole new one.
    """
    path = Path(path)
    partial = path.with_name(f".{path.name}.partial")
    binary = "b" in mode
    encoding, newline = (None, None) if binary else ("utf-8", "")
    with cleaning_up(lambda: partial.unlink(missing_ok=True)):
        with partial.open(mode, encoding=encoding, newline=newline) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
        sync_to_disk(path.parent)


@contextlib.contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Holds an exclusive lock on a directory, also if the directory is renamed meanwhile.

    Raises:
        BlockingIOError: another process holds the lock.
        OSError: the file system does not support locks.
    """
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)


def disk_is_full(error: BaseException) -> bool:
    """Returns True if an error means that no disk space, or no quota, is left."""
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)


def sync_to_disk(path: Path) -> None:
    """Flushes a file, or the entries of a directory, to the disk (fsync)."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
