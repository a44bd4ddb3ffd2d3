"""Writing a file so that it is either the old one or the whole new one, never half of it; and
holding a directory so that nobody else writes there."""

import contextlib
import errno
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from sarm_jax.io.signals import cleaning_up


@contextlib.contextmanager
def replacing(path: str | Path, mode: str = "w") -> Iterator[IO]:
    """Opens a temporary sibling of `path`; flushes and renames it over `path` on success."""
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
        to_disk(path.parent)


@contextlib.contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Marks a directory as in use, under whatever name it goes by the end.

    Raises:
      BlockingIOError: another process holds it.
      OSError: its file system knows no locks.
    """
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)


def disk_is_full(error: BaseException) -> bool:
    """Whether an error says that no space, or none of the quota, is left."""
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)


def to_disk(path: Path) -> None:
    """Flushes a file, or the names in a directory, to the disk itself."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
