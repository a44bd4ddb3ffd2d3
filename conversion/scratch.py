"""Room for a directory in progress, and what becomes of it when its process is killed.

It stands beside its destination as `.NAME.xxxxxxxx`, locked while its process lives. The lock goes
with the process, however that ends, so what is there and not locked is left over.
"""

import contextlib
import re
import shutil
from pathlib import Path

from sarm_jax.io.errors import InputError
from sarm_jax.io.files import locked

OLD = ".old"  # what is about to be replaced


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
