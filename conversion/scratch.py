"""Room for a directory in progress, and what becomes of it when its process is killed.

It stands beside its destination as `.NAME.xxxxxxxx`, locked while its process lives. The lock goes
with the process, however that ends, so what is there and not locked is left over.
"""

import contextlib
import fcntl
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from sarm_jax.errors import InputError

OLD = ".old"  # what is about to be replaced


@contextlib.contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Marks a directory as in use, under whatever name it goes by the end.

    Raises:
      BlockingIOError: another process holds it.
    """
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)


def clear_leftovers(dst: Path) -> None:
    """Removes what killed processes left beside `dst`; half a replacement is undone."""
    pattern = re.compile(re.escape(f".{dst.name}.") + r"[0-9a-f]{8}(" + re.escape(OLD) + ")?")
    if not dst.parent.is_dir():
        return
    for path in sorted(dst.parent.iterdir()):
        match = pattern.fullmatch(path.name)
        if match is None or not path.is_dir():
            continue
        with contextlib.suppress(OSError), locked(path):
            if match[1] and not dst.exists():
                path.rename(dst)
            else:
                shutil.rmtree(path)


def check_space(dst: Path, needed: int) -> None:
    """Raises InputError where fewer than `needed` bytes are free on the disk of `dst`."""
    there = next(p for p in (dst, *dst.absolute().parents) if p.is_dir())
    free = shutil.disk_usage(there).free
    if needed > free:
        raise InputError(f"{dst}: takes {needed:,} bytes, but only {free:,} are free on its disk")
