"""The folder of activations in the working directory, while a stage trains an SAE."""

import contextlib
import hashlib
import os
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

from sarm_jax.io.errors import InputError, TrainingStoppedError
from sarm_jax.io.files import locked_output
from sarm_jax.parallel import processes
from sarm_jax.training.activations import ActivationFolder
from sarm_jax.version import VERSION


@contextlib.contextmanager
def activation_folder(path: Path, made_from: Any) -> Iterator[ActivationFolder]:
    """Yields the folder, which is removed when the training has ended.

    It stays if a signal, a full disk or an error of another process ended the training, or if this
    process was killed; the same command then uses it again. Processes other than the primary one
    have a folder of their own in the temporary directory of their host, which the same command
    finds again.

    Args:
        path: the folder in the working directory.
        made_from: what the activations depend on, as JSON.
    """
    with _own_folder(path) as own:
        made = {"made_from": made_from, "sarm_jax_version": VERSION}
        folder = ActivationFolder(own, made)
        try:
            yield folder
        except processes.OtherProcessError:
            raise
        except (InputError, TrainingStoppedError):
            folder.remove()
            raise
        folder.remove()


@contextlib.contextmanager
def _own_folder(path: Path) -> Iterator[Path]:
    """Yields the folder of this process: `path`, or one in the temporary directory.

    The latter is named after `path` and the number of the process, so that the next call finds it.
    If another process uses it, such as one of an earlier call that has not ended yet, or if its
    parent is another user's, the folder is a new one for this call alone.
    """
    if processes.is_primary():
        yield path
        return
    name = hashlib.sha256(f"{path.absolute()}:{jax.process_index()}".encode()).hexdigest()[:16]
    parent = Path(tempfile.gettempdir()) / f"sarm_jax_{os.getuid()}"
    with contextlib.ExitStack() as stack:
        stack.callback(_remove_empty, parent)
        try:
            _make_private(parent)
            stack.enter_context(locked_output(parent / name))
            folder = parent / name
        except OSError:
            folder = stack.enter_context(processes.writable_workdir(path.parent)) / path.name
        yield folder


def _make_private(folder: Path) -> None:
    """Makes a folder that only this user reads; raises PermissionError if it is another user's."""
    with contextlib.suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    status = folder.lstat()
    is_own = stat.S_ISDIR(status.st_mode) and status.st_uid == os.getuid()
    if not is_own or status.st_mode & 0o077:
        raise PermissionError(f"{folder} is not this user's alone")


def _remove_empty(folder: Path) -> None:
    with contextlib.suppress(OSError):
        folder.rmdir()
