"""The folder of activations in the working directory, while a stage trains an SAE."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sarm_jax.io.errors import InputError, TrainingStoppedError
from sarm_jax.parallel.processes import writable_workdir
from sarm_jax.training.activations import ActivationFolder
from sarm_jax.version import VERSION


@contextlib.contextmanager
def activation_folder(path: Path, made_from: Any) -> Iterator[ActivationFolder]:
    """Yields the folder, which is removed when the training has ended.

    It stays if a signal or a full disk ended the training, or the process died: the same command
    uses it again. Processes other than the primary one have a temporary folder of their own.

    Args:
        path: the folder in the working directory.
        made_from: what the activations depend on, as JSON.
    """
    with writable_workdir(path.parent) as workdir:
        made = {"made_from": made_from, "sarm_jax_version": VERSION}
        folder = ActivationFolder(workdir / path.name, made)
        try:
            yield folder
        except (InputError, TrainingStoppedError):
            folder.remove()
            raise
        folder.remove()
