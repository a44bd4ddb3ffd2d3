"""Removes unfinished directories of killed processes, and checks the free disk space.

An unfinished directory stands beside its destination as `.NAME.xxxxxxxx` and is locked by its
process. The lock ends with the process, however that ends, so a directory without a lock is left
over.
"""

import contextlib
import re
import shutil
from pathlib import Path

from sarm_jax.io.errors import InputError
from sarm_jax.io.files import locked

OLD = ".old"  # ending of the name of a directory that is being replaced


def clear_leftovers(dst: Path) -> None:
    """Removes what killed processes left beside `dst`; undoes a replacement that was cut off."""
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
    """Raises InputError if fewer than `needed` bytes are free on the disk of `dst`."""
    existing = next(p for p in (dst, *dst.absolute().parents) if p.is_dir())
    free = shutil.disk_usage(existing).free
    if needed > free:
        raise InputError(f"{dst}: takes {needed:,} bytes, but only {free:,} are free on its disk")
