"""Whole files: bounded reads of regular files, atomic writes, locks, and checks before writing."""

import contextlib
import errno
import fcntl
import io
import os
import re
import secrets
import stat
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from sarm_jax.io.errors import InputError
from sarm_jax.io.signals import cleaning_up

MAX_BYTES = 1 << 32  # of a file that is read as a whole
_KINDS = {
    stat.S_IFDIR: "a directory",
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def check_file(path: str | Path, name: str = "") -> None:
    """Checks that a path is a regular file, for a library that opens files by their path.

    Opening a pipe waits for a writer, and a device may never end.

    Args:
        path: the file.
        name: what messages call the file; its path by default.

    Raises:
        InputError: there is no such file, or it is a directory, a pipe, a socket or a device.
    """
    name = name or str(path)
    try:
        mode = Path(path).stat().st_mode
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the path
        raise InputError(f"{name}: cannot be read ({_reason(error)})") from error
    if not stat.S_ISREG(mode):
        kind = _KINDS.get(stat.S_IFMT(mode), "something else")
        raise InputError(f"{name}: is not a file but {kind}")


def open_file(path: str | Path, name: str = "") -> io.BufferedReader:
    """Opens a regular file for reading, and never waits for one of another kind.

    Args:
        path: the file.
        name: what messages call the file; its path by default.

    Raises:
        InputError: as in `check_file`, or the file cannot be opened.
    """
    check_file(path, name)
    try:
        # Without O_NONBLOCK a pipe that has just taken the place of the file would block.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise InputError(f"{name or path}: cannot be read ({_reason(error)})") from error
    file = os.fdopen(descriptor, "rb")
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        file.close()
        raise InputError(f"{name or path}: is no longer a file")
    return file


def read_bytes(path: str | Path, name: str = "", max_bytes: int = MAX_BYTES) -> bytes:
    """Reads the content of a file.

    Args:
        path: the file.
        name: what messages call the file; its path by default.
        max_bytes: a larger file is refused.

    Raises:
        InputError: the file cannot be read, is not a regular file, or is too large.
    """
    name = name or str(path)
    with open_file(path, name) as file:
        size = os.fstat(file.fileno()).st_size
        if size > max_bytes:
            raise InputError(f"{name}: has {size:,} bytes, at most {max_bytes:,} are read")
        try:
            return file.read() or b""
        except OSError as error:
            raise InputError(f"{name}: cannot be read ({_reason(error)})") from error


@contextlib.contextmanager
def replacing(path: str | Path, mode: str = "w") -> Iterator[IO]:
    """Opens a temporary file beside `path`; on success flushes it and renames it over `path`.

    Whatever interrupts the block, `path` holds the old content or the whole new one. Several
    processes may write the same file at once: each has a temporary file of its own, and the last
    one to finish wins. Temporary files of processes that were killed are removed. Half of a
    surrogate pair, which a path that is not UTF-8 has in Python, is written as its escape.

    Raises:
        OSError: the file cannot be written; the error names `path`, not the temporary file.
    """
    path = Path(path)
    text: dict[str, Any] = {}
    if "b" not in mode:
        text = {"encoding": "utf-8", "newline": "", "errors": "backslashreplace"}
    partial: Path | None = None
    try:
        _remove_leftovers(path)
        descriptor, partial = _create_locked(path)
        with cleaning_up(partial_remover(partial)), os.fdopen(descriptor, mode, **text) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
            partial.replace(path)
            sync_to_disk(path.parent)
    except OSError as error:
        if error.filename not in (None, str(partial), str(path.parent)) or error.errno is None:
            raise
        raise OSError(error.errno, os.strerror(error.errno), str(path)) from error


def partial_remover(partial: Path) -> Callable[[], None]:
    """Returns a function that removes a temporary file if it is still there."""
    return lambda: partial.unlink(missing_ok=True)


def _create_locked(path: Path) -> tuple[int, Path]:
    """Creates a file of a new name beside `path`, locked so that nobody takes it for a leftover."""
    while True:
        partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")
        descriptor = os.open(partial, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:  # another process is removing it
            os.close(descriptor)
            continue
        except OSError:  # some network file systems have no locks, and leftovers stay there
            return descriptor, partial
        if os.fstat(descriptor).st_nlink:
            return descriptor, partial
        os.close(descriptor)  # another process has removed it


def _remove_leftovers(path: Path) -> None:
    """Removes temporary files of `path` that no process holds a lock on."""
    pattern = re.compile(rf"\.{re.escape(path.name)}\.[0-9a-f]{{8}}\.partial")
    for leftover in path.parent.iterdir():
        if pattern.fullmatch(leftover.name):
            with contextlib.suppress(OSError), locked(leftover):
                leftover.unlink()


@contextlib.contextmanager
def locked_output(path: Path, wait: bool = False) -> Iterator[None]:
    """Holds an exclusive lock on what is written at `path`, in a file that exists only meanwhile.

    On a file system without locks the block runs without one.

    Args:
        path: the file or folder to write; its parent exists.
        wait: wait for other processes.

    Raises:
        BlockingIOError: another process holds the lock, and `wait` is false.
        OSError: the lock cannot be created; the error names `path`.
    """
    lock = path.with_name(f".{path.name}.lock")
    try:
        descriptor = _take(lock, wait)
    except OSError as error:
        if isinstance(error, BlockingIOError):
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error
    try:
        # Removed while the lock is held: whoever waits for it sees that and tries again.
        with cleaning_up(partial_remover(lock)):
            yield
    finally:
        os.close(descriptor)


def _take(lock: Path, wait: bool) -> int:
    """Returns the descriptor of the lock file, created if necessary, with an exclusive lock."""
    while True:
        descriptor = os.open(lock, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            os.close(descriptor)
            raise
        except OSError:  # no locks here
            return descriptor
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(descriptor), lock.stat()):
                return descriptor
        os.close(descriptor)  # its last holder has removed it


def check_target(path: Path, name: str = "", folder: bool = False) -> None:
    """Checks that a file, or a folder, can be written at `path`, before the work that fills it.

    Args:
        path: the file or folder; it and its parents may be missing.
        name: what messages call it; its path by default.
        folder: a folder will be there.

    Raises:
        InputError: something of the other kind is there, a file stands where a parent must be, or
            the nearest folder that exists cannot be written.
    """
    name = name or str(path)
    if folder and path.is_symlink() and not path.exists():
        raise InputError(f"{name}: is a link to nothing, expected a folder or nothing")
    if folder and path.exists() and not path.is_dir():
        raise InputError(f"{name}: is a file, expected a folder or nothing")
    if not folder and path.is_dir():
        raise InputError(f"{name}: is a folder, expected a file or nothing")
    nearest = path if folder and path.exists() else path.absolute().parent
    while not (nearest.exists() or nearest.is_symlink()):
        nearest = nearest.parent
    if not nearest.is_dir():
        raise InputError(f"{name}: cannot be written, {nearest} is not a folder")
    try:
        with tempfile.TemporaryFile(dir=nearest):
            pass
    except OSError as error:
        raise InputError(f"{name}: cannot be written in {nearest} ({error.strerror})") from None


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Holds an exclusive lock on a file or directory, also if it is renamed meanwhile.

    Raises:
        BlockingIOError: another process holds the lock.
        OSError: the file system does not support locks.
    """
    descriptor = os.open(path, os.O_RDONLY)
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


def _reason(error: OSError | ValueError) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or str(error)
